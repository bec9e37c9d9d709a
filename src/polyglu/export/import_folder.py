"""Turn an exported folder, or a published checkpoint, into a portable file: ``polyglu import DIR CKPT.pt``."""

from pathlib import Path
from typing import Annotated

import typer

from polyglu.errors import PolygluError, run_command
from polyglu.files import check_writable
from polyglu.inference import open_tokenizer
from polyglu.logs import configure_logging
from polyglu.model.model import Checkpoint, check_shapes, read_checkpoint, save_portable


def import_checkpoint(source: Path, target: Path, tokenizer: str | None = None) -> Checkpoint:
    """Write what ``load_checkpoint`` reads as a portable file. Code in the folder is never executed.

    Args:
        source: exported folder, or published layout (``.pt``, safetensors file or folder).
        target: ``.pt`` file to make.
        tokenizer: name or path, for a checkpoint that does not say which it was trained with.

    Returns:
        What was read.

    Raises:
        PolygluError: the target exists, no checkpoint, or a tokenizer that does not fit it.
    """
    if target.exists():
        raise PolygluError(f"{target} exists already; give the name of a new file.")
    if target.suffix != ".pt":
        raise PolygluError(f"{target} must end in .pt, which is how a portable checkpoint is known.")
    check_writable(target.parent, "folder")
    checkpoint = read_checkpoint(source)
    check_shapes(checkpoint.weights, checkpoint.config, source)
    identity = checkpoint.tokenizer
    if tokenizer is not None:
        identity = open_tokenizer(source, checkpoint, tokenizer).identity()
    save_portable(target, checkpoint.weights, checkpoint.config, checkpoint.step, checkpoint.tau, identity)
    return checkpoint


def main(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Exported folder, or published checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="CKPT", help="Portable .pt file to make.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or path, where the checkpoint does not say it; default: left open.")
    ] = None,
) -> None:
    """Write an exported folder or a published checkpoint as a portable file."""
    configure_logging()
    read = import_checkpoint(source, target, tokenizer)
    typer.echo(f"imported: {target}, of step {read.step:,} and routing temperature {read.tau:g}", err=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
