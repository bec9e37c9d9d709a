"""From text to tokens: the fast encoder where it is sure to agree with the tokenizer, the tokenizer itself elsewhere.

    TextBatch ──► at risk? ──no──► gigatoken, all cores ──► a sample compared with the tokenizer ──┐
                          └─yes──► the tokenizer ─────────────────────────────────────────────────┴──► DocumentBatch

The two differ where their Unicode tables do: in normalising characters that were assigned after the older table was
made. Documents with a character that any table since Unicode 3.2 may treat otherwise are at risk. What else there may
be is looked for while encoding: a sample of all other documents is encoded by both.
"""

import logging
import resource
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

import awkward
import gigatoken
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from polyglu.data.chunk_writer import DocumentBatch
from polyglu.data.chunks import Tokens
from polyglu.data.documents import Integers, TextBatch
from polyglu.data.quarantine import SPECIAL_TOKEN_TEXT, BadRecord
from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError

log = logging.getLogger(__name__)

SAMPLED = 1024
"""One document in so many is compared, chosen by its position."""
SAMPLE_KEY = np.array([0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0x9E3779B97F4A7C15], np.uint64)
"""Odd numbers: a position times them, modulo 2**64, spreads evenly."""
REFERENCE_BYTES = 1 << 20
"""Text that the tokenizer encodes at once, but for a longer document: it takes some 100 times that much memory."""
CACHE_BYTES = 512 << 20
"""Growth of the process after which the fast encoder, which remembers every word, is made anew."""
CODE_POINTS = 0x110000
EMPTY_PLANES = slice(0x40000, 0xE0000)
"""Nothing is assigned there."""
PROBES = [
    "",
    " \n\n\t x  y\r\n\r\n   z   ",
    "Don't we'LL I'M 'ſ 12345.678e-9 __init__(self, *args): return x**2 != y  # <|endoftext|><think></think>",
    "e\u0301 é ﬁ ½ Å \u1100\u1161\u11a8 각 a\u0315\u0300\u05ae\u0062 ΑΣ İ ǅ \u0344 \u2126 ٣٤ Ⅷ ²",
    "日本語の文章。中文，標點！ 한국어 ไทย हिन्दी العربية עברית 🙂\u200d↔️👩🏽‍💻 \ufeff\u00a0\u2003\u3000\x00\x7f\x85",
    "a" * 300 + " " * 300 + "!" * 300 + "\n" * 300 + "1" * 300,
]
"""What the fast encoder must agree on before it is used."""

Mask = npt.NDArray[np.bool_]


class Encoder:
    """Encodes batches of documents, the end-of-document token after each.

    Args:
        tokenizer: says what the right tokens are.
        fast: whether to use the fast encoder; it is left out too where it does not know the tokenizer's kind.
        files: names of the source's files, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, fast: bool, files: Sequence[str]) -> None:
        self.tokenizer, self.files = tokenizer, files
        self.fast = FastEncoder.create(tokenizer) if fast else None
        # Arrow's regular expressions are RE2's, which take what is between \Q and \E as it stands.
        self._special = "|".join(rf"\Q{token}\E" for token in tokenizer.added_tokens() if token.strip())

    def encode(self, batch: TextBatch) -> DocumentBatch:
        """Tokens of a batch.

        Raises:
            PolygluError: the fast encoder and the tokenizer differ on a document that was not known to be at risk.
        """
        tokens, ends = self._encode(batch)
        # The end-of-document token goes behind each document.
        tokens = np.insert(tokens, ends, self.tokenizer.eos_id)
        bad = [*batch.bad, *self._special_text(batch)]
        bad.sort(key=lambda record: record.row)
        return DocumentBatch(tokens, ends + np.arange(1, len(ends) + 1), batch.row_of, batch.positions, bad)

    def _encode(self, batch: TextBatch) -> tuple[Tokens, Integers]:
        risky = at_risk(batch.texts) if self.fast else np.ones(len(batch.texts), bool)
        slow = [np.array(ids, np.uint32) for ids in self._reference(batch.texts.filter(pa.array(risky)))]
        if self.fast is None:
            return _interleaved(np.empty(0, np.uint32), np.empty(0, np.int64), np.flatnonzero(risky), slow)
        tokens, ends = self.fast.encode(batch.texts.filter(pa.array(~risky)) if slow else batch.texts)
        self._compare(batch, np.flatnonzero(~risky), tokens, ends)
        return _interleaved(tokens, ends, np.flatnonzero(risky), slow) if slow else (tokens, ends)

    def _reference(self, texts: pa.LargeStringArray) -> list[list[int]]:
        """Ids of each text by the tokenizer itself, a bounded amount of text at a time."""
        sizes = np.cumsum(np.asarray(pc.binary_length(texts), np.int64))
        ids: list[list[int]] = []
        while len(ids) < len(texts):
            start = len(ids)
            limit = (int(sizes[start - 1]) if start else 0) + REFERENCE_BYTES
            stop = max(start + 1, int(np.searchsorted(sizes, limit, side="right")))
            ids += self.tokenizer.encode_batch(texts[start:stop].to_pylist())
        return ids

    def _compare(self, batch: TextBatch, places: Integers, tokens: Tokens, ends: Integers) -> None:
        """Encode a sample of the documents at ``places`` by the tokenizer too."""
        positions = batch.positions[batch.row_of[places]]
        sample = np.flatnonzero(positions.astype(np.uint64) @ SAMPLE_KEY < np.uint64((2**64 - 1) // SAMPLED))
        expected = self._reference(batch.texts.take(pa.array(places[sample])))
        for index, ids in zip(sample.tolist(), expected, strict=True):
            found = tokens[ends[index - 1] if index else 0 : ends[index]]
            if not np.array_equal(found, ids):
                file, group, row = positions[index].tolist()
                raise PolygluError(
                    f"{self.files[file]}, row group {group}, row {row}: the fast encoder gives other tokens than "
                    f"tokenizer {self.tokenizer.name}; nothing of it was kept. Set encoder to reference, and report it."
                )

    def _special_text(self, batch: TextBatch) -> list[BadRecord]:
        if not self._special:
            return []
        found = np.flatnonzero(np.asarray(pc.match_substring_regex(batch.texts, self._special)))
        lengths = np.asarray(pc.binary_length(batch.texts.take(pa.array(found))))
        rows = batch.row_of[found].tolist()
        return [BadRecord(row, SPECIAL_TOKEN_TEXT, int(size)) for row, size in zip(rows, lengths, strict=True)]


class FastEncoder:
    """gigatoken, without special tokens, its memory bounded."""

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._encoder = gigatoken.Tokenizer.from_json(tokenizer_json)
        self._bytes_when_new = _resident_bytes()

    @classmethod
    def create(cls, tokenizer: Tokenizer) -> Self | None:
        """A fast encoder that agrees with the tokenizer on the probes; None if there is none."""
        try:
            fast = cls(tokenizer.plain_json())
            tokens, ends = fast.encode(pa.array(PROBES, pa.large_string()))
        except Exception as error:  # the library's exceptions for a kind of tokenizer that it does not know
            log.info("tokenizer %s is not known to the fast encoder (%s); its own is used", tokenizer.name, error)
            return None
        expected = tokenizer.encode_batch(PROBES)
        if [ids.tolist() for ids in np.split(tokens, ends[:-1])] != expected:
            log.warning("the fast encoder gives other tokens than tokenizer %s; its own is used", tokenizer.name)
            return None
        return fast

    def encode(self, texts: pa.LargeStringArray) -> tuple[Tokens, Integers]:
        """Tokens of all texts `[N]`, on all cores, and where each text ends in them `[texts]`."""
        if _resident_bytes() > self._bytes_when_new + CACHE_BYTES:
            del self._encoder  # its memory goes before the new one comes
            self._encoder = gigatoken.Tokenizer.from_json(self._json)
            self._bytes_when_new = _resident_bytes()
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
        characters = awkward.contents.NumpyArray(data, parameters={"__array__": "char"})
        strings = awkward.contents.ListOffsetArray(
            awkward.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
        found = self._encoder.encode_batch(awkward.Array(strings)).layout
        return np.asarray(found.content.data), np.asarray(found.offsets.data)[1:]


def at_risk(texts: pa.LargeStringArray) -> Mask:
    """`[texts]`: whether a text has a character on which Unicode tables of different age may disagree."""
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = data[offsets[0] : offsets[-1]]
    blocks = risky_blocks()
    first = np.flatnonzero(data >= int(np.argmax(blocks)) >> 8)
    # The first two bytes of a character tell blocks of 64 of them apart, or of 4,096: few blocks have any risk.
    first = first[blocks[data[first].astype(np.uint16) << 8 | data[first + 1]]]
    found = first[risky_code_points()[_code_points(data, first)]]
    risky = np.zeros(len(texts), bool)
    risky[np.searchsorted(offsets - offsets[0], found, side="right") - 1] = True
    return risky


@cache
def risky_code_points() -> Mask:
    """`[0x110000]`: unassigned here, or assigned after Unicode 3.2 and no symbol or punctuation.

    Normalisation is stable for what is assigned. Symbols, emoji among them, and punctuation take no part in it.
    """
    risky = np.zeros(CODE_POINTS, bool)
    risky[EMPTY_PLANES] = True
    for point in np.flatnonzero(~risky).tolist():
        category = unicodedata.category(chr(point))
        new = category[0] not in "SPC" and unicodedata.ucd_3_2_0.category(chr(point)) == "Cn"
        risky[point] = new or category == "Cn"
    return risky


@cache
def risky_blocks() -> Mask:
    """`[65536]`: whether a character whose UTF-8 begins with these two bytes may be risky."""
    points = np.flatnonzero(risky_code_points())
    blocks = np.zeros(1 << 16, bool)
    for first, stop, lead, shift in (
        (0x80, 0x800, 0xC0, 6),
        (0x800, 0x10000, 0xE0, 12),
        (0x10000, CODE_POINTS, 0xF0, 18),
    ):
        of_length = points[(points >= first) & (points < stop)]
        blocks[(lead | of_length >> shift) << 8 | 0x80 | (of_length >> shift - 6) & 0x3F] = True
    return blocks


def _code_points(data: npt.NDArray[np.uint8], first: Integers) -> Integers:
    """Code points of the characters of 2 to 4 bytes that begin at ``first``."""
    lead = data[first].astype(np.int64)
    length = 2 + (lead >= 0xE0) + (lead >= 0xF0)
    points = lead & (0x7F >> length)
    for offset in range(1, 4):
        more = length > offset
        points[more] = points[more] << 6 | (data[first[more] + offset] & 0x3F)
    return points


def _interleaved(tokens: Tokens, ends: Integers, places: Integers, others: Sequence[Tokens]) -> tuple[Tokens, Integers]:
    """Documents in ``tokens`` with ``others`` put in at ``places`` of the result, and where each then ends."""
    pieces, cut = [], 0
    for number, (place, other) in enumerate(zip(places.tolist(), others, strict=True)):
        before = place - number
        stop = int(ends[before - 1]) if before else 0
        pieces += [tokens[cut:stop], other]
        cut = stop
    sizes = np.empty(len(ends) + len(others), np.int64)
    sizes[places] = [len(other) for other in others]
    sizes[np.setdiff1d(np.arange(len(sizes)), places)] = np.diff(ends, prepend=0)
    return np.concatenate([*pieces, tokens[cut:]]), np.cumsum(sizes)


def _resident_bytes() -> int:
    """Memory of this process now, or, where the system does not tell that, the most it had."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        return int(statistics.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
