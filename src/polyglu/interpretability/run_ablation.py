"""What routing is worth to a trained model: its held-out loss when the routing is replaced, whole and layer by layer.

checkpoint, data ──► losses of documents, as trained and replaced ──► changes with intervals ──► ablation.json
                                                                                                 ablation.png, .html
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Lines
from torch import Tensor

from polyglu.data.held_out import first_documents
from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable, json_text, write_atomically
from polyglu.inference import Inference, open_for_inference
from polyglu.interpretability import plotting_text
from polyglu.interpretability.ablation import Losses, interventions, mean_weights, measure, passes
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.interpretability.plotting import to_png
from polyglu.interpretability.statistics import CONFIDENCE, Interval, holm, ratio_error, t_interval, two_sided_p
from polyglu.interpretability.text_analysis import LEVEL, described, numbered
from polyglu.logs import configure_logging
from polyglu.page import Cell, Column, Figure, Note, Page, Paragraph, Section, Table, render

PNG, JSON, HTML = "ablation.png", "ablation.json", "ablation.html"


def ablate_checkpoint(
    checkpoint: Path,
    data: Path,
    output: Path,
    tokenizer: str | None = None,
    max_tokens: int = 16_384,
    by_layer: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write ``ablation.json``, ``ablation.png`` and ``ablation.html`` into ``output``, all of them at the end.

    Args:
        checkpoint: whatever ``load_checkpoint`` reads.
        data: ``.jsonl`` file of held-out texts, or a folder of token chunks.
        output: folder, made if need be.
        tokenizer: name or path, if the checkpoint does not say.
        max_tokens: documents are read until they have as many; of each the first seq_length tokens count.
        by_layer: also replace the routing of each layer alone.
        device: on which the model runs.

    Returns:
        The content of ``ablation.json``.

    Raises:
        PolygluError: not a checkpoint, no tokenizer, no routed layers, fewer than two documents, or ``output`` cannot
            be written to.
    """
    check_writable(output, "--output folder")
    opened = open_for_inference(checkpoint, tokenizer, device)
    n_layers = len(stack_alpha(opened.model))
    documents = read_documents(opened, data, max_tokens)
    chosen = interventions(mean_weights(opened.model, [document[:-1] for document in documents], opened.tau))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("ablation", total=passes(documents, len(chosen), n_layers, by_layer))
        losses = measure(opened.model, documents, opened.tau, chosen, by_layer, lambda: progress.advance(task))
    found = {
        "checkpoint": {"path": str(checkpoint), "sha256": opened.sha256, "step": opened.step, "tau": opened.tau},
        "routing_scope": opened.routing_scope,
        "data": {"path": str(data), "documents": len(documents), "tokens": int(losses.tokens.sum())},
        "confidence": CONFIDENCE,
        **summary(losses, n_layers),
    }
    image = draw(found, n_layers, f"{' '.join(found['sentences'])}\n{_describe(found, checkpoint)}")
    files = {PNG: image, JSON: json_text(found).encode(), HTML: render(page(found, checkpoint, image)).encode()}
    for name, content in files.items():
        write_atomically(output / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return found


def read_documents(opened: Inference, data: Path, max_tokens: int) -> list[list[int]]:
    """The first documents, each after an end-of-document token, cut to what the model can predict at once."""
    read = first_documents(data, opened.tokenizer, max_tokens)
    longest = opened.model.config.seq_length
    documents = [[opened.tokenizer.eos_id, *document.tokens[:longest]] for document in read]
    if len(documents) < 2:
        raise PolygluError(
            f"{data}: within --max-tokens {max_tokens:,} there is one document, and intervals need at least two; give "
            "more documents or a larger --max-tokens."
        )
    return documents


def summary(losses: Losses, n_layers: int) -> dict[str, Any]:
    """Changes of the loss with intervals, p-values and what they say; nats per token.

    A p-value is of Student's t test over documents that the change is 0. Those of an intervention's layers are
    corrected for the number of layers (Holm), those in all layers for the number of interventions.
    """
    loss, loss_error = ratio_error(losses.own, losses.tokens)
    change, error = ratio_error(losses.nats - losses.own, losses.tokens)
    freedom = len(losses.tokens) - 1
    interval, p_values = t_interval(change, error, freedom), two_sided_p(change, error, freedom)
    whole = [index for index, condition in enumerate(losses.conditions) if condition.layer is None]
    corrected = holm(p_values[whole])
    found = []
    for index, of_all in zip(whole, corrected, strict=True):
        one = losses.conditions[index].intervention
        layers = [place for place, other in enumerate(losses.conditions) if other == (one, other.layer or 0)]
        entry = {
            "name": one.name,
            "label": one.label,
            "all_layers": _change(interval, p_values, index) | {"p_holm": of_all.item()},
        }
        if len(layers) == n_layers:
            bound = t_interval(change[layers], error[layers], freedom, 1 - (1 - CONFIDENCE) / n_layers)
            entry["layers"] = [
                _change(interval, p_values, place) | {"p_holm": p.item(), "simultaneous": described(joint)}
                for place, p, joint in zip(
                    layers, holm(p_values[layers]), (Interval(*parts) for parts in zip(*bound, strict=True)), strict=True
                )
            ]
        found.append(entry)
    return {
        "loss": described(t_interval(loss, loss_error, freedom)),
        "interventions": found,
        "sentences": in_words(found, len(losses.tokens)),
    }


def _change(interval: Interval, p_values: Tensor, index: int) -> dict[str, Any]:
    return {"change": described(Interval(*(part[index] for part in interval))), "p": p_values[index].item()}


def in_words(found: Sequence[Mapping[str, Any]], n_documents: int) -> list[str]:
    """Which layers use routing, and which let it depend on the input: no more than the intervals allow."""
    by_name = {entry["name"]: entry for entry in found}
    frozen = by_name["freeze_layer"]
    whole = frozen["all_layers"]
    sentences = [
        f"With one fixed mixture in each layer instead of its routing, the held-out loss changes by "
        f"{_signed(whole['change'])} nats per token ({n_documents} documents)."
    ]
    questions = (
        ("freeze_layer", "use routing: with one fixed mixture in that layer alone", "uses routing"),
        ("freeze_neurons", "route by the input: with each neuron's mean instead", "routes by the input"),
    )
    for name, verb, single in questions:
        layers = by_name[name].get("layers")
        if layers is None:
            continue
        shown = [index for index, layer in enumerate(layers) if layer["p_holm"] <= LEVEL]
        rest = [index for index in range(len(layers)) if index not in shown]
        text = ""
        if shown:
            changes = [layers[index]["change"]["estimate"] for index in shown]
            low, high = f"{min(changes):+.2g}", f"{max(changes):+.2g}"
            claim = verb if len(shown) > 1 else single + verb[verb.index(":") :]
            span = low if low == high else f"{low} to {high}"
            where = numbered("layer", shown)
            text = f"{where[0].upper()}{where[1:]} {claim} the loss changes by {span} (p ≤ 0.05, Holm-corrected). "
        if rest:
            bounds = [layers[index]["simultaneous"] for index in rest]
            known = [value for bound in bounds for value in (bound["low"], bound["high"]) if value is not None]
            reach = f"; the changes lie between {min(known):+.2g} and {max(known):+.2g} (joint 95%)" if known else ""
            where = "in any layer" if not shown else f"in {numbered('layer', rest)}"
            what = "Use of routing" if name == "freeze_layer" else "Routing by the input"
            text += f"{what} is not shown {where}{reach}."
        sentences.append(text.strip())
    return sentences


def draw(found: Mapping[str, Any], n_layers: int, caption: str) -> bytes:
    """PNG of all changes."""
    entries = found["interventions"]
    whole = _interval_of([entry["all_layers"]["change"] for entry in entries])
    layers, shown = None, None
    if all("layers" in entry for entry in entries):
        layers = torch.tensor([[layer["change"]["estimate"] for layer in entry["layers"]] for entry in entries])
        shown = torch.tensor([[layer["p_holm"] <= LEVEL for layer in entry["layers"]] for entry in entries])
    labels = [entry["label"] for entry in entries]
    return to_png(plotting_text.ablation(labels, whole, layers, shown, caption))


def _interval_of(changes: Sequence[Mapping[str, float | None]]) -> Interval:
    parts = ([torch.nan if one[name] is None else one[name] for one in changes] for name in Interval._fields)
    return Interval(*(torch.tensor(part, dtype=torch.float64) for part in parts))


def page(found: Mapping[str, Any], checkpoint: Path, image: bytes) -> Page:
    """The report."""
    names = ["as trained", *(entry["label"] for entry in found["interventions"])]
    alt = f"Change of the held-out loss under {len(names) - 1} ways to replace the routing, whole and by layer"
    whole = Table(
        [Column("routing"), Column("change", "nats per token, 95% interval", "number"), Column("p", "Holm", "number", ".2g")],
        [
            [entry["label"], _cell(entry["all_layers"]["change"]), entry["all_layers"]["p_holm"]]
            for entry in found["interventions"]
        ],
        "Replaced in all layers",
    )
    blocks = []
    for entry in found["interventions"]:
        rows = [
            [index, _cell(layer["change"]), layer["p"], layer["p_holm"]] for index, layer in enumerate(entry.get("layers", []))
        ]
        columns = [Column("layer", kind="number", spec="d"), Column("change", "nats per token", "number")]
        columns += [Column("p", kind="number", spec=".2g"), Column("p", "Holm", "number", ".2g")]
        if rows:
            blocks.append(Table(columns, rows, f"{entry['label']}, in one layer"))
    loss = found["loss"]
    return Page(
        f"Ablation of {checkpoint.name}",
        f"Held-out loss as trained: {loss['estimate']:.4f} nats per token. {_describe(found, checkpoint)}",
        [Section("All layers", [Figure(image, alt, wide=True), whole]), Section("Layer by layer", blocks)],
        [*(Note(sentence) for sentence in found["sentences"]), Paragraph(CAUTION)],
    )


CAUTION = (
    "The model was trained with its routing: what it loses without it is what it has come to rely on, not what a model "
    "trained without routing would lack."
)


def _cell(change: Mapping[str, float | None]) -> Cell:
    return Cell(_signed(change), change["estimate"])


def _signed(change: Mapping[str, float | None]) -> str:
    estimate, low, high = change["estimate"], change["low"], change["high"]
    if low is None or high is None:
        return f"{estimate:+.4f}"
    return f"{estimate:+.4f} ({low:+.4f} to {high:+.4f})"


def _describe(found: Mapping[str, Any], checkpoint: Path) -> str:
    data, own = found["data"], found["checkpoint"]
    return (
        f"Checkpoint {checkpoint.name}, step {own['step']:,}, τ = {own['tau']:.3g}; {data['documents']} documents, "
        f"{data['tokens']:,} predicted tokens of {data['path']}."
    )


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, safetensors folder or published layout.")],
    data: Annotated[Path, typer.Option(help="Held-out texts: a .jsonl file, or a folder of token chunks.")],
    output: Annotated[Path, typer.Option(help="Folder for ablation.json, .png and .html.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer name or path, where the checkpoint does not say.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Documents are read until they have as many tokens.")] = 16_384,
    by_layer: Annotated[bool, typer.Option(help="Also replace the routing of each layer alone.")] = True,
    device: Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")] = "cpu",
) -> None:
    """Replace a trained model's routing, in all layers and in each, and measure what that does to its held-out loss."""
    configure_logging()
    found = ablate_checkpoint(checkpoint, data, output, tokenizer, max_tokens, by_layer, device)
    table = Lines("routing", "change of the loss, nats per token (95% interval)", "p, Holm", title=f"Ablation of {checkpoint}")
    for entry in found["interventions"]:
        table.add_row(entry["label"], _signed(entry["all_layers"]["change"]), f"{entry['all_layers']['p_holm']:.2g}")
    console = Console(stderr=True)
    console.print(table)
    for sentence in found["sentences"]:
        console.print(sentence)
    console.print(f"{JSON}, {PNG} and {HTML} are in {output}", soft_wrap=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
