"""Tests run on one thread: they are small, and as fast so."""

import torch

torch.set_num_threads(1)
