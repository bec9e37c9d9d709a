"""Reports as one HTML file: plain data in, a page out.

    Page(title, lead, sections of blocks) ──render──► one string: markup, style, script, figures, data

A page needs nothing but itself: no network, no other file. Its policy (Content-Security-Policy) allows no request, and
no script or style but its own. It follows the reader's light or dark setting, fits a phone, prints, and says in words
what its figures show. Without scripts it is complete but for sorting and for what is told when something is pointed at.

``blocks.py`` says what a page is made of; ``render.py`` makes the text, of ``page.html``, ``blocks.html``, ``page.css``
and ``page.js``.
"""

from polyglu.page.blocks import (
    Block,
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
    Tone,
    as_cell,
)
from polyglu.page.render import clean, render

__all__ = [
    "Block",
    "Cell",
    "Code",
    "Column",
    "Fact",
    "Facts",
    "Figure",
    "Gallery",
    "Mark",
    "Note",
    "Page",
    "Paragraph",
    "RoutingMap",
    "Section",
    "Table",
    "Tone",
    "as_cell",
    "clean",
    "render",
]
