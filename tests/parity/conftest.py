"""Exports for these tests."""

from exports import exported, own_code_cache, pair

__all__ = ["exported", "own_code_cache", "pair"]
