"""Pre-training.

python -m src.training.train --config configs/train_config.yaml                          one device, plain PyTorch
deepspeed --num_gpus=1 -m src.training.train --config configs/train_config.yaml          ZeRO, any number of ranks

config ──► sources ──► TokenLoader.step(s) ──► fit() ──► checkpoints, metrics.jsonl, W&B
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polyglu.config_file import load_config
from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import TokenLoader
from polyglu.data.order import MixSchedule
from polyglu.data.verify import require_intact
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable
from polyglu.logs import configure_logging
from polyglu.model.config import TrainConfig, TrainingSection
from polyglu.model.model import Checkpoint, create_model, load_checkpoint, save_portable
from polyglu.training.checkpoint import find_resume_point, resume, save_resume_point
from polyglu.training.engine import Engine, create_engine
from polyglu.training.fit import Plan, fit
from polyglu.training.metrics import open_metrics
from polyglu.training.schedules import learning_rate, temperature

logger = logging.getLogger(__name__)

SEQUENCE_SCOPE_NOTE = (
    "routing_scope is 'sequence': every position's routing sees the whole row, later tokens and other documents "
    "included, so the training loss is not a language model's loss; 'causal' is honest"
)


def main(
    config: Annotated[Path, typer.Option(help="Training config (YAML).")],
    set_: Annotated[list[str], typer.Option("--set", help="Override: section.key=value; may be repeated.")] = [],  # noqa: B006
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the launcher.")] = 0,
) -> None:
    """Pre-train a model."""
    configure_logging(rank=int(os.environ.get("RANK", local_rank)))
    train(load_config(TrainConfig, config, set_))


def train(config: TrainConfig) -> Path:
    """Run pre-training as configured, from the start or from ``training.resume_from``.

    Returns:
        The final portable checkpoint.

    Raises:
        PolygluError: data, checkpoint or config that do not fit.
    """
    settings = config.training
    checkpoint_dir = Path(settings.checkpoint_dir)
    check_writable(checkpoint_dir, "training.checkpoint_dir")
    check_writable(Path(settings.run_dir), "training.run_dir")
    sources = open_sources(config)
    found = find_resume_point(settings.resume_from, checkpoint_dir) if settings.resume_from else None
    if isinstance(found, Checkpoint) and settings.resume_from:
        check_tokenizer(found, sources[0], settings.resume_from)
        model, start_step = load_checkpoint(settings.resume_from, config.model)[0], found.step
        logger.info("weights and step %d from %s; it has no optimiser state", start_step, settings.resume_from)
    else:
        model, start_step = create_model(config.model, settings.seed), 0
    engine = create_engine(model, settings)
    if config.data.verify_hashes and engine.rank == 0:
        for source in sources:
            require_intact(source.folder)
    loader = create_loader(config, sources, engine)
    order = {"model": config.model.model_dump(mode="json", exclude={"use_flash_attn"}), **loader.identity}
    start_step = resume(engine, found, order) or start_step
    plan = Plan(
        total_steps=settings.total_steps,
        learning_rate=lambda step: learning_rate(
            step, settings.learning_rate, settings.warmup_steps, settings.total_steps
        ),
        tau=lambda step: temperature(step, settings.total_steps, settings.tau_max, settings.tau_min),
        seed=settings.seed,
        log_every=settings.log_every,
    )
    _announce(config, engine)
    metrics = open_metrics(config, engine.rank, start_step, plan.total_steps)

    def save_weights(name: str, step: int) -> None:
        if engine.rank == 0:
            weights, tokenizer = engine.loss.model.state_dict(), sources[0].manifest["tokenizer"]
            save_portable(checkpoint_dir / name, weights, config.model, step, plan.tau(step), tokenizer)

    def save(step: int) -> bool:
        resume = step % settings.checkpoint_every == 0 or step == settings.total_steps
        portable = step % portable_interval(settings) == 0
        if resume:
            save_resume_point(engine, checkpoint_dir, step, order, settings.keep_checkpoints)
        if portable:
            save_weights(f"portable_step{step}.pt", step)
        return resume or portable

    fit(engine, loader.step, plan, start_step, metrics, save)
    save_weights("portable_final.pt", plan.total_steps)
    if metrics is not None:
        metrics.close()
    engine.close()
    return checkpoint_dir / "portable_final.pt"


def portable_interval(settings: TrainingSection) -> int:
    """Steps between portable checkpoints: as configured, or with each resume checkpoint in a run too short for that."""
    short = settings.total_steps < settings.portable_checkpoint_every
    return settings.checkpoint_every if short else settings.portable_checkpoint_every


def open_sources(config: TrainConfig) -> list[TokenSource]:
    """Open all sources of the mix.

    Raises:
        PolygluError: a source is missing or damaged, was made with another tokenizer than the first one, or has more
            tokens in its vocabulary than the model.
    """
    sources = [open_source(Path(source.path), name) for name, source in config.data.sources.items()]
    first = sources[0]
    for source in sources:
        if source.manifest["tokenizer"]["fingerprint"] != first.manifest["tokenizer"]["fingerprint"]:
            raise PolygluError(
                f"{source.folder} was tokenised with {source.manifest['tokenizer']['name']}, {first.folder} with "
                f"{first.manifest['tokenizer']['name']}; tokenise all sources with one tokenizer."
            )
        if source.vocab_size > config.model.vocab_size:
            raise PolygluError(
                f"{source.folder} was tokenised with a vocabulary of {source.vocab_size}, model.vocab_size is "
                f"{config.model.vocab_size}; set it to at least the tokenizer's."
            )
    return sources


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


def create_loader(config: TrainConfig, sources: Sequence[TokenSource], engine: Engine) -> TokenLoader:
    """Loader of this rank's batches."""
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
        rows=config.training.micro_batch_size,
        accumulation=config.training.grad_accum_steps,
        rank=engine.rank,
        world_size=engine.world_size,
        seed=config.training.seed,
        vocab_size=config.model.vocab_size,
    )


def _announce(config: TrainConfig, engine: Engine) -> None:
    settings = config.training
    rows = settings.micro_batch_size * settings.grad_accum_steps * engine.world_size
    logger.info(
        "%s parameters, %s tokens a step, %s engine on %d x %s, compute in %s",
        f"{sum(parameter.numel() for parameter in engine.loss.model.parameters()):,}",
        f"{rows * config.model.seq_length:,}",
        engine.name,
        engine.world_size,
        engine.device.type,
        str(engine.loss.compute_dtype).removeprefix("torch."),
    )
    if config.model.ffn == "polyglu" and config.model.routing_scope == "sequence":
        logger.warning(SEQUENCE_SCOPE_NOTE)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
