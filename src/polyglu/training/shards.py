"""A run's tensors on disk, the same for every engine and number of ranks.

    parameter ─► flattened: weight, exp_avg, exp_avg_sq (fp32) ─► each rank writes the elements that it holds:
    shard_00000.safetensors     "exp_avg/layers.0.mlp.alpha" [numel]; metadata: name -> index of its first element

Any other set of ranks reads what it needs out of all shards. safetensors holds numbers only: nothing in a shard could
be executed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyglu.errors import PolygluError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""
BYTES_PER_PARAMETER = 4 * (1 + len(MOMENTS))
"""Of all shards together."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that a rank holds."""

    name: str
    start: int
    """Index of its first element in the flattened parameter."""
    tensors: Mapping[str, Tensor]
    """Kind (``weight``, ``exp_avg``, ``exp_avg_sq``) -> flat fp32 tensor ``[numel]``, a view of the live one."""


def shard_name(rank: int) -> str:
    """File name of a rank's shard."""
    return f"shard_{rank:05d}.safetensors"


def copied(pieces: Iterable[Piece], buffers: dict[str, Tensor]) -> list[Piece]:
    """The same pieces in the host's memory, as they are now.

    Args:
        pieces: live ones.
        buffers: memory of an earlier copy, by key, used again; what is missing is made, page-locked for a GPU's pieces.
    """
    copies, on_gpu = [], False
    for piece in pieces:
        tensors = {}
        for kind, tensor in piece.tensors.items():
            buffer = buffers.get(key := f"{kind}/{piece.name}")
            if buffer is None:
                buffer = buffers[key] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
            tensors[kind] = buffer.copy_(tensor.detach(), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
        copies.append(Piece(piece.name, piece.start, tensors))
    if on_gpu:
        torch.cuda.synchronize()
    return copies


def write_shard(file: BinaryIO, pieces: Sequence[Piece]) -> None:
    """Write pieces in the host's memory as a safetensors file, without a copy of them.

    The format (github.com/huggingface/safetensors): length of the header as u64, header in JSON, the numbers.
    """
    tensors = {f"{kind}/{piece.name}": tensor for piece in pieces for kind, tensor in piece.tensors.items()}
    header: dict[str, object] = {"__metadata__": {piece.name: str(piece.start) for piece in pieces}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().astype("<f4", copy=False).data)


def read_shards(folder: Path, n_shards: int, pieces: Sequence[Piece]) -> None:
    """Fill live pieces from all shards of a checkpoint.

    Raises:
        PolygluError: a shard cannot be read, or the shards together do not hold each element of the pieces once.
    """
    filled: dict[tuple[int, str], list[range]] = {}
    for path in (folder / shard_name(rank) for rank in range(n_shards)):
        try:
            with safe_open(path, "pt") as shard:
                held, starts = set(shard.keys()), shard.metadata() or {}
                for index, piece in enumerate(pieces):
                    for kind, tensor in _items(piece):
                        if (key := f"{kind}/{piece.name}") in held:
                            part = shard.get_slice(key)
                            ranges = filled.setdefault((index, kind), [])
                            ranges.append(_fill(tensor, piece.start, part, int(starts[piece.name])))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise PolygluError(f"{path} is no shard of a checkpoint ({error}); resume from another one.") from None
    for index, piece in enumerate(pieces):
        for kind, tensor in _items(piece):
            if not _is_covered(piece.start, tensor.numel(), filled.get((index, kind), [])):
                raise PolygluError(f"{folder} does not hold all of {kind}/{piece.name}, each element once.")


def _is_covered(start: int, numel: int, ranges: Iterable[range]) -> bool:
    """Whether ranges, one after another, are ``numel`` indices from ``start`` on."""
    end = start + numel
    for part in sorted(filter(len, ranges), key=lambda part: part.start):
        if part.start != start:
            return False
        start = part.stop
    return start == end


def _items(piece: Piece) -> list[tuple[str, Tensor]]:
    return list(piece.tensors.items())


class _Slice(Protocol):
    """What safetensors gives for a stored tensor."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, part: slice) -> Tensor: ...


@torch.no_grad()
def _fill(target: Tensor, start: int, part: _Slice, part_start: int) -> range:
    """Copy the elements that a stored part and a target have in common; return their indices."""
    (numel,) = part.get_shape()
    if part.get_dtype() != "F32":
        raise ValueError(f"numbers of type {part.get_dtype()}")
    first = max(start, part_start)
    last = min(start + target.numel(), part_start + numel)
    if first >= last:
        return range(0)
    target[first - start : last - start].copy_(part[first - part_start : last - part_start])
    return range(first, last)
