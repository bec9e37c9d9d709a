"""Making, saving and loading models. ``load_checkpoint`` is the only loader.

A portable checkpoint is one ``.pt`` file that loads with ``weights_only=True``:
    format, model (weights, fp32), config (ModelConfig), step, tau, tokenizer (name, fingerprint)
    training (optional): what a resume of its run needs, moments of the optimiser included
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat
from torch import Tensor

from polyglu.config_file import validate
from polyglu.errors import PolygluError
from polyglu.files import write_atomically
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.folder import CONFIG_FILE, own_names, read_description, read_weights

PORTABLE_FORMAT = "polyglu-portable-1"


def create_model(config: ModelConfig, seed: int = 0, device: torch.device | str = "cpu") -> PolychromaticLM:
    """Make an initialised model; the weights follow from ``seed`` alone, whatever the device."""
    model = PolychromaticLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(device)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, on the CPU, in this project's names."""

    weights: dict[str, Tensor]
    config: ModelConfig
    step: int
    tau: float
    tokenizer: dict[str, Any]
    """name and fingerprint; empty for published checkpoints, which do not say."""
    training: dict[str, Any] | None = None
    """What a resume of its run needs, optimiser state included; most checkpoints have none."""


def load_checkpoint(
    path: str | Path, config: ModelConfig | None = None, device: torch.device | str = "cpu"
) -> tuple[PolychromaticLM, int, float]:
    """Load a model in evaluation mode from a portable ``.pt``, an exported folder, or the published layout.

    Args:
        path: file, or folder as ``polyglu export`` writes it; its code is never executed.
        config: used instead of the checkpoint's own; its shape must match the weights.
        device: where the model goes.

    Returns:
        The model, the step at which it was saved, and the routing temperature tau of that step.

    Raises:
        PolygluError: missing, not a checkpoint, pickled objects other than tensors and plain values, or another shape.
    """
    checkpoint = read_checkpoint(path)
    config = config or checkpoint.config
    check_shapes(checkpoint.weights, config, path)
    model = PolychromaticLM(config)
    model.load_state_dict({name: weight.float() for name, weight in checkpoint.weights.items()})
    return model.to(device).eval(), checkpoint.step, checkpoint.tau


def check_shapes(weights: Mapping[str, Tensor], config: ModelConfig, path: str | Path) -> None:
    """Refuse weights that are not all of a config's model, and no others.

    Raises:
        PolygluError: one is missing, left over, or of another shape; the message names ``path``, their file.
    """
    with torch.device("meta"):
        model = PolychromaticLM(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise PolygluError(
                f"{path}: weight '{name}' has shape {found.get(name, 'none (missing)')}, the config expects "
                f"{expected.get(name, 'no such weight')}; use the config the checkpoint was trained with."
            )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what ``load_checkpoint`` loads, without building a model.

    Raises:
        PolygluError: missing or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise PolygluError(f"checkpoint {path} does not exist; training writes portable_*.pt into its checkpoint_dir.")
    if path.is_dir() or path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_tensors(path)
    if content.get("format") == PORTABLE_FORMAT:
        missing = {"model", "config", *_Description.model_fields} - content.keys()
        if missing:
            raise PolygluError(f"{path} is not a whole portable checkpoint: '{min(missing)}' is missing; use another.")
        config = validate(ModelConfig, content["config"], source=str(path))
        return _checked(path, content["model"], config, content)
    if isinstance(content.get("model"), dict) and "embeddings.weight" in content["model"]:
        return _read_published(path, content["model"], content)
    raise PolygluError(f"{path} is not a PolyGLU checkpoint: it has neither this project's nor the published layout.")


def save_portable(
    path: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    step: int,
    tau: float,
    tokenizer: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> str:
    """Write a portable checkpoint atomically; return its SHA-256 (hex)."""
    content = {
        "format": PORTABLE_FORMAT,
        "model": {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()},
        "config": describe_shape(config),
        "step": step,
        "tau": tau,
        "tokenizer": dict(tokenizer),
    }
    if training is not None:
        content["training"] = dict(training)
    return write_atomically(path, lambda file: torch.save(content, file))


def describe_shape(config: ModelConfig) -> dict[str, Any]:
    """What of a config belongs to the weights: not who computes, which each machine decides for itself.

    Routing that has both parts, the paper's, goes without saying, as in checkpoints from before there was a choice.
    """
    return config.model_dump(mode="json", exclude={"kernels"} | ({"routing"} if config.routing == "both" else set()))


class _TokenizerIdentity(BaseModel):
    name: str | None = None
    fingerprint: str | None = None


class _Description(BaseModel):
    """What a file says of its weights, besides their shape."""

    model_config = ConfigDict(allow_inf_nan=False)

    step: NonNegativeInt = 0
    tau: PositiveFloat = 1.0
    tokenizer: _TokenizerIdentity = _TokenizerIdentity()


def _checked(path: Path, weights: Any, config: ModelConfig, description: Mapping[str, Any]) -> Checkpoint:
    """Put together what was read, once all of it is known to be of the right kind."""
    values = {key: description[key] for key in _Description.model_fields if key in description}
    said = validate(_Description, values, source=str(path))
    tokenizer = said.tokenizer.model_dump(exclude_none=True)
    training = description.get("training")
    if training is not None and not isinstance(training, dict):
        raise PolygluError(f"{path}: 'training' must be a dictionary, got {type(training).__name__}; use another.")
    return Checkpoint(_check_weights(path, weights), config, said.step, said.tau, tokenizer, training)


def _check_weights(path: Path, weights: Any) -> dict[str, Tensor]:
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise PolygluError(f"{path} is not a PolyGLU checkpoint: its weights are not named.")
    for name, weight in weights.items():
        dense = isinstance(weight, Tensor) and weight.layout == torch.strided and not weight.is_nested
        if not dense or not weight.is_floating_point() or weight.is_meta:
            raise PolygluError(f"{path} is not a PolyGLU checkpoint: '{name}' is not a tensor of real numbers.")
        if not weight.float().isfinite().all():
            raise PolygluError(f"{path}: weight '{name}' has values that are not finite; use an earlier checkpoint.")
    return weights


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a dictionary of tensors and plain values written by ``torch.save``; nothing in the file is ever executed.

    Raises:
        PolygluError: damaged, no dictionary, or with other objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damaged bytes can raise almost anything
        raise PolygluError(
            f"{path} is not a checkpoint: it is damaged, or holds more than tensors and plain values; "
            "nothing in it was executed."
        ) from None
    if not isinstance(content, dict):
        raise PolygluError(f"{path} is not a PolyGLU checkpoint: expected a dictionary, got {type(content).__name__}.")
    return content


def _read_safetensors(path: Path) -> Checkpoint:
    weights = read_weights(path)
    if "embeddings.weight" in weights:
        return _read_published(path, weights, {})
    config_file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    description = read_description(config_file)
    config = validate(ModelConfig, description["config"], source=str(config_file))
    return _checked(path, own_names(weights, path), config, description)


_PUBLISHED_NAMES = (
    (r"^embeddings\.", "embed_tokens."),
    (r"^model_core\.", "layers."),
    (r"\.rmsnorm_1\.gama$", ".input_layernorm.weight"),
    (r"\.rmsnorm_2\.gama$", ".post_attention_layernorm.weight"),
    (r"\.gqa\.rmsnorm_([qk])\.gama$", r".self_attn.\1_norm.weight"),
    (r"\.gqa\.W_([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.polyglu\.W_(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.polyglu\.gate_net\.0\.", ".mlp.router.hidden."),
    (r"\.polyglu\.gate_net\.2\.", ".mlp.router.out."),
    (r"\.polyglu\.", ".mlp."),
    (r"^rmsnorm\.gama$", "norm.weight"),
)


def published_name(name: str) -> str:
    """Name in this project of a weight of the published layout."""
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _read_published(path: Path, weights: Any, content: Mapping[str, Any]) -> Checkpoint:
    config = _config_from_published(_check_weights(path, weights), path)
    derived = ("rope.", "output_head.")  # tables, and the head tied to the embedding
    renamed = {published_name(name): weight for name, weight in weights.items() if not name.startswith(derived)}
    description = {key: content[key] for key in ("step", "tau") if content.get(key) is not None}
    return _checked(path, renamed, config, description)


def _config_from_published(weights: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The published layout carries no config; all of it but eps shows in the shapes."""
    try:
        vocab_size, d_model = weights["embeddings.weight"].shape
        head_dim = weights["model_core.0.gqa.rmsnorm_q.gama"].shape[0]
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("model_core.")}
        d_ff, n_activations = weights["model_core.0.polyglu.alpha"].shape
        rope = weights.get("rope.cosines")
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            d_ff=d_ff,
            n_layers=len(layers),
            n_q_heads=weights["model_core.0.gqa.W_q.weight"].shape[0] // head_dim,
            n_kv_heads=weights["model_core.0.gqa.W_k.weight"].shape[0] // head_dim,
            head_dim=head_dim,
            seq_length=ModelConfig().seq_length if rope is None else rope.shape[0],
            n_activations=n_activations,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise PolygluError(f"{path} looks like the published layout, but is not whole: {error}.") from None
