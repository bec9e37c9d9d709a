"""Conversations for supervised fine-tuning: read, encoded with a loss mask, packed without padding.

    rows {"messages": [...]} ─► usable ones (the others counted by kind) ─► token ids + learned mask ─► Conversations
    Conversations ─► pack(lengths, capacity, seed, epoch) ─► collate_pack ─► input_ids, targets [1, N], cu_seqlens

Only the assistant's content and its ``<|im_end|>`` are targets. A conversation is never cut, padded or repeated.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor

from polyglu.data.chat import ROLES, Message, encode_conversations
from polyglu.data.data_file import DataFile, local_file
from polyglu.data.dataloader import IGNORED
from polyglu.data.hub import dataset_files, resolve_revision
from polyglu.data.rows import Row, file_rows
from polyglu.data.tokenizer import Tokenizer, is_text
from polyglu.errors import PolygluError
from polyglu.logs import console

log = logging.getLogger(__name__)

BATCH_ROWS = 512
"""Conversations encoded together."""
OPEN_PACKS = 32
"""Packs that are filled at the same time; the fullest is closed when another is needed."""


@dataclass(frozen=True)
class Conversations:
    """Encoded conversations, one after the other in flat arrays."""

    tokens: npt.NDArray[np.uint32]
    """`[N]` token ids."""
    learned: npt.NDArray[np.bool_]
    """`[N]` whether a token is learned."""
    offsets: npt.NDArray[np.int64]
    """`[conversations + 1]` where each conversation begins, and N."""
    counts: Mapping[str, int]
    """Rows by what became of them: used, tools, malformed, too_long."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[conversations]` tokens of each."""
        return np.diff(self.offsets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) that identifies the conversations, their order and what is learned of them."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.learned, self.offsets):
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_conversations(
    *,
    files: Sequence[Path],
    dataset: str | None,
    config: str | None,
    splits: Sequence[str],
    revision: str | None,
    tokenizer: Tokenizer,
    seq_length: int,
    max_conversations: int | None,
) -> Conversations:
    """Read and encode conversations from local .jsonl or .parquet files, or, without files, from a hub dataset.

    Rows that use tools, malformed ones and those longer than ``seq_length`` tokens are left out and counted.

    Raises:
        PolygluError: nothing to read, unreadable, no usable conversation, or a tokenizer without ChatML tokens.
    """
    what = ", ".join(str(file) for file in files) or str(dataset)
    stream = file_rows([local_file(file) for file in files] or _hub_files(dataset, config, splits, revision))
    counts: Counter[str] = Counter(used=0, tools=0, malformed=0, too_long=0)
    tokens: list[npt.NDArray[np.uint32]] = []
    learned: list[npt.NDArray[np.bool_]] = []
    with Progress(console=console(stderr=True)) as progress:
        task = progress.add_task("read conversations", total=max_conversations)
        while (batch := list(islice(stream, BATCH_ROWS))) and counts["used"] != max_conversations:
            usable = list(_usable(batch, counts))
            for ids, mask in encode_conversations(usable, tokenizer):
                if len(ids) > seq_length:
                    counts["too_long"] += 1
                elif counts["used"] != max_conversations:
                    counts["used"] += 1
                    tokens.append(np.array(ids, dtype=np.uint32))
                    learned.append(np.array(mask, dtype=np.bool_))
            progress.update(task, completed=counts["used"])
    if not tokens:
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise PolygluError(
            f"{what} has no usable conversation with an assistant turn within {seq_length} tokens ({found}); rows need "
            f"'messages' with 'role' and 'content'."
        )
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Conversations(np.concatenate(tokens), np.concatenate(learned), offsets, dict(counts))


def _hub_files(dataset: str | None, config: str | None, splits: Sequence[str], revision: str | None) -> list[DataFile]:
    if dataset is None:
        raise PolygluError("give the conversations: 'files' (local .jsonl or .parquet) or 'dataset' (a hub dataset).")
    commit = resolve_revision(dataset, revision)
    log.info("dataset %s at commit %s", dataset, commit)
    return [file for split in splits for file in dataset_files(dataset, config, split, commit)]


def _usable(rows: Sequence[Row], counts: Counter[str]) -> Iterator[list[Message]]:
    """Messages of the rows that can be learned from; counts the others."""
    for row in rows:
        messages = row.get("messages")
        if _uses_tools(row, messages):
            counts["tools"] += 1
        elif isinstance(messages, list) and _well_formed(messages):
            yield messages
        else:
            counts["malformed"] += 1


def _uses_tools(row: Row, messages: Any) -> bool:
    if row.get("tools") not in (None, "", "[]", [], {}):
        return True
    turns = messages if isinstance(messages, list) else []
    return any(isinstance(turn, dict) and (turn.get("tool_calls") or turn.get("role") == "tool") for turn in turns)


def _well_formed(messages: list[Any]) -> bool:
    """Whether every turn has a known role and text, and some turn is the assistant's."""
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not is_text(turn.get("content")):
            return False
        if turn.get("reasoning_content") is not None and not is_text(turn["reasoning_content"]):
            return False
    return any(turn["role"] == "assistant" for turn in messages)


def pack(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int, seed: int, epoch: int) -> list[list[int]]:
    """Group conversations into packs of at most ``capacity`` tokens, each conversation in one pack.

    The order is shuffled by (seed, epoch); a conversation goes to the first of ``OPEN_PACKS`` open packs with room.

    Raises:
        PolygluError: a conversation is longer than ``capacity``.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    packs: list[list[int]] = []
    open_packs: list[tuple[int, list[int]]] = []  # tokens still free, conversations
    for conversation in order.tolist():
        length = int(lengths[conversation])
        if length > capacity:
            raise PolygluError(f"a conversation of {length:,} tokens does not fit into a pack of {capacity:,} tokens.")
        place = next((place for place, (free, _) in enumerate(open_packs) if free >= length), None)
        if place is not None:
            free, members = open_packs[place]
            open_packs[place] = (free - length, [*members, conversation])
            continue
        if len(open_packs) == OPEN_PACKS:
            fullest = min(range(OPEN_PACKS), key=lambda index: open_packs[index][0])
            packs.append(open_packs.pop(fullest)[1])
        open_packs.append((capacity - length, [conversation]))
    return packs + [members for _, members in open_packs]


def collate_pack(conversations: Conversations, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Put conversations of a pack into one row.

    Returns:
        ``input_ids`` `[1, N]` int64; ``targets`` `[1, N]` int64: the next token of the same conversation where it is
        learned, else ``IGNORED``; ``cu_seqlens`` `[conversations + 1]` int32.
    """
    spans = [slice(*conversations.offsets[index : index + 2]) for index in indices]
    input_ids = [torch.from_numpy(conversations.tokens[span].astype(np.int64)) for span in spans]
    learned = [torch.from_numpy(conversations.learned[span]) for span in spans]
    targets = [
        torch.cat([ids[1:].where(mask[1:], torch.tensor(IGNORED)), torch.tensor([IGNORED])])
        for ids, mask in zip(input_ids, learned, strict=True)
    ]
    cu_seqlens = torch.tensor([0, *map(len, input_ids)]).cumsum(0).to(torch.int32)
    return torch.cat(input_ids)[None], torch.cat(targets)[None], cu_seqlens
