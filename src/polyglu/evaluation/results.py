"""Results of an evaluation, read back: the one reader of what ``polyglu eval`` writes.

Keys that nobody reads back may be there, and may be anything.
"""

from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.files import read_json

LARGEST = 1e100
"""Of numbers that are squared and summed."""
LARGEST_METRIC = 1e305
"""The perplexity of words may be as large; sums of two, and intervals, are numbers still."""

Number = Annotated[float, Field(strict=True, ge=-LARGEST, le=LARGEST)]
Error = Annotated[float, Field(strict=True, ge=0, le=LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Size = Annotated[int, Field(strict=True, gt=0, lt=2**63)]
Text = Annotated[str, Field(strict=True)]


class Evaluated(BaseModel):
    """The checkpoint."""

    path: Text
    sha256: Text
    step: Count


class Task(BaseModel):
    """A task or group; its metrics are the keys with a comma (``acc,none``, ``acc_stderr,none``)."""

    model_config = {"extra": "allow"}

    n_samples: Size | None = None
    num_fewshot: Count | None = None
    version: Text | None = None
    higher_is_better: dict[str, Any] = {}
    tasks: list[Text] = []
    """Of a group."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if "," in key and not (type(value) in (int, float) and abs(value) <= LARGEST_METRIC):
                raise ValueError(f"'{key}' is {value!r:.80}, expected a finite number")
        return self


class Documents(BaseModel):
    """Numbers of each document of held-out text."""

    sha256: Text
    nats: list[Number]
    tokens: list[Size]
    bytes: list[Size] | None = None


class HeldOut(BaseModel):
    """Held-out text."""

    documents: Size
    tokens: Size
    nats_per_token: Number
    nats_per_token_stderr: Error | None = None
    perplexity: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    bytes: Size | None = None
    bits_per_byte: Number | None = None
    bits_per_byte_stderr: Error | None = None
    each: Documents | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits_per_byte is not None and self.bytes is None:
            raise ValueError("'bits_per_byte' is there, but 'bytes' is not")
        lists: list[Sequence[Any]] = [] if self.each is None else [self.each.nats, self.each.tokens]
        if self.each is not None and self.bytes is not None:
            lists.append(self.each.bytes or [])
        if any(len(one) != self.documents for one in lists):
            raise ValueError(f"'each' has not one number for each of {self.documents} documents")
        return self


class Results(BaseModel):
    """What is read of a results file."""

    settings: dict[str, Any]
    versions: dict[str, Any]
    checkpoint: Evaluated
    results: dict[str, Task]
    perplexity: dict[str, HeldOut]

    @model_validator(mode="after")
    def _check(self) -> Self:
        # Raises where a group holds itself, also by way of others.
        TopologicalSorter({name: found.tasks for name, found in self.results.items()}).prepare()
        return self


def read_results(path: Path) -> dict[str, Any]:
    """Read the results file of an evaluation.

    Returns:
        Its plain values, of the types above.

    Raises:
        PolygluError: missing, damaged, or something else.
    """
    found = read_json(path)
    try:
        validate(Results, found, source=path.name)
    except PolygluError as error:
        detail = str(error).rstrip(".")
        raise PolygluError(
            f"{path} is not the results file of an evaluation ({detail}); make it with polyglu eval --output."
        ) from None
    return found  # type: ignore[no-any-return]
