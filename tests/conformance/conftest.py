"""Marks of transformers' tests, which are not declared where they are used."""

import pytest

MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate",
         "is_training_test", "order", "slow", "torch_compile_test", "torch_export_test")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")
