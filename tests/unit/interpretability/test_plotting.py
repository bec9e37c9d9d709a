import io

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from polyglu.interpretability import plotting
from polyglu.model.activations import ACTIVATIONS


def test_heatmap_shows_each_preference_in_its_colour() -> None:
    decided = torch.eye(4)[None]  # one layer, neuron n prefers activation n entirely
    undecided = torch.full((1, 4, 4), 0.25)
    figure = plotting.neurotransmitter_heatmap(decided, undecided, "")
    image = figure.subfigs[0].axes[0].images[0].get_array().tolist()
    for column, activation in enumerate(ACTIVATIONS[:4]):
        assert image[0][column] == pytest.approx(to_rgb(activation.colour), abs=1e-6)
    other = figure.subfigs[0].axes[1].images[0].get_array().tolist()
    assert other[0][0] == pytest.approx(to_rgb(plotting.NO_PREFERENCE[1]), abs=1e-6)


def test_each_layer_of_the_heatmap_is_its_own() -> None:
    """Layer n's neurons all prefer activation n; the first layer stands on top, as the axis says."""
    weights = torch.eye(4)[:3, None].expand(3, 5, 4)
    panel = plotting.neurotransmitter_heatmap(weights, weights.flip(0), "").subfigs[0].axes[0]
    for layer, row in enumerate(panel.images[0].get_array().tolist()):
        assert all(colour == pytest.approx(to_rgb(ACTIVATIONS[layer].colour), abs=1e-6) for colour in row)
    assert panel.images[0].get_extent()[2] > panel.images[0].get_extent()[3]


def test_many_neurons_are_binned() -> None:
    weights = torch.randn(2, 20_000, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    figure = plotting.neurotransmitter_heatmap(weights, weights, "")
    assert figure.subfigs[0].axes[0].images[0].get_array().shape == (2, plotting.MAP_COLUMNS, 3)


def test_stacked_bars_fill_the_axis() -> None:
    weights = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    figure = plotting.layer_distribution(weights, weights, "")
    for panel in figure.subfigs[0].axes:
        tops = [bar.get_y() + bar.get_height() for bar in panel.patches]
        assert max(tops) == pytest.approx(1, abs=1e-5)


def test_legend_names_activations_and_transmitters() -> None:
    weights = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    figure = plotting.layer_distribution(weights, weights, "")
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == [f"{a.name} ({a.transmitter})" for a in ACTIVATIONS] + ["no preference"]


def test_histogram_counts_every_neuron_at_the_maximum() -> None:
    maximum = 1.3862943611198906
    figure = plotting.entropy_histogram({"static": torch.full((2, 9), maximum + 1e-7)}, maximum, "")
    heights = [bar.get_height() for bar in figure.subfigs[0].axes[0].patches]
    assert sum(heights) == pytest.approx(1)


@pytest.mark.parametrize("n_layers", [1, 7, 28, 100])
def test_layer_ticks_are_few(n_layers: int) -> None:
    figure = plotting.entropy_per_layer({"static": torch.rand(n_layers, 3)}, 1.4, "")
    ticks = figure.subfigs[0].axes[0].get_xticks()
    assert 1 <= len(ticks) <= 15
    assert ticks[0] == 0
    assert ticks[-1] < n_layers


def test_png_is_an_image() -> None:
    figure = plotting.curves({"loss": ([1, 2, 3], [3.0, 2.0, 1.5]), "other": ([1], [2.0])}, "Loss", "nats")
    image = imread(io.BytesIO(plotting.to_png(figure)))
    assert image.shape[:2] == (480, 780)


@pytest.mark.parametrize("name", ["a $b", "$x^{$", "\\$1 and $\\frac$", "_hidden", "$a$ $b$", "\ufffd"])
def test_names_are_no_formulas_and_stay_in_the_legend(name: str) -> None:
    figure, body = plotting.titled_figure("t", 6, 4, name)
    panel = body.subplots()
    panel.plot([1, 2], label=plotting.literal(name))
    panel.set_yticks([1], [plotting.literal(name)])
    plotting.figure_legend(body, panel)
    assert plotting.to_png(figure).startswith(b"\x89PNG")
    shown = [*body.legends[0].get_texts(), *panel.get_yticklabels()]
    assert [text._preprocess_math(text.get_text()) for text in shown] == [(name.replace("_", " _"), False)] * 2


def test_what_cannot_be_drawn_is_replaced() -> None:
    name = plotting.literal("a\udcff\x1b\nb")
    assert name == "a\ufffd\ufffd\nb"
    assert plotting.to_png(plotting.titled_figure("t", 6, 4, "\udcff")[0]).startswith(b"\x89PNG")
