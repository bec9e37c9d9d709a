"""Text coloured by what a layer's neurons chose at each token: ``polyglu generate --show-routing``."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from polyglu.data.stopping import TextStream
from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.layers import routing_weights
from polyglu.model.packing import pack_rows

POSITIONS_AT_ONCE = 64
"""Whose weights ``[positions, F, K]`` are made at a time."""


def routed_layer(model: PolychromaticLM, layer: int | None) -> int:
    """The layer that is shown: the one asked for, else the last.

    Raises:
        PolygluError: the model has no such layer, or no routing.
    """
    if model.config.ffn != "polyglu":
        raise PolygluError(f"--show-routing: this model's ffn is '{model.config.ffn}', which routes nothing.")
    last = model.config.n_layers - 1
    if layer is not None and not 0 <= layer <= last:
        raise PolygluError(f"--layer {layer}: this model has layers 0 to {last}.")
    return last if layer is None else layer


@torch.inference_mode()
def token_weights(model: PolychromaticLM, tokens: Sequence[int], tau: float, layer: int) -> Tensor:
    """Mean over a layer's neurons of their routing weights at each token of a text, read as a whole: ``[T, K]``."""
    input_ids, cu_seqlens = pack_rows([tokens], model.embed_tokens.weight.device)
    _, routing = model.features(input_ids, cu_seqlens=cu_seqlens, tau=tau)
    mlp = model.layers[layer].mlp
    assert isinstance(mlp, PolyGLU)
    token_logits = routing[layer].expand(-1, len(tokens), -1)  # [1, T, K]
    parts = [
        torch.stack([weight.mean(-1) for weight in routing_weights(mlp.alpha.float()[None], part, tau)], dim=-1)[0]
        for part in torch.split(token_logits, POSITIONS_AT_ONCE, dim=1)
    ]
    return torch.cat(parts).cpu()


def coloured(tokenizer: Tokenizer, tokens: Sequence[int], weights: Tensor, stop_strings: Sequence[str]) -> Text:
    """Text of tokens, up to the first stop string, each in the colour of its largest weight ``[T, K]``.

    A character that several tokens make has the colour of its last one; a token behind a full context, without weights,
    has none.
    """
    text, stream, colour = Text(), TextStream(tokenizer, stop_strings), ""
    colours = [ACTIVATIONS[largest].colour for largest in weights.argmax(-1).tolist()]
    for token, colour in zip_longest(tokens, colours, fillvalue=""):
        text.append(stream.push(int(token)), style=colour)
    return text.append(stream.end(), style=colour)


def shares(weights: Tensor, layer: int) -> Table:
    """Legend of the colours, with how often each activation is the largest and how much weight it has."""
    title = f"layer {layer}: routing of {len(weights)} new tokens"
    table = Table(title=title, title_justify="left")
    for heading in ("activation", "largest at", "mean weight"):  # on a narrow terminal folded, not cut
        table.add_column(heading, justify="left" if heading == "activation" else "right", overflow="fold")
    largest = weights.argmax(-1)
    for k, activation in enumerate(ACTIVATIONS[: weights.shape[-1]]):
        name = Text(f"{activation.name} / {activation.transmitter}", style=activation.colour)
        share = (largest == k).double().mean().item() if len(weights) else 0.0
        table.add_row(name, f"{share:.1%}", f"{weights[:, k].mean().item():.3f}" if len(weights) else "")
    return table
