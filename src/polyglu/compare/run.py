"""Compare variants of a model under one budget: ``polyglu compare SUITE.yaml``.

suite ─► data ─► steps of each variant ─► runs (variant x seed, a process each, resumable) ─► results ─► report

OUTPUT/suite.json                      what is compared, on which data: another suite gets another folder
OUTPUT/runs/VARIANT/seed_N/            an ordinary training run, and result.json when it is finished
OUTPUT/results.json, curves.png, differences.png, report.html
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from polyglu.compare.budget import (
    CALIBRATION_LOGS,
    CALIBRATION_STEPS,
    StepWork,
    step_work,
    steps_within,
)
from polyglu.compare.heldout import check_heldout
from polyglu.compare.identity import claim
from polyglu.compare.member import CONFIG, HELDOUT, RESULT
from polyglu.compare.processes import Job, Start, run_jobs, start_process
from polyglu.compare.report import console_table, write_report
from polyglu.compare.results import run_label, summarise
from polyglu.compare.suite import Suite, load_suite, run_config
from polyglu.config_file import save_config
from polyglu.data.chunks import open_source
from polyglu.data.embedded_tokens import make_embedded_data
from polyglu.errors import Interrupted, PolygluError, run_command
from polyglu.files import exclusive, plain, read_json, write_json
from polyglu.logs import configure_logging, console
from polyglu.training.signals import stop_on_signals
from polyglu.training.train import open_sources

logger = logging.getLogger(__name__)

RESULTS, SPEEDS = "results.json", "speeds.json"


def main(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="What to compare (YAML).")],
    output: Annotated[Path | None, typer.Option(help="Folder of runs and results; runs/compare/SUITE.")] = None,
    devices: Annotated[str | None, typer.Option(help="GPUs to use, one run on each: 0,1,2.")] = None,
) -> None:
    """Train variants of a model under one budget, several seeds each, and say which is better."""
    configure_logging()
    loaded = load_suite(suite)
    folder = output or Path("runs/compare") / loaded.name
    given = ["--output", str(output)] if output else []
    again = shlex.join(["polyglu", "compare", str(suite), *given, *(["--devices", devices] if devices else [])])
    try:
        results = compare(loaded, folder, pick_devices(devices))
    except Interrupted as interrupted:
        raise Interrupted(f"{interrupted} Go on with: {again}") from None
    screen = console()
    screen.print(console_table(results))
    for sentence in (results["verdict"], *results["leak_sentences"]):
        screen.print(sentence, soft_wrap=True)
    screen.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def compare(suite: Suite, output: Path, devices: list[str | None], start: Start = start_process) -> dict[str, Any]:
    """Make the runs that are missing, then the results of all.

    Args:
        suite: what to compare.
        output: folder of runs and results.
        devices: as ``run_jobs`` takes them.
        start: starts a run.

    Returns:
        What ``results.json`` holds.

    Raises:
        PolygluError: data that do not fit, the folder of another suite, or no run that ended well.
        Interrupted: a signal asked to stop; what is running is saved.
    """
    with exclusive(output):
        prepare_data(suite)
        work = {name: step_work(config) for name, config in suite.variants.items()}
        steps = _steps(suite, output, work, devices, start)
        claim(suite, output)
        jobs = list(_jobs(suite, steps, output))
        missing = [job for job in jobs if not (job.folder / RESULT).exists()]
        logger.info("%d runs of %d variants, %d to be made", len(jobs), len(suite.variants), len(missing))
        failed = _run(missing, devices, start)
        found = {job.label: read_json(job.folder / RESULT) for job in jobs if (job.folder / RESULT).exists()}
        if not found:
            first = next(iter(failed.values()), "none was started")
            raise PolygluError(f"no run of {suite.name} ended well; the first: {first}.")
        flops = {name: work[name].flops * steps[name] for name in steps}
        tokens = {name: work[name].tokens * steps[name] for name in steps}
        results: dict[str, Any] = plain(summarise(suite, found, failed, flops, tokens))
        write_json(output / RESULTS, results)
        write_report(results, output)
    return results


def pick_devices(given: str | None) -> list[str | None]:
    """Ids of the GPUs to use: those that are named, else the first; ``[None]``, the CPU, where there is none.

    Raises:
        PolygluError: not numbers of GPUs that are there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given is None:
        return [_visible(0)] if count else [None]
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) < count for part in parts) or len(set(parts)) < len(parts):
        there = f"there are {count}, from 0 on" if count else "there is none; leave it out, to use the CPU"
        raise PolygluError(f"--devices must name GPUs, each once, as in 0,1; got {given!r}, {there}.")
    return [_visible(int(part)) for part in parts]


def _visible(index: int) -> str:
    """Id of the n-th GPU that this process sees."""
    ids = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return ids[index] if ids else str(index)


def run_folder(output: Path, variant: str, seed: int) -> Path:
    """Folder of a run."""
    return output / "runs" / variant / f"seed_{seed}"


def prepare_data(suite: Suite) -> None:
    """Make the embedded data if the suite asks for it, and check that what is held out is.

    Raises:
        PolygluError: data that are missing or do not fit.
    """
    first = next(iter(suite.variants.values()))
    if suite.settings.embedded is not None:
        make_embedded_data(Path(suite.settings.embedded), first.model.vocab_size)
    held_out = [open_source(Path(folder), name) for name, folder in suite.settings.validation.items()]
    check_heldout(held_out, open_sources(first))


def _steps(
    suite: Suite, output: Path, work: dict[str, StepWork], devices: list[str | None], start: Start
) -> dict[str, int]:
    """Steps of each variant's runs.

    Raises:
        PolygluError: the budget does not pay for one step, or not for more than the warm-up.
    """
    budget = suite.settings.budget
    speeds = _speeds(suite, output, devices, start) if budget.kind == "seconds" else {}
    steps = {name: steps_within(budget, work[name], speeds.get(name)) for name in suite.variants}
    for name, config in suite.variants.items():
        if config.training.warmup_steps >= steps[name]:
            raise PolygluError(
                f"variants.{name}: the budget pays for {steps[name]:,} steps, and training.warmup_steps is "
                f"{config.training.warmup_steps:,}: the learning rate would never come down; lower it."
            )
    return steps


def _speeds(suite: Suite, output: Path, devices: list[str | None], start: Start) -> dict[str, float]:
    """Tokens a second of each variant: measured once, one after the other, and kept.

    Raises:
        PolygluError: a variant cannot be measured.
        Interrupted: a signal asked to stop.
    """
    claim(suite, output)  # for they are kept there
    if (output / SPEEDS).exists():
        speeds: dict[str, float] = read_json(output / SPEEDS)
        return speeds
    jobs = []
    for name in suite.variants:
        folder = output / "calibration" / name
        config = run_config(suite, name, suite.settings.seeds[0], CALIBRATION_STEPS, folder)
        short = config.training.model_copy(update={"log_every": CALIBRATION_LOGS, "checkpoint_every": 10**6})
        jobs.append(_written(Job(f"speed of {name}", folder), config.model_copy(update={"training": short}), {}, 0))
    failed = _run([job for job in jobs if not (job.folder / RESULT).exists()], devices[:1], start)
    if failed:
        name, reason = next(iter(failed.items()))
        raise PolygluError(f"the {name} cannot be measured: {reason}.")
    results = [read_json(job.folder / RESULT) for job in jobs]
    speeds = {name: found["tokens_per_second"] for name, found in zip(suite.variants, results, strict=True)}
    write_json(output / SPEEDS, speeds)
    return speeds


def _jobs(suite: Suite, steps: dict[str, int], output: Path) -> Iterator[Job]:
    """All runs, their configs written. Seed by seed, so that what a stop leaves is as even as can be."""
    settings = suite.settings
    for seed in settings.seeds:
        for name in suite.variants:
            folder = run_folder(output, name, seed)
            config = run_config(suite, name, seed, steps[name], folder)
            job = Job(run_label(name, seed), folder)
            yield _written(job, config, settings.validation, settings.validation_tokens)


def _written(job: Job, config: Any, validation: dict[str, str], tokens: int) -> Job:
    save_config(config, job.folder / CONFIG)
    write_json(job.folder / HELDOUT, {"validation": validation, "tokens": tokens})
    return job


def _run(jobs: list[Job], devices: list[str | None], start: Start) -> dict[str, str]:
    """Make runs; say how long the rest will take.

    Raises:
        Interrupted: a signal asked to stop; the runs are saved.
    """
    began, finished = time.monotonic(), []

    def done(job: Job) -> None:
        finished.append(job)
        seconds = (time.monotonic() - began) / len(finished) * (len(jobs) - len(finished))
        logger.info("%s: done (%d of %d), %.0f min left", job.label, len(finished), len(jobs), seconds / 60)

    with stop_on_signals() as stop:
        failed = run_jobs(jobs, devices, stop, start, done)
        if stop.requested:
            raise Interrupted(f"{len(jobs) - len(finished)} of {len(jobs)} runs are to be made or finished.")
    return failed


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
