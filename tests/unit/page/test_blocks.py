from typing import Any

import pytest
from pages import routing_map

from polyglu.page import Column, Figure, RoutingMap, Table

PNG = b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR" + (300).to_bytes(4) + (200).to_bytes(4)


def test_rows_fit_the_columns() -> None:
    with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
        Table([Column("a"), Column("b")], [["x", 1], ["x"]])


def test_a_figure_has_a_size_and_a_text() -> None:
    assert Figure(PNG, "a map").size == (300, 200)
    for png, dark, alt in ((PNG, None, " "), (b"GIF", None, "a map"), (PNG, b"GIF", "a map")):
        with pytest.raises(ValueError):
            Figure(png, alt, dark=dark)


GOOD: dict[str, Any] = {
    "tokens": ["a", "b"],
    "activations": [("x", "#000000"), ("y", "#ffFF00")],
    "shares": [[[0.5, 0.5]], [[1, 0]]],
    "dominant": [[2], [0]],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ["a"]},
        {"dominant": [[2]]},
        {"dominant": [[2], [3]]},
        {"dominant": [[2], [-1]]},
        {"dominant": [[2], [0, 1]]},
        {"shares": [[[0.5, 0.5]], []]},
        {"shares": [[[0.5, 0.5]], [[1]]]},
        {"shares": [[[0.5, 0.5]], [[1.01, 0]]]},
        {"shares": [[[0.5, 0.5]], [[1, -0.01]]]},
        {"shares": [[[0.5, 0.5]], [[float("nan"), 0]]]},
        {"activations": [("x", "#000000"), ("y", "red;}")]},
        {"tokens": [], "shares": [], "dominant": []},
        {"shares": [[], []], "dominant": [[], []]},
    ],
)
def test_a_routing_map_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    RoutingMap(**GOOD)
    with pytest.raises(ValueError):
        RoutingMap(**{**GOOD, **changes})


def test_a_routing_map_is_also_a_table() -> None:
    table = routing_map(["a", "b", "c", "d", "e", "f"], 2).by_layer
    assert [column.title for column in table.columns] == ["layer", "ReLU", "Tanh", "SiLU", "none preferred"]
    # Token 4, which would be Tanh in layer 0 and SiLU in layer 1, prefers none.
    assert table.rows == [[0, 2 / 6, 1 / 6, 2 / 6, 1 / 6], [1, 2 / 6, 2 / 6, 1 / 6, 1 / 6]]
