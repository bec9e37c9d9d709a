"""A run at Weights & Biases. ``wandb`` is imported here and nowhere else, and no fault of it stops training.

A resumed run has the same id and continues the same run, online or not: pieces that were kept offline are joined by
``wandb sync RUN_DIR/wandb``, in the order of their start. Rows carry the step of training as ``step``, the axis of all
curves; W&B's own step only counts rows, so that steps which a rollback repeats are shown, not dropped.
"""

import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from polyglu.model.config import WandbSection

logger = logging.getLogger(__name__)

INIT_SECONDS = 30.0
"""How long the start waits for the server before the run is kept offline."""
FINISH_SECONDS = 60.0
"""How long the end waits for uploads; what is left stays on disk and can be synced."""
REQUEST_SECONDS, REQUEST_RETRIES = 10.0, 2
"""Bounds of one request: ``FINISH_SECONDS`` does not end an alert that a hanging server does not answer."""
ALERT_SECONDS = 900.0
"""Alerts of one kind and level are sent at most once in this time."""
ALERT_LEVELS = {"note": "INFO", "warning": "WARN", "error": "ERROR"}
"""Level of an event -> W&B's name for it."""
TITLE_LENGTH = 63
"""Longest title of an alert that W&B takes."""


class WandbRun:
    """A run that never raises. After a fault it goes on offline, and after another one without W&B, each told once.

    Args:
        run_dir: folder of W&B's files.
        settings: project and name.
        config: resolved config, kept by W&B.
        run_id: the run's id at W&B.
        online: whether to try the server first.
    """

    def __init__(
        self, run_dir: Path, settings: WandbSection, config: dict[str, Any], run_id: str, online: bool
    ) -> None:
        self.id, self.run_dir, self.settings, self.config = run_id, run_dir, settings, config
        self.modes: list[Literal["online", "offline"]] = ["online", "offline"] if online else ["offline"]
        self.run: Any = None
        self.alerts: dict[tuple[str, str], float] = {}
        self._start()

    def log(self, row: dict[str, Any]) -> None:
        """Record one row; it holds the step of training as ``step``."""
        self._call("log", row)

    def alert(self, kind: str, message: str, level: str) -> None:
        """Send an alert as W&B is told to by its user: by mail, say."""
        now = time.monotonic()
        if now - self.alerts.get((kind, level), -ALERT_SECONDS) >= ALERT_SECONDS:
            self.alerts[kind, level] = now
            self._call("alert", kind[:TITLE_LENGTH], message, level=ALERT_LEVELS[level])

    def close(self) -> None:
        """End the run; waits for ``FINISH_SECONDS``, and with a hanging server for the last requests' bounds."""
        self.modes = []
        self._call("finish")
        self.run = None

    def _start(self) -> None:
        import wandb

        while self.run is None and self.modes:
            mode = self.modes.pop(0)
            try:
                run = wandb.init(
                    project=self.settings.project,
                    name=self.settings.name,
                    id=self.id,
                    resume="allow",
                    dir=str(self.run_dir),
                    config=self.config,
                    mode=mode,
                    settings=wandb.Settings(
                        silent=True,  # else a server that does not answer is asked for the user's name too
                        console="off",
                        init_timeout=INIT_SECONDS,
                        login_timeout=INIT_SECONDS,
                        finish_timeout=FINISH_SECONDS,
                        x_graphql_timeout_seconds=REQUEST_SECONDS,
                        x_graphql_retry_max=REQUEST_RETRIES,
                        x_graphql_retry_wait_max_seconds=REQUEST_SECONDS,
                    ),
                )
                run.define_metric("*", step_metric="step")
                self.run = run
                where = run.url if mode == "online" else f"offline; later: wandb sync {self.run_dir / 'wandb'}"
                logger.info("W&B: run %s, %s", self.id, where)
            except Exception as error:  # no server, a wrong key, a full disk: W&B only watches
                self._stop(error)

    def _call(self, method: str, *values: Any, **options: Any) -> None:
        while self.run is not None:
            try:
                getattr(self.run, method)(*values, **options)
                return
            except Exception as error:  # whatever it raises, as when its process was killed
                self._stop(error)
                self._start()

    def _stop(self, error: Exception) -> None:
        import wandb

        text = " ".join(f"{type(error).__name__}: {error}".split())
        if key := os.environ.get("WANDB_API_KEY"):
            text = text.replace(key, "<key>")
        rest = "it goes on offline" if self.modes else "training goes on without it; metrics stay in the run's folder"
        logger.warning("W&B fails (%s): %s.", text, rest)
        self.run = None
        with suppress(Exception):
            wandb.teardown(1)  # its process still holds the run's id


def open_wandb(run_dir: Path, settings: WandbSection, config: dict[str, Any], run_id: str | None) -> WandbRun | None:
    """Start a run, or continue the one with ``run_id``; offline without a key, or if the server does not answer.

    Args:
        run_dir: folder of W&B's files.
        settings: project, name, mode.
        config: resolved config, kept by W&B.
        run_id: the run's id at W&B; a new one if None.

    Returns:
        The run; None if it is disabled or wandb is not installed.
    """
    if settings.mode == "disabled":
        return None
    try:
        import wandb  # noqa: F401
    except ImportError:
        logger.warning("wandb is not installed: metrics go to the run's folder and the console only")
        return None
    online = settings.mode == "online" or (settings.mode == "auto" and "WANDB_API_KEY" in os.environ)
    return WandbRun(run_dir, settings, config, run_id or secrets.token_hex(8), online)
