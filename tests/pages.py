"""A page with one of everything, for tests."""

import math
from collections.abc import Callable

from polyglu.page import (
    Cell,
    Code,
    Column,
    Fact,
    Facts,
    Figure,
    Gallery,
    Mark,
    Note,
    Page,
    Paragraph,
    RoutingMap,
    Section,
    Table,
)

ACTIVATIONS = (("ReLU", "#d1495b"), ("Tanh", "#2e86ab"), ("SiLU", "#edae49"))
ROWS = (("b", 10.0), ("a", 9.5), ("d", None), ("c", 9.5), ("e", 1e-7), ("f", -3.0), ("g", math.nan), ("h", -20.0))


def routing_map(tokens: list[str], n_layers: int, name: str = "ReLU") -> RoutingMap:
    """At token t, layer l: all to activation (t + l) % 3, or a bit less at odd tokens; none is preferred at token 4."""
    shares, dominant = [], []
    for index in range(len(tokens)):
        least = 0.0 if index % 2 == 0 else 0.1
        chosen = [(index + layer) % 3 for layer in range(n_layers)]
        shares.append([[1 - 2 * least if k == choice else least for k in range(3)] for choice in chosen])
        dominant.append([3] * n_layers if index == 4 else chosen)
    return RoutingMap(tokens, [(name, ACTIVATIONS[0][1]), *ACTIVATIONS[1:]], shares, dominant, "A text.")


def full_page(png: bytes, dark: bytes, text: Callable[[str], str] = lambda usual: usual) -> Page:
    """Every kind of block with every kind of content; ``text`` may change all texts."""
    rows = [[text(name), value, Cell(text("high"), tone="good")] for name, value in ROWS]
    numbers = [Column(text("name")), Column(text("loss"), text("nats"), "number", ".3f"), Column(text("verdict"))]
    wide = [Column(text(f"column number {index}"), kind="code") for index in range(9)]
    wide_caption = text("A caption of many words, which is wider than a phone and stays in sight: " + "word " * 20)
    figures = [
        Figure(png, text("A curve that falls"), text("Loss"), dark, [Mark(0.5, 0.25, text("step 7"))]),
        Figure(png, text("A map"), wide=True),
    ]
    first = Section(
        text("Tables"), [Table(numbers, rows, text("Losses")), Table(wide, [[text("cell\n  one")] * 9], wide_caption)]
    )
    second = Section(text("Figures"), [figures[1], Gallery([figures[0]] * 2)])
    third = Section(
        text("Texts"),
        [
            Paragraph(text("Words.")),
            *(Note(text(tone or "plain"), tone) for tone in ("", "good", "warn", "bad")),
            Code(text("config"), text("a: 1\n  b: 2")),
            routing_map([text(token) for token in (" the", "\n", "sum", "<b>", " of", "\t")], 5, text("ReLU")),
        ],
    )
    facts = [Fact(text("loss"), text("3.25"), text("nats")), Fact(text("time"), text("9 s"))]
    return Page(text("A run"), text("What it is."), [first, second, third, Section("left out", [])], [Facts(facts)])
