"""Finding and loading the harness's tasks: its own by name, those shipped here, and the user's.

The harness's own take their data from the hub, or from local files: then a small task file is written that includes the
harness's and changes where the data come from, and nothing else. Nothing is downloaded before every name is known; what
cannot be loaded becomes one sentence.
"""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pyarrow.parquet as pq
import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from polyglu.data.hub import HubUnreachable, resolve_revision
from polyglu.errors import PolygluError
from polyglu.evaluation.local_data import LocalTask, find_files, needed_columns, read_file, read_rows
from polyglu.files import write_text

SHIPPED_TASKS = Path(__file__).parent / "tasks"
HARNESS_TASKS = Path(lm_eval.tasks.__file__).parent
HARNESS_FOLDERS = {
    "gsm8k": ("gsm8k",),
    "minerva_math": ("minerva_math", "benchmarks"),
    "minerva_math500": ("minerva_math",),
    "mmlu_stem": ("mmlu/default",),
    "arc_easy": ("arc",),
    "arc_challenge": ("arc",),
    "boolq": ("super_glue/boolq",),
    "hellaswag": ("hellaswag",),
    "lambada_openai": ("lambada",),
    "openbookqa": ("openbookqa",),
    "piqa": ("piqa",),
    "sciq": ("sciq",),
    "winogrande": ("winogrande",),
}
"""Where the harness defines the tasks of the guide and the paper: it takes half a minute to read all it has."""
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
DEFAULT_FEW_SHOT = {"mmlu_stem": 5}
"""Examples in the prompt of tasks to which the harness gives none by default."""
FEW_SHOT_SEED = 1234
"""The harness's own, so that prompts are those of published scores."""

logger = logging.getLogger(__name__)


def load_tasks(
    names: Sequence[str],
    scratch: Path,
    *,
    include_path: Path | None = None,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Load tasks and groups by name, with their data.

    Args:
        names: tasks, groups or tags.
        scratch: empty folder for the shipped tasks' resolved files and cache; must outlive the tasks.
        include_path: folder with further task files; they win over the harness's of the same name.
        data_dir: folder with the data files of the shipped tasks, and of the harness's if they shall not come from
            the hub.
        num_fewshot: examples in each prompt; absent: each task's default. A task that fixes 0 keeps it.

    Returns:
        What ``lm_eval.evaluator.evaluate`` takes: ``tasks``, ``groups`` and ``group_map``.

    Raises:
        PolygluError: unknown name, no data, no hub access, or a gated data set.
    """
    datasets.disable_progress_bars()
    names = list(dict.fromkeys(names))
    manager = _manager(names, scratch, include_path, data_dir)
    if data_dir is not None:
        _take_local_data(names, manager.task_index, data_dir, scratch, num_fewshot)
    entries = [entry for name in names for entry in _leaves(name, manager.task_index)]
    for entry in entries:
        _check_files(entry, data_dir)
    if not os.environ.get("HF_HUB_OFFLINE"):
        for path in sorted({path for entry in entries if (path := _hub_data(entry))}):
            try:
                resolve_revision(path)  # says at once what the libraries would say after their retries
            except HubUnreachable as error:
                raise PolygluError(f"{error} Local files of the data set are read with --data-dir.") from None
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        found = _load(name, manager)
        for task in found["tasks"].values():
            shots = _few_shot(task.config.num_fewshot, DEFAULT_FEW_SHOT.get(name, 0), num_fewshot)
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        for kind, entries in found.items():
            loaded[kind].update(entries)
    return loaded


def _manager(names: Sequence[str], scratch: Path, include_path: Path | None, data_dir: Path | None) -> Any:
    if include_path is not None and not include_path.is_dir():
        raise PolygluError(f"--include-path {include_path} is not a folder of task files.")
    places = {"{data_dir}": (data_dir or Path("data")).resolve(), "{cache_dir}": scratch / "cache"}
    for file in SHIPPED_TASKS.glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        for name, place in places.items():
            text = text.replace(name, place.as_posix())
        write_text(scratch / file.name, text)
    own = [str(folder) for folder in (scratch, include_path) if folder is not None]
    known = [str(HARNESS_TASKS / folder) for name in names for folder in HARNESS_FOLDERS.get(name, ())]
    folders = [*dict.fromkeys(known), *own]  # of the same name the last one wins
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    logger.info("reading the list of the harness's tasks")  # thousands of files: some seconds
    manager = TaskManager(include_path=own, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "see --include-path for task files of your own."
            raise PolygluError(f"unknown task '{name}'; {hint}")
    return manager


def _leaves(name: str, index: Mapping[str, Entry]) -> Iterator[Entry]:
    """Tasks that a name stands for; groups may also define tasks inline, which are passed over."""
    entry = index[name]
    if entry.kind is Kind.TAG:
        children: list[Any] = sorted(entry.tags)
    elif entry.kind is Kind.GROUP:
        children = list((entry.cfg or {}).get("task", []))
    else:
        yield entry
        return
    for child in children:
        if isinstance(child, str) and child in index:
            yield from _leaves(child, index)


def _take_local_data(
    names: Sequence[str], index: dict[str, Entry], data_dir: Path, scratch: Path, num_fewshot: int | None
) -> None:
    """Make the tasks of an index that take their data from the hub read local files."""
    read = cache(read_file)
    for name in names:
        for entry in list(_leaves(name, index)):
            if _hub_data(entry) is not None:
                shots = _few_shot((entry.cfg or {}).get("num_fewshot"), DEFAULT_FEW_SHOT.get(name, 0), num_fewshot)
                index[entry.name] = _with_local_data(entry, name, data_dir, scratch, shots, read)


def _with_local_data(
    entry: Entry, asked_as: str, data_dir: Path, scratch: Path, shots: int, read: Callable[[Path], Any]
) -> Entry:
    """Write a task's rows as Parquet, and a task file that includes the harness's and reads them.

    Splits that the run does not need are not asked for.
    """
    definition = dict(entry.cfg or {})
    evaluated = definition.get("test_split") or definition.get("validation_split")
    if evaluated is None or entry.yaml_path is None:
        raise PolygluError(f"task '{entry.name}' cannot take local data: its file names no split to evaluate on.")
    task = LocalTask(
        entry.name, asked_as, definition["dataset_path"], definition.get("dataset_name"), needed_columns(definition)
    )
    examples = _split_of_examples(definition, evaluated) if shots else None
    splits = list(dict.fromkeys(split for split in (evaluated, examples) if split is not None))
    files = find_files(task, data_dir.resolve(), splits)
    prepared = {}
    for split in splits:
        rows = read_rows(files, split, task, read)
        if split == examples and rows.num_rows < (fewest := shots + (split == evaluated)):
            raise PolygluError(
                f"{files.splits[split][0]} has {rows.num_rows} rows of task '{entry.name}', whose prompts take "
                f"{shots} examples from it: {fewest} are needed; add rows or pass a smaller --num-fewshot."
            )
        path = scratch / "local" / entry.name / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path)
        prepared[split] = str(path)
    logger.info("%s: %s from %s", entry.name, " and ".join(splits), files.folder)
    changed = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": prepared, "cache_dir": str(scratch / "cache")},
        **{name: None for name in SPLITS if definition.get(name) not in prepared},
        "num_fewshot": shots,  # known here; without it the harness would warn of a split that is not needed
    }
    overlay = scratch / "local" / f"{entry.name}.yaml"
    write_text(overlay, yaml.safe_dump({"include": str(entry.yaml_path), "task": entry.name, **changed}))
    return replace(entry, yaml_path=overlay, cfg={**definition, **changed})


def _split_of_examples(definition: Mapping[str, Any], evaluated: str) -> str | None:
    """Where the harness takes a prompt's examples from; None if the definition holds them itself."""
    configured = definition.get("fewshot_config") or {}
    split = definition.get("fewshot_split") or configured.get("split")
    if split is None and configured.get("samples") is not None:
        return None
    return str(split or definition.get("training_split") or definition.get("validation_split") or evaluated)


def _check_files(entry: Entry, data_dir: Path | None) -> None:
    files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
    for file in files.values() if isinstance(files, dict) else [files]:
        if isinstance(file, str) and "://" not in file and not Path(file).is_file():
            hint = "pass the folder that holds it with --data-dir" if data_dir is None else "check --data-dir"
            raise PolygluError(f"task '{entry.name}' needs {file}, which does not exist; {hint}.")


def _hub_data(entry: Entry) -> str | None:
    """Name of a task's data set on the hub; None for local data."""
    path = (entry.cfg or {}).get("dataset_path")
    return path if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists() else None


def _load(name: str, manager: Any) -> dict[str, Any]:
    try:
        return dict(manager.load([name]))
    except Exception as error:  # the harness runs the task file's templates, which may raise anything
        data = next(filter(None, map(_hub_data, _leaves(name, manager.task_index))), None)
        cause = error.__cause__ or error
        said = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0].rstrip('.')}"
        hint = f"if it is gated, accept its licence at https://huggingface.co/datasets/{data} and set HF_TOKEN"
        raise PolygluError(
            f"task '{name}' could not be loaded ({said}); {hint if data else 'check its task file and data_files'}."
        ) from None


def _few_shot(fixed: int | None, default: int, wanted: int | None) -> int:
    """Examples in a task's prompts: as wanted, but a task that fixes 0 keeps it."""
    if wanted is None or fixed == 0:
        return default if fixed is None else fixed
    return wanted
