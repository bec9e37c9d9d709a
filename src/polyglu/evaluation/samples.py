"""What was asked and answered, sample by sample, for reading: the first in the results, all in files beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyglu.files import write_text

VERDICTS = ("exact_match", "math_verify", "acc")
"""Metrics that say whether a sample is answered correctly, the first one that a task has."""


def samples_folder(output: Path) -> Path:
    """Where the samples of a results file are written."""
    return output.with_name(f"{output.stem}.samples")


def readable(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness logged of a sample, as plain values.

    Returns:
        ``doc_id``; ``prompt``; ``choices``, what each of several requests asks after it; ``output``: the answer, or of
        each choice log-likelihood and whether it is greedy; ``extracted`` by the ``filter``; ``target``; ``correct``;
        ``metrics``.
    """
    arguments, responses = sample["arguments"], sample["resps"]
    verdict = next((sample[metric] for metric in VERDICTS if metric in sample["metrics"]), None)
    several = len(responses) > 1
    kept = {
        "doc_id": sample["doc_id"],
        "prompt": arguments[0][0],
        "choices": [argument[-1] for argument in arguments] if several else None,
        "output": [response[0] for response in responses] if several else responses[0][0],
        "extracted": sample["filtered_resps"],
        "target": sample["target"],
        "filter": sample["filter"],
        "correct": None if verdict is None else bool(verdict),
        "metrics": {metric: sample[metric] for metric in sample["metrics"]},
    }
    return {key: plain(value) for key, value in kept.items()}


def plain(value: Any) -> Any:
    """Values that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write ``TASK.jsonl`` for each task, a sample with its document a line; of other tasks nothing stays."""
    written = set()
    for task, logged in samples.items():
        path = folder / f"{task.replace('/', '_')}.jsonl"
        rows = [readable(sample) | {"doc": plain(sample["doc"])} for sample in logged]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        written.add(path)
    for path in set(folder.glob("*.jsonl")) - written:
        path.unlink()
