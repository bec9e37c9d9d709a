"""What only a CUDA device can show of the model and its kernels: skipped elsewhere, with the reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model import flash_attention
from polyglu.model.architecture import PolychromaticLM, compile_blocks
from polyglu.model.cache import Cache
from polyglu.model.config import KernelName, ModelConfig
from polyglu.model.flash_attention import attention
from polyglu.model.model import create_model
from polyglu.model.packing import Packing
from polyglu.model.routing import gated_mixture, gumbel_noise

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


def bounds(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


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


@pytest.fixture(params=["flash_attn", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention of either package."""
    if request.param == "flash_attn":
        pytest.importorskip("flash_attn", reason="the flash-attn package is not installed")
    monkeypatch.setattr(flash_attention, "FLASH_ATTN_INSTALLED", request.param == "flash_attn")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [64, 64, 64], [2, 62, *[4] * 16, 63, 1]], ids=["some", "rows", "many"])
def test_flash_attention_equals_sdpa_of_each_document(groups: int, lengths: list[int]) -> None:
    """In bf16 both round; each stays within 2 % of the same sum in fp32, forward and backward."""
    generator = torch.Generator().manual_seed(groups)
    shapes = [(3, 64, heads, 64) for heads in (4, 4 // groups, 4 // groups)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().to(DEVICE).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator).bfloat16().to(DEVICE)
    packing = Packing.of(torch.Size((3, 64)), bounds(lengths), torch.device(DEVICE))
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = attention(*exact_inputs, packing, use_flash=False)
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, grad.float())]
    for use_flash in (True, False):
        out = attention(*inputs, packing, use_flash=use_flash)
        assert (out.dtype, out.shape) == (torch.bfloat16, inputs[0].shape)
        actual = [out, *torch.autograd.grad(out, inputs, grad)]
        for ours, true in zip(actual, expected, strict=True):
            assert relative_error(ours, true.detach()) < 0.02


@pytest.mark.usefixtures("backend")
def test_documents_of_one_token_attend_to_themselves() -> None:
    q, k, v = (torch.randn(1, 64, heads, 64, device=DEVICE).bfloat16().requires_grad_() for heads in (4, 2, 2))
    packing = Packing.of(torch.Size((1, 64)), torch.arange(65), torch.device(DEVICE))
    out = attention(q, k, v, packing, use_flash=True)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2))
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert float(d_q.abs().max()) < 1e-2 and float(d_k.abs().max()) < 1e-2
    torch.testing.assert_close(d_v, torch.full_like(d_v, 2))


def mixture_inputs(
    rows: int, columns: int, d_ff: int, k: int, *, per_row: bool, per_token: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Gate, up, neuron logits and token logits."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 100 + d_ff * 10 + k)
    gate, up = (torch.randn(rows, columns, d_ff, generator=generator).to(dtype) for _ in range(2))
    neuron = torch.randn(rows if per_row else 1, d_ff, k, generator=generator)
    token = torch.randn(rows, columns if per_token else 1, k, generator=generator)
    return [tensor.to(DEVICE) for tensor in (gate, up, neuron, token)]


def mixture_results(tensors: list[Tensor], kernel: KernelName) -> list[Tensor]:
    """Hidden layer and gradients; for the reference in fp64."""
    exact = kernel == "reference"
    inputs = [(tensor.double() if exact else tensor).requires_grad_() for tensor in map(Tensor.detach, tensors)]
    hidden = gated_mixture(*inputs, 1.0, kernel)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(hidden.shape, generator=generator).to(tensors[0].dtype).to(DEVICE)  # the same rounded numbers
    return [hidden.detach(), *torch.autograd.grad(hidden, inputs, grad.to(hidden.dtype))]


def assert_mixture(tensors: list[Tensor], tolerance: float = 2e-5) -> None:
    """Errors of the Triton kernels, relative to a tensor's largest value; what is bf16 is rounded once."""
    names = ("hidden", "gate", "up", "neuron", "token")
    pairs = zip(mixture_results(tensors, "triton"), mixture_results(tensors, "reference"), strict=True)
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        assert ours.shape == theirs.shape and torch.isfinite(ours).all(), name
        unit = 2**-8 if ours.dtype == torch.bfloat16 else 0.0
        error = (ours.double() - theirs).abs() - unit * theirs.abs()
        assert float(error.max()) <= tolerance * float(theirs.abs().max().clamp(min=0.1)), name


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton_mixture_for_every_number_of_activations(k: int, dtype: torch.dtype) -> None:
    assert_mixture(mixture_inputs(2, 67, 96, k, per_row=True, per_token=True, dtype=dtype))


@pytest.mark.parametrize(("per_row", "per_token"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton_mixture_for_every_scope(per_row: bool, per_token: bool, dtype: torch.dtype) -> None:
    assert_mixture(mixture_inputs(2, 67, 96, 4, per_row=per_row, per_token=per_token, dtype=dtype))


@pytest.mark.parametrize(
    ("rows", "columns", "d_ff"), [(1, 1, 1), (3, 1, 130), (1, 9, 1), (2, 33, 33), (1, 257, 520), (4, 1024, 1536)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton_mixture_for_odd_shapes(rows: int, columns: int, d_ff: int, dtype: torch.dtype) -> None:
    assert_mixture(mixture_inputs(rows, columns, d_ff, 4, per_row=True, per_token=True, dtype=dtype))


@pytest.mark.parametrize("scales", [(300.0, 5.0), (5.0, 300.0), (300.0, 300.0), (3e4, 3e4)])
@pytest.mark.parametrize("per_token", [False, True])
def test_triton_mixture_for_extreme_logits(scales: tuple[float, float], per_token: bool) -> None:
    gate, up, neuron, token = mixture_inputs(2, 67, 96, 4, per_row=True, per_token=per_token, dtype=torch.float32)
    # A logit of 1e5 has no more than two digits after the point; then neighbours differ in weight.
    assert_mixture([gate, up, neuron * scales[0], token * scales[1]], 2e-3 if scales == (3e4, 3e4) else 3e-4)


@pytest.mark.parametrize("k", [1, 4, 6])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_triton_mixture_shows_a_gate_that_is_not_finite(k: int, value: float) -> None:
    """Where it is, the hidden layer is what the reference has; elsewhere as if it were not there."""
    tensors = mixture_inputs(1, 5, 17, k, per_row=False, per_token=True, dtype=torch.float32)
    tensors[0][0, 2, 3] = value
    ours, theirs = (mixture_results(tensors, kernel)[:3] for kernel in ("triton", "reference"))
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_fused_kernels_equal_the_reference_in_a_whole_model() -> None:
    expected, actual = (
        outputs(create_model(SMALL.model_copy(update={"kernels": kernels}), device=DEVICE), torch.float32)
        for kernels in ("reference", "auto")
    )
    for name, true in expected.items():
        assert relative_error(actual[name], true) < 1e-3, name


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


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_blocks_equal_eager_ones() -> None:
    """In bf16, held against eager blocks in fp32."""
    model = create_model(SMALL, device=DEVICE)
    expected = outputs(model, torch.float32)
    compile_blocks(model, fullgraph=True)
    actual = outputs(model, torch.bfloat16)
    for name, true in expected.items():
        assert relative_error(actual[name], true) < 0.1, name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_captured_decoding_step_gives_the_tokens_of_an_eager_one(precision: torch.dtype) -> None:
    """Mixed lengths, rows that end and are replaced, sizes that are captured while others run."""
    model = create_model(SMALL.model_copy(update={"seq_length": 400}), seed=1, device=DEVICE).eval()
    rows = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 130, 1, 40)]
    steps: dict[bool, list[Tensor]] = {True: [], False: []}
    for captured, logits in steps.items():
        with torch.autocast(DEVICE, dtype=precision, enabled=precision != torch.float32):
            cache = Cache(model, 0.4, 4, 400)
            if not captured:
                cache.graphs = None
            assert (cache.graphs is not None) == captured
            cache.prefill(rows[:3], [0, 1, 2])
            for n in range(6):
                logits.append(cache.step([n, n + 1, n + 2]))
            cache.free(1)
            cache.move(2, 1)
            cache.prefill([rows[3]], [2])
            for n in range(130):  # past the size that lengths are rounded up to
                logits.append(cache.step([n % 64, 3, 5]))
            assert cache.graphs is None or len(cache.graphs.captured) > 1
    for ours, eager in zip(steps[True], steps[False], strict=True):
        assert torch.equal(ours.argmax(-1), eager.argmax(-1))
        assert relative_error(ours, eager) < 1e-5
