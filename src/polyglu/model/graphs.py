"""CUDA graphs of a step whose shapes are few: what a step launches is recorded once, and then starts as one piece."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[int, int], Tensor]
"""(rows, longest) -> a tensor. What it reads and writes stays where it is, and it asks the device for no value."""


class Graphs:
    """Runs a function by its graph, which is captured when sizes occur for the first time.

    The function is given with each call, not kept: with it, a cache that owns its graphs would own itself.

    Args:
        device: of all that the function uses.
    """

    def __init__(self, device: torch.device) -> None:
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()  # shared: no graph leaves in it what another one needs
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Run, rows: int, longest: int, changed: Sequence[Tensor]) -> Tensor:
        """The result for sizes.

        Args:
            run: the function, the same in each call.
            rows: first size.
            longest: second size.
            changed: tensors that ``run`` adds to: a capture runs it once more, and puts them back.
        """
        if (rows, longest) not in self.captured:
            self.captured[rows, longest] = self._capture(run, rows, longest, changed)
        graph, out = self.captured[rows, longest]
        graph.replay()
        return out.clone()  # the next replay writes to the same place

    def _capture(
        self, run: Run, rows: int, longest: int, changed: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Run once, for what is made at a first call (kernels compiled, workspaces), and then record.

        Both on a stream of its own: a workspace belongs to a stream, and one made while recording to the graph's pool.
        """
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        # Weights that autocast has cast are gone when its context ends; so a graph casts them itself.
        with torch.cuda.stream(self.stream), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            before = [tensor.clone() for tensor in changed]
            run(rows, longest)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                out = run(rows, longest)
        caller.wait_stream(self.stream)
        return graph, out
