"""What an ablation found: changes of the loss with intervals, in words, drawn, and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyglu.estimates import SIGNIFICANT
from polyglu.interpretability import plotting_text
from polyglu.interpretability.ablation import Losses
from polyglu.interpretability.statistics import Interval, holm, ratio_error, t_interval, two_sided_p
from polyglu.interpretability.text_analysis import described, numbered
from polyglu.page import Block, Cell, Column, Figure, Note, Page, Paragraph, Section, Table


def summary(losses: Losses) -> dict[str, Any]:
    """Changes of the loss with intervals, p-values and what they say; nats per token.

    A p-value is of Student's t test over documents that the change is 0. Those of an intervention's layers are
    corrected for the number of layers (Holm), those in all layers for the number of interventions.
    """
    tokens, freedom = losses.tokens, len(losses.tokens) - 1
    change, error = ratio_error(losses.nats - losses.own, tokens)
    count = sum(condition.layer is None for condition in losses.conditions)
    whole = _changes(change[:count], error[:count], freedom)
    found: list[dict[str, Any]] = [
        {"name": condition.intervention.name, "label": condition.intervention.label, "all_layers": entry}
        for condition, entry in zip(losses.conditions, whole, strict=False)
    ]
    if len(change) > count:  # after those in all layers stand those in the first, in the second, ...
        by_layer = zip(change[count:].view(-1, count).T, error[count:].view(-1, count).T, strict=True)
        for entry, layers in zip(found, by_layer, strict=True):
            entry["layers"] = _changes(*layers, freedom)
    loss = t_interval(*ratio_error(losses.own, tokens), freedom)
    return {"loss": described(loss), "interventions": found, "sentences": in_words(found, len(tokens))}


def _changes(change: Tensor, error: Tensor, freedom: int) -> list[dict[str, Any]]:
    """JSON of a family of changes ``[n]``: interval, p-value, and both corrected for their number."""
    p_values = two_sided_p(change, error, freedom)
    columns = {
        "change": described(t_interval(change, error, freedom)),
        "simultaneous": described(t_interval(change, error, freedom, 1 - SIGNIFICANT / len(change))),
        "p": p_values.tolist(),
        "p_holm": holm(p_values).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def in_words(found: Sequence[Mapping[str, Any]], n_documents: int) -> list[str]:
    """Which layers rely on routing, and on its following the input: no more than the intervals allow."""
    by_name = {entry["name"]: entry for entry in found}
    sentences = [
        f"With one fixed mixture in each layer instead of its routing, the loss on this data changes by "
        f"{signed(by_name['freeze_layer']['all_layers']['change'])} nats per token ({n_documents} documents)."
    ]
    for name, gain, change in (
        ("freeze_layer", "Routing lowers the loss", "one fixed mixture in that layer alone"),
        ("freeze_neurons", "Routing by the input lowers the loss", "each neuron's mean in that layer alone"),
    ):
        if "layers" in by_name[name]:
            sentences.append(_of_layers(by_name[name]["layers"], gain, change))
    return sentences


def _of_layers(layers: Sequence[Mapping[str, Any]], gain: str, replacement: str) -> str:
    """In which layers the loss rises, in which it falls, and how far it may change in the others."""
    rises: list[int] = []
    falls: list[int] = []
    rest: list[int] = []
    for index, layer in enumerate(layers):
        estimate = layer["change"]["estimate"]
        (rest if layer["p_holm"] > SIGNIFICANT else rises if estimate > 0 else falls).append(index)
    parts = []
    if rises:
        parts.append(f"{gain} in {numbered('layer', rises)}: with {replacement} it rises by {_span(layers, rises)}")
    if falls:
        parts.append(f"With {replacement} the loss falls by {_span(layers, falls)} in {numbered('layer', falls)}")
    if rest:
        bounds = [layers[index]["simultaneous"][end] for index in rest for end in ("low", "high")]
        known = [bound for bound in bounds if bound is not None]
        reach = f": the change lies between {min(known):+.2g} and {max(known):+.2g} (joint 95%)" if known else ""
        where = numbered("layer", rest) if parts else "any layer"
        parts.append(f"With {replacement}, no change of the loss is shown in {where}{reach}")
    corrected = f" (Holm-corrected over {len(layers)} layers, p ≤ {SIGNIFICANT})" if rises or falls else ""
    return f"{'. '.join(parts)}{corrected}."


def _span(layers: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> str:
    """Size of the layers' changes: ``0.012`` or ``0.012 to 0.3``."""
    sizes = sorted(abs(layers[index]["change"]["estimate"]) for index in indices)
    low, high = f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}"
    return low if low == high else f"{low} to {high}"


def draw(found: Mapping[str, Any], checkpoint: Path) -> Figure:
    """All changes in one figure, for a page; its PNG is the file."""
    caption = f"{' '.join(found['sentences'])}\n{description(found, checkpoint)}"
    entries = found["interventions"]
    whole = _interval_of([entry["all_layers"]["change"] for entry in entries])
    layers, shown = None, None
    if all("layers" in entry for entry in entries):
        layers = torch.tensor([[layer["change"]["estimate"] for layer in entry["layers"]] for entry in entries])
        shown = torch.tensor([[layer["p_holm"] <= SIGNIFICANT for layer in entry["layers"]] for entry in entries])
    labels = [entry["label"] for entry in entries]
    alt = f"Change of the loss under {len(entries)} ways to replace the routing, in all layers and in each"
    return plotting_text.ablation(labels, whole, layers, shown, caption).on_page(alt)


def _interval_of(changes: Sequence[Mapping[str, float | None]]) -> Interval:
    parts = ([torch.nan if one[name] is None else one[name] for one in changes] for name in Interval._fields)
    return Interval(*(torch.tensor(part, dtype=torch.float64) for part in parts))


STAR = f"A star: differs from 0, p ≤ {SIGNIFICANT} after correction (Holm)."
CAUTION = (
    "The model was trained with its routing: what it loses without it is what it has come to rely on, not what a model "
    "trained without routing would lack."
)


def ablation_page(found: Mapping[str, Any], checkpoint: Path, figure: Figure) -> Page:
    """The report."""
    entries = found["interventions"]
    columns = [
        Column("routing"),
        Column("change", "nats per token, 95% interval", "number"),
        Column("p", "Holm-corrected", "number", ".2g"),
    ]
    rows = [[entry["label"], _cell(entry["all_layers"]), entry["all_layers"]["p_holm"]] for entry in entries]
    loss = found["loss"]
    return Page(
        f"Ablation of {checkpoint.name}",
        f"Loss as trained: {loss['estimate']:.4f} nats per token. {description(found, checkpoint)}",
        [
            Section(
                "All layers",
                [
                    figure,
                    Table(columns, rows, f"Replaced in all layers. {STAR}"),
                ],
            ),
            Section("Layer by layer", _layer_table(entries)),
        ],
        [*(Note(sentence) for sentence in found["sentences"]), Paragraph(CAUTION)],
    )


def _layer_table(entries: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One row a layer, one column an intervention; nothing where layers were not looked at."""
    if not all("layers" in entry for entry in entries):
        return []
    columns = [Column("layer", kind="number", spec="d"), *(Column(entry["label"], "", "number") for entry in entries)]
    rows: list[list[Any]] = [
        [index, *(_cell(layer) for layer in layers)]
        for index, layers in enumerate(zip(*(entry["layers"] for entry in entries), strict=True))
    ]
    return [Table(columns, rows, f"Replaced in one layer: change in nats per token, 95% interval. {STAR}")]


def _cell(entry: Mapping[str, Any]) -> Cell:
    star = " *" if entry["p_holm"] <= SIGNIFICANT else ""
    return Cell(f"{signed(entry['change'])}{star}", entry["change"]["estimate"])


def signed(change: Mapping[str, float | None]) -> str:
    """A change with its interval."""
    estimate, low, high = change["estimate"], change["low"], change["high"]
    if low is None or high is None:
        return f"{estimate:+.2g}"
    return f"{estimate:+.2g} ({low:+.2g} to {high:+.2g})"


def description(found: Mapping[str, Any], checkpoint: Path) -> str:
    """Which checkpoint, on what data."""
    data, own = found["data"], found["checkpoint"]
    return (
        f"Checkpoint {checkpoint.name}, step {own['step']:,}, τ = {own['tau']:.3g}; {data['documents']} documents, "
        f"{data['tokens']:,} predicted tokens of {data['path']}."
    )
