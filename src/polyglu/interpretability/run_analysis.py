"""Figures and numbers of a checkpoint's routing.

checkpoint ──► alpha ──────────► static weights, entropies ──┐
           ├─► prompts, model ─► effective weights, shifts ──┴─► the guide's six figures + entropy_stats.json
           └─► texts, model ───► effective routing ────────────► text_report.py: figures, numbers, analysis.html
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table
from torch import Tensor

from polyglu.errors import run_command
from polyglu.files import check_writable, json_text, write_atomically
from polyglu.inference import Inference, open_for_inference
from polyglu.interpretability import PAGE_FILE, STATS_FILE, plotting
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
from polyglu.interpretability.evolution import check_one_run, find_checkpoints
from polyglu.interpretability.neurotransmitter_maps import (
    preference_shares,
    stack_alpha,
    static_preference,
)
from polyglu.interpretability.routing_entropy import entropy_stats
from polyglu.interpretability.text_report import report_on_texts
from polyglu.interpretability.texts import Texts, embedded_texts, read_kinds
from polyglu.logs import configure_logging, console
from polyglu.model.activations import ACTIVATIONS
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.routing import entropy


@dataclass(frozen=True)
class Analysis:
    """What is drawn and written down; shapes as in ``polyglu.model.architecture``."""

    static: Tensor
    """``[L, F, K]``: softmax(alpha / tau)."""
    effective: Tensor
    """``[L, F, K]``: softmax(full logits / tau), mean over all prompts."""
    entropies: dict[str, Tensor]
    """``static`` (softmax(alpha)), ``dynamic`` (full logits), ``effective`` (the same at tau): ``[L, F]`` nats each."""
    routing: DynamicRouting
    preference: dict[str, Any]
    """What ``static_preference`` says."""

    @property
    def max_entropy(self) -> float:
        """Ln K, in nats."""
        return math.log(self.static.shape[-1])


@dataclass(frozen=True)
class TextSettings:
    """Which texts are looked at beside the guide's prompts."""

    folder: Path | None = None
    """With KIND.jsonl and KIND.txt files; absent: the embedded texts."""
    documents: int = 24
    """Of each kind, at most."""
    tokens: int = 96
    """Of each document; no more than the model's seq_length."""
    over: Sequence[str] = ()
    """Checkpoints of the same run: files, folders, patterns."""

    def read(self, opened: Inference) -> Texts:
        """Encode the texts for a model."""
        length = min(self.tokens, opened.model.config.seq_length)
        if self.folder is None:
            return embedded_texts(opened.tokenizer, self.documents, length)
        return read_kinds(self.folder, opened.tokenizer, self.documents, length)


def analyze_checkpoint(
    checkpoint: Path, output: Path, tokenizer: str | None = None, settings: TextSettings | None = TextSettings()
) -> dict[str, Any]:
    """Write the guide's six figures and ``entropy_stats.json`` into ``output``, and what routing does on texts.

    Nothing is written before all is made.

    Args:
        checkpoint: whatever ``load_checkpoint`` reads.
        output: folder, made if need be.
        tokenizer: name or path, if the checkpoint does not say.
        settings: which texts; None: the guide's files only.

    Returns:
        The content of ``entropy_stats.json``, and under ``figures`` the paths of the guide's figures; with texts, the
        content of ``text_routing.json`` under ``text_routing``.

    Raises:
        PolygluError: not a checkpoint, no tokenizer, no routed layers, no texts, checkpoints of another run to follow,
            or ``output`` cannot be written to.
    """
    check_writable(output, "--output folder")
    others = find_checkpoints(settings.over) if settings else []
    opened = open_for_inference(checkpoint, tokenizer)
    stack_alpha(opened.model)  # refuses a model without routing
    check_one_run(opened, checkpoint, others)
    texts = settings.read(opened) if settings else None
    analysis = analyze(opened.model, opened.tokenizer, opened.tau)
    stats = make_stats(analysis, checkpoint, opened)
    description = _describe(checkpoint, opened)
    images = draw(analysis, description)
    found: dict[str, Any] = {**stats, "figures": [str(output / name) for name in images]}
    files = {STATS_FILE: json_text(stats).encode()}
    if texts is not None:
        on_text = report_on_texts(opened, checkpoint, texts, others, stats, images, description)
        files |= on_text.files
        found["text_routing"] = on_text.written
    for name, content in (images | files).items():
        write_atomically(output / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return found


def analyze(model: PolychromaticLM, tokenizer: Encoder, tau: float) -> Analysis:
    """Compute everything that is shown of a model in evaluation mode, on the CPU.

    Raises:
        PolygluError: the model has no routed layers.
    """
    alpha = stack_alpha(model)
    static_entropy = entropy(alpha.softmax(-1))
    layers = analyze_layers(model, tokenizer, alpha, tau)
    routing = collect(list(track(layers, "routing", total=len(alpha), console=console(stderr=True))))
    entropies = {"static": static_entropy, "dynamic": routing.entropy, "effective": routing.effective_entropy}
    static = (alpha / tau).softmax(-1)
    return Analysis(static, routing.weights.mean((0, 1)), entropies, routing, static_preference(alpha, tau))


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
        "without_static_preference": analysis.preference["without_preference"],
        "static_preference": analysis.preference,
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
    static_note = f"{analysis.preference['sentence']}\n"
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
    output: Annotated[Path, typer.Option(help="Folder for figures, numbers and analysis.html.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer name or path, where the checkpoint does not say.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Folder with a KIND.jsonl or KIND.txt for each kind of text; else embedded ones."),
    ] = None,
    documents: Annotated[int, typer.Option(min=2, help="Documents of each kind, at most.")] = TextSettings.documents,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of each; shorter documents count not.")
    ] = TextSettings.tokens,
    over: Annotated[
        list[str] | None,
        typer.Option(help="Other checkpoints of the run: a file, a folder, or a pattern in quotes. May be repeated."),
    ] = None,
    guide_only: Annotated[bool, typer.Option("--guide-only", help="Six figures and entropy_stats.json only.")] = False,
) -> None:
    """Draw which activations a checkpoint's neurons choose, and how that depends on the input."""
    configure_logging()
    settings = None if guide_only else TextSettings(texts, documents, tokens, tuple(over or ()))
    stats = analyze_checkpoint(checkpoint, output, tokenizer, settings)
    table = Table("entropy (nats)", "mean", "deviation", "share of ln K", title=f"Routing of {checkpoint}")
    rows = {"static": stats, "dynamic": stats["dynamic_entropy"], "effective": stats["effective_entropy"]}
    for name, row in rows.items():
        values = (f"{row['aggregate_mean']:.4f}", f"{row['aggregate_std']:.4f}", f"{row['normalized_mean']:.1%}")
        table.add_row(name, *values)
    screen = console(stderr=True)
    screen.print(table)
    if guide_only:
        screen.print(f"six figures and {STATS_FILE} are in {output}")
        return
    for sentence in stats["text_routing"]["sentences"]:
        screen.print(sentence)
    screen.print(f"figures, numbers and {PAGE_FILE} are in {output}", soft_wrap=True)


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
