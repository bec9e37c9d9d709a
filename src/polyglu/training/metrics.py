"""Where a run's numbers go: ``metrics.jsonl`` always (the truth), W&B, and a line on the console.

``wandb`` is imported here and nowhere else.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from polyglu.config_file import save_config
from polyglu.files import write_text
from polyglu.model.config import SFTConfig, TrainConfig, WandbSection

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Metrics of one run. Only rank 0 has one.

    Args:
        run_dir: folder of ``metrics.jsonl`` and W&B's files.
        settings: Weights & Biases.
        config: resolved config, kept by W&B.
        start_step: steps done; later lines of an earlier, interrupted run are dropped, for they come again.
        total_steps: steps of the run.
    """

    def __init__(
        self, run_dir: Path, settings: WandbSection, config: dict[str, Any], start_step: int, total_steps: int
    ) -> None:
        self.path = run_dir / METRICS_FILE
        self.start_step, self.total_steps, self.start_time = start_step, total_steps, time.monotonic()
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.wandb = _start_wandb(run_dir, settings, config)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of a step (steps done so far)."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        logger.info("%s", self._line(step, values))

    def close(self) -> None:
        """End W&B's run, if there is one."""
        if self.wandb is not None:
            self.wandb.finish()

    def _line(self, step: int, values: dict[str, float]) -> str:
        done = step - self.start_step
        left = (time.monotonic() - self.start_time) / max(1, done) * (self.total_steps - step)
        parts = [
            f"step {step:,}/{self.total_steps:,}",
            f"loss {values['train/loss']:.4f}",
            f"lr {values['train/lr']:.2e}",
            f"tau {values['train/tau']:.3f}",
            f"{values['train/tokens_per_sec']:,.0f} tok/s",
            f"MFU {values['train/mfu']:.1%}",
            f"mem {values['train/peak_memory_gb']:.2f} GB",
        ]
        if "routing_entropy/mean" in values:
            static, dynamic = values["routing_entropy/mean"], values["dynamic_routing_entropy/mean"]
            parts.append(f"entropy {static:.3f} static {dynamic:.3f} dynamic")
        return " | ".join([*parts, f"{format_seconds(left)} left"])


def open_metrics(config: TrainConfig | SFTConfig, rank: int, start_step: int, total_steps: int) -> MetricsLog | None:
    """Save the resolved config into the run's folder and open its log there; None on ranks other than 0."""
    if rank != 0:
        return None
    run_dir = Path(config.training.run_dir)
    save_config(config, run_dir / "config.yaml")
    return MetricsLog(run_dir, config.wandb, config.model_dump(mode="json"), start_step, total_steps)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; empty if there is none. A last line that was cut off is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def format_seconds(seconds: float) -> str:
    """``93784`` -> ``1d 02:03:04``."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def _start_wandb(run_dir: Path, settings: WandbSection, config: dict[str, Any]) -> Any:
    if settings.mode == "disabled":
        return None
    online = settings.mode == "online" or (settings.mode == "auto" and "WANDB_API_KEY" in os.environ)
    try:
        import wandb
    except ImportError:
        logger.warning("wandb is not installed: metrics go to %s and the console only", METRICS_FILE)
        return None
    return wandb.init(
        project=settings.project,
        name=settings.name,
        dir=str(run_dir),
        config=config,
        mode="online" if online else "offline",
        settings=wandb.Settings(silent=not online, console="off"),
    )
