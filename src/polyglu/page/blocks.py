"""What a page is made of. All texts are plain: what looks like markup in them is shown as it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tone = Literal["", "good", "warn", "bad"]
"""How a text is coloured. Colour alone says nothing: the text says the same."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table whose text is not simply its content.

    Args:
        text: what is shown.
        value: what it is sorted by; None: by its text, or last in a column of numbers.
        tone: of the text.
    """

    text: str
    value: float | None = None
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: heading.
        unit: in the heading, after the title.
        kind: ``text``; ``number`` (to the right, sorted by value); ``code`` (spaces and line ends are kept).
        spec: how numbers are written, as for ``format``: ``".3f"``, ``",d"``, ``".1%"``.
    """

    title: str
    unit: str = ""
    kind: Literal["text", "number", "code"] = "text"
    spec: str = ""


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort by each column. Where it is wider than the page, it scrolls by itself.

    Args:
        columns: the first is the heading of each row.
        rows: a cell is a text, a number, a ``Cell``, or None for nothing.
        caption: what the table shows.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str | float | None]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{len(row)} cells in a table of {len(self.columns)} columns")


@dataclass(frozen=True)
class Mark:
    """A place of a figure that tells more when pointed at.

    Args:
        x: from the figure's left edge, as a share of its width.
        y: from its top edge, as a share of its height.
        text: what is told.
    """

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Figure:
    """A picture.

    Args:
        png: the file's bytes, drawn on white.
        alt: what it shows, for those who cannot see it.
        caption: below it, for those who see it.
        dark: the same picture for dark pages, of the same size; without one, the page puts ``png`` on a pale card.
        marks: places that tell more when pointed at, or when stepped through with the arrow keys.
        wide: keep it readable on a phone, where it then scrolls by itself.

    Raises:
        ValueError: there is no alternative text, or the bytes are not a PNG file.
    """

    png: bytes
    alt: str
    caption: str = ""
    dark: bytes | None = None
    marks: Sequence[Mark] = ()
    wide: bool = False

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("a figure needs an alternative text")
        if not all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in (self.png, self.dark or self.png)):
            raise ValueError(f"the figure '{self.alt}' is not a PNG file")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return int.from_bytes(self.png[16:20]), int.from_bytes(self.png[20:24])


@dataclass(frozen=True)
class Gallery:
    """Small figures side by side, as many as fit."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Note:
    """A sentence that stands out: a verdict, a warning."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Fact:
    """One number worth being large: what it is, the number as text, and what explains it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """The few numbers that a reader wants first."""

    facts: Sequence[Fact]


@dataclass(frozen=True)
class Code:
    """Text whose spaces and line ends are kept, folded under a heading."""

    title: str
    text: str


@dataclass(frozen=True)
class RoutingMap:
    """Routing along a text: below each token one coloured field a layer, the first layer on top.

    Args:
        tokens: texts of the T tokens.
        activations: name and colour (``#rrggbb``) of each of the K activations.
        shares: ``[T, L, K]``, 0..1: how much of a layer's routing goes to each activation at a token.
        dominant: ``[T, L]``: the activation whose colour a field gets; K where none is preferred.
        caption: what it shows.

    Raises:
        ValueError: shapes do not fit, or a share is not in 0..1, or a colour or a dominant activation does not exist.
    """

    tokens: Sequence[str]
    activations: Sequence[tuple[str, str]]
    shares: Sequence[Sequence[Sequence[float]]]
    dominant: Sequence[Sequence[int]]
    caption: str = ""

    def __post_init__(self) -> None:
        n_layers, n_activations = self.n_layers, len(self.activations)
        if not n_layers or not len(self.tokens) == len(self.shares) == len(self.dominant):
            raise ValueError("a routing map needs tokens, and shares and a dominant activation for each")
        for layers, chosen in zip(self.shares, self.dominant, strict=True):
            if len(layers) != n_layers or len(chosen) != n_layers:
                raise ValueError(f"a token has {len(layers)} shares and {len(chosen)} activations of {n_layers} layers")
            if not all(len(shares) == n_activations and all(0 <= share <= 1 for share in shares) for shares in layers):
                raise ValueError(f"the shares of a layer are not {n_activations} numbers from 0 to 1")
            if not all(0 <= index <= n_activations for index in chosen):
                raise ValueError(f"a dominant activation is not one of 0..{n_activations}")
        if not all(_is_colour(colour) for _, colour in self.activations):
            raise ValueError("a colour is not of the form #rrggbb")

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.shares[0]) if len(self.shares) else 0

    @property
    def by_layer(self) -> Table:
        """The map in numbers: share of the tokens at which each activation is dominant, a row a layer."""
        names = [*(name for name, _ in self.activations), "none preferred"]
        columns = [Column("layer", kind="number"), *(Column(name, kind="number", spec=".1%") for name in names)]
        rows = []
        for layer, chosen in enumerate(zip(*self.dominant, strict=True)):
            rows.append([layer, *(chosen.count(index) / len(chosen) for index in range(len(names)))])
        return Table(columns, rows, "Share of the tokens at which each activation is dominant")


Block: TypeAlias = Paragraph | Note | Facts | Table | Figure | Gallery | Code | RoutingMap


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page. Sections without blocks are left out.

    Args:
        title: of the page.
        lead: what the page says, in a sentence or two.
        sections: its parts; with three or more, links to them stand at the top.
        blocks: what stands before the first section.
    """

    title: str
    lead: str = ""
    sections: Sequence[Section] = ()
    blocks: Sequence[Block] = ()


def as_cell(column: Column, content: Cell | str | float | None) -> Cell:
    """Text and value of a cell's content."""
    if isinstance(content, Cell):
        return content
    if content is None:
        return Cell("–")
    if isinstance(content, str):
        return Cell(content)
    return Cell(format(content, column.spec), float(content) if math.isfinite(content) else None)


def _is_colour(text: str) -> bool:
    return len(text) == 7 and text[0] == "#" and all(digit in "0123456789abcdefABCDEF" for digit in text[1:])
