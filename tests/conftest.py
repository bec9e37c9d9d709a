"""Tests run on one thread: they are small, and as fast so. Each begins with the same random numbers."""

import logging
import sys

import torch

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    """With the test end W&B's process, what it took from the environment, and the log of a command that ran in it."""
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
