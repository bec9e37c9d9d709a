"""The embedded corpus: real text for the whole pipeline, made from what is installed, without any network.

    math.jsonl  reasoning-gym problems with worked solutions           ┐
    stem.jsonl  documentation of numpy, sympy and the Python language  ├ pre-training, {"text": ...}
    code.jsonl  sources of the standard library                        ┘
    sft.jsonl   arithmetic conversations, {"messages": [...]}
    heldout_{math,stem,code}.jsonl  for perplexity; arithmetic_test.jsonl  {"question", "answer"}
    corpus.json sizes, hashes, seed and the versions of the packages that the text depends on

No text to be trained on contains a test problem (``polyglu.data.problems``) or a held-out document.
"""

import hashlib
import inspect
import json
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any

import numpy
import sympy

from polyglu.data.problems import Problem, arithmetic, mentions_held_out, other_mathematics
from polyglu.errors import PolygluError
from polyglu.files import write_json, write_text

PACKAGES = ("numpy", "sympy", "reasoning_gym")
HELD_OUT_SHARE = 20
"""One document in so many is held out for perplexity."""
DOCUMENT_CHARACTERS = range(200, 24_000)
"""Length of a documentation page or source file that is taken."""
NOT_LIBRARY_CODE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "turtledemo",
    "encodings",
}


def write_embedded_corpus(
    folder: Path,
    seed: int = 0,
    *,
    n_math: int = 6000,
    arithmetic_share: float = 0.5,
    n_sft: int = 8000,
    n_test: int = 200,
    stem_characters: int = 1_500_000,
    code_characters: int = 1_500_000,
) -> dict[str, Any]:
    """Write the corpus to ``folder`` and return what ``corpus.json`` says.

    ``arithmetic_share`` of the ``n_math`` documents are two-operand sums and differences, the kind that ``sft.jsonl``
    teaches and ``arithmetic_test.jsonl`` asks; equal arguments and package versions give equal bytes.

    Raises:
        PolygluError: more distinct problems are asked for than there are.
    """
    n_arithmetic = round(n_math * arithmetic_share)
    mathematics = [
        *_take(arithmetic(seed, held_out=False), n_arithmetic, "arithmetic documents"),
        *_take(_trainable(other_mathematics(seed + 1)), n_math - n_arithmetic, "mathematics documents"),
    ]
    corpora = {
        "math": _shuffled((problem.document for problem in mathematics), seed),
        "stem": _up_to(_shuffled(_documentation(), seed), stem_characters),
        "code": _up_to(_shuffled(_library_sources(), seed), code_characters),
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, texts in corpora.items():
        rows[f"{name}.jsonl"] = [{"text": text} for text in texts if not _held_out(text)]
        rows[f"heldout_{name}.jsonl"] = [{"text": text} for text in texts if _held_out(text)]
    lessons = _take(arithmetic(seed + 2, held_out=False), n_sft, "conversations")
    rows["sft.jsonl"] = [{"messages": _conversation(problem)} for problem in lessons]
    test = _take(arithmetic(seed + 3, held_out=True), n_test, "test problems")
    rows["arithmetic_test.jsonl"] = [{"question": problem.question, "answer": problem.answer} for problem in test]
    summary = {
        "seed": seed,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "files": {name: _write_rows(folder / name, content) for name, content in rows.items()},
    }
    write_json(folder / "corpus.json", summary)
    return summary


def _take(problems: Iterable[Problem], count: int, what: str) -> list[Problem]:
    taken = list(islice(problems, count))
    if len(taken) < count:
        raise PolygluError(f"the embedded corpus has only {len(taken):,} distinct {what}, {count:,} were asked for.")
    return taken


def _trainable(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Distinct problems in which no held-out sum or difference occurs, not even as a step."""
    seen: set[str] = set()
    for problem in problems:
        if problem.document not in seen and not mentions_held_out(problem.document):
            seen.add(problem.document)
            yield problem


def _conversation(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.solution}]


def _documentation() -> list[str]:
    """Docstrings of numpy's and sympy's public functions and classes, and the topics of Python's help."""
    pages = {f"Python: {topic}": text for topic, text in topics.items()}
    for module in (numpy, numpy.linalg, numpy.fft, numpy.random, sympy):
        pages |= _docstrings(module)
    texts = {
        text: f"{title}\n\n{text}" for title, text in sorted(pages.items())
    }  # one page per text, whatever its names
    return [page for page in texts.values() if len(page) in DOCUMENT_CHARACTERS and not mentions_held_out(page)]


def _docstrings(module: ModuleType) -> dict[str, str]:
    names = (name for name in sorted(dir(module)) if not name.startswith("_"))
    objects = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    documented = {title: inspect.getdoc(value) or "" for title, value in objects.items() if callable(value)}
    return {title: text for title, text in documented.items() if text}


def _library_sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if NOT_LIBRARY_CODE.intersection(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) in DOCUMENT_CHARACTERS and not mentions_held_out(text):
            texts.append(f"# {path.relative_to(root).as_posix()}\n{text}")
    return texts


def _shuffled(texts: Iterable[str], seed: int) -> list[str]:
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    return shuffled


def _up_to(texts: Iterable[str], characters: int) -> list[str]:
    """Texts in their order as long as they fit into ``characters`` together."""
    taken, total = [], 0
    for text in texts:
        if total + len(text) <= characters:
            taken.append(text)
            total += len(text)
    return taken


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] * HELD_OUT_SHARE < 256


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"rows": len(rows), "bytes": len(content.encode()), "sha256": write_text(path, content)}
