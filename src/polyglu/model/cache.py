"""What decoding remembers of its rows: keys, values and routing means, so that a new token is one position of work.

A row holds a slot. Prompts are packed for their first pass, never padded; then each pass takes one token of each row,
side by side as the columns of ``[1, n, D]``. The rows in use are slots 0 to n - 1, so that they are views of the cache.

A step on a CPU in fp32 is ``NativeStep``. On CUDA its shapes are rounded up (``static``), so that few of them occur,
and each is captured once as a CUDA graph: hundreds of kernels then start as one. Elsewhere it runs as it is written.

Shapes as in ``architecture``; P is the longest row, in positions.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from polyglu.model.architecture import Block, PolychromaticLM
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.flash_attention import attention
from polyglu.model.graphs import Graphs
from polyglu.model.layers import GLU, ROUTER_WIDTH
from polyglu.model.native_step import NativeStep, native_serves
from polyglu.model.packing import Packing, pack_rows
from polyglu.model.routing import RoutingState

ROUNDED_TO = 128
"""Positions, to a multiple of which a static step rounds the longest row up; the rows, to a power of two."""


class Cache:
    """Keys, values and routing of up to ``slots`` rows of up to ``longest`` positions.

    Args:
        model: with routing scope ``document`` or ``causal``, or without routing.
        tau: routing temperature.
        slots: rows at a time.
        longest: positions of a row.
        frozen: the routing mean stays the prompt's; else new tokens enter it.
        static: round the shapes of a step up, as for CUDA graphs; absent: on CUDA.
    """

    def __init__(
        self,
        model: PolychromaticLM,
        tau: float,
        slots: int,
        longest: int,
        frozen: bool = False,
        static: bool | None = None,
    ) -> None:
        self.model, self.tau, self.slots, self.longest, self.frozen = model, tau, slots, longest, frozen
        config, device = model.config, model.embed_tokens.weight.device
        shape = config.n_layers, slots, longest, config.n_kv_heads, config.head_dim
        dtype = compute_dtype(model)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.totals = torch.zeros(config.n_layers, slots, ROUTER_WIDTH, device=device)
        self.counts = torch.ones(slots, device=device)
        self.positions = torch.zeros(slots, dtype=torch.int64, device=device)
        """Of the next token of each row, ``[slots]``; ``lengths`` are the same, on the host."""
        self.lengths = [0] * slots
        self.input_ids = torch.zeros(slots, dtype=torch.int64, device=device)
        """The newest token of each row, ``[slots]``."""
        self.static = device.type == "cuda" if static is None else static
        self.graphs = Graphs(device) if device.type == "cuda" and self.static else None
        self.native = NativeStep(model, tau, frozen) if not self.static and native_serves(model, dtype) else None

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Read prompts into free slots.

        Args:
            prompts: token ids.
            slots: of each prompt.

        Returns:
            Logits ``[prompts, V]`` of the token after each prompt.
        """
        device = self.keys.device
        input_ids, cu_seqlens = pack_rows(prompts, device)
        packing = Packing.of(input_ids.shape, cu_seqlens, device)
        places, lengths = torch.tensor([slots, packing.lengths], device=device)
        visit = _Prompts(self, packing, places, places.repeat_interleave(lengths))
        features = features_by(self.model, input_ids, packing.positions, visit)
        self.positions[places], self.counts[places] = lengths, lengths.float()
        for slot, length in zip(slots, packing.lengths, strict=True):
            self.lengths[slot] = length
        return self.model.head(features[0, cu_seqlens[1:].long() - 1]).float()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the rows in slots 0 to n - 1; logits ``[n, V]`` of the token after it.

        Raises:
            ValueError: a row is as long as a slot; C++ would write into the next one.
        """
        n = len(tokens)
        if max(self.lengths[:n]) >= self.longest:
            raise ValueError(f"a row has {self.longest} positions already, which is all that its slot holds")
        self.lengths[:n] = [length + 1 for length in self.lengths[:n]]
        self.input_ids[:n] = torch.tensor(tokens)
        rows, longest = n, max(self.lengths[:n])
        if self.static:
            rows = min(1 << (n - 1).bit_length(), self.slots)
            longest = min(-(-longest // ROUNDED_TO) * ROUNDED_TO, self.longest)
        if self.graphs is None:
            logits = self._step(rows, longest)
        else:
            logits = self.graphs(self._step, rows, longest, [self.totals])
        self.positions[:n] += 1
        if not self.frozen:
            self.counts[:n] += 1
        return logits[:n]

    def _step(self, rows: int, longest: int) -> Tensor:
        """Logits ``[rows, V]`` after the newest tokens of the first slots, of at most ``longest`` positions each."""
        input_ids, positions = self.input_ids[:rows], self.positions[:rows]
        if self.native is not None:
            return self.native.logits(input_ids, positions, self.keys, self.values, self.totals, self.counts)
        features = features_by(self.model, input_ids[None], positions, _Tokens(self, rows, longest))
        return self.model.head(features[0]).float()

    def move(self, source: int, target: int) -> None:
        """Give the row of one slot another slot, which is free."""
        length = self.lengths[source]
        for kept in (self.keys, self.values):
            kept[:, target, :length] = kept[:, source, :length]
        self.totals[:, target] = self.totals[:, source]
        self.counts[target], self.positions[target] = self.counts[source], self.positions[source]
        self.lengths[target] = length
        self.free(source)

    def free(self, slot: int) -> None:
        """Forget a row."""
        # A step of rounded shapes runs the slot too: it leaves what it makes where the next prompt begins.
        self.set_length(slot, 0, 0)
        self.counts[slot], self.input_ids[slot] = 1, 0

    @torch.inference_mode()
    def set_length(self, slot: int, length: int, totals: Tensor | float) -> None:
        """Say how many positions of a row are read, and their routing sums ``[L, R]``.

        Those behind are forgotten: what they leave, a NaN say, would reach others through keys of weight zero.
        """
        for kept in (self.keys, self.values):
            kept[:, slot, length : self.lengths[slot]] = 0
        self.lengths[slot] = length
        self.positions[slot], self.counts[slot], self.totals[:, slot] = length, length, totals


class Visit(Protocol):
    """What a pass over the blocks does between the tokens of a layer; the rest of a block is each token's own."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[1, N, H or G, d]`` -> ``[1, N, H * d]``."""

    def route(self, layer: int, mlp: PolyGLU, x: Tensor) -> Tensor:
        """``[1, N, D]`` -> ``[1, N, D]``."""


def features_by(model: PolychromaticLM, input_ids: Tensor, positions: Tensor, visit: Visit) -> Tensor:
    """Normalised features ``[1, N, D]`` of tokens ``[1, N]`` at positions ``[N]``: the model's parts in its order."""
    rope = model.rope(positions[None])
    x = model.embed_tokens(input_ids)
    for layer, block in enumerate(model.layers):
        assert isinstance(block, Block)
        q, k, v = block.self_attn.project(block.input_layernorm(x), rope)
        x = x + block.self_attn.o_proj(visit.attend(layer, q, k, v))
        normed, mlp = block.post_attention_layernorm(x), block.mlp
        x = x + (mlp(normed) if isinstance(mlp, GLU) else visit.route(layer, mlp, normed))
    return model.norm(x)  # type: ignore[no-any-return]


class _Prompts:
    """First pass over packed prompts."""

    def __init__(self, cache: Cache, packing: Packing, slots: Tensor, slot_of_token: Tensor) -> None:
        self.cache, self.packing = cache, packing
        self.slots, self.slot_of_token = slots, slot_of_token

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = self.slot_of_token, self.packing.positions
        self.cache.keys[layer][place], self.cache.values[layer][place] = k[0], v[0]
        return attention(q, k, v, self.packing, self.cache.model.config.use_flash_attn).flatten(2)

    def route(self, layer: int, mlp: PolyGLU, x: Tensor) -> Tensor:
        projected = mlp.router.project(x)
        with torch.autocast(x.device.type, enabled=False):
            state = RoutingState.after(projected, self.packing)
        self.cache.totals[layer, self.slots] = state.total
        return mlp.combine(x, mlp.token_logits(x, self.packing), self.cache.tau, None)


class _Tokens:
    """One token of each row in slots 0 to n - 1, none of which has more than ``longest`` positions with it."""

    def __init__(self, cache: Cache, n: int, longest: int) -> None:
        self.cache, self.n, self.longest = cache, n, longest
        positions = cache.positions[:n]
        self.place = torch.arange(n, device=positions.device), positions
        later = torch.arange(longest, device=positions.device) > positions[:, None]
        mask = torch.zeros(later.shape, dtype=cache.keys.dtype, device=later.device)
        self.mask = mask.masked_fill_(later, -torch.inf)[:, None, None]  # [n, 1, 1, longest]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.place], values[self.place] = k[0], v[0]
        keys, values = (kept[: self.n, : self.longest].transpose(1, 2) for kept in (keys, values))  # [n, G, P, d]
        # The query heads that share a key stand side by side as queries: no key is repeated.
        query = q.view(self.n, keys.shape[1], -1, keys.shape[3])  # [n, G, H / G, d]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).flatten(1)[None]

    def route(self, layer: int, mlp: PolyGLU, x: Tensor) -> Tensor:
        state = RoutingState(self.cache.totals[layer, : self.n], self.cache.counts[: self.n])
        if self.cache.frozen:
            return mlp.routed_by(x.transpose(0, 1), state, self.cache.tau).transpose(0, 1)
        y, after = mlp.step(x.transpose(0, 1), state, self.cache.tau)
        state.total.copy_(after.total)
        return y.transpose(0, 1)


def compute_dtype(model: PolychromaticLM) -> torch.dtype:
    """Of keys and values: the weights', or autocast's where the caller has entered it."""
    weight = model.embed_tokens.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def slots_within(model: PolychromaticLM, n_bytes: int, longest: int) -> int:
    """Rows of ``longest`` positions whose keys and values fit into ``n_bytes``; 1 at least."""
    config = model.config
    of_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * compute_dtype(model).itemsize
    return max(1, n_bytes // (of_position * longest))
