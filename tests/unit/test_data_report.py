import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from html_page import HtmlPage
from support import EOS, write_sealed, write_token_source

from polyglu.data.chunks import open_source
from polyglu.data.statistics import scan_documents
from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.data_figure import draw
from polyglu.data_report import build_report, find_sources, main
from polyglu.errors import PolygluError

DOCUMENTS = {
    "code": [[1, 2, 3], [4], [1, 2, 3], [5] * 11],
    "math": [[4], [4], [6, 7]],
}


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Two sources and things that are none."""
    for name, documents in DOCUMENTS.items():
        tokens = [token for document in documents for token in [*document, EOS]]
        write_token_source(tmp_path / "all" / name, tokens, chunk_tokens=6)
    (tmp_path / "all/notes").mkdir()
    (tmp_path / "all/notes/a.txt").write_text("nothing")
    (tmp_path / "all/b.txt").write_text("nothing")
    return tmp_path / "all"


def spoil(folder: Path, **changed: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("sha256", "format_version"):
        manifest.pop(key)
    write_sealed(folder, {**manifest, **changed})


def report(parent: Path, seq_length: int = 4) -> dict:
    sources, _ = find_sources(parent)
    return build_report(sources, [scan_documents(source) for source in sources], seq_length)


def test_numbers_of_each_source_and_of_all(parent: Path) -> None:
    numbers = report(parent)
    code, math, total = numbers["sources"]["code"], numbers["sources"]["math"], numbers["total"]
    assert (code["tokens"], code["documents"], code["length"]["max"], code["length"]["mean"]) == (22, 4, 12, 5.5)
    assert code["repeats"] == {
        "documents": 1, "tokens": 4, "documents_of_other_sources": 0, "tokens_of_other_sources": 0,
        "documents_share": 1 / 4, "tokens_share": 4 / 22,
        "documents_of_other_sources_share": 0, "tokens_of_other_sources_share": 0,
    }  # fmt: skip
    assert math["repeats"] == {
        "documents": 2, "tokens": 4, "documents_of_other_sources": 1, "tokens_of_other_sources": 2,
        "documents_share": 2 / 3, "tokens_share": 4 / 7,
        "documents_of_other_sources_share": 1 / 3, "tokens_of_other_sources_share": 2 / 7,
    }  # fmt: skip
    # Windows of 4 end at 4 (a document's end), 8, 12, 16 and 20; documents end at 4, 6, 10 and 22.
    assert code["windows"] == {
        "windows": 5, "cutting": 4, "documents_cut": 2, "documents_longer": 1,
        "cutting_share": 4 / 5, "documents_cut_share": 2 / 4,
    }  # fmt: skip
    assert total["tokens"] == 29 and total["documents"] == 7 and total["length"]["p50"] == 3
    assert total["repeats"]["documents"] == 3 and total["repeats"]["documents_share"] == 3 / 7
    assert total["windows"]["windows"] == 6 and total["windows"]["cutting_share"] == 4 / 6
    assert sum(total["histogram"]["tokens"]) == 29 and sum(total["histogram"]["documents"]) == 7


def test_no_window_no_share_of_windows(parent: Path) -> None:
    numbers = report(parent, seq_length=4096)
    assert numbers["sources"]["code"]["windows"]["cutting_share"] is None
    assert numbers["total"]["windows"]["documents_cut_share"] == 0


def test_the_command_writes_json_and_picture_and_shows_a_row_a_source(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(parent / "math", bad_records={"not_utf8": 7})
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    main(parent, seq_length=4, samples=0, tokenizer=None, output=tmp_path / "out")
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in ("code", "math", "all")) and "7 not_utf8" in shown
    written = json.loads((tmp_path / "out/report.json").read_text())
    numbers = json.loads(json.dumps(report(parent)))
    assert written == {**numbers, "left_out": {}}
    picture = (tmp_path / "out/report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    page = HtmlPage((tmp_path / "out/report.html").read_text())
    assert page.images[0]["src"].endswith(base64.b64encode(picture).decode())
    assert {"29 tokens in 7 documents, of code, math.", "80.00%", "42.86%", "7 not_utf8"} <= set(page.texts)
    rows = page.texts[page.texts.index("code") :]
    assert rows[:8] == ["code", "22", "4", "6", "2", "4", "11", "12"]
    told = [text for _, _, text in page.data[0]]
    assert "code: 22 tokens" in told and "math, repeated documents: 66.67%" in told
    assert "code: 50.00% of its documents\n4 to 5 tokens long" in told
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before


def test_one_source_alone(parent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(parent / "code")
    main(Path("."), seq_length=4, samples=0, tokenizer=None, output=None)
    assert "│ code " in capsys.readouterr().out
    assert list(json.loads((parent / "code/report.json").read_text())["sources"]) == ["code"]
    main(Path("."), seq_length=4, samples=0, tokenizer=None, output=None)  # a report is in the way of no report


def test_samples_are_decoded_if_the_tokenizer_is_to_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"sample [bold] {index}" for index in range(5)]
    tokenizer = train_bpe(texts, 270, tmp_path / "bpe")

    def write(name: str, tokenizer: Tokenizer) -> None:
        tokens = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
        folder = write_token_source(tmp_path / "all" / name, tokens, vocab_size=300)
        entry = {**tokenizer.identity(), "vocab_size": 300, "eos_id": tokenizer.eos_id}
        spoil(folder, tokenizer=entry)

    write("here", tokenizer)
    write("gone", train_bpe(texts, 270, tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    main(tmp_path / "all", seq_length=8, samples=2, tokenizer=None, output=None)
    shown = capsys.readouterr().out
    assert "sample [bold] 0" in shown and "sample [bold] 4" in shown and "gone: no samples: tokenizer" in shown
    numbers = json.loads((tmp_path / "all/report.json").read_text())["sources"]
    assert [sample["document"] for sample in numbers["here"]["samples"]] == [0, 4]
    page = HtmlPage((tmp_path / "all/report.html").read_text())
    assert "sample [bold] 4" in " ".join(page.texts) and any("gone has no samples" in text for text in page.texts)
    assert numbers["gone"]["samples"] == [] and "--tokenizer" in numbers["gone"]["no_samples"]
    main(tmp_path / "all", seq_length=8, samples=1, tokenizer=str(tmp_path / "bpe"), output=None)
    numbers = json.loads((tmp_path / "all/report.json").read_text())["sources"]
    assert all(numbers[name]["samples"][0]["text"].startswith(texts[0]) for name in ("here", "gone"))


def test_unfinished_data_beside_others_is_left_out_and_named(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(parent / "code", complete=False, chunks=[], tokens=0, documents=0)
    main(parent, seq_length=4, samples=0, tokenizer=None, output=None)
    assert "code is left out" in capsys.readouterr().out
    written = json.loads((parent / "report.json").read_text())
    assert list(written["sources"]) == ["math"] and "interrupted" in written["left_out"]["code"]
    assert any("code is left out" in text for text in HtmlPage((parent / "report.html").read_text()).texts)
    with pytest.raises(PolygluError, match="interrupted"):
        find_sources(parent / "code")
    spoil(parent / "math", complete=False, chunks=[], tokens=0, documents=0)
    with pytest.raises(PolygluError, match="code was interrupted"):
        find_sources(parent)


def test_a_folder_without_data_is_refused(parent: Path, tmp_path: Path) -> None:
    for folder in (parent / "notes", tmp_path / "nowhere"):
        with pytest.raises(PolygluError, match="holds no tokenised data"):
            main(folder, seq_length=4, samples=0, tokenizer=None, output=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(PolygluError, match="is a file"):
        main(parent, seq_length=4, samples=0, tokenizer=None, output=tmp_path / "file")


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_picture_shows_every_source_with_units(tmp_path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(count):
        lengths = rng.integers(1, 300, 40)
        tokens = np.concatenate([[*rng.integers(1, 60, length), EOS] for length in lengths])
        write_token_source(tmp_path / f"source_{index}", tokens)
    sources, _ = find_sources(tmp_path)
    numbers = build_report(sources, [scan_documents(open_source(source.folder)) for source in sources], 64)
    figure = draw(numbers)
    figure.canvas.draw()
    documents, tokens_panel, sizes, shares = figure.subfigs[0].axes
    assert [panel.get_xlabel() for panel in (documents, tokens_panel)] == ["length of the document (tokens)"] * 2
    for panel, key in ((documents, "documents"), (tokens_panel, "tokens")):
        assert len(panel.patches) == count and panel.get_ylabel() == f"share of the source's {key}"
        for patch, one in zip(panel.patches, numbers["sources"].values(), strict=True):
            values, edges, _ = patch.get_data()
            assert values.sum() == pytest.approx(1) and edges.tolist() == numbers["length_edges"]
            np.testing.assert_allclose(values * one[key], one["histogram"][key])
    assert sorted(bar.get_width() for bar in sizes.patches) == sorted(
        one["tokens"] for one in numbers["sources"].values()
    )
    assert len(shares.patches) == 4 * count and sizes.get_xlabel() == "tokens"
    first = list(numbers["sources"].values())[0]
    assert [bar.get_height() for bar in shares.patches[:4]] == [
        first["windows"]["cutting_share"], first["windows"]["documents_cut_share"],
        first["repeats"]["documents_share"], first["repeats"]["tokens_share"],
    ]  # fmt: skip


def test_names_of_sources_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    names = ["[bold]", "$a_{$", "_hidden"]
    sources = [open_source(write_token_source(tmp_path / name, [5, 6, 0, 7, 0])) for name in names]
    main(tmp_path, seq_length=4, samples=0, tokenizer=None, output=None)
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in names)
    figure = draw(build_report(sources, [scan_documents(source) for source in sources], 4))
    labels = [text.get_text().replace("\\$", "$").strip() for text in figure.subfigs[0].legends[0].get_texts()]
    assert set(names) < set(labels)
