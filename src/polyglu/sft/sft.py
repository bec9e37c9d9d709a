"""Supervised fine-tuning on conversations.

    python -m src.sft.sft --config configs/sft_config.yaml            or started by the ``deepspeed`` launcher

    portable checkpoint ──► conversations ──► packs (no padding, each conversation once an epoch) ──► fit()

A micro batch is one pack: a row of whole conversations, up to ``micro_batch_size * seq_length`` tokens, which do not
see each other. The loss is normalised by the assistant tokens of the global batch. A model of routing scope
``sequence`` pools over each conversation, as if each were a row of its own.
"""

import logging
import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from polyglu.config_file import load_config
from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.data.sft_dataset import Conversations, collate_pack, load_conversations, pack
from polyglu.data.tokenizer import Tokenizer, load_tokenizer
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable
from polyglu.logs import configure_logging
from polyglu.model.config import SFTConfig
from polyglu.model.folder import weights_digest
from polyglu.model.model import Checkpoint, load_checkpoint, read_checkpoint
from polyglu.training.checkpoint import ResumePoint, find_resume_point
from polyglu.training.engine import create_engine
from polyglu.training.fit import Plan, fit
from polyglu.training.portable import write_portable
from polyglu.training.ranks import connect
from polyglu.training.schedules import learning_rate
from polyglu.training.session import apply_determinism, saying_how_to_go_on, session

logger = logging.getLogger(__name__)

FINAL = "sft_final.pt"


def main(
    config: Annotated[Path, typer.Option(help="Fine-tuning config (YAML).")] = Path("configs/sft_config.yaml"),
    set_: Annotated[list[str], typer.Option("--set", help="Override: section.key=value; may be repeated.")] = [],  # noqa: B006
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Given by the launcher.")] = 0,
) -> None:
    """Fine-tune a model on conversations."""
    configure_logging(rank=int(os.environ.get("RANK", local_rank)))
    with saying_how_to_go_on("sft", config, set_):
        finetune(load_config(SFTConfig, config, set_))


def finetune(config: SFTConfig) -> Path:
    """Run fine-tuning as configured.

    Returns:
        The final portable checkpoint.

    Raises:
        PolygluError: data, checkpoint or config that do not fit, or numbers that stay bad.
        Interrupted: a signal asked to stop; the run is saved.
    """
    settings, ranks = config.training, connect()
    apply_determinism(settings)
    found = ranks.agree(lambda: check_inputs(config))
    base = read_checkpoint(settings.init_from)
    tokenizer = check_tokenizer(base, config)
    per_conversation = "document" if base.config.routing_scope == "sequence" else base.config.routing_scope
    if per_conversation != base.config.routing_scope:
        logger.warning(
            "routing_scope is 'sequence': each conversation is pooled as a row of its own, later turns included"
        )
    model, *_ = load_checkpoint(settings.init_from, base.config.model_copy(update={"routing_scope": per_conversation}))
    conversations = read_conversations(config, tokenizer, base.config.seq_length)
    engine = create_engine(model, settings, ranks)
    packs = PackLoader(
        conversations,
        capacity=settings.micro_batch_size * base.config.seq_length,
        accumulation=settings.grad_accum_steps,
        epochs=settings.epochs,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    order = {"init_from": weights_digest(settings.init_from), **packs.identity}
    plan = Plan(
        total_steps=packs.total_steps,
        learning_rate=lambda step: learning_rate(
            step, settings.learning_rate, settings.warmup_steps, packs.total_steps
        ),
        tau=lambda step: settings.tau,
        seed=settings.seed,
        gumbel=settings.gumbel,
        checkpoint_every=settings.checkpoint_every,
        skip_spikes=settings.on_loss_spike == "skip",
        max_rollbacks=settings.max_rollbacks,
    )
    logger.info("%d conversations in %d steps", len(conversations.lengths), plan.total_steps)
    with session(config, engine, plan.total_steps, found, order) as run:
        state = fit(engine, packs, plan, run.state, run.checkpoints, run.journal, run.stop)
        final = Path(settings.checkpoint_dir) / FINAL
        write_portable(engine, final, base.config, state, plan.tau(state.step), tokenizer.identity())
    return final


def check_inputs(config: SFTConfig) -> ResumePoint | None:
    """Check what can be checked before anything is made; return where to resume, if anywhere.

    Raises:
        PolygluError: a folder that cannot be written, or no such checkpoint.
    """
    settings, checkpoint_dir = config.training, Path(config.training.checkpoint_dir)
    check_writable(checkpoint_dir, "training.checkpoint_dir")
    check_writable(Path(settings.run_dir), "training.run_dir")
    check_tokenizer(read_checkpoint(settings.init_from), config)
    found = find_resume_point(settings.resume_from, checkpoint_dir) if settings.resume_from else None
    if isinstance(found, Checkpoint):
        raise PolygluError("training.resume_from: fine-tuning starts from a portable file with training.init_from.")
    return found


def check_tokenizer(base: Checkpoint, config: SFTConfig) -> Tokenizer:
    """Load the configured tokenizer.

    Raises:
        PolygluError: it is not the one that the starting checkpoint was trained with, or exceeds its vocabulary.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    expected = base.tokenizer.get("fingerprint", tokenizer.fingerprint)
    if tokenizer.fingerprint != expected or tokenizer.vocab_size > base.config.vocab_size:
        raise PolygluError(
            f"data.tokenizer: {config.data.tokenizer} is not the tokenizer that {config.training.init_from} was "
            f"trained with ({base.tokenizer.get('name', 'unnamed')}, vocabulary {base.config.vocab_size}); "
            "set it to that one."
        )
    return tokenizer


def read_conversations(config: SFTConfig, tokenizer: Tokenizer, seq_length: int) -> Conversations:
    """Read the configured conversations and report what was left out."""
    data = config.data
    conversations = load_conversations(
        files=[Path(file) for file in data.files],
        dataset=data.dataset,
        config=data.config,
        splits=data.splits,
        revision=data.revision,
        tokenizer=tokenizer,
        seq_length=seq_length,
        max_conversations=data.max_conversations,
    )
    logger.info("conversations: %s", ", ".join(f"{count:,} {kind}" for kind, count in conversations.counts.items()))
    return conversations


class PackLoader:
    """Micro batches of any step of a fine-tuning run, for one rank; the order follows from the settings alone.

    Args:
        conversations: tokenised conversations.
        capacity: tokens of a micro batch at most.
        accumulation: micro batches of a step on each rank.
        epochs: passes over the conversations.
        seed: of the run.
        rank: this process.
        world_size: processes.
    """

    def __init__(
        self,
        conversations: Conversations,
        *,
        capacity: int,
        accumulation: int,
        epochs: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.conversations, self.accumulation, self.rank, self.world_size = (
            conversations,
            accumulation,
            rank,
            world_size,
        )
        self.packs = [one for epoch in range(epochs) for one in pack(conversations.lengths, capacity, seed, epoch)]
        packs_per_step = accumulation * world_size
        self.total_steps = -(-len(self.packs) // packs_per_step)
        self.identity = {
            "conversations": conversations.digest,
            "capacity": capacity,
            "packs_per_step": packs_per_step,
            "epochs": epochs,
            "seed": seed,
        }

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of one step; the last step is filled up with batches that train nothing.

        Steps beyond the last, which stand in for data that was passed over, begin with the first packs again.
        """
        return [
            self._batch((step * self.accumulation + micro) * self.world_size + self.rank)
            for micro in range(self.accumulation)
        ]

    def recut(self) -> None:
        """None: a smaller micro batch would be other packs, and so another run."""

    def _batch(self, index: int) -> MicroBatch:
        n_packs, n_places = len(self.packs), self.total_steps * self.accumulation * self.world_size
        place = index % n_places
        input_ids, targets, cu_seqlens = collate_pack(self.conversations, self.packs[min(place, n_packs - 1)])
        if place >= n_packs:
            targets = torch.full_like(targets, IGNORED)
        return MicroBatch(input_ids, targets, cu_seqlens, sample_ids=torch.tensor([index]))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
