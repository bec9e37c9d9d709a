"""Portable checkpoints of a run: whole from any ranks, and, with the optimiser's state, a run goes on from one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saving import KINDS, ORDER, SplitEngine, numbers_of, on_ranks
from support import random_documents, write_token_source
from tiny_run import SMALL, batch_of, plain_engine

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.model.config import TrainConfig
from polyglu.model.model import Checkpoint, load_checkpoint, read_checkpoint, save_portable
from polyglu.training import journal
from polyglu.training.checkpoint import find_resume_point, newest_whole, resume
from polyglu.training.guard import RunState
from polyglu.training.portable import portable_writer, resume_portable
from polyglu.training.ranks import Ranks
from polyglu.training.shards import MOMENTS, WEIGHT
from polyglu.training.train import train

STATE = RunState(step=3, passed=1, skipped=1, losses=(3.5, 3.25), wandb_id="abc")


def config_of(folder: Path, **training: Any) -> TrainConfig:
    if not (folder / "data").exists():
        write_token_source(
            folder / "data", random_documents(np.random.default_rng(0), 600, vocab_size=37), vocab_size=37
        )
    loop = {
        "total_steps": 6, "micro_batch_size": 2, "grad_accum_steps": 1, "warmup_steps": 1, "learning_rate": 1e-2,
        "precision": "fp32", "checkpoint_every": 3, "portable_checkpoint_every": 3, "portable_optimizer": True,
        "run_dir": str(folder / "run"), **training,
    }  # fmt: skip
    sources = {"a": {"path": str(folder / "data"), "mix": 1.0, "mix_end": 1.0}}
    values = {"model": SMALL.model_dump(), "data": {"sources": sources}, "wandb": {"mode": "disabled"}}
    return validate(TrainConfig, {**values, "training": loop}, source="test")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_goes_on_from_one_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal, "peak_flops", lambda *_: 1e12)  # measured, which takes time
    whole, resumed, anew = (tmp_path / name for name in ("whole", "resumed", "anew"))
    final = train(config_of(tmp_path, checkpoint_dir=str(whole)))
    start = str(whole / "portable_step3.pt")
    again = train(config_of(tmp_path, checkpoint_dir=str(resumed), resume_from=start))
    assert same(read_checkpoint(again).weights, read_checkpoint(final).weights)
    points = [newest_whole(folder / "ds_checkpoint") for folder in (whole, resumed)]
    assert points[0] is not None and points[1] is not None
    assert points[0].shards == points[1].shards and points[0].state == points[1].state and points[0].updates == 6
    one, other = (read_checkpoint(folder / "portable_step6.pt").training for folder in (whole, resumed))
    assert one is not None and other is not None and one["state"] == other["state"] and one["order"] == other["order"]
    assert all(same(one["moments"][kind], other["moments"][kind]) for kind in MOMENTS)

    caplog.clear()
    with caplog.at_level("WARNING"):
        other_order = train(config_of(tmp_path, checkpoint_dir=str(anew), resume_from=start, seed=1))
    assert "weights alone: its run differs in seed, so AdamW starts anew" in caplog.text
    assert not same(read_checkpoint(other_order).weights, read_checkpoint(final).weights)
    point = newest_whole(anew / "ds_checkpoint")
    assert point is not None and (point.state.step, point.updates) == (6, 3)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_moments_are_put_together_and_dealt_out_again(tmp_path: Path, n_ranks: int) -> None:
    path = tmp_path / "portable.pt"

    def write(ranks: Ranks) -> None:
        writer = portable_writer(SplitEngine(ranks, 3), path, SMALL, STATE, 0.5, {}, ORDER)
        if ranks.rank == 0:
            writer()

    assert on_ranks(n_ranks, write) == [None] * n_ranks
    found, numbers = read_checkpoint(path), numbers_of(3)
    assert found.training is not None and same(found.weights, numbers[WEIGHT])
    assert all(same(found.training["moments"][kind], numbers[kind]) for kind in MOMENTS)

    def read(ranks: Ranks) -> tuple[RunState, bool]:
        engine = SplitEngine(ranks, 3)
        for piece in engine.pieces():
            for kind in MOMENTS:
                piece.tensors[kind].zero_()
        engine.updates = 0
        return resume_portable(engine, found, ORDER), engine.is_at(3)

    for others in (1, 2, 4):
        assert on_ranks(others, read) == [(STATE, True)] * others


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path) -> None:
    engine = SplitEngine(Ranks(torch.device("cpu")), 3)
    write = portable_writer(engine, tmp_path / "portable.pt", SMALL, STATE, 0.5, {}, ORDER)
    engine.become(4)
    write()
    found, numbers = read_checkpoint(tmp_path / "portable.pt"), numbers_of(3)
    assert found.training is not None and found.training["updates"] == 3 and same(found.weights, numbers[WEIGHT])
    assert all(same(found.training["moments"][kind], numbers[kind]) for kind in KINDS if kind != WEIGHT)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable checkpoint with the optimiser's state, after an update."""
    engine, path = plain_engine(), tmp_path_factory.mktemp("portable") / "portable.pt"
    engine.backward(engine.forward(batch_of([(1, 7)]), 0.5, None).loss, True)
    engine.step(1e-3)
    portable_writer(engine, path, SMALL, STATE, 0.5, {}, ORDER)()
    return path


def test_others_pass_over_the_optimiser_state(portable: Path, tmp_path: Path) -> None:
    found = read_checkpoint(portable)
    save_portable(tmp_path / "plain.pt", found.weights, SMALL, 3, 0.5, {})
    with_state, without = load_checkpoint(portable), load_checkpoint(tmp_path / "plain.pt")
    assert same(with_state[0].state_dict(), without[0].state_dict()) and with_state[1:] == without[1:] == (3, 0.5)
    assert portable.stat().st_size > 2.5 * (tmp_path / "plain.pt").stat().st_size


def test_one_without_optimiser_state_gives_the_step_alone(
    portable: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_portable(tmp_path / "plain.pt", read_checkpoint(portable).weights, SMALL, 3, 0.5, {})
    engine = plain_engine()
    state = resume(engine, find_resume_point(str(tmp_path / "plain.pt"), tmp_path), ORDER, tmp_path)
    assert state == RunState(step=3, due=3) and engine.updates == 0
    assert "weights alone: the file holds no optimiser state, so AdamW starts anew" in caplog.text


FIRST = "embed_tokens.weight"


def changed(found: Checkpoint, *path: str, value: Any) -> Checkpoint:
    """The same checkpoint, but for one value of its training state."""

    def put(inside: Any, keys: tuple[str, ...]) -> Any:
        return {**inside, keys[0]: put(inside[keys[0]], keys[1:])} if keys else value

    return Checkpoint(found.weights, found.config, found.step, found.tau, found.tokenizer, put(found.training, path))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("state",), None),
        (("state", "step"), 4),
        (("state", "step"), "3"),
        (("state", "passed"), -1),
        (("state", "losses"), [float("inf")]),
        (("state", "losses"), torch.ones(2)),
        (("updates",), float("inf")),
        (("updates",), -1),
        (("updates",), True),
        (("updates",), 2**70),
        (("updates",), torch.ones(2)),
        (("moments",), []),
        (("moments",), {}),
        (("moments", "exp_avg"), "none"),
        (("moments", "exp_avg", FIRST), None),
        (("moments", "exp_avg", FIRST), [1.0]),
        (("moments", "exp_avg", FIRST), torch.ones(1)),
        (("moments", "exp_avg", FIRST), torch.ones(8, 37)),
        (("moments", "exp_avg", FIRST), torch.ones(37, 8, dtype=torch.float64)),
        (("moments", "exp_avg", FIRST), torch.ones(37, 8, dtype=torch.complex64)),
        (("moments", "exp_avg", FIRST), torch.ones(37, 8).to_sparse()),
        (("moments", "exp_avg", FIRST), torch.ones(37, 8, device="meta")),
        (("moments", "exp_avg", FIRST), torch.full((37, 8), torch.nan)),
        (("moments", "exp_avg_sq", FIRST), torch.full((37, 8), -1.0)),
    ],
)
def test_a_training_state_that_is_not_whole_is_one_sentence(portable: Path, path: Any, value: Any) -> None:
    found = changed(read_checkpoint(portable), *path, value=value)
    with pytest.raises(PolygluError, match=r"training state is not whole \(.*\); resume from another") as raised:
        resume_portable(plain_engine(), found, ORDER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("order", [None, 5, {}, {"seed": torch.ones(3)}, torch.ones(2), {**ORDER, "seed": 1.5}])
def test_an_order_that_is_none_is_another(portable: Path, order: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = changed(read_checkpoint(portable), "order", value=order)
    engine = plain_engine()
    assert resume_portable(engine, found, ORDER) == RunState(step=3, due=3) and engine.updates == 0
    assert "its run differs in" in caplog.text and "seed" in caplog.text


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    ("state",), ("state", "step"), ("state", "passed"), ("state", "losses"), ("state", "wandb_id"), ("updates",),
    ("order",), ("order", "seed"), ("moments",), ("moments", "exp_avg"), ("moments", "exp_avg_sq", FIRST), (),
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=plain_values)
def test_any_plain_value_in_it_is_understood_or_refused(
    portable: Path, tmp_path: Path, place: tuple[str, ...], value: Any
) -> None:
    found = changed(read_checkpoint(portable), *place, value=value)
    path = tmp_path / "any.pt"
    save_portable(path, found.weights, found.config, 3, 0.5, {})
    torch.save({**torch.load(path, weights_only=True), "training": found.training}, path)
    engine = plain_engine()
    try:
        state = resume(engine, find_resume_point(str(path), tmp_path), ORDER, tmp_path)
    except PolygluError as error:
        assert "\n" not in str(error)
    else:
        assert state.step == 3 and engine.updates >= 0
