"""Train a small byte-level BPE for small experiments.

python -m src.data.train_tokenizer --files corpus.jsonl --vocab-size 4096 --output data/tokenizer
"""

import logging
from pathlib import Path
from typing import Annotated

import typer

from polyglu.data.chunk_writer import START
from polyglu.data.data_file import local_file
from polyglu.data.documents import text_batches
from polyglu.data.readers import read_blocks
from polyglu.data.tokenizer import train_bpe
from polyglu.errors import PolygluError, run_command
from polyglu.logs import configure_logging

log = logging.getLogger(__name__)

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer document is left out."""


def main(
    files: Annotated[list[Path], typer.Option(help="Text to learn from (.jsonl, .txt, .parquet); repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 3 special ones and the 256 bytes included.")] = 4096,
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on local files."""
    configure_logging()
    if output.exists() and not output.is_dir():
        raise PolygluError(f"output {output} is a file; give a folder for tokenizer.json.")
    blocks = read_blocks([local_file(file) for file in files], text_field, START, MAX_DOCUMENT_BYTES)
    texts = [text for batch in text_batches(blocks, MAX_DOCUMENT_BYTES) for text in batch.texts.to_pylist()]
    if not texts:
        raise PolygluError(f"{', '.join(map(str, files))}: no text in the column '{text_field}'; set --text-field.")
    tokenizer = train_bpe(texts, vocab_size, output)
    log.info("%s: %d tokens, learnt from %d documents", output, tokenizer.vocab_size, len(texts))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
