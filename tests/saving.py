"""What tests of saving need: an engine that holds a part of a model, ranks in threads, a system that refuses a call."""

import builtins
import errno
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyglu.errors import EXIT_BAD_INPUT, PolygluError
from polyglu.training.checkpoint import MANIFEST, RESUME_FOLDER
from polyglu.training.guard import RunState
from polyglu.training.ranks import Ranks
from polyglu.training.saver import Checkpoints
from polyglu.training.shards import MOMENTS, WEIGHT, Piece, shard_name

T = TypeVar("T")
ORDER = {"seed": 1, "sources": [["a", "digest"]], "model": {"d_model": 8}}
SHAPES = {"first": (3, 5), "second": (7,), "third": (2, 2, 3)}
KINDS = (WEIGHT, *MOMENTS)


def numbers_of(step: int) -> dict[str, dict[str, Tensor]]:
    """Kind -> parameter -> what it is at a step: any numbers, each step's its own."""
    generator = torch.Generator().manual_seed(step)
    return {kind: {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


class SplitEngine:
    """A rank's even share of the flattened parameters, which it alone updates, as under ZeRO; and the whole model."""

    name = "split"

    def __init__(self, ranks: Ranks, step: int = 0) -> None:
        self.ranks, self.updates = ranks, 0
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()})
        self.loss: Any = SimpleNamespace(model=model)
        total = sum(parameter.numel() for parameter in model.values())
        first, last = (total * place // ranks.world_size for place in (ranks.rank, ranks.rank + 1))
        self._pieces, begin = [], 0
        for name, parameter in model.items():
            start, end = max(first, begin), min(last, begin + parameter.numel())
            if start < end:
                tensors = {kind: torch.zeros(end - start) for kind in KINDS}
                self._pieces.append(Piece(name, start - begin, tensors))
            begin += parameter.numel()
        self.become(step)

    def pieces(self) -> list[Piece]:
        return self._pieces

    @torch.no_grad()
    def become(self, step: int) -> None:
        """Be as after a step."""
        numbers, self.updates = numbers_of(step), step
        for name, parameter in self.loss.model.items():
            parameter.copy_(numbers[WEIGHT][name])
        for piece in self._pieces:
            for kind, tensor in piece.tensors.items():
                tensor.copy_(numbers[kind][piece.name].flatten()[piece.start : piece.start + len(tensor)])

    def is_at(self, step: int) -> bool:
        """Whether all numbers are those of a step."""
        other = SplitEngine(self.ranks, step)
        pairs = zip(self._pieces, other._pieces, strict=True)
        return (
            self.updates == step
            and all(torch.equal(own, other.loss.model[name]) for name, own in self.loss.model.items())
            and all(torch.equal(own.tensors[kind], its.tensors[kind]) for own, its in pairs for kind in KINDS)
        )


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "executed")


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Change a manifest, and let it state the shards that are there, as one who knows the format."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    for rank, shard in enumerate(manifest["shards"]):
        data = (folder / shard_name(rank)).read_bytes()
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(manifest)
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "sha256": seal}))


class Saved:
    """A run's checkpoints, and what was told of them."""

    def __init__(self, checkpoint_dir: Path, ranks: Ranks | None = None, keep: int = 2) -> None:
        self.root, self.told = checkpoint_dir / RESUME_FOLDER, list[tuple[int, str, str, str]]()
        self.engine = SplitEngine(ranks or Ranks(torch.device("cpu")))
        self.checkpoints = Checkpoints(self.engine, checkpoint_dir, ORDER, keep, lambda *event: self.told.append(event))

    def save(self, state: RunState | int, **options: Any) -> None:
        """Save the numbers of a step, and wait until that is done."""
        state = state if isinstance(state, RunState) else RunState(step=state, due=state)
        self.engine.become(state.step)
        self.checkpoints.save(state, **options)
        self.checkpoints.finish()

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir())


class ThreadRanks(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(torch.device("cpu"), rank, len(values))
        self.values, self.barrier = values, barrier

    def gather(self, value: T) -> list[T]:
        self.values[self.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def add_up(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(dim=0))

    def agree(self, decide: Callable[[], T]) -> T:
        decided: Any = None
        if self.rank == 0:
            try:
                decided = decide()
            except PolygluError as error:
                decided = error
        decided = self.gather(decided)[0]
        if isinstance(decided, PolygluError):
            raise decided if self.rank == 0 else SystemExit(EXIT_BAD_INPUT)
        return decided  # type: ignore[no-any-return]


def on_ranks(n_ranks: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank's work returned, or raised; a rank whose peers have left breaks off."""
    values, barrier = [None] * n_ranks, threading.Barrier(n_ranks, timeout=20)
    results: list[Any] = [None] * n_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, values, barrier) if n_ranks > 1 else Ranks(torch.device("cpu")))
        except (PolygluError, SystemExit) as error:
            results[rank] = error
        except Exception as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


HARMLESS = {"fspath", "fileno", "readable", "text_encoding"}
"""Ask the system for nothing."""
CLOSING = {"close", "__exit__"}
"""Close a file even if they fail."""
CHANGING = {"unlink", "rmdir", "write", "flush", "fsync", "replace", "rename"}
"""Can be carried out and reported as failed, as by a network's file system."""


class SeenFile:
    """An open file whose writing is seen even if C code writes, as ``torch.save`` does."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        return self.file.write(data)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def seen_open(path: Path, mode: str) -> Any:
    """In place of ``open`` in polyglu.files."""
    file = builtins.open(path, mode)  # noqa: SIM115  # as open does
    return SeenFile(file) if mode == "wb" else file


def asks_the_system(function: Any) -> bool:
    """Whether a C function is one of the system's or of files', whatever its name."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.BytesIO | io.StringIO):
        return False
    of_system = getattr(function, "__module__", None) in ("posix", "io", "_io") or isinstance(
        owner, io.IOBase | os.DirEntry
    )
    return of_system and function.__name__ not in HARMLESS


class System:
    """Notes each call into the system, in every thread, and refuses one of them.

    Args:
        refused: number of that call; -1: none.
        code: with what error.
        done: it was carried out all the same, if it changes anything.
    """

    def __init__(self, refused: int = -1, code: int = errno.ENOSPC, done: bool = False) -> None:
        self.refused, self.code, self.done = refused, code, done
        self.calls: list[tuple[str, str]] = []
        """Name of each, and of the thread."""

    def watch(self, frame: FrameType, event: str, function: Any) -> None:
        if event not in ("c_call", "c_return") or not asks_the_system(function):
            return
        if event == "c_call":
            self.calls.append((function.__name__, threading.current_thread().name))
        done = function.__name__ in CLOSING or (self.done and function.__name__ in CHANGING)
        if len(self.calls) - 1 == self.refused and event == ("c_return" if done else "c_call"):
            self.refused = -1
            raise OSError(self.code, os.strerror(self.code))

    @contextmanager
    def watching(self) -> Iterator["System"]:
        threading.setprofile(self.watch)
        sys.setprofile(self.watch)
        try:
            yield self
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
