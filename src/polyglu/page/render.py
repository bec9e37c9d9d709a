"""A page's text. The markup is ``page.html`` (Jinja2, which escapes every text), beside it style and script."""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from polyglu.page.blocks import Mark, Page, RoutingMap, as_cell

HERE = Path(__file__).parent
PER_MILLE = 1000
"""Shares are kept as whole per mille."""
NON_CHARACTERS = "".join(chr(0x10000 * plane + low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
UNPRINTABLE = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef{NON_CHARACTERS}]")
"""What no page may contain: control characters but line end and tab, halves of surrogate pairs, non-characters."""
SPACES = str.maketrans({"\n": "↵", "\t": "⇥"})
"""How a token's line ends and tabs are shown."""


def render(page: Page) -> str:
    """Make the page.

    Returns:
        HTML that needs nothing else, and can be written as UTF-8 whatever texts it was given.
    """
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template("page.html")
    return template.render(page=page, style=style, script=script, policy=policy)


def clean(text: str) -> str:
    """Replace what a page may not contain: control characters by their pictures, the rest by U+FFFD."""
    return UNPRINTABLE.sub(_replacement, text)


def _replacement(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What is Markup is made here; all other texts come from outside.
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {
        "as_cell": lambda content, column: as_cell(column, content),
        "kind": lambda block: type(block).__name__,
        "data_uri": lambda png: Markup("data:image/png;base64," + base64.b64encode(png).decode()),
        "marks_data": _marks_data,
        "routing_data": _routing_data,
        "shown_token": lambda token: token.translate(SPACES),
    }
    return environment


def _digest(content: str) -> str:
    """How a policy names an allowed inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _marks_data(marks: list[Mark]) -> Markup:
    return _embedded([[round(mark.x, 4), round(mark.y, 4), clean(mark.text)] for mark in marks])


def _routing_data(routing: RoutingMap) -> Markup:
    """Shares of all tokens as one list, layer by layer and activation by activation."""
    flat = [round(PER_MILLE * share) for layers in routing.shares for shares in layers for share in shares]
    return _embedded(
        {
            "names": [clean(name) for name, _ in routing.activations],
            "colours": [colour for _, colour in routing.activations],
            "layers": routing.n_layers,
            "dominant": [index for chosen in routing.dominant for index in chosen],
            "shares": flat,
        }
    )


def _embedded(value: Any) -> Markup:
    """JSON that may stand in a script element: no character that could end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
