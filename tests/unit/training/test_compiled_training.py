"""Training with compiled blocks; and that nothing in a step waits for the device before its end."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import flash_on_cpu
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.model.architecture import compile_blocks
from polyglu.model.config import ModelConfig, Recompute, RoutingScope, TrainingSection
from polyglu.model.flash_attention import flash_serves
from polyglu.model.model import create_model
from polyglu.training import engine as engine_module
from polyglu.training.cross_entropy import METHODS, softmax_
from polyglu.training.engine import PlainEngine, create_engine
from polyglu.training.fit import Plan, _forward_backward
from polyglu.training.guard import RunState
from polyglu.training.loss import LanguageModelLoss
from polyglu.training.memory import fit_micro_batch, trial
from polyglu.training.ranks import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]
SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32,
    routing_scope="causal",
)  # fmt: skip
SETTINGS = TrainingSection(entropy_reg=0.05)
PLAN = Plan(total_steps=9, learning_rate=lambda done: 1e-2, tau=lambda done: 1 - 0.1 * done, seed=0, checkpoint_every=9)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch.compiler.config.patch(dynamic_sources=""):
        yield
    torch.compiler.reset()


def engine_of(recompute: Recompute = "none", scope: RoutingScope = "causal", device: str = "cpu") -> PlainEngine:
    torch.manual_seed(0)
    model = create_model(SMALL.model_copy(update={"routing_scope": scope}))
    loss = LanguageModelLoss(model.to(device), torch.float32, recompute, SETTINGS.entropy_reg)
    return PlainEngine(loss, SETTINGS, Ranks(torch.device(device)))


def batch_of(seed: int, rows: int = 2) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(37, (rows, 33), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, seed:] = IGNORED
    cuts = torch.randint(rows * 32, (3 * seed,), generator=generator)
    bounds = torch.cat([torch.arange(rows + 1) * 32, torch.tensor([7]), cuts]).unique().int()
    return MicroBatch(ids[:, :-1].contiguous(), targets, bounds, torch.arange(rows) + rows * seed)


def train(engine: PlainEngine, steps: Sequence[int]) -> list[float]:
    """Losses and norms of steps of two micro batches."""
    numbers = []
    for step in steps:
        batches = [batch_of(2 * step + index) for index in (1, 2)]
        passes = _forward_backward(engine, batches, 100.0, RunState(step), PLAN.tau(step), PLAN)
        assert passes is not None
        numbers += [engine.step(PLAN.learning_rate(step)), float(passes.loss)]
    return numbers


def compiled(engine: PlainEngine) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(engine.loss.model, backend=counter, fullgraph=True)
    return counter


def parameters_alive() -> int:
    gc.collect()
    return sum(type(thing) is nn.Parameter for thing in gc.get_objects())


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_training_is_the_same_and_a_trial_compiles_for_it(
    recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    flash_on_cpu.use("torch", monkeypatch)
    expected = train(engine_of(recompute), range(3))
    engine = engine_of(recompute)
    counter = compiled(engine)
    before = parameters_alive()
    assert trial(engine.loss, 2, 1.0, 0) and counter.frame_count == 1
    assert parameters_alive() == before  # compiled code does not hold the stand-ins
    assert train(engine, range(3)) == pytest.approx(expected, rel=1e-4)
    assert counter.frame_count == 1
    assert trial(engine.loss, 2, 0.5, 0) and train(engine, [3]) and counter.frame_count == 1


def test_documents_of_a_trial_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``document`` scope rows of one document take another path: seldom, so the trial must not take it."""
    flash_on_cpu.use("torch", monkeypatch)
    engine = engine_of(scope="document")
    counter = compiled(engine)
    assert trial(engine.loss, 2, 1.0, 0) and train(engine, range(2)) and counter.frame_count == 1


def test_code_is_made_for_the_size_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of several sizes end in code for any; training gets its own, and sees no size as variable."""
    flash_on_cpu.use("torch", monkeypatch)
    engine, seen = engine_of(), []
    counter = compiled(engine)
    settings = TrainingSection(micro_batch_size="auto", grad_accum_steps=4)
    assert fit_micro_batch(settings, engine.loss, Ranks(torch.device("cpu")), 1.0, 0) == 4
    assert counter.frame_count <= 3
    made = counter.frame_count
    for seed in range(1, 4):
        engine.loss(batch_of(seed, rows=4), 0.5, None).loss.backward()
    assert counter.frame_count == made + 1
    for node in counter.graphs[-1].graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.ndim == 3:
            seen += [size for size in value.shape if isinstance(size, torch.SymInt)]
    assert not seen


@pytest.mark.parametrize(
    ("model", "settings", "wanted"),
    [
        ({}, {}, True),
        ({}, {"compile": "never"}, False),
        ({}, {"precision": "fp32"}, False),
        ({"use_flash_attn": False}, {}, False),
        ({"kernels": "reference"}, {}, False),
    ],
    ids=["auto", "never", "fp32", "no flash", "reference"],
)
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"
)  # in inductor's imports
def test_blocks_are_compiled_where_attention_asks_for_no_document(
    model: dict[str, Any], settings: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "flash_serves", lambda _, *shape: flash_serves(torch.device("cuda"), *shape))
    section = TrainingSection(**{"precision": "bf16", **settings})
    engine = create_engine(create_model(SMALL.model_copy(update=model)), section, Ranks(torch.device("cpu")))
    assert [block._compiled_call_impl is not None for block in engine.loss.model.layers] == [wanted] * 2


class Reads(TorchDispatchMode):
    """Operators that make the host wait for values on the device."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.latest = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masked or name.startswith(self.WAITING):
            self.found.append(name)
        self.latest = name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def loss_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU counts the targets and leaves the other rows out."""
    for device in ("cpu", "meta"):
        monkeypatch.setitem(METHODS, device, METHODS["cuda"]._replace(softmax_=softmax_))


@pytest.mark.usefixtures("loss_as_on_a_gpu")
def test_a_step_reads_the_device_once_at_its_end() -> None:
    """The norm, when the update is queued."""
    engine, batches = engine_of(), [batch_of(1), batch_of(2)]
    with Reads() as reads:
        passes = _forward_backward(engine, batches, 50.0, RunState(0), 0.7, PLAN)
        assert passes is not None and reads.found == []
        weight = engine.loss.model.layers[0].self_attn.q_proj.weight
        before = weight.detach().clone()
        engine.step(1e-3)
        assert reads.found == ["_local_scalar_dense"] and reads.latest == reads.found[0]
    assert not torch.equal(weight, before)


@pytest.mark.usefixtures("loss_as_on_a_gpu")
@pytest.mark.parametrize("scope", get_args(RoutingScope))
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_the_passes_need_no_value_of_the_device(
    recompute: Recompute, scope: RoutingScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run on meta tensors, which have none: only bounds of documents are read, and they stay on the CPU."""
    flash_on_cpu.use("torch", monkeypatch)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # of which meta tensors know nothing
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    engine = engine_of(recompute, scope, "meta")
    batch = batch_of(3)
    assert batch.to(torch.device("meta")).cu_seqlens is batch.cu_seqlens
    passes = _forward_backward(engine, [batch, batch_of(4)], 100.0, RunState(0), 0.7, PLAN)
    assert passes is not None and passes.loss.is_meta
    assert all(parameter.grad is not None for parameter in engine.loss.parameters())
