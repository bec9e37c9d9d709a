"""CUDA graphs of a step whose shapes are few: what a step launches is recorded once, and then starts as one piece."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Graphs:
    """Runs a function by its graph, which is captured when sizes occur for the first time.

    Args:
        run: ``(rows, longest)`` -> a tensor; what it reads and writes stays where it is, and it asks the device for no
            value.
    """

    def __init__(self, run: Callable[[int, int], Tensor]) -> None:
        self.run = run
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, rows: int, longest: int, changed: Sequence[Tensor]) -> Tensor:
        """The result for sizes.

        Args:
            rows: first size.
            longest: second size.
            changed: tensors that ``run`` adds to: a capture runs it once more, and puts them back.
        """
        if (rows, longest) not in self.captured:
            self.captured[rows, longest] = self._capture(rows, longest, changed)
        graph, out = self.captured[rows, longest]
        graph.replay()
        return out.clone()  # the next replay writes to the same place

    def _capture(self, rows: int, longest: int, changed: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Run once, for what is made at a first call (kernels compiled, workspaces), and then record."""
        before = [tensor.clone() for tensor in changed]
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # Weights that autocast has cast are gone when its context ends; so a graph casts them itself.
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            self.run(rows, longest)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = self.run(rows, longest)
        return graph, out
