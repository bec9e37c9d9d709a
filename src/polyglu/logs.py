"""What a person sees of the log: one line a message on stderr, from rank 0 only; libraries speak from warnings up."""

import logging
import sys
import warnings


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
