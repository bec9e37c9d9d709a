"""Figures and numbers of a checkpoint's routing.

checkpoint ──► alpha ──────────► static weights, entropies ──┐
           └─► prompts, model ─► effective weights, shifts ──┴─► six figures + entropy_stats.json
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from polyglu.errors import run_command
from polyglu.files import check_writable, write_atomically, write_json
from polyglu.inference import Inference, open_for_inference
from polyglu.interpretability import STATS_FILE, plotting
from polyglu.interpretability.dynamic_routing import (
    KINDS,
    DynamicRouting,
    Encoder,
    analyze_layers,
    collect,
    gate_sensitivity,
    make_prompts,
    shift_within_kinds,
    shifts_between_kinds,
)
from polyglu.interpretability.neurotransmitter_maps import (
    NO_PREFERENCE_NATS,
    has_preference,
    preference_shares,
    stack_alpha,
)
from polyglu.interpretability.routing_entropy import entropy_stats
from polyglu.logs import configure_logging
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.routing import entropy


@dataclass(frozen=True)
class Analysis:
    """What is drawn and written down; shapes as in ``polyglu.model.architecture``."""

    static: Tensor
    """``[L, F, K]``: softmax(alpha)."""
    effective: Tensor
    """``[L, F, K]``: softmax(full logits / tau), mean over all prompts."""
    entropies: dict[str, Tensor]
    """``static``, ``dynamic`` (full logits at temperature 1), ``effective`` (at tau): ``[L, F]`` nats each."""
    routing: DynamicRouting

    @property
    def max_entropy(self) -> float:
        """Ln K, in nats."""
        return math.log(self.static.shape[-1])


def analyze_checkpoint(checkpoint: Path, output: Path, tokenizer: str | None = None) -> dict[str, Any]:
    """Write six figures and ``entropy_stats.json`` into ``output``; nothing is written before all are made.

    Args:
        checkpoint: whatever ``load_checkpoint`` reads.
        output: folder, made if need be.
        tokenizer: name or path, if the checkpoint does not say.

    Returns:
        The content of ``entropy_stats.json``, and under ``figures`` the paths of the figures.

    Raises:
        PolygluError: not a checkpoint, no tokenizer, no routed layers, or ``output`` cannot be written to.
    """
    check_writable(output, "--output folder")
    opened = open_for_inference(checkpoint, tokenizer)
    analysis = analyze(opened.model, opened.tokenizer, opened.tau)
    stats = make_stats(analysis, checkpoint, opened)
    images = draw(analysis, _describe(checkpoint, opened))
    for name, image in images.items():
        write_atomically(output / name, lambda file, image=image: file.write(image))  # type: ignore[misc]
    write_json(output / STATS_FILE, stats)
    return {**stats, "figures": [str(output / name) for name in images]}


def analyze(model: PolychromaticLM, tokenizer: Encoder, tau: float) -> Analysis:
    """Compute everything that is shown of a model in evaluation mode, on the CPU.

    Raises:
        PolygluError: the model has no routed layers.
    """
    alpha = stack_alpha(model)
    static = alpha.softmax(-1)
    layers = analyze_layers(model, tokenizer, alpha, tau)
    routing = collect(list(track(layers, "routing", total=len(alpha), console=Console(stderr=True))))
    entropies = {"static": entropy(static), "dynamic": routing.entropy, "effective": routing.effective_entropy}
    return Analysis(static, routing.weights.mean((0, 1)), entropies, routing)


def make_stats(analysis: Analysis, checkpoint: Path, opened: Inference) -> dict[str, Any]:
    """Content of ``entropy_stats.json``; its entropies at the top level are the static ones."""
    n_activations = analysis.static.shape[-1]
    names = [activation.name for activation in ACTIVATIONS[:n_activations]]
    of_kinds = analysis.routing.weights.mean((1, 3))  # [kinds, L, K]
    stats = {name: entropy_stats(values, n_activations) for name, values in analysis.entropies.items()}
    return {
        **stats.pop("static"),
        **{f"{name}_entropy": values for name, values in stats.items()},
        "checkpoint": {"path": str(checkpoint), "sha256": opened.sha256, "step": opened.step, "tau": opened.tau},
        "routing_scope": opened.routing_scope,
        "activations": names,
        "static_shares": _rows(preference_shares(analysis.static), [*names, "no preference"]),
        "effective_shares": _rows(analysis.effective.mean(1), names),
        "effective_shares_by_kind": {kind: _rows(shares, names) for kind, shares in zip(KINDS, of_kinds, strict=True)},
        "without_static_preference": 1 - has_preference(analysis.static).double().mean().item(),
        "gate_sensitivity": gate_sensitivity(analysis.routing.prompt_logits).tolist(),
        "routing_shift": {
            **{pair: shift.tolist() for pair, shift in shifts_between_kinds(analysis.routing.weights).items()},
            "within one kind": shift_within_kinds(analysis.routing.weights).tolist(),
        },
        "prompts_per_kind": {kind: len(make_prompts(kind)) for kind in KINDS},
    }


def draw(analysis: Analysis, description: str) -> dict[str, bytes]:
    """File name -> PNG image; ``description`` of the checkpoint is printed below each."""
    routing, maximum = analysis.routing, analysis.max_entropy
    undecided = 1 - has_preference(analysis.static).double().mean().item()
    static_note = (
        f"Without a static preference (entropy within {NO_PREFERENCE_NATS:g} nats of ln K, α is near its initial 0): "
        f"{undecided:.1%} of the neurons.\n"
    )
    entropies = {
        "static: softmax(α)": analysis.entropies["static"],
        "dynamic: full logits, temperature 1": analysis.entropies["dynamic"],
        "effective: full logits, the model's τ": analysis.entropies["effective"],
    }
    of_text = f"Real text: {sum(len(make_prompts(kind)) for kind in KINDS)} prompts of {', '.join(KINDS)}. "
    of_halves = "Within one kind: two halves of its prompts, worded differently; a shift means something above that. "
    shares = routing.weights.mean((1, 3))
    shifts = shifts_between_kinds(routing.weights)
    sensitivity, baseline = gate_sensitivity(routing.prompt_logits), shift_within_kinds(routing.weights)
    text = of_text + description
    maps = (analysis.static, analysis.effective, static_note + text)
    figures = {
        "neurotransmitter_heatmap.png": plotting.neurotransmitter_heatmap(*maps),
        "layer_distribution.png": plotting.layer_distribution(*maps),
        "entropy_per_layer.png": plotting.entropy_per_layer(entropies, maximum, static_note + text),
        "entropy_histogram.png": plotting.entropy_histogram(entropies, maximum, static_note + text),
        "dynamic_routing_comparison.png": plotting.dynamic_routing_comparison(
            KINDS, routing.prompt_logits, shares, text
        ),
        "routing_shift_summary.png": plotting.routing_shift_summary(sensitivity, shifts, baseline, of_halves + text),
    }
    return {name: plotting.to_png(figure) for name, figure in figures.items()}


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, exported folder or published layout.")],
    output: Annotated[Path, typer.Option(help="Folder for the figures and entropy_stats.json.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer name or path, where the checkpoint does not say.")
    ] = None,
) -> None:
    """Draw which activations a checkpoint's neurons choose, and how that depends on the input."""
    configure_logging()
    stats = analyze_checkpoint(checkpoint, output, tokenizer)
    table = Table("entropy (nats)", "mean", "deviation", "share of ln K", title=f"Routing of {checkpoint}")
    rows = {"static": stats, "dynamic": stats["dynamic_entropy"], "effective": stats["effective_entropy"]}
    for name, row in rows.items():
        values = (f"{row['aggregate_mean']:.4f}", f"{row['aggregate_std']:.4f}", f"{row['normalized_mean']:.1%}")
        table.add_row(name, *values)
    console = Console(stderr=True)
    console.print(table)
    console.print(f"six figures and {STATS_FILE} are in {output}")


def _rows(shares: Tensor, names: list[str]) -> list[dict[str, float]]:
    """Shares ``[L, names]`` as one dictionary a layer."""
    return [dict(zip(names, row, strict=True)) for row in shares.tolist()]


def _describe(checkpoint: Path, opened: Inference) -> str:
    config = opened.model.config
    return (
        f"Checkpoint {checkpoint.name}: step {opened.step:,}, τ = {opened.tau:.3g}, layers: {config.n_layers}, "
        f"neurons in each: {config.d_ff:,}, activations: {config.n_activations}, routing scope: {opened.routing_scope}."
    )


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
