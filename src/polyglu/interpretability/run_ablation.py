"""What routing is worth to a trained model: its held-out loss when the routing is replaced, whole and layer by layer.

checkpoint, data ──► losses of documents, as trained and replaced ──► changes with intervals ──► ablation.json
                                                                                                 ablation.png, .html
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from polyglu.data.held_out import first_documents
from polyglu.errors import PolygluError, run_command
from polyglu.estimates import LEVEL
from polyglu.files import check_writable, json_text, write_atomically
from polyglu.inference import Inference, open_for_inference
from polyglu.interpretability.ablation import interventions, mean_weights, measure, passes
from polyglu.interpretability.ablation_report import ablation_page, draw, signed, summary
from polyglu.interpretability.neurotransmitter_maps import stack_alpha
from polyglu.logs import configure_logging, console
from polyglu.page import render

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
    with Progress(console=console(stderr=True)) as progress:
        task = progress.add_task("ablation", total=passes(documents, len(chosen), n_layers, by_layer))
        losses = measure(opened.model, documents, opened.tau, chosen, by_layer, lambda: progress.advance(task))
    found = {
        "checkpoint": {"path": str(checkpoint), "sha256": opened.sha256, "step": opened.step, "tau": opened.tau},
        "routing_scope": opened.routing_scope,
        "data": {"path": str(data), "documents": len(documents), "tokens": int(losses.tokens.sum())},
        "confidence": LEVEL,
        **summary(losses),
    }
    figure = draw(found, checkpoint)
    page = render(ablation_page(found, checkpoint, figure))
    files = {PNG: figure.png, JSON: json_text(found).encode(), HTML: page.encode()}
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
    table = Table(
        "routing", "change of the loss, nats per token (95% interval)", "p, Holm", title=f"Ablation of {checkpoint}"
    )
    for entry in found["interventions"]:
        table.add_row(entry["label"], signed(entry["all_layers"]["change"]), f"{entry['all_layers']['p_holm']:.2g}")
    screen = console(stderr=True)
    screen.print(table)
    for sentence in found["sentences"]:
        screen.print(sentence)
    screen.print(f"{JSON}, {PNG} and {HTML} are in {output}", soft_wrap=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
