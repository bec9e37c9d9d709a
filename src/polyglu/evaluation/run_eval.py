"""Evaluation of a checkpoint: tasks of EleutherAI's lm-evaluation-harness, and held-out perplexity.

    run_eval --checkpoint checkpoints/portable_final.pt --tasks gsm8k minerva_math --output results/pretrain_eval.json

The results file is written once, when everything has succeeded.
"""

import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval.evaluator import evaluate
from rich.console import Console
from rich.table import Table

from polyglu.errors import PolygluError, run_command
from polyglu.evaluation.model_wrapper import HarnessModel
from polyglu.evaluation.perplexity import perplexity
from polyglu.evaluation.task_loading import load_tasks
from polyglu.files import check_writable, write_json
from polyglu.inference import Inference, open_for_inference
from polyglu.logs import configure_logging
from polyglu.model.config import RoutingScope

KEPT_SAMPLES = 5
"""Samples of each task that the results keep."""
VERDICTS = ("exact_match", "math_verify", "acc")
"""Metrics that say whether a sample is answered correctly, the first one that a task has."""
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


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate and how."""

    checkpoint: Path
    tasks: Sequence[str] = ()
    """Names of harness tasks, groups or tags."""
    perplexity: Mapping[str, Path] = field(default_factory=dict)
    """Source name -> ``.jsonl`` file of texts or folder of token chunks."""
    limit: int | None = None
    """Examples of each task; all if absent."""
    num_fewshot: int | None = None
    """Examples in the prompt; each task's own number if absent."""
    batch_size: int = 16
    """Requests that run together; results do not depend on it."""
    perplexity_tokens: int = 100_000
    """Documents of a source are read whole until they have this many tokens."""
    tokenizer: str | None = None
    """Name or path; the checkpoint's own if absent."""
    device: str | None = None
    """Torch device; CUDA if there is one, else the CPU."""
    include_path: Path | None = None
    """Folder with further task files."""
    data_dir: Path | None = None
    """Folder with the data files of the shipped tasks (``demo_arithmetic``, ``demo_arithmetic_chat``)."""
    apply_chat_template: bool = False
    """Prompts become conversations, for a fine-tuned checkpoint."""


def evaluate_checkpoint(settings: EvalSettings) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Returns:
        Plain values, ready for JSON: ``settings``, ``versions``, ``checkpoint``, ``routing_scope``, ``results`` (per
        task or group: metrics with standard errors, ``n_samples``, ``num_fewshot``), ``samples`` (per task: prompt,
        output, target, correct or not), ``perplexity`` (per source), ``seconds``, ``finished_at``.

    Raises:
        PolygluError: nothing to evaluate, bad checkpoint or tokenizer, unknown task, or data out of reach.
    """
    if not settings.tasks and not settings.perplexity:
        raise PolygluError("nothing to evaluate: name tasks with --tasks or sources with --perplexity NAME=PATH.")
    started = time.monotonic()
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_for_inference(settings.checkpoint, settings.tokenizer, device)
    with tempfile.TemporaryDirectory(prefix="polyglu-tasks-") as scratch:
        # Tasks and sources are looked at first, the long work comes last.
        tasks = load_tasks(
            settings.tasks,
            Path(scratch),
            include_path=settings.include_path,
            data_dir=settings.data_dir,
            num_fewshot=settings.num_fewshot,
        )
        perplexities = {name: _perplexity(path, opened, settings) for name, path in settings.perplexity.items()}
        results, samples = _run_tasks(tasks, opened, settings) if settings.tasks else ({}, {})
    return {
        "settings": _plain(asdict(settings) | {"device": device}),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "checkpoint": {
            "path": str(settings.checkpoint),
            "sha256": opened.sha256,
            "step": opened.step,
            "tau": opened.tau,
            "tokenizer": opened.tokenizer.name,
        },
        "routing_scope": {"scope": opened.routing_scope, "note": SCOPE_NOTES[opened.routing_scope]},
        "results": results,
        "samples": samples,
        "perplexity": perplexities,
        "seconds": round(time.monotonic() - started, 2),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _perplexity(path: Path, opened: Inference, settings: EvalSettings) -> dict[str, float | int]:
    return perplexity(
        opened.model,
        opened.tokenizer,
        opened.tau,
        path,
        max_tokens=settings.perplexity_tokens,
        batch_size=settings.batch_size,
    )


def _run_tasks(
    tasks: dict[str, Any], opened: Inference, settings: EvalSettings
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Metrics and the first samples of each task."""
    chat = settings.apply_chat_template
    model = HarnessModel(opened.model, opened.tokenizer, opened.tau, settings.batch_size, chat)
    found = evaluate(model, tasks, limit=settings.limit, apply_chat_template=chat, fewshot_as_multiturn=chat)
    results = {
        name: _metrics(values)
        | ({"n_samples": found["n-samples"][name]["effective"]} if name in found["n-samples"] else {})
        | ({"num_fewshot": found["n-shot"][name]} if name in found["n-shot"] else {})
        for name, values in {**found["results"], **found.get("groups", {})}.items()
    }
    samples = {name: [_sample(sample) for sample in kept[:KEPT_SAMPLES]] for name, kept in found["samples"].items()}
    return results, samples


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task, under the harness's keys (``exact_match,strict-match``, ``exact_match_stderr,...``)."""
    return {key: float(value) for key, value in values.items() if "," in key and isinstance(value, int | float)}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments, responses = sample["arguments"], sample["resps"]
    verdict = next((sample[metric] for metric in VERDICTS if metric in sample["metrics"]), None)
    kept = {
        "prompt": arguments[0][0],
        "output": responses[0][0] if len(responses) == 1 else [response[0] for response in responses],
        "extracted": sample["filtered_resps"],
        "target": sample["target"],
        "filter": sample["filter"],
        "correct": None if verdict is None else bool(verdict),
        "metrics": {metric: sample[metric] for metric in sample["metrics"]},
    }
    return {key: _plain(value) for key, value in kept.items()}


def _plain(value: Any) -> Any:
    """Values that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def results_table(results: Mapping[str, Any]) -> Table:
    """Metrics and perplexities as a table."""
    table = Table(title=f"{results['checkpoint']['path']}, step {results['checkpoint']['step']}")
    table.add_column("task")
    table.add_column("metric")
    for column in ("value", "± stderr", "n"):
        table.add_column(column, justify="right")
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filter_name}")
                shown = "" if error is None else f"{error:.4f}"
                table.add_row(task, key, f"{value:.4f}", shown, str(values.get("n_samples", "")))
    for source, values in results["perplexity"].items():
        table.add_row(source, "perplexity", f"{values['perplexity']:.4f}", "", f"{values['tokens']:,} tokens")
    return table


def _sources(pairs: Sequence[str]) -> dict[str, Path]:
    sources = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (name and separator and path):
            raise PolygluError(f"--perplexity {pair!r} is not of the form NAME=PATH.")
        sources[name] = Path(path)
    return sources


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, or exported folder.")],
    output: Annotated[Path, typer.Option(help="Results file (JSON).")],
    tasks: Annotated[list[str] | None, typer.Option(metavar="TASK ...", help="Tasks, groups or tags.")] = None,
    perplexity: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH ...", help="Held-out .jsonl file or folder of token chunks.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = EvalSettings.batch_size,
    perplexity_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each source.")
    ] = EvalSettings.perplexity_tokens,
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: CUDA if there is one.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with further task files.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the shipped tasks' data files.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts become conversations (fine-tuned checkpoints).")
    ] = False,
) -> None:
    """Evaluate a checkpoint on lm-evaluation-harness tasks and held-out text; write the results as JSON."""
    configure_logging()
    # Further names after an option are plain arguments; the ones with '=' are sources.
    further = more or []
    settings = EvalSettings(
        checkpoint=checkpoint,
        tasks=[*(tasks or []), *(name for name in further if "=" not in name)],
        perplexity=_sources([*(perplexity or []), *(pair for pair in further if "=" in pair)]),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        perplexity_tokens=perplexity_tokens,
        tokenizer=tokenizer,
        device=device,
        include_path=include_path,
        data_dir=data_dir,
        apply_chat_template=apply_chat_template,
    )
    if output.is_dir():
        raise PolygluError(f"--output {output} is a folder; give the name of a results file in it.")
    check_writable(output.parent, "--output folder")
    results = evaluate_checkpoint(settings)
    write_json(output, results)
    console = Console(stderr=True)
    console.print(results_table(results))
    console.print(f"{results['routing_scope']['scope']} scope: {results['routing_scope']['note']}")
    console.print(f"results: {output}")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
