"""One run of a comparison, a process of its own: ``python -m polyglu.compare.member FOLDER PARENT``.

The folder is that of an ordinary training run: ``config.yaml`` (which ``polyglu train`` takes too), ``metrics.jsonl``,
``checkpoints/``. ``heldout.json`` says what its last checkpoint is measured on, ``result.json`` what came out.
The run ends when the process PARENT (its id) has: killed, that one cannot say so itself.
"""

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from polyglu.compare.budget import measured_speed
from polyglu.compare.heldout import measure
from polyglu.config_file import load_config
from polyglu.errors import EXIT_INTERRUPTED, run_command
from polyglu.files import exclusive, read_json, write_json
from polyglu.logs import configure_logging
from polyglu.model.config import TrainConfig
from polyglu.training.checkpoint import RESUME_FOLDER
from polyglu.training.estimate import count_parameters
from polyglu.training.metrics import METRICS_FILE, read_metrics
from polyglu.training.train import train

CONFIG, HELDOUT, RESULT = "config.yaml", "heldout.json", "result.json"
SETTLED = 0.1
"""Share of the run, at its end, whose logged losses are averaged."""
POLL = 0.2
"""Seconds between looks at the parent."""


def end_with(parent: int) -> None:
    """End this process at once, in whatever it is doing, when it is no longer a child of ``parent``.

    As after any kill, the last checkpoint is where a rerun goes on: saving now would hold the folder against it.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: Path) -> None:
    """Train a run to its end, from where it is, and measure it.

    Raises:
        PolygluError: it cannot be trained or measured.
        Interrupted: a signal asked to stop; the run is saved.
    """
    with exclusive(folder):
        config = load_config(TrainConfig, folder / CONFIG)
        final = train(config)
        plan = read_json(folder / HELDOUT)
        losses = measure(final, config, plan["validation"], plan["tokens"]) if plan["validation"] else {}
        write_json(folder / RESULT, {**describe(config, read_metrics(folder / METRICS_FILE)), **losses})
        drop_resume_files(config)


def describe(config: TrainConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a finished run says of itself.

    Args:
        config: of the run.
        rows: of its metrics.jsonl.
    """
    last = [row["train/loss"] for row in rows if row["step"] > (1 - SETTLED) * config.training.total_steps]
    known = [loss for loss in last if loss is not None]
    return {
        "steps": config.training.total_steps,
        "parameters": count_parameters(config.model).total,
        "d_ff": config.model.d_ff,
        "train_loss": sum(known) / len(known) if known else None,
        "tokens_per_second": measured_speed(rows),
        "peak_memory_gb": max(row["train/peak_memory_gb"] for row in rows),
        "curve": [[row["step"], row["train/loss"]] for row in rows],
    }


def drop_resume_files(config: TrainConfig) -> None:
    """Remove what only an unfinished run needs; ``portable_final.pt`` stays."""
    folder = Path(config.training.checkpoint_dir)
    shutil.rmtree(folder / RESUME_FOLDER, ignore_errors=True)
    (folder / f"portable_step{config.training.total_steps}.pt").unlink(missing_ok=True)  # equals the final one


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    configure_logging()
    run_command(lambda: main(Path(sys.argv[1])))
