"""Progress of long work, drawn on stderr."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def tracked(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    return track(items, description, console=Console(stderr=True))
