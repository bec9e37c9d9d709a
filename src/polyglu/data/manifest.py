"""What a manifest of token chunks must look like; ``polyglu.data.chunks`` writes it and says what it means."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True)]


class Cursor(BaseModel):
    """Where tokenising goes on after a chunk."""

    rows: Count
    """Rows of the source that are used up."""
    tokens_of_next_row: Count
    """Tokens of the row after them that the chunk already holds."""


class Chunk(BaseModel):
    """One chunk file."""

    file: Annotated[str, Field(strict=True, pattern=r"^chunk_\d+\.bin$")]
    tokens: Annotated[int, Field(strict=True, gt=0)]
    documents: Count
    sha256: Text
    end: Cursor | None = None
    """Needed to go on; finished data is read without."""


class TokenizerEntry(BaseModel):
    """The tokenizer that made the tokens."""

    name: Text
    fingerprint: Text
    vocab_size: Annotated[int, Field(strict=True, gt=0)]
    eos_id: Count


class Manifest(BaseModel):
    """All of it but the format's version."""

    tokenizer: TokenizerEntry
    source: dict[str, Any]
    chunk_tokens: Annotated[int, Field(strict=True, gt=0)]
    chunks: list[Chunk]
    tokens: Count
    documents: Count
    skipped: dict[str, Count]
    complete: Annotated[bool, Field(strict=True)]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        total = sum(chunk.tokens for chunk in self.chunks)
        if self.tokens != total:
            raise ValueError(f"'tokens' is {self.tokens}, its chunks have {total}")
        if self.tokenizer.eos_id >= self.tokenizer.vocab_size:
            raise ValueError(f"eos_id {self.tokenizer.eos_id} is outside vocab_size {self.tokenizer.vocab_size}")
        if not self.complete and any(chunk.end is None for chunk in self.chunks):
            raise ValueError("a chunk of unfinished data has no 'end'")
        return self
