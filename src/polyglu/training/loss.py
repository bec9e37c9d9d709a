"""Next-token loss of a micro batch, summed over its targets; the caller divides by those of the global batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.model.architecture import PolychromaticLM

LOGITS_AT_ONCE = 2**27
"""Logits held in memory at a time (512 MB in fp32)."""


class LanguageModelLoss(nn.Module):
    """The model with its loss: what an engine feeds forward.

    Args:
        model: language model with fp32 weights.
        compute_dtype: dtype of matrix products; weights stay fp32.
        recompute: keep only each block's input and recompute the rest in backward.
    """

    def __init__(self, model: PolychromaticLM, compute_dtype: torch.dtype, recompute: bool) -> None:
        super().__init__()
        self.model, self.compute_dtype, self.recompute = model, compute_dtype, recompute

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Summed cross-entropy in nats, and the token logits ``[B, S, K]`` of each routed layer, without gradient."""
        device = batch.input_ids.device
        with torch.autocast(device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            features, routing = self.model.features(
                batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=tau, gumbel=gumbel, recompute=self.recompute
            )
            loss = summed_cross_entropy(self.model, features.flatten(0, 1), batch.targets.flatten())
        return loss, [logits.detach() for logits in routing]


def summed_cross_entropy(model: PolychromaticLM, features: Tensor, targets: Tensor) -> Tensor:
    """Sum in nats over ``[N]`` targets for features ``[N, D]``; only a chunk of the logits exists at a time."""
    chunk = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if len(targets) <= chunk:
        return _chunk_loss(model, features, targets)
    losses = [
        checkpoint(_chunk_loss, model, part, target, use_reentrant=False)
        for part, target in zip(torch.split(features, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(model: PolychromaticLM, features: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.head(features).float(), targets, ignore_index=IGNORED, reduction="sum")
