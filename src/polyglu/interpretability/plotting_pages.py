"""Matplotlib figures as figures of a page: drawn for light and for dark pages, with the details of their points."""

import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.collections import Collection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from polyglu.interpretability.plotting import DPI, to_png
from polyglu.page import Figure as PageFigure
from polyglu.page import Mark

COLOURS = {
    Text: ("color",),
    Line2D: ("color", "markerfacecolor", "markeredgecolor"),
    Patch: ("facecolor", "edgecolor"),
    Collection: ("facecolor", "edgecolor"),
}
"""Kind of artist -> its properties that are colours."""
GREY = 0.02
"""Colours whose channels differ by less than this are greys."""
LEAST_LUMINANCE = 0.16
"""Of a colour on a dark page: its contrast there (WCAG 2.2) is then 3 or more."""


class Point(NamedTuple):
    """A point of a panel, in the panel's own units, and what is told when it is pointed at."""

    panel: Any
    x: float
    y: float
    text: str


def page_figure(
    figure: Figure, alt: str, caption: str = "", points: Iterable[Point] = (), wide: bool = False
) -> PageFigure:
    """Make a page's figure, in the colours of light and of dark pages.

    Args:
        figure: is drawn in dark colours afterwards: save it as a file before.
        alt: what it shows, for those who cannot see it.
        caption: below it.
        points: what tells more when pointed at.
        wide: keep it readable on a phone, where it then scrolls by itself.
    """
    light = to_png(figure)
    marks = _marks(figure, list(points))
    return PageFigure(light, alt, caption, dark=_dark_png(figure), marks=marks, wide=wide)


def _marks(figure: Figure, points: list[Point]) -> list[Mark]:
    """Points as shares of the figure's width and height, from the top left; those out of sight are left out."""
    marks = []
    for panel, x, y, text in points:
        across, up = panel.transData.transform((x, y)) / figure.bbox.size
        if 0 <= across <= 1 and 0 <= up <= 1:
            marks.append(Mark(float(across), float(1 - up), text))
    return marks


def _dark_png(figure: Figure) -> bytes:
    """Render without a background; light and dark greys change places, colours become as pale as it takes."""
    figure.draw_without_rendering()  # makes the axes' numbers
    for kind, properties in COLOURS.items():
        for artist in figure.findobj(kind):
            artist.set(**{name: _in_the_dark(getattr(artist, f"get_{name}")()) for name in properties})
    for image in figure.findobj(AxesImage):
        values = np.asarray(image.get_array())
        if values.ndim == 3:  # colours, not numbers that a colour map colours
            rgba = [_in_the_dark(row) for row in values]
            image.set_data(np.clip(np.reshape(rgba, (*values.shape[:2], 4)), 0, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


def _in_the_dark(colours: Any) -> Any:
    """One colour or several, as they are on a dark page."""
    changed = [_dark_colour(np.asarray(rgb), alpha) for *rgb, alpha in to_rgba_array(colours)]
    return changed if len(changed) != 1 else changed[0]


def _dark_colour(rgb: Any, alpha: float) -> tuple[float, ...]:
    if np.ptp(rgb) < GREY:
        rgb = 0.92 - 0.8 * rgb
    else:
        while _luminance(rgb) < LEAST_LUMINANCE:
            rgb = 0.95 * rgb + 0.05
    return (*rgb, alpha)


def _luminance(rgb: Any) -> float:
    """Relative luminance of sRGB values 0..1 (WCAG 2.2)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
