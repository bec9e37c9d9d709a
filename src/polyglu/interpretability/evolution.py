"""Routing over a run: entropies, shares and static preferences of several checkpoints, on the same texts."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyglu.errors import PolygluError
from polyglu.inference import Inference, open_for_inference
from polyglu.interpretability.neurotransmitter_maps import moved_weight, stack_alpha
from polyglu.interpretability.statistics import Interval, mean_of_groups, t_interval
from polyglu.interpretability.text_analysis import described
from polyglu.interpretability.text_routing import route_layers, token_logits
from polyglu.interpretability.texts import Texts
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.config import ModelConfig, RoutingScope
from polyglu.model.model import describe_shape, read_checkpoint
from polyglu.model.routing import static_entropy

MOMENTUM_STEPS = 100
"""Between checkpoints nearer than that, an update's direction lasts by AdamW's momentum alone (beta1 0.9: 10 steps)."""


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint's routing, mean over layers."""

    path: Path
    step: int
    tau: float
    alpha: Tensor
    """``[L, F, K]``."""
    static_entropy: float
    """Nats: of softmax(alpha)."""
    entropies: Interval
    """``[2]`` nats: of the full logits on text, at temperature 1 and at tau."""
    shares: Interval
    """``[K]``: mean of g on text."""


def find_checkpoints(given: Sequence[str]) -> list[Path]:
    """Files that were named: each a file, a folder (its ``portable_*.pt``), or a pattern such as ``run/*step*.pt``.

    Raises:
        PolygluError: nothing is there.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        portable = path.is_dir() and not (path / "model.safetensors").exists()
        pattern = f"{glob.escape(name)}/portable_*.pt" if portable else name
        files = [path] if path.exists() and not portable else sorted(map(Path, glob.glob(pattern)))
        if not files:
            raise PolygluError(
                f"--over {name}: no checkpoint is there; give a portable .pt file, a folder with portable_*.pt files, "
                "or a pattern in quotes."
            )
        found += files
    return list(dict.fromkeys(found))


def check_one_run(opened: Inference, checkpoint: Path, others: Sequence[Path]) -> None:
    """Refuse checkpoints that cannot be of one run.

    Args:
        opened: the checkpoint.
        checkpoint: its path.
        others: paths.

    Raises:
        PolygluError: one of them is no checkpoint, or has another shape or tokenizer.
    """
    ours = _shape(opened.model.config, opened.routing_scope)
    for path in others:
        other = read_checkpoint(path)
        theirs = _shape(other.config, other.config.routing_scope)
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                raise PolygluError(
                    f"--over {path}: its {key} is {theirs.get(key)}, that of {checkpoint} is {ours.get(key)}; give "
                    "checkpoints of one run."
                )
        if other.tokenizer.get("fingerprint", opened.tokenizer.fingerprint) != opened.tokenizer.fingerprint:
            raise PolygluError(
                f"--over {path}: it was trained with another tokenizer ('{other.tokenizer.get('name')}') than "
                f"{checkpoint}; give checkpoints of one run."
            )


def _shape(config: ModelConfig, scope: RoutingScope) -> dict[str, Any]:
    return describe_shape(config) | {"routing_scope": scope}


def follow(opened: Inference, checkpoint: Path, others: Sequence[Path], texts: Texts) -> list[Snapshot]:
    """Look at a checkpoint and others of its run, in the order of their steps; of several at one step the first counts.

    Args:
        opened: the checkpoint.
        checkpoint: its path.
        others: paths, of the same run (``check_one_run``).
        texts: encoded with its tokenizer.

    Raises:
        PolygluError: one of them cannot be opened.
    """
    snapshots = {opened.step: look_at(opened, checkpoint, texts)}
    for path in others:
        other = open_for_inference(path, opened.tokenizer.name)
        if other.step not in snapshots:
            snapshots[other.step] = look_at(other, path, texts)
    return [snapshots[step] for step in sorted(snapshots)]


def look_at(opened: Inference, path: Path, texts: Texts) -> Snapshot:
    """Routing of one checkpoint."""
    alpha = stack_alpha(opened.model)
    layers = list(route_layers(alpha, token_logits(opened.model, texts.tokens, opened.tau), opened.tau))
    entropies = torch.stack([layer.entropies for layer in layers]).mean(0)
    shares = torch.stack([layer.document_shares for layer in layers]).mean(0)
    return Snapshot(
        path=path,
        step=opened.step,
        tau=opened.tau,
        alpha=alpha,
        static_entropy=torch.stack([static_entropy(layer).mean() for layer in alpha]).mean().item(),
        entropies=mean_of_groups(texts.of_kind(entropies)),
        shares=mean_of_groups(texts.of_kind(shares)),
    )


def persistence(snapshots: Sequence[Snapshot]) -> Interval | None:
    """Whether neurons' static preferences keep moving the same way: a correlation, with its interval over layers.

    The changes of alpha in consecutive intervals of training, each less its mean over activations and over the
    layer's neurons, correlated within each layer; mean over pairs of intervals. Alpha begins at 0. The drift of noisy
    updates is as often undone as continued: its correlation is 0. Preferences that the loss asks for go on: it is
    positive.

    Returns:
        None with fewer than two intervals, or where nothing moves.
    """
    start = torch.zeros_like(snapshots[0].alpha)
    points = [start, *(one.alpha for one in snapshots if one.step > 0)]
    changes = [_own(later - earlier) for earlier, later in zip(points, points[1:], strict=False)]
    if len(changes) < 2:
        return None
    pairs = [_correlation(first, second) for first, second in zip(changes, changes[1:], strict=False)]
    of_layers = torch.stack(pairs).mean(0)  # [L]
    if not of_layers.isfinite().all():
        return None
    n_layers = len(of_layers)
    error = of_layers.std(correction=min(1, n_layers - 1)) / n_layers**0.5
    return t_interval(of_layers.mean(), error, n_layers - 1)


def persistence_in_words(snapshots: Sequence[Snapshot]) -> str:
    """What the correlation says about the static preferences between which steps, and no more."""
    if len(snapshots) == 1:
        return f"All checkpoints are of step {snapshots[0].step:,}: one does not show how routing changes over time."
    found = persistence(snapshots)
    if found is None:
        return ""
    steps = [0, *(one.step for one in snapshots if one.step > 0)]
    lengths = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    shortest, longest = f"{min(lengths):,}", f"{max(lengths):,}"
    of_steps = shortest if shortest == longest else f"{shortest} to {longest}"
    value = (
        f"consecutive changes of α, from step 0 to step {steps[-1]:,} in {len(lengths)} intervals of {of_steps} steps, "
        f"correlate by {found.estimate:.3f}"
    )
    if not (found.low.isfinite() and found.high.isfinite()):
        return f"Neurons' {value} (one layer: no interval)."
    value += f" (mean over layers, 95% interval {found.low:.3f} to {found.high:.3f})"
    if found.low > 0:
        alone = "as noisy updates alone would not"
        if min(lengths) < MOMENTUM_STEPS:
            alone = "but over intervals of so few steps the optimiser's momentum alone may do that"
        return f"Neurons' {value}: between these steps their preferences keep moving the same way, {alone}."
    return f"Neurons' {value}: that their preferences are more than the drift of noisy updates is not shown."


def to_json(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """Part ``over_training`` of ``text_routing.json``."""
    found = persistence(snapshots)
    return {
        "checkpoints": [_snapshot(one) for one in snapshots],
        "persistence_of_alpha": None if found is None else described(found),
        "persistence_sentence": persistence_in_words(snapshots),
    }


def _snapshot(one: Snapshot) -> dict[str, Any]:
    dynamic, effective = described(one.entropies)
    names = [activation.name for activation in ACTIVATIONS]
    return {
        "path": str(one.path),
        "step": one.step,
        "tau": one.tau,
        "static_entropy": one.static_entropy,
        "dynamic_entropy": dynamic,
        "effective_entropy": effective,
        "shares": dict(zip(names, described(one.shares), strict=False)),
        "moved_by_alpha": moved_weight((one.alpha / one.tau).softmax(-1)).median().item(),
    }


def _own(change: Tensor) -> Tensor:
    """``[L, F, K]`` less what activations, and what neurons of a layer, have in common."""
    change = change.double() - change.double().mean(-1, keepdim=True)
    return (change - change.mean(1, keepdim=True)).flatten(1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of ``[L, F * K]``: ``[L]``; NaN where one does not vary."""
    return (first * second).sum(1) / (first.square().sum(1) * second.square().sum(1)).sqrt()
