"""The micro batch that fits: the search, tries that leave no trace, ranks that agree, and steps that stay the same."""

import gc
import logging
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier, Lock, local
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_documents, write_token_source

from polyglu.config_file import load_config, save_config
from polyglu.data.chunks import open_source
from polyglu.data.dataloader import MicroBatch, TokenLoader
from polyglu.data.order import MixSchedule
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, Recompute, SFTConfig, TrainConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training import memory
from polyglu.training.loss import LanguageModelLoss, LossParts
from polyglu.training.memory import (
    available_memory,
    choose_micro_batch,
    divisors,
    fit_micro_batch,
    is_out_of_memory,
    rows_per_step,
    smaller,
    trial,
)

SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32,
    routing_scope="causal",
)  # fmt: skip
ROWS = st.integers(1, 400)


class Alone:
    """One rank."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def loss_of(recompute: Recompute = "none", entropy_reg: float = 0.0, ffn: str = "polyglu") -> LanguageModelLoss:
    model = create_model(SMALL.model_copy(update={"ffn": ffn}))
    return LanguageModelLoss(model, torch.float32, recompute, entropy_reg)


# --- the search


@given(rows=ROWS, limit=st.integers(0, 500))
def test_auto_finds_the_largest_that_fits_and_fails_once_at_most(rows: int, limit: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    if limit == 0:
        with pytest.raises(PolygluError, match=r"training\.micro_batch_size.*activation_checkpointing: full"):
            choose_micro_batch(rows, None, fits)
    else:
        assert choose_micro_batch(rows, None, fits) == max(size for size in range(1, limit + 1) if rows % size == 0)
    assert asked == sorted(asked) and sum(size > limit for size in asked) <= 1


@given(size=st.integers(1, 60), accumulation=st.integers(1, 8), limit=st.integers(0, 80))
def test_a_configured_size_is_made_smaller_until_it_fits(size: int, accumulation: int, limit: int) -> None:
    rows, asked = size * accumulation, []

    def fits(candidate: int) -> bool:
        asked.append(candidate)
        return candidate <= limit

    if limit == 0:
        with pytest.raises(PolygluError, match=r"training\.micro_batch_size: not even 1 row"):
            choose_micro_batch(rows, size, fits)
    else:
        assert choose_micro_batch(rows, size, fits) == asked[-1] <= limit
        assert all(candidate > limit for candidate in asked[:-1])
    assert asked[0] == size


@given(rows=ROWS, data=st.data())
def test_smaller_halves_or_takes_the_next_divisor(rows: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(divisors(rows)))
    below = [other for other in range(1, size) if rows % other == 0]
    if size == 1:
        assert smaller(size, rows) is None
    else:
        assert smaller(size, rows) == (size // 2 if size % 2 == 0 else below[-1]) and smaller(size, rows) in below


# --- a step does not depend on how it is cut


@cache
def source_folder(root: Path) -> Path:
    return write_token_source(root / "source", random_documents(np.random.default_rng(0), 3000))


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_another_cut_takes_the_same_samples_a_step(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(2, 24))
    size = data.draw(st.sampled_from(divisors(rows)[1:]))
    source = open_source(source_folder(tmp_path_factory.getbasetemp()))
    mix, seed, step = MixSchedule((1.0,), (1.0,), 1.0, 9), data.draw(st.integers(0, 99)), data.draw(st.integers(0, 8))

    def samples(world_size: int, size: int) -> tuple[dict[int, list[int]], dict[str, object]]:
        found: dict[int, list[int]] = {}
        for rank in range(world_size):
            loader = TokenLoader(
                [source], mix, seq_length=16, rows=size, accumulation=rows // size, rank=rank, world_size=world_size,
                seed=seed, vocab_size=64,
            )  # fmt: skip
            for batch in loader.step(step):
                assert len(batch.sample_ids) == size and not found.keys() & set(batch.sample_ids.tolist())
                found |= dict(zip(batch.sample_ids.tolist(), batch.input_ids.tolist(), strict=True))
        return found, loader.identity

    for world_size in (1, 2, 4):
        assert samples(world_size, size) == samples(world_size, smaller(size, rows) or 1)


# --- a try


@pytest.mark.parametrize(("recompute", "entropy_reg", "ffn"), [("none", 0.1, "polyglu"), ("full", 0.0, "swiglu")])
def test_a_try_runs_the_model_and_leaves_no_trace(recompute: Recompute, entropy_reg: float, ffn: str) -> None:
    loss, fired, seen = loss_of(recompute, entropy_reg, ffn), [], []
    for parameter in loss.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
        parameter.register_post_accumulate_grad_hook(fired.append)
        parameter.register_hook(fired.append)
    objects, versions = list(loss.parameters()), [parameter._version for parameter in loss.parameters()]
    before, random = {name: value.clone() for name, value in loss.state_dict().items()}, torch.get_rng_state()
    handle = loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    assert trial(loss, 3, 0.5, reserve_bytes=100)
    handle.remove()
    (batch, tau, gumbel), *rest = seen
    assert not rest and batch.input_ids.shape == (3, 32) and tau == 0.5
    assert (gumbel is None) == (ffn == "swiglu") and (gumbel is None or gumbel.shape == (2, 3, 24, 4))
    assert fired == [] and torch.equal(torch.get_rng_state(), random) and loss.training
    assert all(one is two for one, two in zip(loss.parameters(), objects, strict=True))
    assert [parameter._version for parameter in loss.parameters()] == versions
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert all(bool((parameter.grad == 3.0).all()) for parameter in loss.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in loss.parameters())


class FailingBackward(torch.autograd.Function):
    """Identity whose backward finds no memory."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_out_in_backward_is_seen_and_all_of_the_pass_is_freed(recompute: Recompute) -> None:
    loss, alive = loss_of(recompute), []

    def fail(_: object, inputs: tuple, parts: LossParts) -> LossParts:
        alive.extend(weakref.ref(tensor) for tensor in (inputs[0].input_ids, inputs[2], *parts.routing, parts.loss))
        return parts._replace(loss=FailingBackward.apply(parts.loss))

    handle = loss.register_forward_hook(fail)
    try:
        gc.disable()
        assert not trial(loss, 2, 1.0, 0)
        assert len(alive) == 5 and [reference() for reference in alive] == [None] * 5
    finally:
        gc.enable()
    handle.remove()
    assert trial(loss, 2, 1.0, 0)


def test_any_other_error_of_a_try_is_not_taken_for_memory() -> None:
    loss = loss_of()
    loss.register_forward_hook(lambda _, inputs, parts: parts._replace(loss=torch.zeros(2) @ torch.zeros(3)))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trial(loss, 2, 1.0, 0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_the_system_refuses_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


class Hungry(LanguageModelLoss):
    """Asks for more memory than there is, and is refused by the system, from a number of rows on."""

    largest = 40

    def forward(self, batch: MicroBatch, *rest: Any) -> LossParts:
        if len(batch.input_ids) > self.largest:
            torch.empty(2**60, dtype=torch.uint8)
        return super().forward(batch, *rest)


def test_a_size_that_is_refused_memory_is_halved_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    loss, wanted = Hungry(create_model(SMALL), torch.float32, False), 5 * 2**6
    chosen = fit_micro_batch(TrainingSection(micro_batch_size=wanted, grad_accum_steps=2), loss, Alone(), 1.0, 0)
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert chosen == Hungry.largest
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and warning.getMessage().startswith(
        f"training.micro_batch_size: {wanted} does not fit into memory; now {chosen}, accumulated 16 times"
    )


# --- all together


class Group:
    """Ranks in threads; each sum waits for all of them, so that one that asks less often is noticed."""

    def __init__(self, world_size: int) -> None:
        self.barrier, self.lock, self.values = Barrier(world_size, timeout=5), Lock(), []

    def sum(self, values: Sequence[float]) -> list[float]:
        with self.lock:
            self.values.append(values)
        self.barrier.wait()
        total = [sum(column) for column in zip(*self.values, strict=True)]
        self.barrier.wait()
        with self.lock:
            self.values.clear()
        self.barrier.wait()
        return total


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 60),
    limits=st.lists(st.tuples(st.integers(1, 80), st.sampled_from([2**50, 2**50, 0])), min_size=2, max_size=4),
    auto=st.booleans(),
)
def test_ranks_agree_on_a_size_that_fits_on_all(rows: int, limits: list[tuple[int, int]], auto: bool) -> None:
    """Each rank has its own largest size and memory that it may take."""
    wanted = {"micro_batch_size": "auto", "grad_accum_steps": rows} if auto else {"micro_batch_size": rows}
    section, group, own = TrainingSection(**wanted), Group(len(limits)), local()

    def one(rank: tuple[int, int]) -> int:
        own.limit, own.available = rank
        return fit_micro_batch(section, torch.nn.Linear(1, 1), group, 1.0, 0)  # type: ignore[arg-type]

    with (
        patch.object(memory, "trial", lambda _, size, *__: size <= own.limit),
        patch.object(memory, "memory_limit", lambda: own.available),
        ThreadPoolExecutor(len(limits)) as threads,
    ):
        chosen = set(threads.map(one, limits))
    assert len(chosen) == 1
    (size,), least = chosen, min(limit for limit, _ in limits)
    assert size <= least and rows_per_step(section) % size == 0
    if auto:
        fitting = [other for other in divisors(rows) if other <= least]
        assert size == (fitting[-1] if all(available for _, available in limits) else 1)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.sampled_from([1, 7, 12, 64, 360]),
    row=st.integers(1, 10**6),
    constant=st.integers(0, 10**6),
    available=st.integers(0, 10**8),
)
def test_a_cpu_tries_nothing_beyond_its_memory(rows: int, row: int, constant: int, available: int) -> None:
    """A machine that would kill the process: what a size needs is told by its peak alone, after it was tried."""
    held, weights, tried = 10**7, 8, []
    machine = SimpleNamespace(peak=held)

    def attempt(_: object, size: int, *__: object) -> bool:
        tried.append(size)
        machine.peak = max(machine.peak, held + weights + constant + row * size)
        return True

    with (
        patch.object(memory, "trial", attempt),
        patch.object(memory, "peak_memory", lambda _: machine.peak),
        patch.object(memory, "resident_memory", lambda: held),
        patch.object(memory, "available_memory", lambda: available),
    ):
        section = TrainingSection(micro_batch_size="auto", grad_accum_steps=rows)
        size = fit_micro_batch(section, torch.nn.Linear(1, 1), Alone(), 1.0, 0)  # type: ignore[arg-type]

    def needs(size: int) -> int:
        return weights + constant + row * size + memory.CPU_RESERVE * weights

    allowed = int(memory.CPU_SHARE * available)
    assert tried[0] == 1 and all(needs(other) <= allowed for other in tried[1:]) and size == tried[-1]
    if constant == 0:
        assert size == max([1, *(other for other in divisors(rows) if needs(other) <= allowed)])


def test_the_log_says_what_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    section = TrainingSection(micro_batch_size="auto", grad_accum_steps=12)
    with caplog.at_level(logging.INFO), patch.object(memory, "available_memory", lambda: 2**50):
        assert fit_micro_batch(section, loss_of(), Alone(), 1.0, 0) == 12
        assert fit_micro_batch(TrainingSection(micro_batch_size=3), loss_of(), Alone(), 1.0, 0) == 3
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "training.micro_batch_size: auto; now 12, accumulated 1 times: the same 12 rows on each rank make a step, "
            "and the data and its order stay as they are",
        )
    ]


# --- what is asked of the system, and of the config


def write_all(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  900 kB\nMemAvailable:    800 kB\nHugePages_Total:       0\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def group(folder: str, limit: str, used: int, cached: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    files = dict(zip(names, (limit, str(used)), strict=True)) | {"memory.stat": f"anon 5\ninactive_file {cached}\n"}
    return {f"{folder}/{name}": text + "\n" for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 800 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a/b", "max", 9, 0), 800 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a/b", "5000", 3000, 400), 2400),
        ({"proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a/b", "9000", 100, 0) | group(f"{V2}/a", "700", 100, 0), 600),
        ({"proc/self/cgroup": "0::/a\n"} | group(V2, "4000", 1000, 0), 3000),
        ({"proc/self/cgroup": "4:memory:/x\n3:cpu:/y\n0::/\n"} | group(f"{V1}/x", "6000", 1000, 1, 1), 5001),
        ({"proc/self/cgroup": "4:cpu,memory:/outside\n"} | group(V1, "6000", 2000, 0, 1), 4000),
        ({"proc/self/cgroup": "4:memory:/\n"} | group(V1, str(2**63 - 4096), 2000, 0, 1), 800 * 1024),
    ],
)
def test_available_memory_is_that_of_the_tightest_limit(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(write_all(tmp_path, MEMINFO | files)) == expected


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_memory", lambda: 1000)
    monkeypatch.setattr(memory, "available_memory", lambda: 8000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory.memory_limit()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (alone, memory.memory_limit()) == (1000 + int(8000 * memory.CPU_SHARE), 1000 + int(2000 * memory.CPU_SHARE))


def test_this_process_is_measured() -> None:
    before = memory.resident_memory()
    held = torch.ones(2**24)
    assert memory.resident_memory() - before > 0.9 * held.nbytes
    assert available_memory() > 0


@pytest.mark.parametrize("value", [0, -1, "many", 2.5, None])
def test_a_size_is_a_number_or_auto(value: object) -> None:
    with pytest.raises(PolygluError, match=r"training\.micro_batch_size: must be a number from 1 on, or auto, got "):
        load_config(TrainConfig, None, [f"training.micro_batch_size={'null' if value is None else value}"])
    with pytest.raises(PolygluError, match=r"training\.micro_batch_size: must not be true"):
        load_config(TrainConfig, None, ["training.micro_batch_size=true"])


def test_auto_is_kept_in_the_resolved_config_and_reads_rows_from_accumulation(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, ["training.micro_batch_size=auto"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert (config.training.micro_batch_size, rows_per_step(config.training)) == ("auto", 64)
    assert rows_per_step(TrainingSection(micro_batch_size=3, grad_accum_steps=5)) == 15


def test_auto_is_refused_in_fine_tuning() -> None:
    with pytest.raises(
        PolygluError, match=r"training\.micro_batch_size: auto is for pre-training alone: .* a number\."
    ):
        load_config(SFTConfig, None, ["training.micro_batch_size=auto"])
    assert load_config(SFTConfig, None, ["training.micro_batch_size=4"]).training.micro_batch_size == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_a_gpu_trains_with_what_was_found() -> None:
    device = torch.device("cuda", 0)
    loss = loss_of().to(device)
    limit = 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit, device)
    try:
        assert trial(loss, 1, 1.0, 0)  # libraries take their memory
        before = torch.cuda.memory_allocated(device)
        wanted = 2**17
        chosen = fit_micro_batch(TrainingSection(micro_batch_size=wanted, grad_accum_steps=1), loss, Alone(), 1.0, 0)
        assert 1 < chosen < wanted and torch.cuda.memory_allocated(device) == before
        batch = memory.long_documents(SMALL, chosen).to(device)
        for _ in range(2):
            (loss(batch, 1.0, memory._noise(SMALL, batch)).loss / batch.n_targets).backward()
        automatic = TrainingSection(micro_batch_size="auto", grad_accum_steps=64)
        with patch.object(memory, "GPU_HEADROOM", 0.0):
            assert fit_micro_batch(automatic, loss, Alone(), 1.0, 0) == 64
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
