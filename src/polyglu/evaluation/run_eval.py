"""Evaluation of a checkpoint: tasks of EleutherAI's lm-evaluation-harness, and held-out perplexity.

    run_eval --checkpoint checkpoints/portable_final.pt --tasks gsm8k minerva_math --output results/pretrain_eval.json

| written | what | when |
|---|---|---|
| ``pretrain_eval.answers.jsonl`` | the model's answers; the same command, run again, takes them over | as they come |
| ``pretrain_eval.samples/TASK.jsonl`` | each sample with prompt, answer, target and scores, for reading | at the end |
| ``pretrain_eval.json`` | the results | at the end |
"""

import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval.evaluator import evaluate

from polyglu.data.held_out import first_documents
from polyglu.errors import PolygluError, run_command
from polyglu.evaluation.answers import Answers, KeptAnswers, answers_file, identity, stoppable
from polyglu.evaluation.model_wrapper import HarnessModel
from polyglu.evaluation.perplexity import perplexity
from polyglu.evaluation.samples import plain, readable, samples_folder, write_samples
from polyglu.evaluation.suites import beside_published, suite_tasks
from polyglu.evaluation.tables import published_table, results_table
from polyglu.evaluation.task_loading import load_tasks
from polyglu.files import check_writable, write_json
from polyglu.inference import Inference, open_for_inference
from polyglu.logs import configure_logging, console
from polyglu.model.config import RoutingScope

KEPT_SAMPLES = 5
"""Samples of each task that the results keep."""
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "polyglu")
_SEES_AHEAD = (
    "routing sees the whole {}, later tokens included: log-likelihoods and perplexities are not those of a language "
    "model. Generated answers only ever see what is already there."
)
SCOPE_NOTES: dict[RoutingScope, str] = {
    "causal": "routing sees only earlier tokens: log-likelihoods and perplexities are those of a language model.",
    "document": _SEES_AHEAD.format("document"),
    "sequence": _SEES_AHEAD.format("input"),
}
NOT_ROUTED_NOTE = (
    "what is read decides nothing between activations: log-likelihoods and perplexities are those of a language model."
)


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate and how."""

    checkpoint: Path
    tasks: Sequence[str] = ()
    """Names of harness tasks, groups or tags."""
    suite: str | None = None
    """Name of several tasks (``polyglu.evaluation.suites``), evaluated before the others."""
    perplexity: Mapping[str, Path] = field(default_factory=dict)
    """Source name -> ``.jsonl`` file of texts or folder of token chunks."""
    limit: int | None = None
    """Examples of each task; all if absent."""
    num_fewshot: int | None = None
    """Examples in the prompt; each task's own number if absent."""
    batch_size: int | None = None
    """Inputs or prompts that run together, as many as fit if absent; results do not depend on it."""
    perplexity_tokens: int = 100_000
    """Documents of a source are read whole until they have this many tokens."""
    tokenizer: str | None = None
    """Name or path; the checkpoint's own if absent."""
    device: str | None = None
    """Torch device; CUDA if there is one, else the CPU."""
    include_path: Path | None = None
    """Folder with further task files."""
    data_dir: Path | None = None
    """Folder with the tasks' data files (docs/tasks.md); absent: the harness's own tasks take theirs from the hub."""
    apply_chat_template: bool = False
    """Prompts become conversations, for a fine-tuned checkpoint."""
    system_instruction: str | None = None
    """Stands before every prompt; in a conversation it is the system's turn."""
    seed: int = 0
    """Of answers that are drawn."""


def evaluate_checkpoint(settings: EvalSettings, output: Path | None = None, fresh: bool = False) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        settings: what and how.
        output: results file to write; answers are kept beside it as they come, and taken over by the next run. Absent:
            nothing is written.
        fresh: forget the answers of earlier runs.

    Returns:
        Plain values, ready for JSON: ``settings``, ``versions``, ``checkpoint``, ``routing_scope``, ``results`` (per
        task or group: metrics with standard errors, ``n_samples``, ``num_fewshot``, ``version``,
        ``higher_is_better`` of each metric, ``tasks`` of a group, and ``n_cut`` if prompts were cut), ``samples`` (the
        first of each task, as ``readable`` gives them), ``perplexity`` (per source), ``published`` (scores beside,
        for the suite ``paper``), ``seconds``, ``finished_at``.

    Raises:
        PolygluError: nothing to evaluate, bad checkpoint or tokenizer, unknown task, data out of reach, or another
            process evaluates into ``output``.
    """
    names = [*suite_tasks(settings.suite), *settings.tasks]
    if not names and not settings.perplexity:
        raise PolygluError(
            "nothing to evaluate: name tasks with --tasks or --suite, or sources with --perplexity NAME=PATH."
        )
    started = time.monotonic()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_for_inference(settings.checkpoint, settings.tokenizer, device)
    with tempfile.TemporaryDirectory(prefix="polyglu-tasks-") as scratch:
        # Tasks and sources are looked at first, the long work comes last.
        tasks = load_tasks(
            names,
            Path(scratch),
            include_path=settings.include_path,
            data_dir=settings.data_dir,
            num_fewshot=settings.num_fewshot,
        )
        for source in settings.perplexity.values():
            first_documents(source, opened.tokenizer, max_tokens=1)
        answers = (
            Answers()
            if output is None
            else KeptAnswers(answers_file(output), identity(opened, settings.apply_chat_template), fresh)
        )
        with closing(answers):
            perplexities = {
                name: _perplexity(path, opened, settings, answers) for name, path in settings.perplexity.items()
            }
            results, samples = _run_tasks(tasks, opened, settings, answers) if names else ({}, {})
            evaluated = {
                **_described(settings, opened, device),
                "results": results,
                "samples": {
                    task: [readable(sample) for sample in logged[:KEPT_SAMPLES]] for task, logged in samples.items()
                },
                "perplexity": perplexities,
                **_published(settings, results, perplexities),
                "seconds": round(time.monotonic() - started, 2),
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            if output is not None:
                write_samples(samples_folder(output), samples)
                write_json(output, evaluated)
    return evaluated


def _described(settings: EvalSettings, opened: Inference, device: str) -> dict[str, Any]:
    return {
        "settings": plain(asdict(settings) | {"device": device}),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "checkpoint": {
            "path": str(settings.checkpoint),
            "sha256": opened.sha256,
            "step": opened.step,
            "tau": opened.tau,
            "tokenizer": opened.tokenizer.name,
        },
        "routing_scope": {"scope": opened.routing_scope, "note": _scope_note(opened)},
    }


def _scope_note(opened: Inference) -> str:
    return SCOPE_NOTES[opened.routing_scope] if opened.model.config.routed_by_text else NOT_ROUTED_NOTE


def _published(
    settings: EvalSettings, results: Mapping[str, Any], perplexities: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    if settings.suite != "paper":
        return {}
    return {"published": beside_published(results, perplexities)}


def _perplexity(path: Path, opened: Inference, settings: EvalSettings, answers: Answers) -> dict[str, Any]:
    return perplexity(
        opened.model,
        opened.tokenizer,
        opened.tau,
        path,
        max_tokens=settings.perplexity_tokens,
        batch_size=settings.batch_size,
        answers=answers,
    )


def _run_tasks(
    tasks: dict[str, Any], opened: Inference, settings: EvalSettings, answers: Answers
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Metrics and the samples of each task, as the harness logs them."""
    # Else standard errors are bootstrapped in forked processes, which may wait forever: they share the locks of this
    # process's threads and its handler of SIGTERM, by which they are ended.
    os.environ["DISABLE_MULTIPROC"] = "1"
    chat = settings.apply_chat_template
    model = HarnessModel(
        opened.model,
        opened.tokenizer,
        opened.tau,
        settings.batch_size,
        chat,
        seed=settings.seed,
        answers=answers,
        versions={name: str(task.VERSION) for name, task in tasks["tasks"].items()},
    )
    found = evaluate(
        model,
        tasks,
        limit=settings.limit,
        system_instruction=settings.system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    results = {
        name: _metrics(values)
        | ({"n_samples": found["n-samples"][name]["effective"]} if name in found["n-samples"] else {})
        | ({"num_fewshot": found["n-shot"][name]} if name in found["n-shot"] else {})
        | {"version": str(found["versions"].get(name)), "higher_is_better": found["higher_is_better"].get(name, {})}
        | ({"tasks": members} if (members := tasks["group_map"].get(name)) else {})
        | ({"n_cut": model.cut[name]} if name in model.cut else {})
        for name, values in {**found["results"], **found.get("groups", {})}.items()
    }
    return results, found["samples"]


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task, under the harness's keys (``exact_match,strict-match``, ``exact_match_stderr,...``)."""
    numbers = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _sources(pairs: Sequence[str]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            raise PolygluError(f"--perplexity {pair!r} is not of the form NAME=PATH.")
        if name in sources:
            raise PolygluError(
                f"--perplexity has two sources '{name}', {sources[name]} and {path}; give one another name."
            )
        sources[name] = Path(path)
    return sources


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise PolygluError(f"--batch-size {given!r} is neither auto nor a whole number from 1 on.")
    return int(given)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, or exported folder.")],
    output: Annotated[Path, typer.Option(help="Results file (JSON).")],
    tasks: Annotated[list[str] | None, typer.Option(metavar="TASK ...", help="Tasks, groups or tags.")] = None,
    suite: Annotated[str | None, typer.Option(help="Several tasks by one name: paper.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH ...", help="Held-out .jsonl file or folder of token chunks.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.")] = None,
    batch_size: Annotated[str, typer.Option(help="Requests that run together; auto: as many as fit.")] = "auto",
    perplexity_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each source.")
    ] = EvalSettings.perplexity_tokens,
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: CUDA if there is one.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further task files.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the tasks' data files, in place of the hub.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts become conversations (fine-tuned checkpoints).")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="Stands before every prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of answers that are drawn.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers kept from earlier runs.")] = False,
) -> None:
    """Evaluate a checkpoint on lm-evaluation-harness tasks and held-out text; write the results as JSON."""
    configure_logging()
    # Further names after an option are plain arguments; the ones with '=' are sources.
    further = more or []
    settings = EvalSettings(
        checkpoint=checkpoint,
        tasks=[*(tasks or []), *(name for name in further if "=" not in name)],
        suite=suite,
        perplexity=_sources([*(perplexity or []), *(pair for pair in further if "=" in pair)]),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=_batch_size(batch_size),
        perplexity_tokens=perplexity_tokens,
        tokenizer=tokenizer,
        device=device,
        include_path=include_path,
        data_dir=data_dir,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        seed=seed,
    )
    if output.is_dir():
        raise PolygluError(f"--output {output} is a folder; give the name of a results file in it.")
    check_writable(output.parent, "--output folder")
    with stoppable(answers_file(output)):
        results = evaluate_checkpoint(settings, output, fresh)
    screen = console(stderr=True)
    screen.print(results_table(results))
    if "published" in results:
        screen.print(published_table(results["published"]))
    screen.print(f"{results['routing_scope']['scope']} scope: {results['routing_scope']['note']}")
    screen.print(f"results: {output}; samples: {samples_folder(output)}", soft_wrap=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
