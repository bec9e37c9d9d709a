"""The loop's arithmetic: a step does not depend on how its global batch is cut."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training.engine import PlainEngine
from polyglu.training.fit import STEPS_AHEAD, Plan, fit, host_batches
from polyglu.training.loss import LanguageModelLoss

SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32,
    routing_scope="causal",
)  # fmt: skip


def batches_of(rows: Sequence[tuple[int, int]], cuts: Sequence[int]) -> list[MicroBatch]:
    """Rows of (sample, trained targets) cut into micro batches of the given sizes."""
    batches, start = [], 0
    for size in cuts:
        part = rows[start : start + size]
        start += size
        ids = torch.stack([torch.randint(0, 37, (8,), generator=torch.Generator().manual_seed(row)) for row, _ in part])
        targets = ids.roll(-1, dims=1)
        for index, (_, trained) in enumerate(part):
            targets[index, trained:] = IGNORED
        bounds = torch.arange(0, 8 * size + 1, 8, dtype=torch.int32)
        batches.append(MicroBatch(ids, targets, bounds, torch.tensor([row for row, _ in part])))
    return batches


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def plain_engine(clip: float = 1e9) -> PlainEngine:
    settings = TrainingSection(grad_clip=clip, weight_decay=0.0)
    return PlainEngine(LanguageModelLoss(create_model(SMALL), torch.float32, False), settings, torch.device("cpu"))


def plan_of(steps: int) -> Plan:
    return Plan(total_steps=steps, learning_rate=lambda _: 1e-3, tau=lambda _: 0.5, seed=0, log_every=1)


def one_step(batches: list[MicroBatch], clip: float = 1e9) -> tuple[dict[str, torch.Tensor], float]:
    engine = plain_engine(clip)
    gradients: dict[str, torch.Tensor] = {}

    def note(*_: object) -> None:
        gradients.update({name: parameter.grad.clone() for name, parameter in engine.loss.named_parameters()})  # type: ignore[union-attr]

    engine.optimizer.register_step_pre_hook(note)
    fit(engine, lambda _: batches, plan_of(1), 0, None, lambda _: False)
    return gradients, float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


ROWS = [(0, 8), (1, 1), (2, 5), (3, 0)]


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [2, 2], [1, 3]])
def test_gradient_does_not_depend_on_the_cut(cuts: list[int]) -> None:
    """Rows have very different numbers of targets: a mean of micro-batch means would differ."""
    whole, _ = one_step(batches_of(ROWS, [4]))
    cut, _ = one_step(batches_of(ROWS, cuts))
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_is_clipped_to_the_global_norm() -> None:
    _, norm = one_step(batches_of(ROWS, [4]))
    assert norm > 0.1
    _, clipped = one_step(batches_of(ROWS, [4]), clip=0.01)
    assert clipped == pytest.approx(0.01, rel=1e-3)


class Loader:
    """Batches of any step, all different; notes which were asked for, and where."""

    def __init__(self, bad_step: int = -1) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.bad_step = bad_step

    def step(self, step: int) -> list[MicroBatch]:
        self.asked.append(step)
        self.threads.add(threading.current_thread().name)
        if step == self.bad_step:
            raise PolygluError(f"step {step} has a bad token.")
        return batches_of([(10 * step + 1, 8), (10 * step + 2, 4)], [1, 1])


def test_each_step_gets_its_own_batches_made_ahead_in_a_thread() -> None:
    loader, engine, seen, ahead = Loader(), plain_engine(), [], []
    forward = engine.forward

    def note(batch: MicroBatch, *rest: object) -> object:
        seen.extend(batch.sample_ids.tolist())
        return forward(batch, *rest)  # type: ignore[arg-type]

    engine.forward = note  # type: ignore[method-assign, assignment]

    def save(done: int) -> bool:
        ahead.append(max(loader.asked) + 1 - done)
        return False

    fit(engine, loader.step, plan_of(7), 2, None, save)
    assert loader.asked == [2, 3, 4, 5, 6] and loader.threads == {"prefetch"}
    assert seen == [10 * step + row for step in range(2, 7) for row in (1, 2)]
    assert max(ahead) <= STEPS_AHEAD


def test_nothing_is_left_to_do() -> None:
    loader = Loader()
    fit(plain_engine(), loader.step, plan_of(3), 3, None, lambda _: False)
    assert loader.asked == []


def test_bad_data_ends_the_run_in_its_step() -> None:
    """Steps before it are trained and saved, though it was read ahead of them."""
    saved: list[int] = []
    with pytest.raises(PolygluError, match="step 3 has a bad token"):
        fit(plain_engine(), Loader(bad_step=3).step, plan_of(9), 0, None, lambda done: bool(saved.append(done)))
    assert saved == [1, 2, 3]


def test_an_error_in_training_ends_the_thread() -> None:
    def save(done: int) -> bool:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        fit(plain_engine(), Loader().step, plan_of(9), 0, None, save)
    # At once, and not when the error, and with it the loop's frame, is forgotten.
    assert raised.traceback and "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_host_batches_count_the_targets_of_each_step() -> None:
    made = list(host_batches(Loader().step, range(2), torch.device("cpu")))
    assert [n_targets for _, n_targets in made] == [12, 12]
    assert [batch.sample_ids.item() for batches, _ in made for batch in batches] == [1, 2, 11, 12]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_host_batches_are_page_locked_for_a_gpu() -> None:
    (batches, _), *_ = host_batches(Loader().step, range(1), torch.device("cuda", 0))
    for batch, plain in zip(batches, Loader().step(0), strict=True):
        assert batch.input_ids.is_pinned() and batch.targets.is_pinned() and batch.sample_ids.is_pinned()
        moved = batch.to(torch.device("cuda", 0))
        assert torch.equal(moved.input_ids.cpu(), plain.input_ids) and torch.equal(moved.targets.cpu(), plain.targets)
