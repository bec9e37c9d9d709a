import io
import sys

import pytest
from rich.progress import BarColumn
from rich.table import Table

from polyglu.logs import console, progress

ODD = "a[/x] [bold]b[/bold] :smile: [red"


def test_texts_stand_on_the_console_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[/head]", title=ODD)
    table.add_row(ODD)
    console().print(table)
    console(stderr=True).print(ODD)
    said = capsys.readouterr()
    assert said.out.count(ODD) == 2 and "[/head]" in said.out and said.err == f"{ODD}\n"


def test_a_bar_names_its_work_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with progress(BarColumn()) as bar:
        bar.advance(bar.add_task(ODD, total=1))
    assert ODD in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_written_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    console().print("a\udcff.pt")
    sys.stdout.flush()
    assert written.getvalue() == b"a\\udcff.pt\n"
