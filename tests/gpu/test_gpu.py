"""What only a CUDA device can show: tests with the marker ``gpu``, skipped elsewhere, with the reason."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import random_documents, write_token_source
from torch import Tensor

from polyglu.config_file import validate
from polyglu.model import flash_attention
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, TrainConfig
from polyglu.model.flash_attention import attention
from polyglu.model.model import create_model, load_checkpoint
from polyglu.model.packing import Packing
from polyglu.model.routing import gumbel_noise
from polyglu.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]
DEVICE = "cuda"
SMALL = ModelConfig(
    vocab_size=64, d_model=64, d_ff=96, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, seq_length=64,
    routing_scope="causal",
)  # fmt: skip
LENGTHS = [1, 30, 33, 64, 7, 57]
"""Documents of three rows of 64 tokens."""


def bounds() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().float().cpu() - expected.float().cpu()).norm() / expected.float().norm())


def random_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, targets and noise on the CPU."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(SMALL.vocab_size, (3, 64), generator=generator) for _ in range(2))
    return ids, targets, gumbel_noise(0, torch.arange(3), SMALL.n_layers, SMALL.d_ff, SMALL.n_activations)


def outputs(model: PolychromaticLM, precision: torch.dtype) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    ids, targets, noise = (tensor.to(model.embed_tokens.weight.device) for tensor in random_inputs())
    model.zero_grad()
    with torch.autocast(ids.device.type, dtype=precision, enabled=precision != torch.float32):
        logits = model(ids, cu_seqlens=bounds(), tau=0.5, gumbel=noise)
    F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("backend", ["flash_attn", "torch"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flash_attention_equals_sdpa_of_each_document(
    backend: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 both round; each stays within 2 % of the same sum in fp32, forward and backward."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    monkeypatch.setattr(flash_attention, "_flash_attn_installed", lambda: backend == "flash_attn")
    generator = torch.Generator().manual_seed(groups)
    shapes = [(3, 64, heads, 64) for heads in (4, 4 // groups, 4 // groups)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(DEVICE).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator).to(DEVICE)
    packing = Packing.of(torch.Size((3, 64)), bounds(), torch.device(DEVICE))
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = attention(*exact_inputs, packing, use_flash=False)
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, grad)]
    for use_flash in (True, False):
        out = attention(*inputs, packing, use_flash=use_flash)
        assert (out.dtype, out.shape) == (torch.bfloat16, inputs[0].shape)
        actual = [out, *torch.autograd.grad(out, inputs, grad.bfloat16())]
        for ours, true in zip(actual, expected, strict=True):
            assert relative_error(ours, true.detach()) < 0.02


@pytest.mark.parametrize("scope", ["sequence", "document", "causal"])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_model_on_the_gpu_equals_the_cpu(scope: str, precision: torch.dtype, tolerance: float) -> None:
    """fp32 differs in the order of sums; bf16 compute is held against fp32 on the CPU."""
    config = SMALL.model_copy(update={"routing_scope": scope})
    expected = outputs(create_model(config), torch.float32)
    actual = outputs(create_model(config, device=DEVICE), precision)
    assert actual.keys() == expected.keys()
    for name, true in expected.items():
        assert relative_error(actual[name], true) < tolerance, name


def test_noise_is_the_same_on_both_devices() -> None:
    """The integers and the uniform numbers are equal; the two logarithms may round differently."""
    samples = torch.tensor([0, 5, 2**40, 2**62])
    on_cpu, on_gpu = (gumbel_noise(3, samples.to(device), 3, 500, 4).cpu() for device in ("cpu", DEVICE))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-5)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def deterministic_afterwards_off() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("default")  # PyTorch names operations that have no deterministic kernel
@pytest.mark.parametrize(
    ("precision", "deterministic", "tolerance"), [("fp32", False, 1e-3), ("bf16", False, 2e-2), ("bf16", True, 0.0)]
)
@pytest.mark.usefixtures("deterministic_afterwards_off")
def test_training_learns_and_resumes(tmp_path: Path, precision: str, deterministic: bool, tolerance: float) -> None:
    """Losses after a resume: the same bits with deterministic kernels, else within a tolerance in nats."""
    write_token_source(tmp_path / "data", random_documents(np.random.default_rng(0), 6000))
    values: dict[str, Any] = {
        "model": SMALL.model_dump(),
        "data": {"sources": {"a": {"path": str(tmp_path / "data"), "mix": 1.0, "mix_end": 1.0}}},
        "training": {
            "total_steps": 20, "micro_batch_size": 2, "grad_accum_steps": 2, "learning_rate": 3e-3, "warmup_steps": 3,
            "precision": precision, "deterministic": deterministic, "log_every": 1, "checkpoint_every": 5,
            "resume_from": "auto",
            "checkpoint_dir": str(tmp_path / "checkpoints"), "run_dir": str(tmp_path / "run"),
        },
        "wandb": {"mode": "disabled"},
    }  # fmt: skip
    config = validate(TrainConfig, values, source="test")
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


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_blocks_compile(precision: torch.dtype, tolerance: float) -> None:
    model = create_model(SMALL, device=DEVICE)
    expected = outputs(model, torch.float32)
    for block in model.layers:
        block.compile()
    actual = outputs(model, precision)
    for name, true in expected.items():
        assert relative_error(actual[name], true) < tolerance, name
