"""Before the money burns: ``polyglu train --dry-run CONFIG``.

    config ──► examine(): every fault ──► any? listed, exit code 2
                                 └ none ──► try_out(): two steps, save, load ──► the plan, on stdout

Nothing is written into checkpoint_dir or run_dir, and no run at Weights & Biases is made.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import typer

from polyglu.data.dataloader import TokenLoader
from polyglu.errors import PolygluError
from polyglu.model.config import TrainConfig
from polyglu.training.checkpoint import ResumePoint
from polyglu.training.devices import PEAK_FLOPS, compute_dtype, peak_flops
from polyglu.training.estimate import (
    ASSUMED_MFU,
    FP32,
    Trial,
    activation_bytes,
    choose_trial,
    count_parameters,
    source_needs,
    state_bytes,
    tokens_per_step,
    training_seconds,
)
from polyglu.training.memory import memory_limit, rows_per_step
from polyglu.training.preflight import Findings, examine
from polyglu.training.ranks import Ranks, connect, launched_distributed
from polyglu.training.session import apply_determinism
from polyglu.training.shards import BYTES_PER_PARAMETER
from polyglu.training.train import create_loader, data_order, open_sources
from polyglu.training.trial import Outcome, place_for_trial, try_out

logger = logging.getLogger(__name__)

TRIAL_SECONDS = 300.0
"""Time that the steps tried out may take, as forecast; what would take longer is cut down."""

MANY_EPOCHS = 4
"""Up to about so many, repeated data are nearly as good as new ones (Muennighoff et al. 2023, arXiv 2305.16264)."""

Line = tuple[str, str]
"""What, and what there is to say of it."""


def rehearse(config: TrainConfig, price_per_hour: float | None = None) -> None:
    """Check a run, try two steps of it and print its plan (all ranks call it).

    Args:
        config: of the run.
        price_per_hour: of one GPU, in any currency.

    Raises:
        PolygluError: something is wrong; what it is has been printed.
    """
    ranks = connect()
    apply_determinism(config.training)
    findings = ranks.agree(lambda: _sound(examine(config, ranks.world_size)))
    sources, settings = open_sources(config), config.training
    loader = create_loader(config, sources, ranks, rows_per_step(settings))
    order, checkpoint_dir = data_order(config, loader), Path(settings.checkpoint_dir)
    trial = ranks.agree(lambda: _trial(config, ranks))
    outcome = try_out(trial, sources, ranks, findings.found, order, checkpoint_dir)
    if ranks.rank == 0:
        lines = [
            *plan_lines(config, findings, loader, ranks.world_size),
            *memory_lines(config, findings, outcome, trial, ranks.world_size),
            *trial_lines(config, trial, outcome),
            *time_lines(config, findings, trial, outcome, ranks.world_size, price_per_hour),
            *(("note", note) for note in findings.notes),
        ]
        width = max(len(what) for what, _ in lines)
        for what, text in lines:
            typer.echo(f"{what:<{width}}  {text}")
    ranks.agree(lambda: _require_repeatable(config, outcome))
    if ranks.rank == 0:
        typer.echo("All is well: nothing was written; start the run without --dry-run.")
    ranks.close()


def plan_lines(config: TrainConfig, findings: Findings, loader: TokenLoader, ranks: int) -> Iterator[Line]:
    """The model, where the run starts, its steps, its data and its disk."""
    settings, size, per_step = config.training, count_parameters(config.model), tokens_per_step(config, ranks)
    left = max(0, settings.total_steps - findings.step)
    yield "model", f"{size.total:,} parameters, {size.embedding:,} of them the embedding"
    start = "step 0, new weights"
    if findings.found is not None:
        where = findings.found.folder if isinstance(findings.found, ResumePoint) else settings.resume_from
        start = f"step {findings.step:,}, from {where}"
    yield "start", start
    yield "run", f"{settings.total_steps:,} steps of {per_step:,} tokens: {settings.total_steps * per_step:,} tokens"
    yield "left", f"{left:,} steps, {left * per_step:,} tokens"
    rows = rows_per_step(settings)
    yield "step", f"{rows:,} rows of {config.model.seq_length:,} tokens on each of {ranks} rank(s)"
    names = [source.name for source in loader.sources]
    quotas = loader.order.quotas[settings.total_steps].tolist()
    for need in source_needs(names, quotas, loader.order.windows, config.model.seq_length):
        yield "data", f"{need.name}: {need.needed:,} of {need.there:,} tokens, {need.epochs:.2f} epochs"
        if need.epochs > MANY_EPOCHS:
            yield (
                "note",
                f"{need.name} is read more than {MANY_EPOCHS} times, from where on repeats teach less and less",
            )
    resume = BYTES_PER_PARAMETER * size.total
    portable = resume if settings.portable_optimizer else FP32 * size.total
    kept = f"{settings.keep_checkpoints} kept and one being written"
    yield "checkpoints", f"{bytes_in_words(resume)} to resume ({kept}), portable {bytes_in_words(portable)} (all kept)"
    needed, free = findings.disk
    yield "disk", f"{bytes_in_words(needed)} to come, {bytes_in_words(free)} free"


def memory_lines(config: TrainConfig, findings: Findings, outcome: Outcome, trial: Trial, ranks: int) -> Iterator[Line]:
    """Memory of each rank: estimated, and as measured in the trial."""
    settings, zero = config.training, findings.zero if launched_distributed() else None
    parts = state_bytes(count_parameters(config.model).total, ranks, zero)
    wanted = settings.micro_batch_size
    rows = wanted if isinstance(wanted, int) else outcome.micro_batch
    parts["activations"] = activation_bytes(config.model, rows, outcome.compute, settings.activation_checkpointing)
    listed = ", ".join(f"{what} {bytes_in_words(n_bytes)}" for what, n_bytes in parts.items())
    total, on = bytes_in_words(sum(parts.values())), "a GPU" if outcome.device.type == "cpu" else str(outcome.device)
    formula = "estimated from shapes (training/estimate.py)"
    yield "memory", f"{total} on {on} for micro batches of {rows} row(s), {formula}: {listed}"
    whose = "this process"
    if outcome.device.type == "cuda":
        whole = torch.cuda.get_device_properties(outcome.device).total_memory
        whose = f"tensors on {outcome.device}, which has {bytes_in_words(whole)},"
    of = "" if trial.whole_model else ", of the smaller model"
    yield "measured", f"{bytes_in_words(outcome.peak)} at most in use by {whose} during the trial{of}"


def trial_lines(config: TrainConfig, trial: Trial, outcome: Outcome) -> Iterator[Line]:
    """What was tried, and what came of it."""
    precision = str(outcome.compute).removeprefix("torch.")
    yield "tried on", f"{outcome.engine} engine, {outcome.device}, compute in {precision}"
    what = f"two steps of the run, in micro batches of {outcome.micro_batch} row(s)"
    if not trial.whole_model:
        small = count_parameters(trial.config.model).total
        what = f"two steps of one row with a model of {small:,} parameters: the run's is too large for this machine"
    elif not trial.whole_step:
        what = f"two steps of one micro batch of {outcome.micro_batch} row(s): whole ones would take too long here"
    yield "tried", what
    yield "loss", " then ".join(f"{loss:.4f}" for loss in outcome.losses) + " nats per token"
    yield (
        "saved",
        f"and loaded in {place_for_trial(Path(config.training.checkpoint_dir))}: the same bits, removed again",
    )
    yield "save took", f"{outcome.save_seconds:.2f} s (a run goes on meanwhile)"
    again = "the same bits" if outcome.repeated else "NOT the same bits: a resumed run will differ in rounding"
    yield "resumed", f"the second step made again after the load has {again}"


def time_lines(
    config: TrainConfig, findings: Findings, trial: Trial, outcome: Outcome, ranks: int, price_per_hour: float | None
) -> Iterator[Line]:
    """Time and price of the steps that are left: as measured, or where that says nothing, at an assumed speed."""
    left = max(0, config.training.total_steps - findings.step)
    per_step = tokens_per_step(config, ranks)

    def cost(seconds: float) -> str:
        price = "" if price_per_hour is None else f", price {seconds / 3600 * ranks * price_per_hour:,.2f}"
        return f"{duration(seconds)} on {ranks} device(s){price}"

    if trial.whole_step or (trial.whole_model and outcome.device.type == "cuda"):
        seconds = outcome.seconds * rows_per_step(config.training) / rows_per_step(trial.config.training)
        yield "speed", f"{per_step / seconds:,.0f} tokens/s, {seconds:.3g} s a step, measured"
        yield "time", cost(left * seconds)
        return
    yield "speed", f"this machine is too slow to tell; assumed: {ASSUMED_MFU:.1%} of a GPU's peak, by 6 N"
    parameters = count_parameters(config.model).total
    for name, peak in PEAK_FLOPS.items():
        yield "time", f"{name}: {cost(training_seconds(parameters, left * per_step, peak * ASSUMED_MFU * ranks))}"


def bytes_in_words(count: int) -> str:
    """Kilo-, mega- or gigabytes."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1000:.2f} kB"


def duration(seconds: float) -> str:
    """Days, hours, minutes or seconds, whichever suits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _sound(findings: Findings) -> Findings:
    """The findings, if nothing is wrong.

    Raises:
        PolygluError: something is; each problem is printed.
    """
    for problem in findings.problems:
        typer.echo(f"problem: {' '.join(problem.split())}")
    if count := len(findings.problems):
        raise PolygluError(f"{count} problem(s) found, listed above; mend them before the run is started.")
    return findings


def _trial(config: TrainConfig, ranks: Ranks) -> Trial:
    """What to try here. A GPU's memory is not forecast: whether the run fits is what shall be seen."""
    device = ranks.device
    flops = peak_flops(device, compute_dtype(config.training.precision, device)) * ASSUMED_MFU
    memory = float("inf") if device.type == "cuda" else memory_limit()
    return choose_trial(config, memory, flops, TRIAL_SECONDS)


def _require_repeatable(config: TrainConfig, outcome: Outcome) -> None:
    """Check that a step gives the same bits twice where it should.

    Raises:
        PolygluError: it does not, on a CPU or with deterministic kernels.
    """
    if not outcome.repeated and (outcome.device.type == "cpu" or config.training.deterministic):
        raise PolygluError(
            "a step that was made again after a load has other bits than before: a resumed run would not be the same "
            "as one that was not stopped; this machine or a library of it does not compute alike twice."
        )
