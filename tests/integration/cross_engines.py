"""One run on changing engines and numbers of ranks, against the same run on each of them alone.

    python tests/integration/cross_engines.py FOLDER            prints what was trained, step by step, as JSON

Every change is a kill in a step after a checkpoint, and a resume by other processes. 0 ranks: the plain engine.
"""

import json
import sys
from pathlib import Path

import deepspeed  # noqa: F401  # once, not in every fork
import torture

UNINTERRUPTED = (0, 1, 2)
CHANGES = ((0, 7), (2, 4), (1, 5), (2, 3), (0, None))
"""Ranks, and steps until the kill; checkpoints are made every third step."""


def trained(folder: Path) -> dict[str, object]:
    """Step -> samples of all ranks (sorted) and the numbers in the log; samples of a step that came twice are equal."""
    samples: dict[int, set[tuple[int, ...]]] = {}
    per_rank = [torture.rows_of(path) for path in sorted(folder.glob("record_*.jsonl"))]
    for rows in per_rank:
        for row in rows:
            samples.setdefault(row["samples"][0] // torture.ROWS, set()).update((sample,) for sample in row["samples"])
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "samples": {step: sorted(sample for (sample,) in found) for step, found in sorted(samples.items())},
        "loss": [row["train/loss"] for row in rows],
        "grad_norm": [row["train/grad_norm"] for row in rows],
        "steps": [row["step"] for row in rows],
    }


def main(folder: Path) -> None:
    """Train everything."""
    torture.write_data(folder / "data")
    report = {}
    for ranks in UNINTERRUPTED:
        place = folder / f"ranks_{ranks}"
        place.mkdir()
        codes = torture.attempt(place, folder / "data", ranks, None)
        assert not any(codes), (ranks, codes)
        report[str(ranks)] = trained(place)
    place = folder / "changing"
    place.mkdir()
    for ranks, steps in CHANGES:
        moment = None if steps is None else {"kind": "after update", "step": steps, "rank": 0}
        codes = torture.attempt(place, folder / "data", ranks, moment)
        assert any(codes) == (moment is not None), (ranks, codes)
    report["changing"] = trained(place)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
