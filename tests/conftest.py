"""Tests run on one thread: they are small, and as fast so. Each begins with the same random numbers."""

import sys

import torch

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    """W&B's process and what it took from the environment end with the test."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
