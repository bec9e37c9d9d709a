"""The one exception for bad input, and the one place that turns it into a sentence and an exit code."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2


class PolygluError(Exception):
    """Input that the user can mend: the message names the file or key, what was expected and what to do."""


def run_command(command: Callable[[], Any]) -> None:
    """Run ``command``; bad input ends it with one sentence on stderr and exit code 2, without a traceback.

    So does a file or folder that the system refuses: no permission, not a folder, a full disk.
    """
    try:
        command()
    except PolygluError as error:
        _exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename} cannot be used: {error.strerror}; mend that, or give another path.")


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.stderr.flush()
    raise SystemExit(EXIT_BAD_INPUT) from None
