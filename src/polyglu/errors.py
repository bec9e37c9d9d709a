"""The one exception for bad input, and the one place that turns it into a sentence and an exit code."""

import sys
from collections.abc import Callable
from typing import Any

EXIT_BAD_INPUT = 2


class PolygluError(Exception):
    """Input that the user can mend: the message names the file or key, what was expected and what to do."""


def run_command(command: Callable[[], Any]) -> None:
    """Run ``command``; bad input ends it with one sentence on stderr and exit code 2, without a traceback."""
    try:
        command()
    except PolygluError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
        raise SystemExit(EXIT_BAD_INPUT) from None
