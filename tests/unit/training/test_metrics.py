"""The log of a run tells each step once, whatever happened to the run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyglu.model.config import TrainConfig, WandbSection
from polyglu.training.metrics import METRICS_FILE, MetricsLog, format_seconds, open_metrics, read_metrics

SILENT = WandbSection(mode="disabled")
VALUES = {
    "train/loss": 2.5, "train/lr": 1e-3, "train/tau": 0.7, "train/tokens_per_sec": 12345.0, "train/mfu": 0.25,
    "train/peak_memory_gb": 1.5,
}  # fmt: skip
ENTROPIES = {"routing_entropy/mean": 1.386, "dynamic_routing_entropy/mean": 0.9}


def open_log(folder: Path, start_step: int = 0) -> MetricsLog:
    folder.mkdir(exist_ok=True)
    return MetricsLog(folder, SILENT, {}, start_step, total_steps=100)


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / METRICS_FILE)]


def test_rows_are_read_back_as_logged(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(1, VALUES)
    log.log(10, VALUES | ENTROPIES)
    log.close()
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, **VALUES}, {"step": 10, **VALUES, **ENTROPIES}]


@pytest.mark.parametrize(
    ("resumed_at", "kept"), [(0, []), (19, [10]), (20, [10, 20]), (25, [10, 20]), (99, [10, 20, 30])]
)
def test_rows_after_the_resume_step_are_dropped(tmp_path: Path, resumed_at: int, kept: list[int]) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30):
        log.log(step, VALUES)
    resumed = open_log(tmp_path, start_step=resumed_at)
    assert steps(tmp_path) == kept
    resumed.log(resumed_at + 10, VALUES)
    assert steps(tmp_path) == [*kept, resumed_at + 10]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_cut_off_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    log = open_log(tmp_path)
    log.log(1, VALUES)
    log.log(2, VALUES)
    path = tmp_path / METRICS_FILE
    whole = path.read_text()
    path.write_text(whole[:-cut])
    kept = [1, 2] if cut == 1 else [1]  # only the end of the line is lost: the row is whole
    assert steps(tmp_path) == kept
    open_log(tmp_path, start_step=5).log(6, VALUES)
    assert steps(tmp_path) == [*kept, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_nothing_logged_yet_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS_FILE) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00"), (59.9, "00:00:59"), (3661, "01:01:01"), (86399, "23:59:59"), (86400, "1d 00:00:00"),
     (93784, "1d 02:03:04"), (12.5 * 86400, "12d 12:00:00")],
)  # fmt: skip
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_console_line_tells_progress_and_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 of 80 steps are left after a resume at 20: time is counted from there, not from step 0."""
    now = [1000.0]
    monkeypatch.setattr("polyglu.training.metrics.time.monotonic", lambda: now[0])
    log = open_log(tmp_path, start_step=20)
    now[0] += 40.0
    with caplog.at_level(logging.INFO, logger="polyglu.training.metrics"):
        log.log(40, VALUES | ENTROPIES)
    (line,) = caplog.messages
    parts = ("step 40/100", "loss 2.5000", "lr 1.00e-03", "tau 0.700", "12,345 tok/s", "MFU 25.0%", "mem 1.50 GB")
    assert line == " | ".join([*parts, "entropy 1.386 static 0.900 dynamic", "00:02:00 left"])


def test_model_without_routing_shows_no_entropy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polyglu.training.metrics"):
        open_log(tmp_path).log(1, VALUES)
    assert "entropy" not in caplog.text


def test_only_rank_0_writes(tmp_path: Path) -> None:
    values: dict[str, Any] = {"training": {"run_dir": str(tmp_path / "run")}, "wandb": {"mode": "disabled"}}
    config = TrainConfig.model_validate(values)
    assert open_metrics(config, rank=1, start_step=0, total_steps=1) is None
    assert not (tmp_path / "run").exists()
    assert open_metrics(config, rank=0, start_step=0, total_steps=1) is not None
    assert TrainConfig.model_validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text())) == config
