"""Continue a prompt with a checkpoint: ``polyglu generate --checkpoint C --prompt "..."``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from polyglu.data.chat import encode_prompt
from polyglu.data.tokenizer import is_text
from polyglu.errors import PolygluError, run_command
from polyglu.inference import open_for_inference
from polyglu.logs import configure_logging
from polyglu.model.generation import Routing, generate


def main(
    checkpoint: Annotated[Path, typer.Option(help="Portable .pt file, or exported folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, or the user's message with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among this many of the likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message (fine-tuned checkpoints).")
    ] = False,
    routing: Annotated[
        Routing,
        typer.Option(
            help="Of new tokens. frozen, running: with a model that is not causal, approximate what exact computes "
            "from the whole text for each token."
        ),
    ] = "exact",
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; default: CUDA if there is one.")] = None,
) -> None:
    """Print a checkpoint's continuation of a prompt on stdout."""
    configure_logging()
    if not is_text(prompt):
        raise PolygluError("the prompt is not UTF-8 text; check the terminal's encoding.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_for_inference(checkpoint, tokenizer, device)
    text = opened.tokenizer
    prompt_ids = encode_prompt([{"role": "user", "content": prompt}], text) if chat else text.encode(prompt)
    longest = opened.model.config.seq_length
    if len(prompt_ids) > longest:
        raise PolygluError(f"the prompt has {len(prompt_ids)} tokens, the model takes at most {longest}; shorten it.")
    (new,) = generate(
        opened.model,
        [prompt_ids or [text.eos_id]],
        max_new_tokens=max_new_tokens,
        tau=opened.tau,
        eos_ids=[end for end in (text.eos_id, text.im_end_id) if end is not None],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        routing=routing,
    )
    typer.echo(text.decode(new))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
