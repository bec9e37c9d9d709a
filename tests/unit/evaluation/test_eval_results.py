import json
import math
from pathlib import Path
from typing import Any

import pytest

from polyglu.errors import PolygluError
from polyglu.evaluation.results import read_results
from polyglu.evaluation.run_eval import _metrics

EACH = {"sha256": "0", "nats": [1.0, 2.0], "tokens": [3, 4], "bytes": [5, 6]}
GOOD: dict[str, Any] = {
    "settings": {"limit": None},
    "versions": {},
    "checkpoint": {"path": "a.pt", "sha256": "0", "step": 3, "tau": 0.5},
    "results": {
        "group": {"acc,none": 1, "tasks": ["x"]},
        "x": {"acc,none": 0.5, "acc_stderr,none": 0.1, "n_samples": 4, "num_fewshot": 0, "version": "1.0"},
    },
    "perplexity": {
        "held": {
            "documents": 2, "tokens": 7, "nats_per_token": 0.4, "perplexity": 1.5, "bytes": 11, "bits_per_byte": 0.4,
            "each": EACH,
        }
    },
    "samples": "whatever",
}  # fmt: skip


def read(path: Path, value: Any) -> dict[str, Any]:
    path.write_text(json.dumps(value))
    return read_results(path)


def test_results_come_back_as_they_are(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", GOOD) == GOOD


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("", [], "valid dictionary"),
        ("checkpoint.sha256", None, "checkpoint.sha256"),
        ("results", [1], "results"),
        ("results.x", "0.5", "results.x"),
        ("results.x.acc,none", math.nan, "'acc,none' is nan"),
        ("results.x.acc_stderr,none", "0.1", "'acc_stderr,none' is '0.1'"),
        ("results.x.acc,none", 10**400, "'acc,none' is 1000"),
        ("perplexity.held.bits_per_byte_stderr", 1e300, "perplexity.held.bits_per_byte_stderr"),
        ("perplexity.held.perplexity", math.nan, "perplexity.held.perplexity"),
        ("results.x.n_samples", 4.5, "results.x.n_samples"),
        ("results.x.tasks", ["group"], "cycle"),
        ("perplexity.held.nats_per_token", math.inf, "perplexity.held.nats_per_token"),
        ("perplexity.held.documents", 0, "perplexity.held.documents"),
        ("perplexity.held.bytes", None, "'bytes' is not"),
        ("perplexity.held.each.nats", [1.0], "'each' has not one number for each of 2 documents"),
        ("perplexity.held.each.bytes", None, "'each' has not one number for each of 2 documents"),
    ],
)
def test_damaged_results_are_one_sentence(tmp_path: Path, where: str, value: Any, said: str) -> None:
    found = json.loads(json.dumps(GOOD))
    *path, last = where.split(".")
    inner = found
    for key in path:
        inner = inner[key]
    if where:
        inner[last] = value
    with pytest.raises(PolygluError, match="a.json is not the results file of an evaluation") as caught:
        read(tmp_path / "a.json", found if where else value)
    assert said in str(caught.value) and str(caught.value).endswith("; make it with polyglu eval --output.")
    if path:
        del inner[last]
        if last in ("sha256", "nats_per_token", "documents", "nats"):
            with pytest.raises(PolygluError, match="Field required"):
                read(tmp_path / "a.json", found)


def test_a_number_that_is_none_is_not_written() -> None:
    assert _metrics({"acc,none": 0.5, "acc_stderr,none": math.nan, "f1,none": "N/A", "n": 3}) == {"acc,none": 0.5}
