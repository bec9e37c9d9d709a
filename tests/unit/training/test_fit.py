"""The loop's arithmetic: a step does not depend on how its global batch is cut."""

from collections.abc import Sequence

import pytest
import torch

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training.engine import PlainEngine
from polyglu.training.fit import Plan, fit
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


def one_step(batches: list[MicroBatch], clip: float = 1e9) -> tuple[dict[str, torch.Tensor], float]:
    settings = TrainingSection(grad_clip=clip, weight_decay=0.0)
    loss = LanguageModelLoss(create_model(SMALL), torch.float32, recompute=False)
    engine = PlainEngine(loss, settings, torch.device("cpu"))
    gradients: dict[str, torch.Tensor] = {}

    def note(*_: object) -> None:
        gradients.update({name: parameter.grad.clone() for name, parameter in loss.named_parameters()})  # type: ignore[union-attr]

    engine.optimizer.register_step_pre_hook(note)
    plan = Plan(total_steps=1, learning_rate=lambda _: 1e-3, tau=lambda _: 0.5, seed=0, log_every=1)
    fit(engine, lambda _: batches, plan, 0, None, lambda _: False)
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
