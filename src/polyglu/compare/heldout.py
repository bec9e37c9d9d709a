"""Losses of a checkpoint on packed rows: under the routing it was trained with, and under honest routing.

A model trained under ``sequence`` or ``document`` scope routes every position by a mean that includes what comes later.
Honest routing is that of ``causal`` scope with the same weights: the mean is over the document up to the position.
Nothing else differs between the two passes, so the difference of their losses is what the later tokens are worth to
this checkpoint, and what it costs it that its router never saw such means.

    rows [B, T] ──► features ──► nats of each target ──► summed by document (by its part, where a row cuts it)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import IGNORED, MicroBatch, pack_windows
from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, RoutingScope, TrainConfig
from polyglu.model.model import load_checkpoint
from polyglu.training.devices import compute_dtype, pick_device
from polyglu.training.ranks import Ranks
from polyglu.training.train import create_loader, open_sources

HEAD_POSITIONS = 2048
"""Positions whose logits exist at once."""
HONEST: RoutingScope = "causal"


@dataclass(frozen=True)
class Losses:
    """Of documents; ``nats[i]`` is the sum over the ``targets[i]`` targets of document i."""

    nats: list[float]
    targets: list[int]

    @property
    def mean(self) -> float:
        """Nats per target."""
        return float(np.sum(self.nats) / np.sum(self.targets))

    @classmethod
    def joined(cls, parts: Iterable["Losses"]) -> "Losses":
        """All documents of several."""
        parts = list(parts)
        return cls([nats for part in parts for nats in part.nats], [count for part in parts for count in part.targets])

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"nats": self.nats, "targets": self.targets}


def sees_ahead(config: ModelConfig) -> bool:
    """Whether a model routes a position by what comes after it."""
    return config.ffn == "polyglu" and config.routing != "static" and config.routing_scope != HONEST


def measure(checkpoint: Path, config: TrainConfig, validation: dict[str, str], max_tokens: int) -> dict[str, Any]:
    """All losses of a finished run.

    Args:
        checkpoint: the run's last.
        config: the run's.
        validation: name -> folder of tokenised data.
        max_tokens: tokens of each folder, and of the training rows.

    Returns:
        ``heldout``: source -> losses under honest routing. For a model that sees ahead also ``heldout_as_trained``,
        and ``training`` and ``training_as_trained``: on the rows of the run's last steps.

    Raises:
        PolygluError: data that are missing or too short.
    """
    device = pick_device()
    dtype, rows = compute_dtype(config.training.precision, device), _rows_of(config)
    sources = {name: open_source(Path(folder), name) for name, folder in validation.items()}

    def heldout(model: PolychromaticLM) -> dict[str, Any]:
        found = {}
        for name, source in sources.items():
            batches = validation_rows(source, config.model.seq_length, max_tokens, rows)
            found[name] = document_losses(model, batches, tau, dtype).plain()
        return found

    def training(model: PolychromaticLM) -> dict[str, Any]:
        return document_losses(model, last_rows(config, max_tokens), tau, dtype).plain()

    honest_config = config.model.model_copy(update={"routing_scope": HONEST})
    honest, _, tau = load_checkpoint(checkpoint, honest_config, device)
    result = {"heldout": heldout(honest)}
    if sees_ahead(config.model):
        trained, _, tau = load_checkpoint(checkpoint, config.model, device)
        result |= {"heldout_as_trained": heldout(trained)}
        result |= {"training": {"all": training(honest)}, "training_as_trained": {"all": training(trained)}}
    return result


@torch.inference_mode()
def document_losses(
    model: PolychromaticLM, batches: Iterable[MicroBatch], tau: float, dtype: torch.dtype = torch.float32
) -> Losses:
    """Deterministic losses of the documents of packed rows, those without a target left out.

    Args:
        model: its routing scope decides what each position's routing sees.
        batches: on the host.
        tau: routing temperature.
        dtype: of matrix products.
    """
    device = model.embed_tokens.weight.device
    nats, targets = [], []
    for batch in batches:
        on_device = batch.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features, _ = model.features(on_device.input_ids, cu_seqlens=batch.cu_seqlens, tau=tau)
            losses = _target_losses(model, features.flatten(0, 1), on_device.targets.flatten()).cpu()
        counted = (batch.targets.flatten() != IGNORED).double()
        document = torch.searchsorted(batch.cu_seqlens, torch.arange(len(losses), dtype=torch.int32), right=True) - 1
        n_documents = len(batch.cu_seqlens) - 1
        counts = torch.bincount(document, counted, n_documents)
        sums = torch.bincount(document, losses, n_documents)
        kept = counts > 0
        nats += sums[kept].tolist()
        targets += counts[kept].long().tolist()
    return Losses(nats, targets)


def _target_losses(model: PolychromaticLM, features: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, 0 where there is none: ``[N, D]``, ``[N]`` -> fp64 ``[N]``."""
    parts = zip(torch.split(features, HEAD_POSITIONS), torch.split(targets, HEAD_POSITIONS), strict=True)
    losses = [
        F.cross_entropy(model.head(part).float(), wanted, reduction="none", ignore_index=IGNORED)
        for part, wanted in parts
    ]
    return torch.cat(losses).double()


def validation_rows(source: TokenSource, seq_length: int, max_tokens: int, rows: int) -> Iterator[MicroBatch]:
    """The first windows of a source, packed as training packs them; what does not fill a window is left out.

    Args:
        source: data.
        seq_length: T.
        max_tokens: no more tokens than these.
        rows: of a batch.

    Raises:
        PolygluError: there is not one window.
    """
    windows = (min(source.n_tokens - 1, max_tokens)) // seq_length
    if windows < 1:
        raise PolygluError(
            f"{source.folder}: {min(source.n_tokens, max_tokens):,} tokens for validation are less than one window of "
            f"seq_length + 1 = {seq_length + 1}; give more data, or raise validation_tokens."
        )
    for first in range(0, windows, rows):
        starts = range(first, min(first + rows, windows))
        tokens = np.stack([source.read(at * seq_length, (at + 1) * seq_length + 1) for at in starts])
        ids = np.arange(len(tokens))
        yield from pack_windows(tokens[None], np.full((1, len(tokens)), source.eos_id), ids[None])


def last_rows(config: TrainConfig, max_tokens: int) -> Iterator[MicroBatch]:
    """Micro batches of the run's last steps, the latest first, until they have ``max_tokens`` tokens."""
    settings = config.training
    loader = create_loader(config, open_sources(config), Ranks(torch.device("cpu")), _rows_of(config))
    left = max_tokens
    for step in range(settings.total_steps - 1, -1, -1):
        for batch in loader.step(step):
            yield batch
            left -= batch.input_ids.numel()
        if left <= 0:
            return


def _rows_of(config: TrainConfig) -> int:
    """Rows of a micro batch; with ``auto``, one."""
    size = config.training.micro_batch_size
    return 1 if size == "auto" else size


def check_heldout(sources: Sequence[TokenSource], trained_on: Sequence[TokenSource]) -> None:
    """Refuse data for validation that training sees, or of another tokenizer.

    Raises:
        PolygluError: which, and why.
    """
    digests = {source.digest: source.folder for source in trained_on}
    fingerprint = trained_on[0].manifest["tokenizer"]["fingerprint"]
    for source in sources:
        if source.digest in digests:
            raise PolygluError(
                f"validation.{source.name}: {source.folder} holds the tokens of {digests[source.digest]}, which is "
                "trained on; give data that training never sees."
            )
        if source.manifest["tokenizer"]["fingerprint"] != fingerprint:
            raise PolygluError(
                f"validation.{source.name}: {source.folder} was tokenised with another tokenizer than "
                f"{trained_on[0].folder}; tokenise it with the same."
            )
