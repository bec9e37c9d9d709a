"""Opening a checkpoint for use: the model, its own tokenizer, and which they are. Whatever runs a model starts here."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from polyglu.data.tokenizer import Tokenizer, load_tokenizer
from polyglu.errors import PolygluError
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, RoutingScope
from polyglu.model.folder import weights_digest
from polyglu.model.model import Checkpoint, load_checkpoint, read_checkpoint

PUBLISHED_TOKENIZER = "Qwen/Qwen3-0.6B-Base"
"""Of the published checkpoints, which do not name one."""

logger = logging.getLogger(__name__)


class Inference(NamedTuple):
    """A model that is ready to run, and what it is."""

    model: PolychromaticLM
    """In evaluation mode. A model of routing scope ``sequence`` is opened with ``document``: an input is a row of its
    own, so both are the same, and several inputs can be packed."""
    tokenizer: Tokenizer
    step: int
    """Optimiser step at which the checkpoint was saved."""
    tau: float
    """Routing temperature of that step."""
    sha256: str
    """Of the checkpoint file, or of the folder's weights."""
    routing_scope: RoutingScope
    """The scope the model was trained with."""


def open_for_inference(checkpoint: str | Path, tokenizer: str | None = None, device: str = "cpu") -> Inference:
    """Load a checkpoint and the tokenizer it was trained with.

    Without ``tokenizer``, an exported folder's own is used, else the checkpoint's name for it: a path relative to the
    working folder, else the folder ``tokenizer`` next to the checkpoint, else a hub name.

    Args:
        checkpoint: portable ``.pt`` file, exported folder, or published layout.
        tokenizer: name or path; must be the one the checkpoint was trained with.
        device: where the model goes.

    Raises:
        PolygluError: no such device, not a checkpoint, no tokenizer known, a tokenizer other than the checkpoint's, or
            one with more tokens than the model has.
    """
    checkpoint = Path(checkpoint)
    _check_device(device)
    described = read_checkpoint(checkpoint)
    config, opened = described.config, open_tokenizer(checkpoint, described, tokenizer)
    del described  # the weights are read again below, once the scope is known
    scope = config.routing_scope
    if scope == "sequence":
        config = config.model_copy(update={"routing_scope": "document"})
    model, step, tau = load_checkpoint(checkpoint, config, device)
    logger.info("opened %s: step %d, tau %.3f, tokenizer %s", checkpoint, step, tau, opened.name)
    return Inference(model, opened, step, tau, weights_digest(checkpoint), scope)


def open_tokenizer(path: Path, checkpoint: Checkpoint, tokenizer: str | None = None) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with; which one: see ``open_for_inference``.

    Args:
        path: of the checkpoint.
        checkpoint: what was read there.
        tokenizer: name or path.

    Raises:
        PolygluError: none known, another than the checkpoint's, or one with more tokens than the model has.
    """
    config, identity = checkpoint.config, checkpoint.tokenizer
    opened = load_tokenizer(tokenizer or _tokenizer_of(path, config, identity))
    if identity.get("fingerprint", opened.fingerprint) != opened.fingerprint:
        raise PolygluError(
            f"tokenizer '{opened.name}' is not the one {path} was trained with ('{identity.get('name')}'); "
            "pass that one with --tokenizer."
        )
    if opened.vocab_size > config.vocab_size:
        raise PolygluError(
            f"tokenizer '{opened.name}' has {opened.vocab_size} tokens, {path} only {config.vocab_size}; "
            "pass the one it was trained with as --tokenizer."
        )
    return opened


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # no such name; torch without CUDA; device without data
        raise PolygluError(f"device '{device}' cannot be used here; give cpu, or cuda where there is a GPU.") from None


def _tokenizer_of(checkpoint: Path, config: ModelConfig, identity: dict[str, str]) -> str:
    if (checkpoint / "tokenizer.json").is_file():  # an exported folder has its own
        return str(checkpoint)
    name = identity.get("name")
    if name is None:
        if config.vocab_size == ModelConfig().vocab_size:
            return PUBLISHED_TOKENIZER
        raise PolygluError(f"{checkpoint} does not say which tokenizer it was trained with; pass it with --tokenizer.")
    beside = checkpoint.parent / "tokenizer"
    return str(beside) if beside.exists() and not Path(name).exists() else name
