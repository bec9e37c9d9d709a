"""The embedded corpus as tokens, of a tokenizer that is trained on it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from polyglu.data.embedded import write_embedded_corpus
from polyglu.data.sources import SourcesConfig, TextSource
from polyglu.data.tokenize_dataset import tokenize_source
from polyglu.data.tokenizer import load_tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.files import read_json, write_json

logger = logging.getLogger(__name__)

SOURCES = ("math", "stem", "code")
"""Of the embedded corpus, for training; ``heldout_`` before the name: the documents that are not."""


def tokenize_embedded(raw: Path, names: Sequence[str], vocab_size: int, tokenizer_dir: Path, output: Path) -> None:
    """Train a tokenizer on the corpus for training and tokenise ``names`` with it.

    Args:
        raw: folder that ``write_embedded_corpus`` wrote.
        names: files of it, without their ending; each becomes a folder of chunks in ``output``.
        vocab_size: tokens of the tokenizer.
        tokenizer_dir: folder of the tokenizer.
        output: folder of the folders of chunks.
    """
    lines = (line for name in SOURCES for line in (raw / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    train_bpe((json.loads(line)["text"] for line in lines), vocab_size, tokenizer_dir)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    for name in names:
        source = TextSource(output=str(output / name), files=(str(raw / f"{name}.jsonl"),))
        manifest = tokenize_source(source, tokenizer, SourcesConfig.model_fields["chunk_tokens"].default)
        logger.info("%s: %s tokens in %s documents", name, f"{manifest['tokens']:,}", f"{manifest['documents']:,}")


def make_embedded_data(folder: Path, vocab_size: int) -> None:
    """Write the embedded corpus to ``folder/raw``, and to ``folder/tokenized`` its tokens, those held out too.

    What is there already stays.

    Raises:
        PolygluError: that is of a vocabulary of another size.
    """
    done = folder / "data.json"
    if done.exists():
        found = read_json(done)
        if found != {"vocab_size": vocab_size}:
            raise PolygluError(
                f"{folder} holds embedded data of {found}, model.vocab_size is {vocab_size}; give another folder."
            )
        return
    write_embedded_corpus(folder / "raw")
    names = (*SOURCES, *(f"heldout_{name}" for name in SOURCES))
    tokenize_embedded(folder / "raw", names, vocab_size, folder / "tokenizer", folder / "tokenized")
    write_json(done, {"vocab_size": vocab_size})
