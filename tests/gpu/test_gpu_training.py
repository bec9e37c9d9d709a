"""What only a CUDA device can show of training: skipped elsewhere, with the reason."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support import random_documents, write_token_source
from torch._dynamo.utils import counters

from polyglu.config_file import validate
from polyglu.data.dataloader import MicroBatch
from polyglu.model.config import ModelConfig, Recompute, RoutingScope, TrainConfig, TrainingSection
from polyglu.model.model import create_model, load_checkpoint
from polyglu.training.engine import Engine, create_engine
from polyglu.training.fit import Plan, _forward_backward
from polyglu.training.guard import RunState
from polyglu.training.memory import trial
from polyglu.training.ranks import Ranks
from polyglu.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
    pytest.mark.filterwarnings("default"),  # the compiler's own, and of operations without a deterministic kernel
]
DEVICE = torch.device("cuda", 0)
SMALL = ModelConfig(
    vocab_size=64, d_model=64, d_ff=96, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, seq_length=64,
    routing_scope="causal",
)  # fmt: skip
LARGER = ModelConfig(
    vocab_size=64, d_model=256, d_ff=2048, n_layers=6, n_q_heads=4, n_kv_heads=2, head_dim=64, seq_length=512,
    routing_scope="causal",
)  # fmt: skip
PLAN = Plan(
    total_steps=99, learning_rate=lambda done: 1e-3, tau=lambda done: 1 - done / 100, seed=0, checkpoint_every=99
)


@pytest.fixture(autouse=True)
def fresh_device() -> Iterator[None]:
    """No compiled code, and no memory that another test holds."""
    torch.compiler.reset()
    counters.clear()
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def engine_of(config: ModelConfig = SMALL, **settings: Any) -> Engine:
    section = TrainingSection(**{"precision": "bf16", "entropy_reg": 0.01, **settings})
    return create_engine(create_model(config), section, Ranks(DEVICE))


def batch_of(seed: int, config: ModelConfig = SMALL, rows: int = 4) -> MicroBatch:
    """Rows in page-locked memory, with documents of their own."""
    generator, length = torch.Generator().manual_seed(seed), config.seq_length
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    cuts = torch.randint(rows * length, (1 + 5 * seed,), generator=generator)
    bounds = torch.cat([torch.arange(rows + 1) * length, torch.tensor([1]), cuts]).unique().int()
    samples = torch.arange(rows) + rows * seed
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bounds, samples).pin_memory()


def passes(engine: Engine, step: int, config: ModelConfig = SMALL, rows: int = 4) -> None:
    """Forward and backward of a step of two micro batches."""
    batches = [batch_of(2 * step + index, config, rows) for index in range(2)]
    targets = float(sum(batch.n_targets for batch in batches))
    assert _forward_backward(engine, batches, targets, RunState(step), PLAN.tau(step), PLAN) is not None


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("scope", "recompute"),
    [("causal", "none"), ("causal", "hidden"), ("causal", "full"), ("document", "ffn"), ("sequence", "none")],
)
def test_blocks_are_compiled_once(scope: RoutingScope, recompute: Recompute) -> None:
    """For all documents, temperatures and noise, and for the trial before."""
    engine = engine_of(SMALL.model_copy(update={"routing_scope": scope}), activation_checkpointing=recompute)
    assert trial(engine.loss, 4, 1.0, 0)
    made = compiled_graphs()
    assert made > 0
    for step in range(6):
        passes(engine, step)
        engine.step(1e-3)
    assert compiled_graphs() == made and not counters["graph_break"]


@pytest.mark.parametrize(
    ("scope", "compile_blocks"),
    [("causal", "auto"), ("causal", "never"), ("document", "never"), ("sequence", "never")],
)
def test_a_step_waits_for_the_device_at_its_end_only(scope: RoutingScope, compile_blocks: str) -> None:
    engine = engine_of(SMALL.model_copy(update={"routing_scope": scope}), compile=compile_blocks)
    for step in range(3):  # what is compiled and tuned
        passes(engine, step)
        engine.step(1e-3)
    updates = engine.updates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    passes(engine, 3)
    with pytest.raises(RuntimeError, match="synchroniz"):  # the norm, which the step returns
        engine.step(1e-3)
    torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is None for parameter in engine.loss.parameters())  # it had come as far as its end
    assert engine.updates == updates + 1


@pytest.mark.parametrize("compile_blocks", ["auto", "never"])
def test_a_trial_leaves_no_trace(compile_blocks: str) -> None:
    engine = engine_of(LARGER, compile=compile_blocks)
    assert trial(engine.loss, 2, 1.0, 0)  # what the first pass makes for good: workspaces of cuBLAS
    before = [parameter.detach().clone() for parameter in engine.loss.parameters()]
    held, random = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    assert trial(engine.loss, 2, 1.0, 0)
    assert not trial(engine.loss, 2, 1.0, 2 * torch.cuda.get_device_properties(DEVICE).total_memory)
    gc.collect()
    assert torch.cuda.memory_allocated() == held and torch.equal(torch.cuda.get_rng_state(), random)
    for parameter, copy in zip(engine.loss.parameters(), before, strict=True):
        assert parameter.grad is None and torch.equal(parameter, copy)


def peak(compile_blocks: str, recompute: Recompute) -> int:
    """Bytes that the passes of a step add at most to what is held."""
    engine = engine_of(LARGER, compile=compile_blocks, activation_checkpointing=recompute)
    for step in range(2):
        passes(engine, step, LARGER, rows=8)
        engine.step(1e-3)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    passes(engine, 2, LARGER, rows=8)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def test_each_mode_of_recomputation_needs_less_memory() -> None:
    peaks = [peak("never", recompute) for recompute in get_args(Recompute)]
    assert get_args(Recompute) == ("none", "hidden", "ffn", "full")
    assert all(less < more for more, less in zip(peaks, peaks[1:], strict=False)), peaks


def test_each_mode_needs_less_memory_when_compiled() -> None:
    none, hidden, full = (peak("auto", recompute) for recompute in ("none", "hidden", "full"))
    assert full < hidden < none, (none, hidden, full)


def test_memory_does_not_grow() -> None:
    engine, held = engine_of(LARGER), []
    for step in range(30):
        passes(engine, step, LARGER, rows=8)
        engine.step(1e-3)
        held.append(torch.cuda.memory_allocated())
    assert max(held[5:]) <= held[4], held


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def config_of(folder: Path, model: dict[str, Any], **settings: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": {**SMALL.model_dump(), **model},
        "data": {"sources": {"a": {"path": str(folder / "data"), "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "learning_rate": 3e-3, "log_every": 1, "checkpoint_dir": str(folder / "checkpoints"),
            "run_dir": str(folder / "run"), **settings,
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    return validate(TrainConfig, values, source="test")


@pytest.mark.parametrize(
    ("precision", "deterministic", "tolerance"), [("fp32", False, 1e-3), ("bf16", False, 2e-2), ("bf16", True, 0.0)]
)
def test_training_learns_and_resumes(tmp_path: Path, precision: str, deterministic: bool, tolerance: float) -> None:
    """Losses after a resume: the same bits with deterministic kernels, else within a tolerance in nats."""
    write_token_source(tmp_path / "data", random_documents(np.random.default_rng(0), 6000))
    config = config_of(
        tmp_path, {}, total_steps=20, micro_batch_size=2, grad_accum_steps=2, warmup_steps=3, checkpoint_every=5,
        precision=precision, deterministic=deterministic, resume_from="auto",
    )  # fmt: skip
    final = train(config)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    assert load_checkpoint(final, device=DEVICE)[1] == 20

    shutil.rmtree(tmp_path / "checkpoints/ds_checkpoint/step_00000020")
    train(config)
    again = metrics(tmp_path / "run")
    assert [row["step"] for row in again] == list(range(1, 21))
    assert again[:15] == rows[:15]
    for first, second in zip(rows[15:], again[15:], strict=True):
        assert second["train/loss"] == pytest.approx(first["train/loss"], rel=0, abs=tolerance)


def test_fused_training_learns_as_the_reference(tmp_path: Path) -> None:
    """Curves of 200 steps, one with all that is fast and one with nothing of it, in nats over windows of 20 steps."""
    curves = []
    for name, model, settings in (
        ("fast", {}, {"compile": "auto", "precision": "bf16"}),
        ("reference", {"kernels": "reference", "use_flash_attn": False}, {"compile": "never", "precision": "fp32"}),
    ):
        folder = tmp_path / name
        write_token_source(folder / "data", random_documents(np.random.default_rng(0), 30_000))
        loop = {"total_steps": 200, "micro_batch_size": 4, "grad_accum_steps": 1, "warmup_steps": 20}
        train(config_of(folder, model, **loop, **settings))
        curves.append(np.array([row["train/loss"] for row in metrics(folder / "run")]).reshape(10, 20).mean(1))
    assert curves[0][-1] < curves[0][0] - 0.5
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=0.05)
