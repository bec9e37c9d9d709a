"""Tests run on one thread: they are small, and as fast so. Each begins with the same random numbers."""

import torch

torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)
