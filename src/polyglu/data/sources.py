"""What to tokenise: a sources file, or the same from the command line.

configs/sources.yaml ─► SourcesConfig ─► TextSource ─► files: local ones, or those of a hub dataset at a commit
                                                         └─► a shard of them, for one of several workers
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polyglu.config_file import Section
from polyglu.data.tokenizer import QWEN3
from polyglu.errors import PolygluError


@dataclass(frozen=True)
class Shard:
    """The part of a source that one of several independent workers takes: every ``of``-th file, from ``index`` on."""

    index: int
    of: int

    @property
    def folder(self) -> str:
        """Name of its folder within the source's."""
        return f"shard_{self.index}_of_{self.of}"


def parse_shard(text: str) -> Shard:
    """Read ``i/N``.

    Raises:
        PolygluError: not of that form, or ``i`` is not one of 0 to N - 1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise PolygluError(f"--shard must be i/N with i from 0 to N - 1, for example 0/4 to 3/4; got '{text}'.")
    return Shard(int(match[1]), int(match[2]))


class TextSource(Section):
    """One source of documents, how much of it to take, and where its tokens go: a hub dataset or local files."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the token chunks."""
    dataset: str | None = None
    """Hub dataset, read only through data files: no code from the hub is run."""
    config: str | None = None
    """Hub dataset's configuration."""
    split: str = "train"
    """Hub dataset's split."""
    revision: str | None = None
    """Commit of the hub dataset; absent: the newest one, resolved at the start and recorded in the manifest."""
    files: tuple[str, ...] = ()
    """Local files, read in this order; a .txt file is one document, the others have a document a row."""
    text_field: str = "text"
    """Column that holds the text."""
    max_tokens: PositiveInt | None = None
    """Token budget, end-of-document tokens included; met at a document's end, never exceeded. Absent: everything."""
    max_document_bytes: PositiveInt = 4 << 20
    """Longest document, in bytes of UTF-8; a longer one is a bad record."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rows left out as bad records (``polyglu.data.quarantine``), rounded up, above which the job stops."""

    @model_validator(mode="after")
    def _check(self) -> "TextSource":
        if (self.dataset is None) == (not self.files):
            raise ValueError("give either 'dataset' (a hub dataset) or 'files' (local ones)")
        of_hub = [key for key in ("config", "split", "revision") if key in self.model_fields_set]
        if self.files and of_hub:
            raise ValueError(f"'{of_hub[0]}' belongs to a hub dataset; leave it out with 'files'")
        return self


class SourcesConfig(Section):
    """A sources file: what to tokenise, with which tokenizer, in chunks of which size."""

    tokenizer: str = QWEN3
    """Hub name, folder or tokenizer.json."""
    chunk_tokens: PositiveInt = 100_000_000
    """Tokens a chunk; the last of a source may be shorter."""
    encoder: Literal["fast", "reference"] = "fast"
    """The fast encoder, compared with the tokenizer as it runs, or the tokenizer alone; the tokens are the same."""
    sources: Annotated[dict[str, TextSource], Field(min_length=1)]
    """Name -> source."""


def describe(
    source: TextSource, revision: str | None, files: list[dict[str, Any]], shard: Shard | None
) -> dict[str, Any]:
    """Identity of a source for the manifest; a run with another one cannot continue there."""
    hub = {"dataset": source.dataset, "config": source.config, "split": source.split, "revision": revision}
    return {
        **(hub if source.dataset else {}),
        "files": files,
        **({"shard": {"index": shard.index, "of": shard.of}} if shard else {}),
        "text_field": source.text_field,
        "max_tokens": source.max_tokens,
        "max_document_bytes": source.max_document_bytes,
    }
