"""Documents to measure a model on: a ``.jsonl`` file of texts, or a folder of token chunks."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polyglu.data.chunks import open_source
from polyglu.data.data_file import local_file
from polyglu.data.documents import sort_out
from polyglu.data.quarantine import EMPTY, LONE_SURROGATE, NOT_JSON, NOT_TEXT, NOT_UTF8, TOO_LONG
from polyglu.data.readers import LINE_BYTES, read_blocks
from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError

READ_TOKENS = 65536
"""Tokens read from a chunk at a time."""
FOUND = {
    NOT_JSON: "something else",
    NOT_TEXT: "none",
    NOT_UTF8: "bytes that are not UTF-8",
    LONE_SURROGATE: "half of a surrogate pair",
    TOO_LONG: "too long a line",
}
"""Kind of a bad record -> what stands in its line, for a sentence."""


class Document(NamedTuple):
    """Tokens of a held-out document."""

    tokens: list[int]
    n_bytes: int | None
    """Bytes of its UTF-8 text; of token chunks, after normalisation. None if the tokenizer is not byte-level."""


def first_documents(source: Path, tokenizer: Tokenizer, max_tokens: int) -> list[Document]:
    """Documents from the first on, each whole, until they have ``max_tokens``; those without text are passed over.

    Raises:
        PolygluError: no such source, not of its format, of another tokenizer, or without text.
    """
    kept: list[Document] = []
    total = 0
    for document in _documents(source, tokenizer):
        if total >= max_tokens:
            break
        kept.append(document)
        total += len(document.tokens)
    if not total:
        raise PolygluError(f"{source} has no text to measure on.")
    return kept


def read_texts(source: Path) -> Iterator[str]:
    """The ``text`` of each line of a ``.jsonl`` file, read as for training; blank ones are passed over.

    Raises:
        PolygluError: another kind of file, or a line that has no text: in training that is left out, here every
            document counts.
    """
    file = local_file(source)
    if file.kind != ".jsonl":
        raise PolygluError(f"{source} is no .jsonl file; give one with a 'text' in each line.")
    for block in read_blocks([file], "text", {"file": 0, "row_group": 0, "row": 0}, LINE_BYTES):
        batch = sort_out(block)
        bad = next((record for record in batch.bad if record.kind != EMPTY), None)
        before = None if bad is None else int(np.searchsorted(batch.row_of, bad.row))
        yield from batch.texts[:before].to_pylist()
        if bad is not None:
            raise PolygluError(
                f"{source}, line {batch.positions[bad.row, 2] + 1}: expected a JSON object whose 'text' is a string, "
                f"found {FOUND[bad.kind]}; mend or remove it."
            )


def _documents(source: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents that have any text, in order."""
    if not source.exists():
        raise PolygluError(
            f"{source} does not exist; give a .jsonl file with a 'text' in each line, or a chunk folder."
        )
    if source.is_dir():
        found = _documents_of_chunks(source, tokenizer)
    else:
        found = (Document(tokenizer.encode(text), len(text.encode())) for text in read_texts(source))
    return (document for document in found if document.tokens)


def _documents_of_chunks(source: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    opened = open_source(source)
    described = opened.manifest["tokenizer"]
    if described["fingerprint"] != tokenizer.fingerprint:
        raise PolygluError(
            f"{source} was tokenised with '{described['name']}', the checkpoint uses '{tokenizer.name}'; "
            "tokenise it again, or give its text as .jsonl."
        )
    sizes = tokenizer.token_bytes

    def document(tokens: list[int]) -> Document:
        return Document(tokens, None if sizes is None else sum(sizes[token] for token in tokens))

    rest: list[int] = []
    for start in range(0, opened.n_tokens, READ_TOKENS):
        part = opened.read(start, min(start + READ_TOKENS, opened.n_tokens))
        ends = np.flatnonzero(part == opened.eos_id)
        begin = 0
        for end in ends.tolist():
            yield document([*rest, *part[begin:end].tolist()])
            rest, begin = [], end + 1
        rest += part[begin:].tolist()
    yield document(rest)
