"""Rows that begin alike, as a tree: each distinct prefix of theirs is one node, and runs once.

    rows, sorted    what runs, in one pass: each row's own tokens
    a b c d         a b c d
    a b c e f               e f        sees a b c: the beginning that it shares with the row before it
    a g                         g      sees a

Exact where a token sees nothing after it: under routing scope ``causal``, and without routing. Under ``document``,
where the tokens of a row route all of it, rows share nothing and lie behind each other.

Shapes as in ``architecture``; N nodes, S rows.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.cache import features_by
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.flash_attention import suffix_attention
from polyglu.model.packing import Packing, groups_of_tokens, pack_rows
from polyglu.model.routing import RoutingState

Row = tuple[int, ...]


def shares_prefixes(model: PolychromaticLM) -> bool:
    """Whether a token of this model sees nothing after it: its routing is causal, or not decided by the text."""
    return not model.config.routed_by_text or model.config.routing_scope == "causal"


def shared_lengths(rows: Sequence[Row]) -> list[int]:
    """For each row the number of tokens with which the row before it begins too."""
    return [common_length(before, row) for before, row in pairwise([(), *rows])]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens with which both rows begin."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def tree_batches(rows: Sequence[Row], share: bool, max_tokens: int, max_rows: int | None = None) -> Iterator[slice]:
    """Cut rows, in order, into batches of at most ``max_tokens`` nodes and ``max_rows`` rows; a longer row is alone."""
    lengths = [len(row) for row in rows]
    own = [length - shared for length, shared in zip(lengths, shared_lengths(rows), strict=True)]
    return groups_of_tokens(own if share else lengths, max_tokens, max_rows, lengths)


class Stretch(NamedTuple):
    """A row's own nodes, and all that its last one sees."""

    own: slice
    path: slice | Tensor
    """Nodes of the row's positions, its own ones last: the same slice, or int64 ``[length of the row]``."""


class PrefixTree:
    """Rows in one pass.

    Args:
        rows: distinct rows of one token or more; sorted, to share as much as they can.
        share: as ``shares_prefixes`` says; else the rows lie behind each other.
        device: of the pass.
    """

    def __init__(self, rows: Sequence[Row], share: bool, device: torch.device) -> None:
        shared = shared_lengths(rows) if share else [0] * len(rows)
        self.input_ids, self.bounds = pack_rows([row[n:] for row, n in zip(rows, shared, strict=True)], device)
        self.packing = Packing.of(self.input_ids.shape, self.bounds, device)
        self.stretches: list[Stretch] = []
        self.nodes: list[Tensor] = []
        """Of each row's positions, int64 on the CPU."""
        positions: list[int] = []
        path, left = torch.empty(0, dtype=torch.int64), list[int]()
        leaves = []  # for each row, where its path goes on in another row's stretch or in its own
        for row, n, (begin, end) in zip(rows, shared, pairwise(self.bounds.tolist()), strict=True):
            left = [*(node for node in left if positions[node] < n - 1), *path[:n][-1:].tolist()]
            leaves.append(left)
            path = torch.cat((path[:n], torch.arange(begin, end)))
            positions += range(n, len(row))
            own = slice(begin, end)
            self.stretches.append(Stretch(own, path.to(device) if n else own))
            self.nodes.append(path)
        self.positions = torch.tensor(positions, device=device)
        self.branches, self.ancestry = _ancestry(leaves, device)

    def features(self, model: PolychromaticLM, tau: float) -> Tensor:
        """Normalised features ``[N, D]`` of the nodes."""
        if not len(self.branches):
            return model.features(self.input_ids, cu_seqlens=self.bounds, tau=tau)[0][0]
        return features_by(model, self.input_ids, self.positions, _Nodes(self, tau))[0]


def _ancestry(leaves: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """All nodes that paths leave a stretch at, int64 ``[P]``; 1 where a row's path passes there, fp32 ``[S, P]``."""
    branches = sorted({node for nodes in leaves for node in nodes})
    column = {node: index for index, node in enumerate(branches)}
    ancestry = torch.zeros(len(leaves), len(branches))
    for row, nodes in enumerate(leaves):
        ancestry[row, [column[node] for node in nodes]] = 1
    return torch.tensor(branches, dtype=torch.int64, device=device), ancestry.to(device)


class _Nodes:
    """A pass over all nodes of a tree, each of which sees its ancestors."""

    def __init__(self, tree: PrefixTree, tau: float) -> None:
        self.tree, self.tau = tree, tau
        lengths = torch.tensor(tree.packing.lengths, device=tree.positions.device)
        self.row_of_node = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = [suffix_attention(q[0, own], k[0, path], v[0, path]) for own, path in self.tree.stretches]
        return torch.cat(seen).flatten(1)[None]

    def route(self, layer: int, mlp: PolyGLU, x: Tensor) -> Tensor:
        packing = self.tree.packing
        projected = mlp.router.project(x)
        with torch.autocast(x.device.type, enabled=False):
            own = RoutingState.along(projected, packing).total  # in the stretch, [N, R]
            before = self.tree.ancestry @ own[self.tree.branches]  # [S, R]
            state = RoutingState(own + before[self.row_of_node], (self.tree.positions + 1).float())
        return mlp.routed_by(x.transpose(0, 1), state, self.tau).transpose(0, 1)
