import logging

import pytest

from polyglu.evaluation import progress as progress_module
from polyglu.evaluation.progress import progress


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_a_log_gets_a_line_now_and_then_with_the_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress("generating", 1000) as advance:
        for _ in range(100):
            clock.now += 6
            advance(1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 20 and lines[0] == "generating: 5 of 1000, about 1:39:30 left"
    assert lines[-1] == "generating: 100 of 1000, about 1:30:00 left"


def test_a_terminal_shows_a_bar_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("generating", 4) as advance:
        advance(3)
        advance(1)
    said = capsys.readouterr().err
    assert "generating" in said and "4/4" in said and "left" in said


def test_nothing_to_do_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress("generating", 0) as advance:
        clock.now += 1000
        advance(0)
    assert not caplog.records
