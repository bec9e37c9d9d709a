"""The log of a run tells each step once, whatever happened to the run."""

import json
import logging
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.model.config import TrainConfig, WandbSection
from polyglu.training import row_file
from polyglu.training.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    REPLACED_FILE,
    MetricsLog,
    format_seconds,
    open_metrics,
    read_events,
    read_metrics,
)

SILENT = WandbSection(mode="disabled")
VALUES = {
    "train/loss": 2.5, "train/lr": 1e-3, "train/tau": 0.7, "train/tokens_per_sec": 12345.0, "train/mfu": 0.25,
    "train/mfu_attention": 0.3,
    "train/peak_memory_gb": 1.5,
}  # fmt: skip
ENTROPIES = {"routing_entropy/mean": 1.386, "dynamic_routing_entropy/mean": 0.9}


def open_log(folder: Path, start_step: int = 0) -> MetricsLog:
    folder.mkdir(exist_ok=True)
    return MetricsLog(folder, SILENT, {}, start_step, total_steps=100)


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / METRICS_FILE)]


def flags(folder: Path, file: str = METRICS_FILE) -> list[tuple[int, int | None]]:
    return [(row["step"], row.get("repeated")) for row in read_metrics(folder / file)]


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
    assert not (tmp_path / REPLACED_FILE).exists()  # they come again with the same bits: nothing to keep


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


def test_a_rollback_keeps_what_it_takes_back_and_flags_what_it_repeats(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30):
        log.log(step, VALUES)
    log.rewind(10, attempt=1)
    assert flags(tmp_path) == [(10, None)]
    for step in (20, 30, 40):
        log.log(step, VALUES, attempt=1)
    assert flags(tmp_path) == [(10, None), (20, 1), (30, 1), (40, None)]
    log.rewind(30, attempt=2)
    log.log(40, VALUES, attempt=2)
    assert flags(tmp_path) == [(10, None), (20, 1), (30, 1), (40, 2)]
    assert read_metrics(tmp_path / REPLACED_FILE) == [
        {"step": 20, **VALUES, "replaced_by": 1},
        {"step": 30, **VALUES, "replaced_by": 1},
        {"step": 40, **VALUES, "replaced_by": 2},
    ]


def test_a_step_taken_back_by_any_rollback_is_flagged(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for attempt, last in enumerate((30, 20, 40)):
        for step in range(10, last + 1, 10):
            log.log(step, VALUES, attempt)
        if last < 40:
            log.rewind(0, attempt + 1)
    assert flags(tmp_path) == [(10, 2), (20, 2), (30, 2), (40, None)]


def test_a_resumed_run_knows_which_steps_were_logged_before_a_rollback(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30):
        log.log(step, VALUES)
    log.rewind(10, attempt=1)
    log.log(20, VALUES, attempt=1)
    resumed = open_log(tmp_path, start_step=20)
    for step in (30, 40):
        resumed.log(step, VALUES, attempt=1)
    assert flags(tmp_path) == [(10, None), (20, 1), (30, 1), (40, None)]


def test_a_rollback_that_is_still_to_come_flags_nothing(tmp_path: Path) -> None:
    """The process was killed after the second rollback; the checkpoint it is resumed from knows of the first."""
    log = open_log(tmp_path)
    log.log(1, VALUES)
    log.rewind(0, attempt=1)
    for step in (1, 2, 3):
        log.log(step, VALUES, attempt=1)
    log.rewind(2, attempt=2)
    resumed = open_log(tmp_path, start_step=2)
    resumed.log(3, VALUES, attempt=1)
    assert flags(tmp_path) == [(1, 1), (2, None), (3, None)]
    resumed.rewind(2, attempt=2)
    resumed.log(3, VALUES, attempt=2)
    assert flags(tmp_path) == [(1, 1), (2, None), (3, 2)]
    assert flags(tmp_path, REPLACED_FILE) == [(1, None), (3, None)]


def test_a_new_run_in_the_same_folder_has_no_rollbacks_behind_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(50, VALUES)
    log.rewind(0, attempt=1)
    again = open_log(tmp_path)
    again.log(1, VALUES)
    again.rewind(0, attempt=1)
    for step in (1, 2):
        again.log(step, VALUES, attempt=1)
    assert flags(tmp_path) == [(1, 1), (2, None)]
    assert flags(tmp_path, REPLACED_FILE) == [(1, None)]


class Killed(BaseException):
    """What SIGKILL is to a simulated process."""


@contextmanager
def kills(moments: list[tuple[int, float]]) -> Iterator[None]:
    """Kill the process at file operations, counted over all its lives, before (0), after (1) or within a write."""
    count = 0
    dying = dict(moments)

    def deadly(operation: Callable[..., Any], tear: bool) -> Callable[..., Any]:
        def run(*values: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            part = dying.get(count)
            if part is None:
                return operation(*values, **options)
            if part == 1:
                operation(*values, **options)
            elif tear:
                path, rows = values
                text = "".join(json.dumps(row) + "\n" for row in rows)
                with open(path, "a") as file:
                    file.write(text[: int(part * len(text))])
            raise Killed

        return run

    with (
        mock.patch.object(row_file, "append_rows", deadly(row_file.append_rows, tear=True)),
        mock.patch.object(row_file.os, "truncate", deadly(row_file.os.truncate, tear=False)),
        mock.patch.object(row_file, "write_text", deadly(row_file.write_text, tear=False)),
        mock.patch.object(row_file, "flush", deadly(row_file.flush, tear=False)),
        mock.patch.object(Path, "unlink", deadly(Path.unlink, tear=False)),
        mock.patch.object(os, "fsync"),  # a kill loses nothing that was written
    ):
        yield


def simulate(folder: Path, total: int, save_every: int, rollbacks: list[int], every: int) -> None:
    """Train to the end through kills: state is what a checkpoint holds, and loss a function of it."""
    saved = (0, 0)
    while True:
        step, attempt = saved
        try:
            log = open_log(folder, step)
            while step < total:
                step += 1
                if step % every == 0 or step == 1:
                    log.log(step, {**VALUES, "train/loss": step + attempt / 10}, attempt)
                logged = steps(folder)
                assert logged == sorted(set(logged))
                if attempt < len(rollbacks) and step == rollbacks[attempt]:
                    attempt, step = attempt + 1, saved[0]
                    log.rewind(step, attempt)
                elif step % save_every == 0:
                    saved = (step, attempt)
            return
        except Killed:
            continue


@settings(max_examples=50, deadline=None)
@given(
    moments=st.lists(
        st.tuples(st.integers(1, 50), st.sampled_from([0.0, 0.3, 0.6, 0.99, 1.0])), max_size=8, unique_by=lambda m: m[0]
    ),
    save_every=st.integers(2, 7),
    rollbacks=st.lists(st.integers(1, 15), max_size=3).map(sorted),
    every=st.integers(1, 3),
)
def test_a_run_that_was_killed_leaves_the_files_of_one_that_was_not(
    moments: list[tuple[int, float]], save_every: int, rollbacks: list[int], every: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        simulate(whole, 15, save_every, rollbacks, every)
        with kills(moments):
            simulate(killed, 15, save_every, rollbacks, every)
        for file in (METRICS_FILE, REPLACED_FILE):
            assert read_metrics(killed / file) == read_metrics(whole / file)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond ``room`` bytes; the system writes as much of a row as fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 30])
def test_rows_that_find_no_space_are_written_when_there_is_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    log = open_log(tmp_path)
    log.log(1, VALUES)
    path = tmp_path / METRICS_FILE
    before = path.read_bytes()
    with full_disk(len(before) + room):
        for step in (2, 3, 4):
            log.log(step, VALUES)
            assert path.read_bytes() == before
        log.rewind(2, attempt=1)
        log.log(3, VALUES, attempt=1)
    assert [METRICS_FILE in message for message in caplog.messages].count(True) == 1
    log.log(4, VALUES, attempt=1)
    log.log(5, VALUES, attempt=1)
    assert flags(tmp_path) == [(1, None), (2, None), (3, 1), (4, 1), (5, None)]
    log.rewind(5, attempt=2)  # a kept row is written with the next one
    assert flags(tmp_path, REPLACED_FILE) == [(3, None), (4, None)]


def test_a_disk_that_fails_in_a_rollback_is_told_and_mended_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any) -> None:
        raise OSError(5, "Input/output error")

    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.log(step, VALUES)
    with monkeypatch.context() as patch:
        patch.setattr("polyglu.training.row_file.os.truncate", fail)
        log.rewind(1, attempt=1)
    assert "Input/output error" in caplog.text
    for step in (2, 3, 4):
        log.log(step, VALUES, attempt=1)
    open_log(tmp_path, start_step=3)
    assert flags(tmp_path) == [(1, None), (2, 1), (3, 1)]


def test_events_survive_resumes_and_torn_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / EVENTS_FILE
    assert read_events(path) == []
    log = open_log(tmp_path)
    with caplog.at_level(logging.INFO, logger="polyglu.training.metrics"):
        log.event(1234, "quiet", "Nothing is wrong.")
        log.event(1235, "spike", "The loss is high.", "warning")
        log.event(1236, "rollback", "Back to step 1,000.", "error")
    console = [("INFO", "step 1,234: Nothing is wrong."), ("WARNING", "step 1,235: The loss is high."),
               ("ERROR", "step 1,236: Back to step 1,000.")]  # fmt: skip
    assert [(record.levelname, record.message) for record in caplog.records] == console
    with open(path, "a") as file:
        file.write('{"time": "20')
    assert len(read_events(path)) == 3
    open_log(tmp_path, start_step=1000).event(1001, "again", "Resumed.")
    open_log(tmp_path)
    events = read_events(path)
    assert [(event["step"], event["kind"], event["level"]) for event in events] == [
        (1234, "quiet", "note"), (1235, "spike", "warning"), (1236, "rollback", "error"), (1001, "again", "note"),
    ]  # fmt: skip
    assert events[1]["message"] == "The loss is high."
    assert abs(datetime.fromisoformat(events[0]["time"]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_sync_and_close_flush_the_rows_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    log.log(1, VALUES)
    flushed: list[Path] = []
    monkeypatch.setattr("polyglu.training.row_file.flush", flushed.append)
    log.sync()
    log.close()
    assert flushed == [tmp_path / METRICS_FILE] * 2


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
    parts = ("step 40/100", "loss 2.5000", "lr 1.00e-03", "tau 0.700", "12,345 tok/s")
    shares = ("MFU 25.0% (30.0% with attention)", "mem 1.50 GB")
    assert line == " | ".join([*parts, *shares, "entropy 1.386 static 0.900 dynamic", "00:02:00 left"])


def test_model_without_routing_shows_no_entropy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="polyglu.training.metrics"):
        open_log(tmp_path).log(1, VALUES)
    assert "entropy" not in caplog.text


@pytest.mark.parametrize(("total", "shown"), [(0.0, False), (3.0, True)])
def test_skipped_steps_are_shown_if_there_are_any(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, total: float, shown: bool
) -> None:
    with caplog.at_level(logging.INFO, logger="polyglu.training.metrics"):
        open_log(tmp_path).log(1, VALUES | {"train/skipped_steps": total})
    assert ("| skipped 3 |" in caplog.text) == shown and ("skipped" in caplog.text) == shown


def test_only_rank_0_writes(tmp_path: Path) -> None:
    values: dict[str, Any] = {"training": {"run_dir": str(tmp_path / "run")}, "wandb": {"mode": "disabled"}}
    config = TrainConfig.model_validate(values)
    assert open_metrics(config, rank=1, start_step=0, total_steps=1) is None
    assert not (tmp_path / "run").exists()
    log = open_metrics(config, rank=0, start_step=0, total_steps=1)
    assert log is not None and log.wandb_id is None
    assert TrainConfig.model_validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text())) == config
