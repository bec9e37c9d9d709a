"""Whose an output folder is: runs of other settings or data must not be mixed with a suite's own.

Seeds count as settings. Adding some until a difference shows finds differences that are not there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyglu.compare.suite import Suite
from polyglu.data.chunks import open_source
from polyglu.errors import PolygluError
from polyglu.files import plain, read_json, write_json
from polyglu.training.train import open_sources

SUITE = "suite.json"


def identity(suite: Suite) -> dict[str, Any]:
    """What a suite's runs follow from, but for the data."""
    variants = {name: config.model_dump(mode="json") for name, config in suite.variants.items()}
    return {"settings": suite.settings.model_dump(mode="json"), "variants": variants}


def _digests(suite: Suite) -> dict[str, str]:
    first = next(iter(suite.variants.values()))
    held_out = {name: open_source(Path(folder), name) for name, folder in suite.settings.validation.items()}
    trained = {source.name: source for source in open_sources(first)}
    parts = (("training", trained), ("validation", held_out))
    return {f"{part}.{name}": source.digest for part, sources in parts for name, source in sources.items()}


def claim(suite: Suite, output: Path) -> None:
    """Write down whose folder it is, or compare, the data as well.

    Raises:
        PolygluError: in what they differ.
    """
    now = plain({**identity(suite), "data": _digests(suite)})
    if (output / SUITE).exists():
        _same(read_json(output / SUITE), now, output)
    else:
        write_json(output / SUITE, now)


def _same(before: Any, now: dict[str, Any], output: Path) -> None:
    changed = sorted(_differences(before, now, ""))
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise PolygluError(
            f"{output} has runs of another suite: it differs in {', '.join(changed[:4])}{more}. Give another "
            "--output, or remove the folder."
        )


def _differences(before: Any, now: Any, place: str) -> Iterator[str]:
    """Keys in which ``now`` differs; what only ``before`` has at the top is not compared."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield place or "everything"
        return
    keys = now.keys() if not place else before.keys() | now.keys()
    for key in keys:
        inner = f"{place}.{key}" if place else key
        yield from _differences(before.get(key), now.get(key), inner)
