"""Next-token loss of a micro batch, summed over its targets; the caller divides by those of the global batch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyglu.data.dataloader import IGNORED, MicroBatch
from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import NO_ROUTING, ModelConfig, Recompute
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.routing import gumbel_noise, summed_entropy
from polyglu.training.cross_entropy import METHODS, linear_cross_entropy, reference_cross_entropy


class LossParts(NamedTuple):
    """What a micro batch adds to the objective, ``(loss + penalty) / targets of the global batch``."""

    loss: Tensor
    """Scalar: cross-entropy in nats, summed over the targets."""
    penalty: Tensor
    """Scalar: the entropy regulariser; a constant zero when it is off."""
    routing: list[Tensor]
    """Token logits ``[B, S, K]`` of each routed layer, without gradient."""


class LanguageModelLoss(nn.Module):
    """The model with its loss: what an engine feeds forward.

    Args:
        model: language model with fp32 weights.
        compute_dtype: dtype of matrix products; weights stay fp32.
        recompute: what is computed anew in backward instead of kept.
        entropy_reg: weight of the routing entropy in the objective (``entropy_penalty``); 0: off.

    Raises:
        PolygluError: an entropy_reg for a model without routing.
    """

    def __init__(
        self, model: PolychromaticLM, compute_dtype: torch.dtype, recompute: Recompute, entropy_reg: float = 0.0
    ) -> None:
        super().__init__()
        if entropy_reg and model.config.ffn != "polyglu":
            raise PolygluError(NO_ROUTING.format(entropy_reg, model.config.ffn))
        self.model, self.compute_dtype, self.recompute = model, compute_dtype, recompute
        self.entropy_reg = entropy_reg

    def forward(self, batch: MicroBatch, tau: float, gumbel: Tensor | None) -> LossParts:
        """Loss of a micro batch that is on the model's device, at a routing temperature and noise ``[L, B, F, K]``."""
        device = batch.input_ids.device
        temperature = torch.full((), tau, device=device)  # for a number of another value, blocks would be compiled anew
        with torch.autocast(device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            features, routing = self.model.features(
                batch.input_ids, cu_seqlens=batch.cu_seqlens, tau=temperature, gumbel=gumbel, recompute=self.recompute
            )
        inputs = features.flatten(0, 1), self.model.embed_tokens.weight, batch.targets.flatten(), self.compute_dtype
        if self.model.config.kernels == "reference":
            loss = reference_cross_entropy(*inputs)
        else:
            loss = linear_cross_entropy(*inputs, METHODS[device.type])
        penalty = loss.new_zeros(())
        if self.entropy_reg:
            penalty = entropy_penalty(self.model, routing, batch.targets, self.entropy_reg)
        return LossParts(loss, penalty, [logits.detach() for logits in routing])


def entropy_penalty(model: PolychromaticLM, routing: list[Tensor], targets: Tensor, entropy_reg: float) -> Tensor:
    """- entropy_reg * sum over targets of the mean routing entropy over layers and neurons, where the target stands.

    Every target brings its own term, as it does to the cross-entropy: divided by the targets of the global batch, the
    sum is a mean over them, however the rows are cut into micro batches and ranks.

    The entropy is that of the full logits at temperature 1, without noise: what is logged as
    ``dynamic_routing_entropy``. That of softmax(alpha) alone, the static one, stays near ln K while a router's own
    logits sharpen (so in the published run, whose dynamic entropy ends at 0.0004 of 1.386): it neither sees that
    collapse nor has a gradient against it. The full logits contain alpha, so alpha is held back too.

    Args:
        model: whose alphas enter.
        routing: token logits ``[B, S, K]`` of each routed layer, with gradient.
        targets: ``[B, T]``, ``IGNORED`` where nothing is predicted.
        entropy_reg: weight.

    Returns:
        Scalar in nats, not positive.
    """
    layers = [block.mlp for block in model.layers if isinstance(block.mlp, PolyGLU)]
    counted = targets != IGNORED
    entropies = [summed_entropy(layer.alpha, logits, counted) for layer, logits in zip(layers, routing, strict=True)]
    return -entropy_reg * torch.stack(entropies).mean()


def batch_noise(config: ModelConfig, batch: MicroBatch, seed: int) -> Tensor | None:
    """Gumbel noise ``[L, B, F, K]`` of a micro batch, by its samples alone; None for a model without routing."""
    if config.ffn != "polyglu":
        return None
    return gumbel_noise(seed, batch.sample_ids, config.n_layers, config.d_ff, config.n_activations)
