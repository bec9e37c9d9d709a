"""Tasks that go by one name, and the scores that were published for them."""

from collections.abc import Mapping
from typing import Any

from polyglu.errors import PolygluError

SUITES = {
    "paper": (
        "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "mmlu_stem", "lambada_openai",
        "openbookqa", "sciq",
    ),
}  # fmt: skip
"""Name -> tasks of the harness. ``paper``: those that the PolyGLU paper (arXiv 2603.13347) evaluates."""
PUBLISHED_SCORES = {"mmlu_stem": 25.28, "arc_easy": 41.04, "hellaswag": 28.51, "piqa": 58.87, "sciq": 61.20}
"""Per cent, of the published base model. Whether they are ``acc`` or ``acc_norm`` is not stated."""
PUBLISHED_PERPLEXITIES = {"math": 3.56, "code": 7.08, "stem": 31.93}
"""Of the published base model on its held-out text: source -> perplexity."""
PUBLISHED_NOTE = (
    "Published: the PolyGLU paper's base model. Whether a score is acc or acc_norm is not stated: the difference is to "
    "acc. Prompts and held-out text may differ too, so a difference is not a test."
)


def suite_tasks(name: str | None) -> tuple[str, ...]:
    """Tasks of a suite; none of None.

    Raises:
        PolygluError: no such suite.
    """
    if name is None:
        return ()
    if name not in SUITES:
        raise PolygluError(f"unknown suite '{name}'; there is {', '.join(SUITES)}.")
    return SUITES[name]


def beside_published(results: Mapping[str, Mapping[str, Any]], perplexity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put the paper's suite beside what was published of it.

    Args:
        results: of an evaluation: task -> metrics under the harness's keys.
        perplexity: of an evaluation: source -> numbers.

    Returns:
        A row of each task and source: ``name``; ``metric``, ``acc`` (per cent) or ``perplexity``; ``value`` with
        ``stderr``, and ``acc_norm``; ``published``; ``difference``, value - published. None stands for what was not
        evaluated, what there is not, and what was not published.
    """
    rows = []
    for task in SUITES["paper"]:
        found = results.get(task, {})
        acc, stderr, norm = (
            100 * found[key] if key in found else None for key in ("acc,none", "acc_stderr,none", "acc_norm,none")
        )
        rows.append(_row(task, "acc", acc, PUBLISHED_SCORES.get(task), stderr, norm))
    for source, published in PUBLISHED_PERPLEXITIES.items():
        rows.append(_row(source, "perplexity", perplexity.get(source, {}).get("perplexity"), published))
    return rows


def _row(
    name: str,
    metric: str,
    value: float | None,
    published: float | None,
    stderr: float | None = None,
    acc_norm: float | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "acc_norm": acc_norm,
        "published": published,
        "difference": None if value is None or published is None else value - published,
    }
