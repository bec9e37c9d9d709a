"""Pre-training.

python -m src.training.train --config configs/train_config.yaml                          one device, plain PyTorch
deepspeed --num_gpus=1 -m src.training.train --config configs/train_config.yaml          ZeRO, any number of ranks
polyglu train --dry-run configs/train_config.yaml                            checks, tries two steps, writes nothing

config ──► sources ──► TokenLoader ──► run() ──► fit() ──► checkpoints, metrics.jsonl, events.jsonl, W&B
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from polyglu.config_file import load_config
from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import MicroBatch, TokenLoader
from polyglu.data.order import MixSchedule
from polyglu.data.verify import require_intact
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable
from polyglu.logs import configure_logging
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import TrainConfig, TrainingSection
from polyglu.model.model import Checkpoint, create_model, describe_shape, load_checkpoint, read_checkpoint
from polyglu.training.checkpoint import ResumePoint, find_resume_point
from polyglu.training.engine import Engine, create_engine
from polyglu.training.fit import Plan, fit
from polyglu.training.guard import RunState
from polyglu.training.memory import announce as announce_size
from polyglu.training.memory import fit_micro_batch, rows_per_step, smaller
from polyglu.training.portable import portable_writer, write_portable
from polyglu.training.ranks import Ranks, connect
from polyglu.training.saver import Job
from polyglu.training.schedules import learning_rate, temperature
from polyglu.training.session import apply_determinism, saying_how_to_go_on, session

logger = logging.getLogger(__name__)

SEQUENCE_SCOPE_NOTE = (
    "routing_scope is 'sequence': every position's routing sees the whole row, later tokens and other documents "
    "included, so the training loss is not a language model's loss; 'causal' is honest"
)


def main(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="Training config (YAML).")] = None,
    config: Annotated[Path | None, typer.Option(help="The same, as an option.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override: section.key=value; may be repeated.")] = [],  # noqa: B006
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, try two steps, print the plan.")
    ] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="Of one GPU, for the plan.", min=0.0)] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the launcher.")] = 0,
) -> None:
    """Pre-train a model."""
    configure_logging(rank=int(os.environ.get("RANK", local_rank)))
    chosen = path or config
    if chosen is None or (path and config):
        raise PolygluError("give one training config: polyglu train CONFIG, or --config CONFIG.")
    if dry_run:
        from polyglu.training.dry_run import rehearse  # which imports this module

        rehearse(load_config(TrainConfig, chosen, set_), price_per_hour)
        return
    if price_per_hour is not None:
        raise PolygluError("--price-per-hour is for the plan that --dry-run prints; give both.")
    with saying_how_to_go_on("train", chosen, set_):
        train(load_config(TrainConfig, chosen, set_))


def train(config: TrainConfig) -> Path:
    """Run pre-training as configured, from the start or from ``training.resume_from``.

    Returns:
        The final portable checkpoint.

    Raises:
        PolygluError: data, checkpoint or config that do not fit, or numbers that stay bad.
        Interrupted: a signal asked to stop; the run is saved.
    """
    settings, ranks = config.training, connect()
    apply_determinism(settings)
    ranks.agree(lambda: check_inputs(config))
    sources = open_sources(config)
    start = ranks.agree(lambda: find_start(config, sources[0]))
    found = read_checkpoint(start) if isinstance(start, Path) else start
    engine = create_engine(starting_model(config, found), settings, ranks)
    size = fit_micro_batch(settings, engine.loss, ranks, settings.tau_max, engine.buffer_bytes)
    loader = CutLoader(lambda rows: create_loader(config, sources, ranks, rows), size, rows_per_step(settings))
    order = data_order(config, loader.loader)
    tokenizer, checkpoint_dir = sources[0].manifest["tokenizer"], Path(settings.checkpoint_dir)
    plan = Plan(
        total_steps=settings.total_steps,
        learning_rate=lambda step: learning_rate(
            step, settings.learning_rate, settings.warmup_steps, settings.total_steps
        ),
        tau=lambda step: temperature(step, settings),
        seed=settings.seed,
        gumbel=settings.gumbel,
        checkpoint_every=settings.checkpoint_every,
        skip_spikes=settings.on_loss_spike == "skip",
        max_rollbacks=settings.max_rollbacks,
        files=lambda state: portable_files(engine, config, state, tokenizer, order),
    )
    announce(config, engine, size)
    with session(config, engine, plan.total_steps, found, order) as run:
        state = fit(engine, loader, plan, run.state, run.checkpoints, run.journal, run.stop)
        final = checkpoint_dir / "portable_final.pt"
        write_portable(engine, final, config.model, state, plan.tau(state.step), tokenizer)
    return final


def portable_files(
    engine: Engine, config: TrainConfig, state: RunState, tokenizer: Mapping[str, Any], order: Mapping[str, Any]
) -> dict[str, Job]:
    """The portable checkpoint that is due after a step, if one is."""
    settings = config.training
    if state.step % portable_interval(settings):
        return {}
    path = Path(settings.checkpoint_dir) / f"portable_step{state.step}.pt"
    tau = temperature(state.step, settings)
    with_order = order if settings.portable_optimizer else None
    return {path.name: portable_writer(engine, path, config.model, state, tau, tokenizer, with_order)}


def portable_interval(settings: TrainingSection) -> int:
    """Steps between portable checkpoints: as configured, or with each resume checkpoint in a run too short for that."""
    short = settings.total_steps < settings.portable_checkpoint_every
    return settings.checkpoint_every if short else settings.portable_checkpoint_every


def check_inputs(config: TrainConfig) -> None:
    """Check folders and data, as far as that is possible before the model is made.

    Raises:
        PolygluError: what does not fit.
    """
    check_writable(Path(config.training.checkpoint_dir), "training.checkpoint_dir")
    check_writable(Path(config.training.run_dir), "training.run_dir")
    for source in open_sources(config):
        if config.data.verify_hashes:
            require_intact(source.folder)


def find_start(config: TrainConfig, source: TokenSource) -> ResumePoint | Path | None:
    """What ``training.resume_from`` leads to: a resume point, or a portable checkpoint.

    Raises:
        PolygluError: nothing whole, or a checkpoint of another tokenizer than the data's.
    """
    settings = config.training
    if settings.resume_from is None:
        return None
    found = find_resume_point(settings.resume_from, Path(settings.checkpoint_dir))
    if isinstance(found, Checkpoint):
        check_tokenizer(found, source, settings.resume_from)
        return Path(settings.resume_from)
    return found


def starting_model(config: TrainConfig, found: ResumePoint | Checkpoint | None) -> PolychromaticLM:
    """The model with the weights of a portable checkpoint, or else with initial ones."""
    if isinstance(found, Checkpoint) and config.training.resume_from:
        return load_checkpoint(config.training.resume_from, config.model)[0]
    return create_model(config.model, config.training.seed)


def open_sources(config: TrainConfig) -> list[TokenSource]:
    """Open all sources of the mix.

    Raises:
        PolygluError: a source is missing or damaged, was made with another tokenizer than the first one, or has more
            tokens in its vocabulary than the model.
    """
    sources = [open_source(Path(source.path), name) for name, source in config.data.sources.items()]
    for fault in source_faults(sources, config.model.vocab_size):
        raise PolygluError(fault)
    return sources


def source_faults(sources: Sequence[TokenSource], vocab_size: int) -> Iterator[str]:
    """What keeps sources from being trained on together: another tokenizer than the first one's, or too many tokens.

    Args:
        sources: open ones.
        vocab_size: of the model.
    """
    for source in sources:
        tokenizer, first = source.manifest["tokenizer"], sources[0].manifest["tokenizer"]
        if tokenizer["fingerprint"] != first["fingerprint"]:
            yield (
                f"{source.folder} was tokenised with {tokenizer['name']}, {sources[0].folder} with {first['name']}; "
                "tokenise all sources with one tokenizer."
            )
        if source.vocab_size > vocab_size:
            yield (
                f"{source.folder} was tokenised with a vocabulary of {source.vocab_size}, model.vocab_size is "
                f"{vocab_size}; set it to at least the tokenizer's."
            )


def data_order(config: TrainConfig, loader: TokenLoader) -> dict[str, Any]:
    """What determines a run's model and data order."""
    shape = describe_shape(config.model)
    del shape["use_flash_attn"]  # who computes
    return {"model": shape, **loader.identity}


def check_tokenizer(checkpoint: Checkpoint, source: TokenSource, path: str) -> None:
    """Refuse to go on from a checkpoint that was trained on tokens of another tokenizer.

    Raises:
        PolygluError: the fingerprints differ; a published checkpoint has none.
    """
    expected = source.manifest["tokenizer"]["fingerprint"]
    if checkpoint.tokenizer.get("fingerprint", expected) != expected:
        raise PolygluError(
            f"training.resume_from: {path} was trained with tokenizer {checkpoint.tokenizer.get('name')}, "
            f"{source.folder} was tokenised with {source.manifest['tokenizer']['name']}; use data of that tokenizer."
        )


def create_loader(config: TrainConfig, sources: Sequence[TokenSource], ranks: Ranks, rows: int) -> TokenLoader:
    """Loader of this rank's batches, in micro batches of ``rows`` rows."""
    shares = config.data.sources.values()
    return TokenLoader(
        sources,
        MixSchedule(
            start=tuple(source.mix for source in shares),
            end=tuple(source.mix_end for source in shares),
            anneal_start=config.data.anneal_start,
            total_steps=config.training.total_steps,
        ),
        seq_length=config.model.seq_length,
        rows=rows,
        accumulation=rows_per_step(config.training) // rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
    )


class CutLoader:
    """A token loader whose micro batches can be made smaller: the same rows a step, in the same order.

    Args:
        make: makes a loader of micro batches of a number of rows.
        size: that number.
        rows: of a step on this rank.
    """

    def __init__(self, make: Callable[[int], TokenLoader], size: int, rows: int) -> None:
        self.make, self.size, self.rows, self.loader = make, size, rows, make(size)

    def step(self, index: int) -> list[MicroBatch]:
        """This rank's micro batches of one step."""
        return self.loader.step(index)

    def recut(self) -> "CutLoader | None":
        """A loader of the next smaller micro batches; None if they are of one row."""
        size = smaller(self.size, self.rows)
        if size is None:
            return None
        announce_size(self.size, size, self.rows)
        return CutLoader(self.make, size, self.rows)


def announce(config: TrainConfig, engine: Engine, micro_batch_size: int) -> None:
    """Say what is about to be trained, and how."""
    rows = rows_per_step(config.training) * engine.ranks.world_size
    logger.info(
        "%s parameters, %s tokens a step in micro batches of %d x %d, %s engine on %d x %s, compute in %s",
        f"{sum(parameter.numel() for parameter in engine.loss.model.parameters()):,}",
        f"{rows * config.model.seq_length:,}",
        micro_batch_size,
        config.model.seq_length,
        engine.name,
        engine.ranks.world_size,
        engine.ranks.device.type,
        str(engine.loss.compute_dtype).removeprefix("torch."),
    )
    if config.model.ffn == "polyglu" and config.model.routing_scope == "sequence":
        logger.warning(SEQUENCE_SCOPE_NOTE)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
