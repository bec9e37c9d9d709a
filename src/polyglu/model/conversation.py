"""A row that is read once, however often it is continued: the cache of a conversation stays between its turns.

    turn 1   prompt ......... new tokens
    turn 2   the same ................. | what comes after them ... new tokens
                                        only this is read

A turn may begin otherwise than what was read (its oldest messages are forgotten, an answer's text makes other tokens):
then it is read from where it differs. Shapes as in ``architecture``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.cache import Cache, features_by
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.flash_attention import suffix_attention
from polyglu.model.layers import ROUTER_WIDTH
from polyglu.model.packing import Packing
from polyglu.model.prefix_tree import common_length
from polyglu.model.routing import RoutingState


class Conversation:
    """A ``generation.Decoder`` of one slot, whose row stays when it is freed. An interrupt at any moment does no harm.

    Args:
        model: under which a token sees nothing after it (``shares_prefixes``).
        tau: routing temperature.
    """

    slots = 1

    def __init__(self, model: PolychromaticLM, tau: float) -> None:
        config, device = model.config, model.embed_tokens.weight.device
        self.cache = Cache(model, tau, self.slots, config.seq_length)
        self.sums = torch.zeros(config.n_layers, config.seq_length + 1, ROUTER_WIDTH, device=device)
        """Routing sums after each number of tokens."""
        self.read: list[int] = []
        """Tokens whose keys, values and sums are there."""

    def known(self, prompt: Sequence[int]) -> int:
        """How many of a prompt's tokens need not be read again; not the last one, which gives the logits."""
        return min(common_length(self.read, prompt), len(prompt) - 1)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Read what a prompt has beyond the tokens that are read already; logits ``[1, V]`` of the token after it."""
        [prompt], [slot] = prompts, slots
        start = self.known(prompt)
        del self.read[start:]
        self.cache.set_length(slot, start, self.sums[:, start])
        positions = torch.arange(start, len(prompt), device=self.sums.device)
        input_ids = torch.tensor([prompt[start:]], device=self.sums.device)
        features = features_by(self.cache.model, input_ids, positions, _Suffix(self, slot, positions))
        self.cache.set_length(slot, len(prompt), self.sums[:, len(prompt)])
        self.read += prompt[start:]
        return self.cache.model.head(features[:, -1]).float()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits ``[1, V]`` of the token after this one."""
        logits = self.cache.step(tokens)
        self.sums[:, len(self.read) + 1] = self.cache.totals[:, 0]
        self.read += tokens
        return logits

    def free(self, slot: int) -> None:
        """Nothing: what of the row is of use, the next prompt tells."""

    def move(self, source: int, target: int) -> None:
        """Nothing: there is one slot."""


class _Suffix:
    """A pass over new tokens ``[1, N]`` behind those that are read."""

    def __init__(self, conversation: Conversation, slot: int, positions: Tensor) -> None:
        self.cache, self.sums, self.slot, self.positions = conversation.cache, conversation.sums, slot, positions
        self.start, self.end = conversation.cache.lengths[slot], conversation.cache.lengths[slot] + len(positions)
        self.packing = Packing.of(torch.Size((1, len(positions))), None, positions.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer, self.slot], self.cache.values[layer, self.slot]
        keys[self.start : self.end], values[self.start : self.end] = k[0], v[0]
        return suffix_attention(q[0], keys[: self.end], values[: self.end]).flatten(1)[None]

    def route(self, layer: int, mlp: PolyGLU, x: Tensor) -> Tensor:
        projected, sums = mlp.router.project(x), self.sums[layer]
        with torch.autocast(x.device.type, enabled=False):
            own = RoutingState.along(projected, self.packing).total  # [N, R]
            sums[self.start + 1 : self.end + 1] = own + sums[self.start]
        state = RoutingState(sums[self.start + 1 : self.end + 1], (self.positions + 1).float())
        return mlp.routed_by(x.transpose(0, 1), state, self.cache.tau).transpose(0, 1)
