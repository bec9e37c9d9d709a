"""What a person sees of the log: one line a message on stderr, from rank 0 only; libraries speak from warnings up."""

import io
import logging
import sys
import warnings

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn


def configure_logging(rank: int = 0) -> None:
    """Set up logging for a command; called once, by the command itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("polyglu").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("__main__").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|datasets|lm_eval|transformers)\b")


def console(stderr: bool = False) -> Console:
    """Where a command shows its results; colours where that is a terminal and NO_COLOR is not set.

    Texts stand as they are: a name may hold ``[/]`` or ``:x:``, which rich would read as markup.
    What the terminal's encoding lacks is written as an escape.
    """
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def progress(*columns: ProgressColumn) -> Progress:
    """Bar on stderr: a task's description as it is, then ``columns``."""
    return Progress(TextColumn("{task.description}", markup=False), *columns, console=console(stderr=True))
