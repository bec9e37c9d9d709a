"""The loop: what a step is, what bad data, missing memory and a request to stop do to a run."""

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_run import ROWS, SMALL, Rows, Run, StopAt, batch_of, plain_engine, plan_of

from polyglu.errors import Interrupted, PolygluError
from polyglu.model.config import TrainingSection
from polyglu.training import saver
from polyglu.training.checkpoint import newest_whole, read_resume_point, step_folder
from polyglu.training.feed import STEPS_AHEAD
from polyglu.training.fit import FIRST_STEPS, TOO_LARGE


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# --- a step


class Cut(Rows):
    """One step whose rows have very different numbers of targets, cut as a test says."""

    rows = ((0, 8), (1, 1), (2, 5), (3, 0))

    def __init__(self, cuts: list[int]) -> None:
        super().__init__()
        self.cuts = cuts

    def step(self, index: int) -> list[Any]:
        starts = [sum(self.cuts[:number]) for number in range(len(self.cuts))]
        return [batch_of(self.rows[at : at + size]) for at, size in zip(starts, self.cuts, strict=True)]


def one_step(folder: Path, cuts: list[int], clip: float = 1e9) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients that the update is made of, and the row of metrics."""
    gradients: dict[str, torch.Tensor] = {}

    def engine_of(faults: Any) -> Any:
        engine = plain_engine(faults, TrainingSection(grad_clip=clip))
        named = engine.loss.named_parameters
        note = lambda *_: gradients.update({name: weight.grad.clone() for name, weight in named()})  # type: ignore[union-attr]  # noqa: E731
        engine.optimizer.register_step_pre_hook(note)
        return engine

    run = Run(folder, plan_of(1), engine_of=engine_of)
    run.go(loader=Cut(cuts))
    return gradients, run.rows()[0]


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_a_step_does_not_depend_on_the_cut(tmp_path: Path, cuts: list[int]) -> None:
    """Rows have very different numbers of targets: a mean of micro-batch means would differ."""
    whole, expected = one_step(tmp_path / "whole", [4])
    cut, row = one_step(tmp_path / "cut", cuts)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)
    for key in ("train/loss", "train/grad_norm"):
        assert row[key] == pytest.approx(expected[key], rel=1e-5)


def test_gradient_is_clipped_to_the_global_norm_and_logged_before(tmp_path: Path) -> None:
    gradients, row = one_step(tmp_path, [4], clip=0.01)
    clipped = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3) and row["train/grad_norm"] > 0.1


def test_schedules_take_the_steps_done_and_the_noise_the_sample(tmp_path: Path) -> None:
    seen, asked = [], []

    class Noting(Run):
        def go(self, *arguments: Any) -> Any:
            noise = lambda config, batch, seed: asked.append((seed, batch.sample_ids))  # noqa: E731
            with patch("polyglu.training.fit.batch_noise", noise):
                return super().go(*arguments)

    def engine_of(faults: Any) -> Any:
        engine = plain_engine(faults)
        forward, step = engine.forward, engine.step
        engine.forward = lambda batch, tau, gumbel: seen.append(("tau", tau)) or forward(batch, tau, gumbel)
        engine.step = lambda rate: seen.append(("rate", rate)) or step(rate)
        return engine

    schedules = {"learning_rate": lambda done: 0.1 + done, "tau": lambda done: 0.5 + done, "seed": 7}
    Noting(tmp_path, plan_of(2, **schedules), engine_of=engine_of).go()
    assert seen == [("tau", 0.5), ("tau", 0.5), ("rate", 0.1), ("tau", 1.5), ("tau", 1.5), ("rate", 1.1)]
    assert [(seed, samples.tolist()) for seed, samples in asked] == [(7, [at, at + 1]) for at in (0, 2, 4, 6)]
    Noting(tmp_path / "quiet", plan_of(2, gumbel=False), engine_of=engine_of).go()
    assert len(asked) == 4  # no more


def test_a_step_without_targets_is_no_fault_of_the_program(tmp_path: Path) -> None:
    empty = Cut([2, 2])
    empty.rows = ((0, 0), (1, 0), (2, 0), (3, 0))
    run = Run(tmp_path, plan_of(1))
    run.go(loader=empty)
    assert run.rows()[0]["train/loss"] == 0.0


# --- batches


def test_each_step_gets_its_own_batches_made_ahead_in_a_thread(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Run(tmp_path, plan_of(7)).go(StopAt(2))
    loader, ahead, run = Rows(), [], Run(tmp_path, plan_of(7))

    class Noting(StopAt):
        @property
        def requested(self) -> bool:  # type: ignore[override]
            ahead.append(max(loader.asked) - 2 - len(ahead))
            return False

    run.go(Noting(), loader)
    assert loader.asked == [2, 3, 4, 5, 6] and loader.threads == {"prefetch"}
    assert [step.samples for step in run.engine.watched] == [
        list(range(ROWS * step, ROWS * (step + 1))) for step in range(2, 7)
    ]
    assert 0 <= max(ahead) <= STEPS_AHEAD


def test_nothing_is_left_to_do(tmp_path: Path) -> None:
    Run(tmp_path, plan_of(3)).go()
    loader = Rows()
    again = Run(tmp_path, plan_of(3))
    assert again.go(loader=loader).step == 3 and loader.asked == [] and again.engine.watched == []


def test_bad_data_ends_the_run_in_its_step(tmp_path: Path) -> None:
    """Steps before it are trained and saved, though it was read ahead of them; a slow disk loses nothing."""
    run, write = Run(tmp_path, plan_of(9, checkpoint_every=1)), saver.write_shard

    def slow(file: Any, pieces: Any) -> None:
        threading.Event().wait(0.3 if len(run.engine.watched) == 3 else 0)
        write(file, pieces)

    with patch.object(saver, "write_shard", slow), pytest.raises(PolygluError, match="step 3 has a bad token"):
        run.go(loader=Rows(bad_step=3))
    assert run.trained == [0, 1, 2]
    assert read_resume_point(step_folder(tmp_path, 3)).state.step == 3


def test_an_error_in_training_ends_the_thread(tmp_path: Path) -> None:
    def engine_of(faults: Any) -> Any:
        engine = plain_engine(faults)
        engine.step = lambda rate: 1 / 0
        return engine

    with pytest.raises(ZeroDivisionError) as raised:
        Run(tmp_path, plan_of(9), engine_of=engine_of).go()
    # At once, and not when the error, and with it the loop's frame, is forgotten.
    assert raised.traceback and "prefetch" not in {thread.name for thread in threading.enumerate()}


# --- stopping


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_request_to_stop_saves_after_the_step(tmp_path: Path, at: int) -> None:
    run = Run(tmp_path, plan_of(6))
    folder = step_folder(tmp_path, at)
    with pytest.raises(Interrupted, match=rf"^stopped after step {at}, saved in {folder}\.$"):
        run.go(StopAt(at))
    assert run.trained == list(range(at)) and read_resume_point(folder).state.step == at


def test_an_interruption_that_could_not_be_saved_says_so(tmp_path: Path) -> None:
    run, write = Run(tmp_path, plan_of(6)), saver.write_shard

    def full(file: Any, pieces: Any) -> None:
        if run.engine.watched:
            raise OSError(28, "No space left on device")
        write(file, pieces)

    with patch.object(saver, "write_shard", full), pytest.raises(Interrupted, match=r"step 2, NOT saved; .*before\.$"):
        run.go(StopAt(2))
    assert run.events() == [(2, "save failed")]
    point = newest_whole(tmp_path / "ds_checkpoint")
    assert point is not None and point.state.step == 0


# --- memory


class Short:
    """Mixed in: memory is out in some calls, at one of three places, for micro batches larger than ``fits`` rows."""

    place: str
    fits = 1
    steps_until = 0

    def forward(self, batch: Any, *rest: Any) -> Any:
        self.short = len(batch.sample_ids) > self.fits and len(self.watched) >= self.steps_until  # type: ignore[attr-defined]
        if self.short and self.place == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        parts = super().forward(batch, *rest)  # type: ignore[misc]
        self.held.append(weakref.ref(parts.loss))
        return parts

    def backward(self, objective: Any, last: bool) -> None:
        if self.short and self.place == "last backward" and last:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")
        super().backward(objective, last)  # type: ignore[misc]

    def step(self, learning_rate: float) -> float:
        if self.short and self.place == "update":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().step(learning_rate)  # type: ignore[misc, no-any-return]


def short_of_memory(place: str, **settings: Any) -> Any:
    def engine_of(faults: Any) -> Any:
        engine = plain_engine(faults)
        engine.__class__ = type("ShortEngine", (Short, type(engine)), {"place": place, "held": [], **settings})
        return engine

    return engine_of


@pytest.mark.parametrize("place", ["forward", "last backward"])
@pytest.mark.parametrize(("at", "fits"), [(0, 1), (FIRST_STEPS - 1, 2)])
def test_memory_out_in_the_first_steps_is_answered_by_smaller_micro_batches(
    tmp_path: Path, place: str, at: int, fits: int
) -> None:
    whole = Run(tmp_path / "whole", plan_of(5))
    whole.go(loader=Rows(size=4))
    run = Run(tmp_path / "short", plan_of(5), engine_of=short_of_memory(place, steps_until=at, fits=fits))
    run.go(loader=Rows(size=4))
    fed = [step.samples for step in run.engine.watched]
    # What the broken passes fed comes again, in as many micro batches as it takes.
    assert [step[-ROWS:] for step in fed] == [list(range(ROWS * step, ROWS * (step + 1))) for step in range(5)]
    assert run.engine.updates == 5 and not any(step.unchanged for step in run.engine.watched)
    for row, expected in zip(run.rows(), whole.rows(), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-5)
        assert row["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_what_the_broken_passes_held_is_free_before_the_next(tmp_path: Path) -> None:
    """Else the smaller micro batch would have to fit beside the graph of the larger one."""
    alive = []

    class Loader(Rows):
        def recut(self) -> Any:
            alive.extend(reference() for reference in held)
            return super().recut()

    engine_of = short_of_memory("last backward", fits=2)
    run, held = Run(tmp_path, plan_of(1), engine_of=engine_of), []
    run.engine_of = lambda faults: keep(engine_of(faults), held)
    gc.disable()
    try:
        run.go(loader=Loader(size=4))
    finally:
        gc.enable()
    assert len(held) >= 2 and alive and alive == [None] * len(alive)


def keep(engine: Any, held: list[Any]) -> Any:
    engine.held = held
    return engine


@pytest.mark.parametrize(
    ("place", "settings"),
    [("forward", {"steps_until": FIRST_STEPS}), ("last backward", {"fits": 0}), ("update", {})],
)
def test_memory_out_for_good_is_one_sentence(tmp_path: Path, place: str, settings: dict[str, Any]) -> None:
    """Later on, with a single row, or in the update, of which a part may have been made."""
    run = Run(tmp_path, plan_of(5), engine_of=short_of_memory(place, **settings))
    with pytest.raises(PolygluError) as raised:
        run.go()
    assert str(raised.value) == TOO_LARGE and raised.value.__cause__ is None
    assert len(run.trained) == settings.get("steps_until", 0)


def test_an_engine_that_cannot_discard_is_not_asked_to_go_on(tmp_path: Path) -> None:
    run = Run(tmp_path, plan_of(5), engine_of=short_of_memory("forward", discard=lambda engine: False))
    with pytest.raises(PolygluError, match=r"training\.micro_batch_size: lower it"):
        run.go()


def test_another_error_is_not_taken_for_memory(tmp_path: Path) -> None:
    def engine_of(faults: Any) -> Any:
        engine = plain_engine(faults)
        engine.backward = lambda objective, last: torch.zeros(2) @ torch.zeros(3)
        return engine

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        Run(tmp_path, plan_of(5), engine_of=engine_of).go()


def test_a_model_without_routing_needs_no_noise(tmp_path: Path) -> None:
    with patch("tiny_run.SMALL", SMALL.model_copy(update={"ffn": "swiglu"})):
        run = Run(tmp_path, plan_of(2))
        run.go()
    assert len(run.rows()) == 2 and not any("entropy" in key for key in run.rows()[0])
