"""What surrounds a capture, with a stand-in for CUDA: recording runs nothing, replaying runs everything."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import random_tokens, sharp_model
from torch import Tensor

from polyglu.model.cache import Cache
from polyglu.model.graphs import Graphs

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
CPU = torch.device("cpu")


class Recorded:
    """A graph whose result stays in its place."""

    def __init__(self) -> None:
        self.run: Callable[[], Tensor] | None = None
        self.out: Tensor | None = None

    def replay(self) -> None:
        assert self.run is not None and self.out is not None
        self.out.copy_(self.run())


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which stream has waited for which."""
    waited: list[tuple[str, str]] = []

    def stream(name: str) -> Any:
        wait = lambda other: waited.append((name, other.name))  # noqa: E731
        return SimpleNamespace(name=name, device=CPU, wait_stream=wait)

    caller = stream("caller")

    @contextmanager
    def record(graph: Recorded, pool: int, stream: Any) -> Iterator[None]:
        assert stream.name == "own" and waited[-1] == ("own", "caller")
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return waited


def test_a_capture_leaves_what_it_found_and_a_result_is_the_callers(streams: list[tuple[str, str]]) -> None:
    total, graphs, calls = torch.zeros(2), Graphs(CPU), 0

    def run(rows: int, longest: int) -> Tensor:
        nonlocal calls
        calls += 1
        total[:rows] += longest
        return total[:rows].clone()

    first = recorded(graphs, run, 2, 5, total)
    assert calls == 3 and streams == [("own", "caller"), ("caller", "own")]  # to warm up, to record, to replay
    second = graphs(run, 2, 5, [total])
    assert calls == 4 and len(graphs.captured) == 1
    assert first.tolist() == [5, 5] and second.tolist() == [10, 10]
    recorded(graphs, run, 1, 7, total)
    assert total.tolist() == [17, 10] and len(graphs.captured) == 2


def recorded(graphs: Graphs, run: Callable[[int, int], Tensor], rows: int, longest: int, total: Tensor) -> Tensor:
    """The first call for sizes. A recording runs nothing: what the stand-in's run has added is taken away."""
    before = total.clone()
    graph, out = graphs._capture(run, rows, longest, [total])
    assert isinstance(graph, Recorded) and (total - before)[:rows].tolist() == [longest] * rows  # once, not twice
    total.copy_(before)
    graph.run, graph.out = lambda: run(rows, longest), out
    graphs.captured[rows, longest] = graph, out
    return graphs(run, rows, longest, [total])


@pytest.mark.usefixtures("streams")
def test_a_cache_goes_with_its_last_user() -> None:
    """Not when the garbage collector looks for rings: gigabytes of a device would wait for it."""
    model = sharp_model(seq_length=12, routing_scope="causal")
    cache = Cache(model, 0.4, 2, 12, static=True)
    cache.graphs = Graphs(CPU)
    cache.prefill([random_tokens(3, 0)], [0])
    with pytest.raises(AssertionError):  # captured, and nothing is there to be replayed
        cache.step([1])
    assert cache.graphs.captured
    gone = weakref.ref(cache)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()
