import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from html_page import HtmlPage
from matplotlib.image import imread
from models import sharp_model
from safetensors.torch import load_file

from polyglu.data.tokenizer import Tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.interpretability import EVOLUTION_FIGURE, NEURON_FILE, PAGE_FILE, TEXT_FIGURES, TEXT_FILE, text_report
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.interpretability.run_analysis import TextSettings, analyze, analyze_checkpoint
from polyglu.interpretability.text_analysis import analyze_texts, to_json
from polyglu.interpretability.texts import Texts
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, load_checkpoint, save_portable

FILES = {
    "neurotransmitter_heatmap.png",
    "layer_distribution.png",
    "entropy_per_layer.png",
    "entropy_histogram.png",
    "dynamic_routing_comparison.png",
    "routing_shift_summary.png",
    "entropy_stats.json",
}
SHAPE = {"d_model": 8, "d_ff": 7, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 4, "seq_length": 32}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(["one two three"], 260, tmp_path_factory.mktemp("tokenizer"))


def save_checkpoint(
    path: Path, tokenizer: Tokenizer, alpha: float = 1.0, tau: float = 0.1, step: int = 12, **changes: Any
) -> Path:
    shape = {**SHAPE, "vocab_size": tokenizer.vocab_size, "routing_scope": "causal", **changes}
    config = ModelConfig.model_validate(shape)
    model = create_model(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * alpha
    path.parent.mkdir(exist_ok=True)
    save_portable(path, model.state_dict(), config, step, tau, tokenizer.identity())
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"n_activations": 1},
        {"n_activations": 6, "n_layers": 3, "routing_scope": "sequence"},
        {"d_ff": 1, "n_activations": 2},
        {"n_layers": 40, "routing_scope": "document"},
        {"d_ff": 5000},
    ],
)
def test_seven_files_for_any_shape(tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer, **changes)
    stats = analyze_checkpoint(checkpoint, tmp_path / "figures", settings=None)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == FILES
    for path in map(Path, stats.pop("figures")):
        image = imread(path)
        assert image.shape[1] > 900
        assert image[..., :3].std() > 0.05
    written = json.loads((tmp_path / "figures/entropy_stats.json").read_text(), parse_constant=pytest.fail)
    assert written == stats
    config = ModelConfig.model_validate({**SHAPE, **changes})
    assert len(stats["per_layer_mean"]) == len(stats["static_shares"]) == config.n_layers
    assert stats["max_entropy"] == math.log(config.n_activations)
    for shares in (*stats["static_shares"], *stats["effective_shares"]):
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)


WORDS = ("alpha beta gamma", "one two three", "x = y + 1", "the cat sat")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of three kinds; two of them are of the same words."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, (first, second) in {"greek": (0, 1), "more": (1, 0), "code": (2, 2)}.items():
        texts = [f"{WORDS[first]} {index} {WORDS[second]} " * 3 for index in range(8)]
        (folder / f"{kind}.txt").write_text("\n\n".join(texts))
    return folder


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of few pixels are made quickly."""
    for module in ("plotting", "plotting_pages"):
        monkeypatch.setattr(f"polyglu.interpretability.{module}.DPI", 30)


@pytest.mark.usefixtures("coarse")
def test_texts_add_figures_numbers_neurons_and_a_page(tmp_path: Path, tokenizer: Tokenizer, kinds: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer, n_layers=2)
    other = save_checkpoint(tmp_path / "run/portable_step5.pt", tokenizer, n_layers=2, step=5, alpha=0.3)
    settings = TextSettings(kinds, documents=6, tokens=24, over=[str(other.parent)])
    found = analyze_checkpoint(checkpoint, tmp_path / "figures", settings=settings)
    added = {*TEXT_FIGURES, TEXT_FILE, NEURON_FILE, PAGE_FILE}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == FILES | added
    written = json.loads((tmp_path / "figures" / TEXT_FILE).read_text(), parse_constant=pytest.fail)
    assert written == found["text_routing"]
    assert written["texts"]["kinds"] == {"code": 6, "greek": 6, "more": 6}
    assert written["static_preference"]["sentence"] in written["sentences"]
    for layer in written["layers"]:
        for shares in (*layer["shares_by_kind"].values(), layer["dominant"]):
            assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert sum(part["estimate"] for part in layer["variance"]["components"].values()) == pytest.approx(1)
    assert [one["step"] for one in written["over_training"]["checkpoints"]] == [5, 12]
    neurons = load_file(tmp_path / "figures" / NEURON_FILE)
    assert neurons["mean_weights"].shape == (2, 7, 4) and neurons["dominant"].shape == (2, 7)
    page = HtmlPage((tmp_path / "figures" / PAGE_FILE).read_text())
    assert len(page.images) == len(TEXT_FIGURES) + 6
    routes = [data for data in page.data if isinstance(data, dict)]
    assert [route["layers"] for route in routes] == [2, 2, 2] and len(routes[0]["dominant"]) == 2 * 24


@pytest.mark.usefixtures("coarse")
def test_one_snapshot_is_not_drawn_as_training(tmp_path: Path, tokenizer: Tokenizer, kinds: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer)
    settings = TextSettings(kinds, documents=2, tokens=24, over=[str(checkpoint)])
    found = analyze_checkpoint(checkpoint, tmp_path / "figures", settings=settings)["text_routing"]
    assert not (tmp_path / "figures" / EVOLUTION_FIGURE).exists()
    assert "one does not show how routing changes over time" in found["sentences"][-1]
    assert "Over training" not in (tmp_path / "figures" / PAGE_FILE).read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_ff": 9}, "its d_ff is 9, that of .*model.pt is 7"),
        ({"n_q_heads": 1}, "its n_q_heads is 1"),  # its preferences have the same shape
        ({"routing_scope": "sequence"}, "its routing_scope is sequence"),
        ({"ffn": "swiglu"}, "its ffn is swiglu"),
    ],
)
def test_checkpoints_of_another_run_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, kinds: Path, changes: dict[str, Any], said: str
) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer)
    other = save_checkpoint(tmp_path / "other.pt", tokenizer, step=5, **changes)
    with pytest.raises(PolygluError, match=f"--over {other}: {said}.*; give checkpoints of one run"):
        analyze_checkpoint(checkpoint, tmp_path / "figures", settings=TextSettings(kinds, 2, 24, [str(other)]))
    assert not (tmp_path / "figures").exists()


def test_checkpoints_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer, kinds: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer)
    foreign = train_bpe(["four five six"], 260, tmp_path / "foreign")
    assert foreign.vocab_size == tokenizer.vocab_size
    other = save_checkpoint(tmp_path / "other.pt", foreign, step=5)
    with pytest.raises(PolygluError, match=f"--over {other}: it was trained with another tokenizer"):
        analyze_checkpoint(checkpoint, tmp_path / "figures", settings=TextSettings(kinds, 2, 24, [str(other)]))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("shape", [(3, 7, 1), (1, 1, 6)])
def test_lone_activation_and_single_neuron_are_looked_at_too(shape: tuple[int, int, int]) -> None:
    n_layers, neurons, activations = shape
    model = sharp_model(n_layers=n_layers, d_ff=neurons, n_activations=activations, routing_scope="causal")
    tokens, labels = torch.arange(40).view(4, 10), torch.tensor([0, 0, 1, 1])
    analysis = analyze_texts(model, Texts(("a", "b"), tokens, labels, {}), stack_alpha(model), 0.5)
    json.dumps(to_json(analysis), allow_nan=False)
    figures = [drawn.on_page(name) for name, drawn in text_report.draw(analysis, "note", "caption").items()]
    assert len(figures) == 3 and figures[0].dark is not None and figures[2].dark is None
    assert any("layer 0" in mark.text for mark in figures[0].marks)


@pytest.mark.usefixtures("coarse")
def test_stats_identify_the_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer, routing_scope="sequence")
    stats = analyze_checkpoint(checkpoint, tmp_path / "figures", settings=None)
    assert stats["checkpoint"] == {
        "path": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "step": 12,
        "tau": 0.1,
    }
    assert stats["routing_scope"] == "sequence"


@pytest.mark.usefixtures("coarse")
def test_untrained_alpha_is_called_no_preference(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer, alpha=0.001)
    stats = analyze_checkpoint(checkpoint, tmp_path / "figures", settings=None)
    assert stats["without_static_preference"] == 1
    assert stats["static_preference"]["as_at_the_start"]
    assert stats["static_shares"] == [{"ReLU": 0, "Tanh": 0, "SiLU": 0, "GELU": 0, "no preference": 1}]


def test_effective_routing_follows_tau(tmp_path: Path, tokenizer: Tokenizer) -> None:
    means = []
    for tau in (1.0, 0.1):
        checkpoint = save_checkpoint(tmp_path / f"{tau}.pt", tokenizer, tau=tau)
        model, _, loaded_tau = load_checkpoint(checkpoint)
        analysis = analyze(model, tokenizer, loaded_tau)
        means.append(analysis.entropies["effective"].mean())
        # The untrained router says next to nothing, so that only alpha is left.
        torch.testing.assert_close(analysis.entropies["dynamic"], analysis.entropies["static"], atol=0.05, rtol=0)
    assert means[1] < means[0] / 2


def test_no_routing_is_refused_and_nothing_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint = save_checkpoint(tmp_path / "model.pt", tokenizer, ffn="swiglu")
    with pytest.raises(PolygluError, match="swiglu"):
        analyze_checkpoint(checkpoint, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_output_that_is_a_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    output = tmp_path / "figures"
    output.write_text("mine")
    with pytest.raises(PolygluError, match="is a file"):
        analyze_checkpoint(save_checkpoint(tmp_path / "model.pt", tokenizer), output)
    assert output.read_text() == "mine"


def test_command_says_in_one_sentence_what_is_missing(tmp_path: Path) -> None:
    command = [
        "-m",
        "polyglu.interpretability.run_analysis",
        "--checkpoint",
        "none.pt",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint none.pt does not exist")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()
