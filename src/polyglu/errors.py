"""The one exception for bad input, and the one place that turns it into a sentence and an exit code."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75
"""A run that was asked to stop has saved and can go on (sysexits.h: EX_TEMPFAIL, try again)."""


class PolygluError(Exception):
    """Input that the user can mend: the message names the file or key, what was expected and what to do."""


class Interrupted(Exception):
    """The command was asked to stop and has put everything in order; the message says how to go on."""


def run_command(command: Callable[[], Any]) -> None:
    """Run ``command``; bad input ends it with one sentence on stderr and exit code 2, without a traceback.

    So does a file or folder that the system refuses: no permission, not a folder, a full disk. A command that was
    asked to stop, and saved, ends with exit code 75.
    """
    try:
        command()
    except Interrupted as interrupted:
        _exit(f"interrupted: {interrupted}", EXIT_INTERRUPTED)
    except PolygluError as error:
        _exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"error: {error.filename} cannot be used: {error.strerror}; mend that, or give another path.")


def _exit(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    sys.stderr.write(f"{' '.join(message.split())}\n")
    sys.stderr.flush()
    raise SystemExit(code) from None
