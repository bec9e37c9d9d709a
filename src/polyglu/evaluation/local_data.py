"""Data of the harness's tasks from local files: the hub's own files, or anybody's with the same columns.

    DIR/gsm8k/main/test-00000-of-00001.parquet ─┐
    DIR/gsm8k/test.jsonl                        ├─► find_files ─► read_rows ─► rows with the columns that the task reads
    DIR/mmlu_stem/test.jsonl  (column subject) ─┘

Where files may lie is told in ``docs/tasks.md``.
"""

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pyarrow as pa
import pyarrow.parquet as pq

from polyglu.errors import PolygluError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
SHARED_FOLDERS = ("", "data", "default", "main", "plain_text", "all")
"""Folders of a data set that hold all of it, as data sets on the hub are laid out."""
SUBJECT_COLUMNS = ("subject", "type")
"""Tell the rows of each task apart in a file that serves several tasks."""
DOCUMENT_FIELDS = ("doc_to_text", "doc_to_target", "doc_to_choice", "process_results")
"""Parts of a task's definition that read the columns of a row."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")


@dataclass(frozen=True)
class LocalTask:
    """A task as far as its data are concerned."""

    name: str
    asked_as: str
    """The task, or the group or tag that it was asked for by."""
    dataset: str
    """Name on the hub, ``owner/name``."""
    config: str | None
    """Configuration of the data set: a part of it."""
    columns: frozenset[str]
    """Columns that every row must have."""


@dataclass(frozen=True)
class SplitFiles:
    """Files of a task's splits, all in one folder."""

    folder: Path
    splits: Mapping[str, Sequence[Path]]
    shared: bool
    """The files may hold rows of other tasks too."""


def find_files(task: LocalTask, data_dir: Path, splits: Sequence[str]) -> SplitFiles:
    """Find the files of a task.

    Args:
        task: whose.
        data_dir: folder with a folder for each task, group or data set.
        splits: names of splits, the one to evaluate on first.

    Raises:
        PolygluError: no folder for the task, or a split is missing, double or lacks a part.
    """
    if not data_dir.is_dir():
        raise PolygluError(f"--data-dir {data_dir} is not a folder; give the one that holds the tasks' data.")
    for folder, shared in _folders(task, data_dir):
        found = {split: split_files(folder, split) for split in splits}
        if not found[splits[0]]:
            continue
        for split, files in found.items():
            if not files:
                raise PolygluError(
                    f"task '{task.name}' takes examples for its prompts from the split '{split}', which {folder} "
                    f"lacks; add {split}.jsonl or {split}.parquet there, or pass --num-fewshot 0."
                )
        return SplitFiles(folder, found, shared)
    split, roots = splits[0], " or ".join(dict.fromkeys((task.name, task.asked_as, task.dataset.split("/")[-1])))
    raise PolygluError(
        f"task '{task.name}': --data-dir {data_dir} has no folder {roots} with the split '{split}' ({split}.jsonl, "
        f"{split}.jsonl.gz, {split}.parquet or the hub's {split}-00000-of-00001.parquet); "
        f"without --data-dir it comes from the hub ({task.dataset})."
    )


def _folders(task: LocalTask, data_dir: Path) -> Iterator[tuple[Path, bool]]:
    """Places to look in, in this order, and whether each may hold other tasks' rows too."""
    owner, _, repository = task.dataset.rpartition("/")
    part = None if task.config in (None, "default") else task.config
    for name in dict.fromkeys((task.name, task.asked_as, repository, f"{owner}/{repository}")):
        root = data_dir / name
        if part is not None:
            yield from ((root / inner, False) for inner in (part, f"data/{part}"))
        yield from ((root / inner, part is not None and name != task.name) for inner in SHARED_FOLDERS)


def split_files(folder: Path, split: str) -> list[Path]:
    """Find the files of a split in a folder, in order; empty if there are none.

    They are ``test.jsonl``, or ``test-00000-of-00002.parquet`` and its likes; else all files of a folder ``test``;
    else ``anything_test.jsonl``.

    Raises:
        PolygluError: there are several where one is expected, or a part is missing.
    """
    stems = {path: path.name.removesuffix(_suffix(path)) for path in _data_files(folder)}
    whole = [path for path, stem in stems.items() if stem == split]
    parts = [path for path, stem in stems.items() if stem != split and _SHARD.sub("", stem) == split]
    inner = _data_files(folder / split)
    named = [path for path, stem in stems.items() if re.search(rf".[_-]{re.escape(split)}$", _SHARD.sub("", stem))]
    for found in ([*whole, *parts], inner, named):
        if not found:
            continue
        shards = [_SHARD.search(stems.get(path, path.name.removesuffix(_suffix(path)))) for path in found]
        if found is not inner and len(found) > 1 and not all(shards):
            listed = ", ".join(path.name for path in found)
            raise PolygluError(f"{folder} has several files for the split '{split}' ({listed}); keep one of them.")
        expected = max((int(shard[2]) for shard in shards if shard), default=len(found))
        if expected != len(found):
            raise PolygluError(f"{found[0].parent} has {len(found)} of {expected} parts of the split '{split}'.")
        return found
    return []


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _suffix(path) and path.is_file())


def _suffix(path: Path) -> str:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def read_rows(files: SplitFiles, split: str, task: LocalTask, read: Callable[[Path], pa.Table]) -> pa.Table:
    """Read the rows of a task.

    Args:
        files: of the task.
        split: which of them.
        task: whose rows.
        read: ``read_file``, or one that remembers files which several tasks share.

    Raises:
        PolygluError: a file is damaged, lacks a column or a value, or has no row of the task.
    """
    tables = []
    for path in files.splits[split]:
        table = read(path)
        if missing := task.columns - set(table.column_names):
            raise PolygluError(
                f"{path} has the columns {_listed(table.column_names)}; task '{task.name}' reads "
                f"{_listed(sorted(task.columns))}: {_listed(sorted(missing))} missing."
            )
        table = _own_rows(table, path, task) if files.shared else table
        for column in sorted(task.columns):
            if table[column].null_count:
                raise PolygluError(f"{path}: column '{column}', which task '{task.name}' reads, has rows without one.")
        tables.append(table)
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowInvalid as error:
        raise PolygluError(f"{files.folder}: the parts of the split '{split}' do not fit together ({error}).") from None
    if not rows.num_rows:
        of = f" of '{task.config}' (column {' or '.join(SUBJECT_COLUMNS)})" if files.shared else ""
        raise PolygluError(f"{files.splits[split][0]} has no rows{of}, which task '{task.name}' needs.")
    return rows


def read_file(path: Path) -> pa.Table:
    """Read a whole file of rows.

    Raises:
        PolygluError: it is damaged, or not what its name says.
    """
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        rows = []
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                rows += [] if row is None else [row]
        names = dict.fromkeys(key for row in rows for key in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (ValueError, pa.ArrowException, EOFError, gzip.BadGzipFile, RecursionError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "a JSON object in each line, of the same columns"
        said = str(error).partition("\n")[0].rstrip(".")
        raise PolygluError(f"{path} cannot be read ({said}); expected {kind}.") from None


def _own_rows(table: pa.Table, path: Path, task: LocalTask) -> pa.Table:
    """Rows of a task in a file of several."""
    column = next((name for name in SUBJECT_COLUMNS if name in table.column_names), None)
    if column is None:
        raise PolygluError(
            f"{path} may hold rows of several tasks and has no column {' or '.join(SUBJECT_COLUMNS)} to tell those of "
            f"'{task.name}' by; add it, or put the task's own rows into a folder {task.config}."
        )
    return table.filter(
        pa.array([_plain_name(value) == _plain_name(task.config) for value in table[column].to_pylist()])
    )


def _plain_name(value: Any) -> str:
    """Make ``Counting & Probability`` and ``counting_and_probability`` the same."""
    return re.sub(r"[\s_-]+", "_", str(value).lower().replace("&", "and")).strip("_")


def needed_columns(definition: Mapping[str, Any]) -> frozenset[str]:
    """Columns that a task's definition reads.

    Where the definition prepares rows with ``process_docs``, what that reads: everything else reads what it made.

    Args:
        definition: of the harness's index: templates as they are, functions as ``/path/module.function``.
    """
    if isinstance(process := definition.get("process_docs"), str):
        return _read_by(process) or frozenset()
    return frozenset[str]().union(*(_read_by(definition.get(name)) for name in DOCUMENT_FIELDS))


def _read_by(value: Any) -> frozenset[str]:
    """Columns that a template, a function or the plain name of a column reads."""
    if not isinstance(value, str):
        return frozenset()
    module, _, function = value.rpartition(".")
    if value.startswith("/") and Path(f"{module}.py").is_file():
        return _read_by_function(Path(f"{module}.py"), function)
    if value.isidentifier():
        return frozenset({value})
    parsed = jinja2.Environment().parse(value)
    guarded = {
        test.node.name
        for test in parsed.find_all(jinja2.nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, jinja2.nodes.Name)
    }
    return frozenset(jinja2.meta.find_undeclared_variables(parsed) - guarded)


def _read_by_function(module: Path, name: str) -> frozenset[str]:
    """Keys that a function, or one inside it, looks up in an argument: ``doc["question"]``."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    nodes = [] if function is None else list(ast.walk(function))
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return frozenset(
        node.slice.value
        for node in nodes
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id in arguments
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
