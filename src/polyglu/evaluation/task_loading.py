"""Finding and loading the harness's tasks: its own by name (from the hub), those shipped here, and the user's.

Nothing is downloaded before every name is known; what cannot be loaded becomes one sentence.
"""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from polyglu.data.hub import resolve_revision
from polyglu.errors import PolygluError
from polyglu.files import write_text

SHIPPED_TASKS = Path(__file__).parent / "tasks"
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
        data_dir: folder with the data files of the shipped tasks.
        num_fewshot: examples in each prompt; absent: each task's default. A task that fixes 0 keeps it.

    Returns:
        What ``lm_eval.evaluator.evaluate`` takes: ``tasks``, ``groups`` and ``group_map``.

    Raises:
        PolygluError: unknown name, no data, no hub access, or a gated data set.
    """
    datasets.disable_progress_bars()
    manager = _manager(names, scratch, include_path, data_dir)
    entries = [entry for name in names for entry in _leaves(name, manager.task_index)]
    for entry in entries:
        _check_files(entry, data_dir)
    if not os.environ.get("HF_HUB_OFFLINE"):
        for path in sorted({path for entry in entries if (path := _hub_data(entry))}):
            resolve_revision(path)  # says at once what the libraries would say after their retries
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        found = _load(name, manager)
        for task in found["tasks"].values():
            _set_few_shot(task, DEFAULT_FEW_SHOT.get(name, 0), num_fewshot)
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
    folders = [str(folder) for folder in (scratch, include_path) if folder is not None]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    logger.info("reading the list of the harness's tasks")  # thousands of files: some seconds
    manager = TaskManager(include_path=folders, include_defaults=True)
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


def _set_few_shot(task: Any, default: int, num_fewshot: int | None) -> None:
    fixed = task.config.num_fewshot
    if fixed is None or (num_fewshot is not None and fixed != 0):
        task.set_config(key="num_fewshot", value=default if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)
