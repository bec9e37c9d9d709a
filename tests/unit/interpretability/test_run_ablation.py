import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from html_page import HtmlPage
from matplotlib.image import imread
from models import sharp_model

from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.interpretability.ablation import Condition, Intervention, Losses, as_trained
from polyglu.interpretability.ablation_report import in_words, summary
from polyglu.interpretability.run_ablation import ablate_checkpoint
from polyglu.model.model import save_portable

TEXTS = ["one two three", "three two one two", "two two", "", "one three one three one"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(TEXTS, 260, tmp_path_factory.mktemp("tokenizer"))


def save(path: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    shape = {"vocab_size": tokenizer.vocab_size, "seq_length": 8, "routing_scope": "causal", **settings}
    model = sharp_model(**shape)
    save_portable(path, model.state_dict(), model.config, 7, 0.3, tokenizer.identity())
    return path


def write(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels are made quickly."""
    for module in ("plotting", "plotting_pages"):
        monkeypatch.setattr(f"polyglu.interpretability.{module}.DPI", 30)


@pytest.mark.parametrize("by_layer", [True, False])
def test_report_of_a_checkpoint(tmp_path: Path, tokenizer: Tokenizer, by_layer: bool) -> None:
    checkpoint = save(tmp_path / "model.pt", tokenizer, routing_scope="sequence")
    output = tmp_path / "out"
    found = ablate_checkpoint(checkpoint, write(tmp_path / "texts.jsonl"), output, by_layer=by_layer)
    assert {path.name for path in output.iterdir()} == {"ablation.json", "ablation.png", "ablation.html"}
    assert json.loads((output / "ablation.json").read_text(), parse_constant=pytest.fail) == found
    assert found["checkpoint"]["step"] == 7 and found["routing_scope"] == "sequence"
    cut = [min(8, len(tokenizer.encode(text))) for text in TEXTS if text]
    assert (found["data"]["documents"], found["data"]["tokens"]) == (4, sum(cut))
    assert len(found["interventions"]) == 9
    assert all(("layers" in entry) == by_layer for entry in found["interventions"])
    assert len(found["sentences"]) == (3 if by_layer else 1)
    assert imread(output / "ablation.png")[..., :3].std() > 0.05
    page = HtmlPage((output / "ablation.html").read_text())
    assert len(page.images) == 1 and all(sentence in page.texts for sentence in found["sentences"])


@pytest.mark.parametrize(
    ("texts", "settings", "sentence"),
    [
        (["one two"], {}, "one document"),
        ([], {}, "no text to measure on"),
        (TEXTS, {"ffn": "swiglu"}, "no routing"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    tmp_path: Path, tokenizer: Tokenizer, texts: list[str], settings: dict[str, Any], sentence: str
) -> None:
    checkpoint = save(tmp_path / "model.pt", tokenizer, **settings)
    with pytest.raises(PolygluError, match=sentence):
        ablate_checkpoint(checkpoint, write(tmp_path / "texts.jsonl", texts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def losses(changes: torch.Tensor) -> Losses:
    """Of 12 documents of 10 tokens; ``changes`` ``[layers + 1, 12]`` per document: in all layers, in the first, ..."""
    names = ("freeze_layer", "freeze_neurons")
    places = [None, *range(len(changes) - 1)]
    conditions = [Condition(Intervention(name, name, as_trained), place) for place in places for name in names]
    own = torch.linspace(20, 30, 12, dtype=torch.float64)
    return Losses(conditions, own + changes.repeat_interleave(2, dim=0), own, torch.full((12,), 10))


def test_sentences_claim_what_the_intervals_show() -> None:
    noise = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = 0.1 * (noise - noise.mean(1, keepdim=True)) + torch.tensor([[0.5], [2.0], [-1.0], [0.0]])
    found = summary(losses(changes))
    entry = found["interventions"][0]
    assert entry["all_layers"]["change"]["estimate"] == pytest.approx(0.05)
    estimates = [layer["change"]["estimate"] for layer in entry["layers"]]
    assert estimates == pytest.approx([0.2, -0.1, 0.0], abs=1e-12)
    _, of_layers, _ = found["sentences"]
    assert (
        "Routing lowers the loss in layer 0: with one fixed mixture in that layer alone it rises by 0.2." in of_layers
    )
    assert "the loss falls by 0.1 in layer 1" in of_layers
    assert "no change of the loss is shown in layer 2: the change lies between -0.0" in of_layers
    for layer in entry["layers"]:
        wide, narrow = layer["simultaneous"], layer["change"]
        assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]
        assert layer["p"] <= layer["p_holm"] <= 1


def test_nothing_shown_is_said_to_be_nothing_shown() -> None:
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = summary(losses(noise - noise.mean(1, keepdim=True)))
    assert "no change of the loss is shown in any layer" in found["sentences"][1]
    assert "Holm" not in found["sentences"][1]
    assert in_words(found["interventions"], 12)[0].endswith("(12 documents).")
