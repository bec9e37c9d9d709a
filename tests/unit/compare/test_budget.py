"""Steps that a budget pays for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import random_documents, write_token_source

from polyglu.compare.budget import StepWork, measured_speed, step_work, steps_within
from polyglu.compare.suite import Budget
from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.model.config import TrainConfig
from polyglu.training.estimate import count_parameters
from polyglu.training.ranks import Ranks
from polyglu.training.train import create_loader, open_sources

WORK = StepWork(tokens=100, flops=5e6)


def test_whole_steps_within_the_budget() -> None:
    assert steps_within(Budget(tokens=1099), WORK) == 10
    assert steps_within(Budget(flops=1.6e7), WORK) == 3
    assert steps_within(Budget(seconds=7), WORK, tokens_per_second=250) == 17
    with pytest.raises(PolygluError, match="budget.tokens: a step takes 100 tokens and 5e.06 FLOPs, more than"):
        steps_within(Budget(tokens=99), WORK)


def test_flops_are_those_of_the_documents_at_hand(tmp_path: Path) -> None:
    """A row of documents of 7 tokens and their end: 8 * 9 / 2 pairs each, not those of whole rows."""
    write_token_source(tmp_path / "a", [1, 2, 3, 4, 5, 6, 7, 0] * 60)
    shape = {"vocab_size": 64, "d_model": 16, "d_ff": 24, "n_layers": 3, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    values = {
        "model": {**shape, "seq_length": 32},
        "data": {"sources": {"a": {"path": str(tmp_path / "a"), "mix": 1, "mix_end": 1}}},
        "training": {"micro_batch_size": 2, "grad_accum_steps": 3},
    }
    config = validate(TrainConfig, values, source="test")
    found, tokens = step_work(config), 6 * 32
    pairs = tokens // 8 * 36
    assert found == StepWork(tokens, 6 * count_parameters(config.model).total * tokens + 12 * 3 * 2 * 8 * pairs)


def test_the_first_reading_does_not_count() -> None:
    rows = [{"train/tokens_per_sec": speed} for speed in (1.0, 90.0, 100.0, 95.0)]
    assert measured_speed(rows) == 95.0 and measured_speed(rows[:1]) == 1.0
    with pytest.raises(ValueError, match="no readings"):
        measured_speed([])


def test_a_shorter_run_sees_the_same_data_first(tmp_path: Path) -> None:
    """Under a constant mix, as budgets of FLOPs and time ask for; the shorter run's last steps may swap sources."""
    rng = np.random.default_rng(0)
    for name in "ab":
        write_token_source(tmp_path / name, random_documents(rng, 3000))
    sources = {
        name: {"path": str(tmp_path / name), "mix": mix, "mix_end": mix} for name, mix in (("a", 0.7), ("b", 0.3))
    }
    seen = []
    for steps in (40, 90):
        values = {
            "model": {"vocab_size": 64, "seq_length": 32},
            "data": {"sources": sources},
            "training": {"total_steps": steps, "micro_batch_size": 4, "grad_accum_steps": 1},
        }
        config = validate(TrainConfig, values, source="test")
        loader = create_loader(config, open_sources(config), Ranks(torch.device("cpu")), 4)
        seen.append([loader.step(step)[0].input_ids.tolist() for step in range(40)])
    assert seen[0][:35] == seen[1][:35]
