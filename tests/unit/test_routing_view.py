import io
from pathlib import Path

import pytest
import torch
from models import random_tokens, sharp_model
from rich.console import Console

from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError
from polyglu.model.activations import ACTIVATIONS
from polyglu.routing_view import coloured, routed_layer, shares, token_weights

TAU = 20.0


@pytest.mark.parametrize("scope", ["causal", "document"])
def test_weights_are_the_mean_over_neurons_of_the_softmax(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyglu.routing_view.POSITIONS_AT_ONCE", 3)
    model, tokens = sharp_model(routing_scope=scope), random_tokens(7, 0)
    found = token_weights(model, tokens, TAU, layer=1)
    _, routing = model.features(torch.tensor([tokens]), tau=TAU)
    for position in range(7):
        at = routing[1][0, position if scope == "causal" else 0]
        expected = torch.softmax((model.layers[1].mlp.alpha + at) / TAU, dim=-1).mean(0)
        torch.testing.assert_close(found[position], expected, rtol=1e-5, atol=1e-6)
    assert (found[0] - found[-1]).abs().max() > 1e-3 or scope == "document"


def test_layers_that_cannot_be_shown_are_refused() -> None:
    assert [routed_layer(sharp_model(), layer) for layer in (None, 0, 1)] == [1, 0, 1]
    for layer in (-1, 2):
        with pytest.raises(PolygluError, match="layers 0 to 1"):
            routed_layer(sharp_model(), layer)
    with pytest.raises(PolygluError, match="ffn is 'swiglu', which routes nothing"):
        routed_layer(sharp_model(ffn="swiglu"), None)


def printed(text: object, **settings: object) -> str:
    file = io.StringIO()
    Console(file=file, highlight=False, width=200, **settings).print(text, soft_wrap=True)  # type: ignore[arg-type]
    return file.getvalue()


def test_each_token_has_the_colour_of_its_largest_weight(tmp_path: Path) -> None:
    tokenizer = train_bpe(["née"], 262, tmp_path)
    ids = tokenizer.encode("abé#c")
    assert len(ids) == 6  # é is two tokens
    weights = torch.eye(4)[[0, 1, 2, 3, 2]]  # the last token stands behind a full context
    text = coloured(tokenizer, ids, weights, [])
    assert text.plain == "abé#c"
    colours = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert colours == {
        "a": ACTIVATIONS[0].colour,
        "b": ACTIVATIONS[1].colour,
        "é": ACTIVATIONS[3].colour,
        "#": ACTIVATIONS[2].colour,
    }
    assert coloured(tokenizer, ids, weights, ["#"]).plain == "abé"
    terminal = {"force_terminal": True, "color_system": "truecolor"}
    assert "\x1b[38;2;209;73;91ma" in printed(text, **terminal)
    assert printed(text, no_color=True, **terminal) == printed(text) == "abé#c\n"


def test_the_legend_counts(tmp_path: Path) -> None:
    told = printed(shares(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.9, 0, 0]]), 5))
    assert "layer 5: routing of 3 new tokens" in told
    assert [line.split()[-4:-1:2] for line in told.splitlines() if "ReLU" in line] == [["66.7%", "0.467"]]
    assert printed(shares(torch.zeros(0, 4), 5)).count("0.0%") == 4  # nothing was added
