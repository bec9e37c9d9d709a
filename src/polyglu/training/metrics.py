"""Where a run's numbers and events go: files in its folder always (the truth), W&B, and the console.

| file | content |
|---|---|
| ``metrics.jsonl`` | one row a logged step, each step once, in order |
| ``metrics_replaced.jsonl`` | rows that rollbacks took back, ``"replaced_by": N`` the Nth: evidence of what was wrong |
| ``events.jsonl`` | what a person should know: rollbacks, skipped steps, faults of the disk, collapse of the routing |

A row of ``metrics.jsonl`` whose step was logged before a rollback says so: ``"repeated": N`` after N rollbacks. Rows
that a kill took come again with the same bits: they are dropped when the run is resumed, and not flagged.
"""

import logging
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from polyglu.config_file import save_config
from polyglu.files import read_rows
from polyglu.model.config import SFTConfig, TrainConfig, WandbSection
from polyglu.training.row_file import RowFile, write_rows
from polyglu.training.wandb_run import open_wandb

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
REPLACED_FILE = "metrics_replaced.jsonl"
EVENTS_FILE = "events.jsonl"
Level = Literal["note", "warning", "error"]
LOGGING_LEVELS: dict[Level, int] = {"note": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class MetricsLog:
    """Metrics and events of one run. Only rank 0 has one, and uses it from one thread.

    Once it is open, no fault of the disk or of W&B is raised: it is told, and training goes on.

    Args:
        run_dir: folder of the files and of W&B's.
        settings: Weights & Biases.
        config: resolved config, kept by W&B.
        start_step: steps done; later rows of an earlier, interrupted process are dropped, for they come again. 0 is
            a new run: rows that rollbacks took from an earlier one go too. Events stay.
        total_steps: steps of the run.
        wandb_id: id of the run at W&B that this one continues; a new one if None.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: WandbSection,
        config: dict[str, Any],
        start_step: int,
        total_steps: int,
        wandb_id: str | None = None,
    ) -> None:
        path = run_dir / METRICS_FILE
        by_step = {row["step"]: row for row in read_rows(path) if row["step"] <= start_step}
        write_rows(path, [by_step[step] for step in sorted(by_step)])
        if start_step == 0:
            (run_dir / REPLACED_FILE).unlink(missing_ok=True)
        self.metrics, self.replaced = RowFile(path), RowFile(run_dir / REPLACED_FILE)
        self.events = RowFile(run_dir / EVENTS_FILE)
        self.start_step, self.total_steps, self.start_time = start_step, total_steps, time.monotonic()
        self.wandb = open_wandb(run_dir, settings, config, wandb_id)
        self.replaced_rows = {(row["step"], row["replaced_by"]) for row in self.replaced.rows()}

    @property
    def wandb_id(self) -> str | None:
        """Id of the run at W&B, to be given again when the run is resumed; None without W&B."""
        return self.wandb.id if self.wandb is not None else None

    def log(self, step: int, values: dict[str, float], attempt: int = 0) -> None:
        """Record the metrics of a step.

        Args:
            step: steps done so far.
            values: name -> number; one that is not finite is written as null.
            attempt: rollbacks so far.
        """
        # JSON has no word for what is not finite.
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        if any((step, rollback) in self.replaced_rows for rollback in range(1, attempt + 1)):
            row["repeated"] = attempt
        self.metrics.append([row])
        if self.wandb is not None:
            self.wandb.log(row)
        logger.info("%s", self._line(step, values))

    def rewind(self, step: int, attempt: int) -> None:
        """Take back the rows after ``step``, to which the run has returned; they go to ``metrics_replaced.jsonl``.

        Call it before a checkpoint records the rollback. A process that is killed on the way is then resumed from a
        state that does not know of it, and comes here again; a row that is already kept is not kept twice.

        Args:
            step: steps done in the state returned to.
            attempt: rollbacks so far, this one included; the rows kept say ``"replaced_by": attempt``.
        """
        removed = [row for row in self.metrics.rows() if row["step"] > step]
        new = [row for row in removed if (row["step"], attempt) not in self.replaced_rows]
        self.replaced.append([{**row, "replaced_by": attempt} for row in new])
        self.replaced.sync()
        self.metrics.cut(step)
        self.replaced_rows |= {(row["step"], attempt) for row in new}

    def event(self, step: int, kind: str, message: str, level: Level = "note") -> None:
        """Record what a person should know: in ``events.jsonl``, on the console, and by an alert of W&B.

        Args:
            step: steps done so far.
            kind: short name, the same for all events of a kind: the alert's title.
            message: one sentence.
            level: how bad it is.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.events.append([{"time": now, "step": step, "kind": kind, "level": level, "message": message}])
        self.events.sync()
        if self.wandb is not None:
            self.wandb.alert(kind, f"step {step:,}: {message}", level)
        logger.log(LOGGING_LEVELS[level], "step %s: %s", f"{step:,}", message)

    def sync(self) -> None:
        """Flush the rows to disk: what a checkpoint is saved after must not be lost by a power cut."""
        self.metrics.sync()

    def close(self) -> None:
        """Flush the rows, and end W&B's run if there is one."""
        self.sync()
        if self.wandb is not None:
            self.wandb.close()

    def _line(self, step: int, values: dict[str, float]) -> str:
        done = step - self.start_step
        left = (time.monotonic() - self.start_time) / max(1, done) * (self.total_steps - step)
        parts = [
            f"step {step:,}/{self.total_steps:,}",
            f"loss {values['train/loss']:.4f}",
            f"lr {values['train/lr']:.2e}",
            f"tau {values['train/tau']:.3f}",
            f"{values['train/tokens_per_sec']:,.0f} tok/s",
            f"MFU {values['train/mfu']:.1%} ({values['train/mfu_attention']:.1%} with attention)",
            f"mem {values['train/peak_memory_gb']:.2f} GB",
        ]
        if "routing_entropy/mean" in values:
            static, dynamic = values["routing_entropy/mean"], values["dynamic_routing_entropy/mean"]
            parts.append(f"entropy {static:.3f} static {dynamic:.3f} dynamic")
        if skipped := values.get("train/skipped_steps"):
            parts.append(f"skipped {skipped:,.0f}")
        return " | ".join([*parts, f"{format_seconds(left)} left"])


def open_metrics(
    config: TrainConfig | SFTConfig, rank: int, start_step: int, total_steps: int, wandb_id: str | None = None
) -> MetricsLog | None:
    """Save the resolved config into the run's folder and open its log there; None on ranks other than 0.

    Args:
        config: the run's.
        rank: this process's.
        start_step: steps done.
        total_steps: steps of the run.
        wandb_id: id of the run at W&B that this one continues; a new one if None.
    """
    if rank != 0:
        return None
    run_dir = Path(config.training.run_dir)
    save_config(config, run_dir / "config.yaml")
    return MetricsLog(run_dir, config.wandb, config.model_dump(mode="json"), start_step, total_steps, wandb_id)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; empty if there is none. A line that was cut off is passed over."""
    return read_rows(path)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of an ``events.jsonl``: ``time`` (ISO 8601, UTC), ``step``, ``kind``, ``level``, ``message``."""
    return read_rows(path)


def format_seconds(seconds: float) -> str:
    """``93784`` -> ``1d 02:03:04``."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
