"""Compiled blocks over the attention of a GPU: one graph, the eager results, and nothing compiled anew."""

from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import flash_on_cpu
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from polyglu.model.architecture import PolychromaticLM, compile_blocks
from polyglu.model.config import ModelConfig, Recompute, RoutingScope
from polyglu.model.model import create_model
from polyglu.model.routing import gumbel_noise

# The tracer's own, which it hides except where warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
SMALL = ModelConfig(
    vocab_size=40, d_model=16, d_ff=24, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=8, seq_length=64
)
ROWS, COLUMNS = 2, 48
CUTS: Sequence[Sequence[int]] = [
    [5, 9, 40, 60, 61, 90], [], [24], range(1, 24), [1, 47, 49], range(4, 96, 4), range(1, 96), [95],
]  # fmt: skip
"""Where documents of batches begin besides the rows: 2 to 96 documents, of 48 to 1 tokens."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.compiler.config.patch(dynamic_sources=""):
        yield
    torch.compiler.reset()


def model_of(config: ModelConfig) -> PolychromaticLM:
    model = create_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "alpha" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
            elif parameter.ndim == 2:
                parameter.mul_(5)
    return model


def run(model: PolychromaticLM, batch: int, columns: int, recompute: Recompute, dtype: torch.dtype) -> list[Tensor]:
    """Features, token logits and gradients of a batch with its own documents, temperature and noise."""
    starts = {cut for cut in CUTS[batch] if cut < ROWS * columns}
    bounds = torch.tensor(sorted({0, columns, ROWS * columns} | starts), dtype=torch.int32)
    ids = torch.randint(40, (ROWS, columns), generator=torch.Generator().manual_seed(batch))
    config = model.config
    noise = gumbel_noise(batch, torch.arange(ROWS), config.n_layers, config.d_ff, config.n_activations)
    tau = torch.full((), 1 - 0.1 * batch)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        features, routing = model.features(
            ids, cu_seqlens=bounds, tau=tau, gumbel=noise if config.ffn == "polyglu" else None, recompute=recompute
        )
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(batch))
    ((features * direction).sum() + sum(logits.square().sum() for logits in routing)).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [features.detach(), *(logits.detach() for logits in routing), *gradients]


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / (theirs.float().norm() + 1e-6))


Check = Callable[..., None]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Compiled blocks are as good as eager ones over all batches, and ``graphs`` are made in all."""

    def checked(
        config: ModelConfig, recompute: Recompute = "none", *, attention: str = "torch", backend: str = "aot_eager",
        dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, graphs: int = 1, shrinks: int = 0,
    ) -> None:  # fmt: skip
        flash_on_cpu.use(attention, monkeypatch)
        exact_model, eager, model = (model_of(config) for _ in range(3))
        counter = CompileCounterWithBackend(backend)
        compile_blocks(model, backend=counter, fullgraph=True)
        for batch in range(len(CUTS)):
            what = batch, COLUMNS - shrinks * batch, recompute
            exact, expected = run(exact_model, *what, torch.float32), run(eager, *what, dtype)
            for ours, theirs, true in zip(run(model, *what, dtype), expected, exact, strict=True):
                assert ours.dtype == theirs.dtype
                assert error(ours, true) <= 2 * error(theirs, true) + tolerance  # what is rounded is rounded otherwise
            assert counter.frame_count <= graphs
        assert counter.frame_count == graphs

    return checked


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("scope", get_args(RoutingScope))
def test_one_graph_serves_all_documents(check: Check, scope: RoutingScope, recompute: Recompute) -> None:
    """Of all batches; under ``document``, where all rows are single documents, another one."""
    config = SMALL.model_copy(update={"routing_scope": scope})
    check(config, recompute, graphs=2 if scope == "document" else 1)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_of_one_activation(check: Check, recompute: Recompute) -> None:
    check(SMALL.model_copy(update={"ffn": "swiglu"}), recompute)


CAUSAL = SMALL.model_copy(update={"routing_scope": "causal"})


@pytest.mark.parametrize("recompute", ["hidden", "full"])
def test_autocast(check: Check, recompute: Recompute) -> None:
    """A gate that rounds to the other side of 0 meets ReLU's other slope: hence the tolerance."""
    check(CAUSAL, recompute, dtype=torch.bfloat16, tolerance=4e-2)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_flash_attn_package(check: Check, recompute: Recompute) -> None:
    check(CAUSAL, recompute, attention="flash_attn")


def test_rows_of_other_lengths_cost_one_graph_more(check: Check) -> None:
    """As in fine-tuning, where each pack has its own length."""
    check(CAUSAL, shrinks=1, graphs=2)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # in inductor's imports
def test_code_made_by_inductor(check: Check) -> None:
    check(CAUSAL, "hidden", backend="inductor", tolerance=1e-4)
