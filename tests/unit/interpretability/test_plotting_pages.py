import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from polyglu.interpretability.plotting import SERIES_COLOURS, titled_figure
from polyglu.interpretability.plotting_pages import Point, page_figure
from polyglu.model.activations import ACTIVATIONS
from polyglu.page import Figure as PageFigure

DARK_CARD = np.array([0x1D, 0x20, 0x27]) / 255
"""``--card`` of the page's style, in the dark."""


def pixels(png: bytes | None) -> Any:
    assert png is not None
    return imread(io.BytesIO(png))


def at(image: Any, mark: Any) -> Any:
    """Colour ``[4]`` where a mark is."""
    height, width = image.shape[:2]
    return image[int(mark.y * height), int(mark.x * width)]


def luminance(rgb: Any) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def drawn(colour: str) -> PageFigure:
    """A figure with a bar over half of its panel, from the bottom."""
    figure, body = titled_figure("Title", 4, 3, "caption")
    panel = body.subplots()
    panel.bar([1], [1], width=2, color=colour)
    panel.set(xlim=(0, 2), ylim=(0, 2))
    points = [Point(panel, x, y, f"{x}, {y}") for x, y in ((1, 0.5), (1, 1.5), (0, 0), (2, 2), (99, 0))]
    return page_figure(figure, "a bar", points=points)


def test_points_are_where_they_are_drawn() -> None:
    bar = drawn("#ff0000")
    assert [mark.text for mark in bar.marks] == ["1, 0.5", "1, 1.5", "0, 0", "2, 2"]  # without the one out of sight
    image = pixels(bar.png)
    inside, above, low, high = bar.marks
    assert at(image, inside)[:3] == pytest.approx([1, 0, 0]) and at(image, above)[:3] == pytest.approx([1, 1, 1])
    assert inside.y > above.y and low.x < inside.x < high.x
    assert inside.y == pytest.approx((3 * low.y + high.y) / 4, abs=1e-3)


def test_the_dark_picture_has_no_background_and_light_text() -> None:
    bar = drawn("#ff0000")
    light, dark = pixels(bar.png), pixels(bar.dark)
    assert light.shape == dark.shape
    assert at(dark, bar.marks[1])[3] == 0 and light[..., 3].min() == 1
    left, bottom = bar.marks[2].x * dark.shape[1], bar.marks[2].y * dark.shape[0]
    numbers, title, caption = dark[: int(bottom), : int(left) - 8], dark[: len(dark) // 12], dark[int(bottom) + 8 :]
    for texts, least in ((numbers, 0.9), (title, 0.9), (caption, 0.55)):  # a caption is grey
        solid = texts[texts[..., 3] > 0.95][:, :3]
        assert len(solid) > 20 and solid.min() > least


@pytest.mark.parametrize("colour", [*SERIES_COLOURS, *(activation.colour for activation in ACTIVATIONS)])
def test_colours_can_be_told_from_either_background(colour: str) -> None:
    bar = drawn(colour)
    for png, paper in ((bar.png, np.ones(3)), (bar.dark, DARK_CARD)):
        low, high = sorted([luminance(at(pixels(png), bar.marks[0])[:3]), luminance(paper)])
        assert (high + 0.05) / (low + 0.05) >= (1.9 if png is bar.png else 3)


def test_greys_of_an_image_turn_dark_and_colours_stay() -> None:
    figure = Figure(figsize=(2, 2))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow([[[0.92, 0.92, 0.92], [0.9, 0.3, 0.2]]], aspect="auto")
    points = [Point(panel, 0, 0, "grey"), Point(panel, 1, 0, "red")]
    image = page_figure(figure, "two fields", points=points)
    grey, red = (at(pixels(image.dark), mark)[:3] for mark in image.marks)
    assert grey == pytest.approx([0.184] * 3, abs=0.01) and red == pytest.approx([0.9, 0.3, 0.2], abs=0.01)


def test_images_of_numbers_keep_their_colours() -> None:
    figure = Figure(figsize=(2, 2))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.imshow([[0.0, 1.0]], aspect="auto", cmap="viridis")
    made = page_figure(figure, "two fields", points=[Point(panel, 1, 0, "one")])
    assert at(pixels(made.dark), made.marks[0])[:3] == pytest.approx(at(pixels(made.png), made.marks[0])[:3])
