"""Texts of several kinds, on which routing is looked at: documents of the same number of tokens each.

    embedded      arithmetic, algebra, geometry  reasoning-gym problems with their answers, several generators a kind
                  code                           functions and classes of the standard library
                  prose                          paragraphs of Python's language reference, those without code
    --texts DIR   KIND.jsonl                     a {"text": ...} a line, each a document
                  KIND.txt                       documents are parted by blank lines

Every document is cut after the same number of tokens, and a shorter one left out: routing means settle along a text,
so kinds of different lengths would differ for that alone.
"""

import importlib.util
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from polyglu.data.held_out import read_texts
from polyglu.errors import PolygluError
from polyglu.interpretability.dynamic_routing import Encoder

GENERATORS: dict[str, dict[str, dict[str, int]]] = {
    "arithmetic": {
        "chain_sum": {"min_digits": 1, "max_digits": 2},
        "gsm_symbolic": {},
        "products": {"max_digits": 2},
        "fraction_simplification": {},
        "lcm": {},
    },
    "algebra": {"simple_equations": {}, "polynomial_equations": {}, "polynomial_multiplication": {}},
    "geometry": {"simple_geometry": {}, "advanced_geometry": {}},
}
"""Kind -> generators of reasoning-gym, taken in turn -> their settings."""
INSTRUCTIONS = re.compile(
    r"\s*(In solving equations|When performing calculations|For all geometry problems|Give (only |the |your )"
    r"|Return only|Do not ).*",
    re.DOTALL,
)
"""How an answer is to be written; it would fill the document of a short problem."""
PARAGRAPH_CHARACTERS = 150
"""Least length of a paragraph of prose."""
PROSE_CHARACTERS = 0.94
"""Share of letters, blanks, commas and full stops from which on a paragraph is prose."""
MOST_PIECES = 200_000
"""Problems of a generator."""


@dataclass(frozen=True)
class Texts:
    """Encoded documents of several kinds."""

    kinds: tuple[str, ...]
    tokens: Tensor
    """``[n, T]`` int64: documents in the order of their kinds."""
    labels: Tensor
    """``[n]`` int64: index of each document's kind."""
    too_short: Mapping[str, int]
    """Kind -> documents that were left out."""

    def of_kind(self, values: Tensor) -> list[Tensor]:
        """Cut values of documents ``[n, ...]`` into those of each kind."""
        return [values[self.labels == index] for index in range(len(self.kinds))]


def embedded_texts(tokenizer: Encoder, documents: int, length: int) -> Texts:
    """Texts that come with the package and with Python; the same every time.

    Args:
        tokenizer: the model's own.
        documents: of each kind, at most.
        length: tokens of each, T. Short texts of a kind are joined until they have as many.

    Raises:
        PolygluError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise PolygluError(
            "the sample problems come from the package reasoning_gym, which is missing: pip install "
            "'polyglu[figures]', or give texts of your own with --texts."
        )
    pieces: dict[str, Iterator[str]] = {kind: _problems(kind) for kind in GENERATORS}
    pieces |= {"code": iter(_definitions()), "prose": iter(_paragraphs())}
    return _collect(pieces, documents, lambda texts: _joined(texts, tokenizer, length), "the sample texts", length)


def read_kinds(folder: Path, tokenizer: Encoder, documents: int, length: int) -> Texts:
    """Texts of a folder: ``KIND.jsonl`` and ``KIND.txt``; arguments as in ``embedded_texts``, but nothing is joined.

    Raises:
        PolygluError: no such folder, fewer than two kinds in it, two files of a kind, or fewer than two documents of a
            kind that are long enough.
    """
    if not folder.is_dir():
        raise PolygluError(f"--texts {folder} is not a folder; give one with a KIND.jsonl or KIND.txt for each kind.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".jsonl", ".txt"):
            continue
        if path.stem in files:
            raise PolygluError(
                f"--texts {folder} has {files[path.stem].name} and {path.name}, two files of one kind; keep one."
            )
        files[path.stem] = path
    if len(files) < 2:
        raise PolygluError(
            f"--texts {folder} has {len(files)} kinds of text, two are needed: a KIND.jsonl or KIND.txt for each."
        )
    pieces = {kind: _read(path) for kind, path in files.items()}
    encoded = lambda texts: (tokenizer.encode(text) for text in texts)  # noqa: E731
    return _collect(pieces, documents, encoded, f"--texts {folder}", length)


def _read(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return read_texts(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise PolygluError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from None
    return (part for part in re.split(r"\n\s*\n", text) if part.strip())


def _collect(
    pieces: Mapping[str, Iterator[str]],
    documents: int,
    encode: Callable[[Iterator[str]], Iterable[list[int]]],
    source: str,
    length: int,
) -> Texts:
    tokens, labels, too_short = [], [], {}
    for index, (kind, texts) in enumerate(pieces.items()):
        kept, short = [], 0
        for document in encode(texts):
            if len(document) < length:
                short += 1
                continue
            kept.append(document[:length])
            if len(kept) == documents:
                break
        if len(kept) < 2:
            raise PolygluError(
                f"{source}: kind '{kind}' has {len(kept)} documents of at least {length} tokens, two are needed; "
                "give longer or more texts, or a smaller --tokens."
            )
        tokens += kept
        labels += [index] * len(kept)
        too_short[kind] = short
    return Texts(tuple(pieces), torch.tensor(tokens), torch.tensor(labels), too_short)


def _joined(texts: Iterator[str], tokenizer: Encoder, length: int) -> Iterator[list[int]]:
    """Documents of at least ``length`` tokens each, of as many texts as that takes."""
    document = ""
    for text in texts:
        document = f"{document}\n\n{text}" if document else text
        tokens = tokenizer.encode(document)
        if len(tokens) >= length:
            yield tokens
            document = ""


def _problems(kind: str) -> Iterator[str]:
    import reasoning_gym  # not everybody who looks at texts of his own has it

    streams = [
        reasoning_gym.create_dataset(name, seed=0, size=MOST_PIECES, **settings)
        for name, settings in GENERATORS[kind].items()
    ]
    for index in range(MOST_PIECES):
        entry = streams[index % len(streams)][index // len(streams)]
        yield f"Question: {INSTRUCTIONS.sub('', entry['question']).strip()}\nAnswer: {entry['answer']}"


def _definitions() -> list[str]:
    """Each source file of the standard library's first level, from its first definition on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^(def|class) ", source, re.MULTILINE)
        if found:
            texts.append(source[found.start() :])
    return _shuffled(texts)


def _paragraphs() -> list[str]:
    found = {" ".join(part.split()) for text in topics.values() for part in re.split(r"\n\s*\n", text)}
    return _shuffled(
        text
        for text in sorted(found)
        if len(text) >= PARAGRAPH_CHARACTERS
        and text.endswith(".")
        and sum(letter.isalpha() or letter in " ,." for letter in text) >= PROSE_CHARACTERS * len(text)
    )


def _shuffled(texts: Iterable[str]) -> list[str]:
    shuffled = list(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled
