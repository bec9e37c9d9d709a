"""What can be wrong with a run before its first step: every check by itself, every fault found, nothing changed."""

import importlib.util
import netrc
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polyglu.data.chunks import TokenSource, open_source
from polyglu.data.dataloader import TokenLoader
from polyglu.data.manifest import MANIFEST
from polyglu.data.verify import verify_with_progress
from polyglu.errors import PolygluError
from polyglu.files import check_writable
from polyglu.model.config import TrainConfig, WandbSection
from polyglu.model.model import Checkpoint
from polyglu.training.checkpoint import RESUME_FOLDER, ResumePoint, check_fits, find_resume_point, step_folders
from polyglu.training.engine import read_deepspeed_config
from polyglu.training.estimate import count_parameters, disk_need
from polyglu.training.memory import rows_per_step
from polyglu.training.ranks import Ranks, launched_distributed
from polyglu.training.saver import GIGABYTE
from polyglu.training.train import (
    check_tokenizer,
    create_loader,
    data_order,
    portable_interval,
    source_faults,
    starting_model,
)

WANDB_SECRET = re.compile(r"([^-]*-)?[\w-]{40,}|[\w-]+(\.[\w-]+){2}")
"""Forms of a key that wandb takes: 40 characters and more after an optional prefix, or a token in three parts."""


@dataclass
class Findings:
    """What the checks found."""

    problems: list[str] = field(default_factory=list)
    """Each keeps the run from starting, or would end it later."""
    notes: list[str] = field(default_factory=list)
    """What a person may not expect."""
    found: ResumePoint | Checkpoint | None = None
    """What ``resume_from`` leads to."""
    zero: dict[str, Any] | None = None
    """Section ``zero_optimization`` of the DeepSpeed config, if that is whole."""
    disk: tuple[int, int] = (0, 0)
    """Bytes that the checkpoints need, and that are free."""

    @property
    def step(self) -> int:
        """Steps done where the run goes on."""
        if isinstance(self.found, ResumePoint):
            return self.found.state.step
        return self.found.step if self.found is not None else 0

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Take what is raised for bad input as a problem, and go on after the block."""
        try:
            yield
        except PolygluError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename} cannot be used: {error.strerror}; mend that, or give another path.")


def examine(config: TrainConfig, world_size: int) -> Findings:
    """Check all that a run depends on; nothing is written, renamed or removed.

    Args:
        config: of the run.
        world_size: its processes.
    """
    findings, settings = Findings(), config.training
    for name in ("checkpoint_dir", "run_dir"):
        with findings.gathering():
            check_writable(Path(getattr(settings, name)), f"training.{name}")
    sources = _check_data(config, findings)
    loader = None
    if sources is not None:
        with findings.gathering():
            alone = Ranks(torch.device("cpu"), 0, world_size)
            loader = create_loader(config, sources, alone, rows_per_step(settings))
    _check_start(config, sources, loader, findings)
    _check_deepspeed(config, findings)
    if (fault := wandb_fault(config.wandb)) is not None:
        findings.problems.append(fault)
    with findings.gathering():
        _check_disk(config, findings)
    if settings.warmup_steps >= settings.total_steps:
        findings.notes.append(
            f"training.warmup_steps {settings.warmup_steps:,} is not below total_steps {settings.total_steps:,}: the "
            "learning rate never reaches its peak."
        )
    return findings


def _check_data(config: TrainConfig, findings: Findings) -> list[TokenSource] | None:
    """Verify every byte of every source; return the sources if all of them can be trained on."""
    sources, before = [], len(findings.problems)
    for name, source in config.data.sources.items():
        folder = Path(source.path)
        faults = verify_with_progress(folder).faults if (folder / MANIFEST).is_file() else ()
        findings.problems.extend(f"{folder / fault.file} {fault.text}" for fault in faults)
        if not faults:
            with findings.gathering():
                sources.append(open_source(folder, name))
    findings.problems.extend(source_faults(sources, config.model.vocab_size))
    return sources if len(findings.problems) == before else None


def _check_start(
    config: TrainConfig, sources: list[TokenSource] | None, loader: TokenLoader | None, findings: Findings
) -> None:
    """Find what ``resume_from`` leads to, and whether the run can go on from there."""
    settings, checkpoint_dir = config.training, Path(config.training.checkpoint_dir)
    with findings.gathering():
        if settings.resume_from is not None:
            findings.found = find_resume_point(settings.resume_from, checkpoint_dir, aside=False)
        if isinstance(findings.found, Checkpoint):
            if sources:
                check_tokenizer(findings.found, sources[0], str(settings.resume_from))
            starting_model(config, findings.found)
        elif findings.found is not None and loader is not None:
            check_fits(findings.found, data_order(config, loader))
        earlier = len(step_folders(checkpoint_dir / RESUME_FOLDER))
        if findings.found is None and earlier and settings.resume_from is not None:
            raise PolygluError(
                f"training.resume_from: auto finds {earlier} checkpoint(s) in {checkpoint_dir / RESUME_FOLDER}, none "
                "of them whole: the run would start anew; restore one, or set it to null."
            )
        if findings.found is None and earlier:
            findings.notes.append(
                f"the run starts at step 0 and sets aside {earlier} checkpoint(s) in {checkpoint_dir / RESUME_FOLDER}; "
                "training.resume_from: auto goes on from the newest that is whole."
            )
    if findings.step >= settings.total_steps:
        findings.notes.append(f"nothing is left to do: {settings.resume_from} is of step {findings.step:,}.")


def _check_deepspeed(config: TrainConfig, findings: Findings) -> None:
    path = Path(config.training.deepspeed_config)
    if launched_distributed() or path.exists():
        with findings.gathering():
            findings.zero = read_deepspeed_config(path)["zero_optimization"]
    else:
        findings.notes.append(f"training.deepspeed_config {path} does not exist; the deepspeed launcher would need it.")


def wandb_fault(settings: WandbSection) -> str | None:
    """What is wrong with the key for Weights & Biases; the server is not asked, and the key never shown."""
    key = os.environ.get("WANDB_API_KEY")
    if settings.mode in ("disabled", "offline") or (settings.mode == "auto" and key is None):
        return None
    if settings.mode == "online" and importlib.util.find_spec("wandb") is None:
        return "wandb.mode is online, but wandb is not installed: pip install 'polyglu[train]', or set it to disabled."
    if key is None:
        if _wandb_logged_in():
            return None
        return "wandb.mode is online, but no key is there: set WANDB_API_KEY, or wandb.mode to auto or offline."
    if WANDB_SECRET.fullmatch(key) is None:
        return (
            f"WANDB_API_KEY, of {len(key)} characters, is no key: one has 40 letters and digits or more; copy it again "
            "from wandb.ai/authorize, or set wandb.mode: offline."
        )
    return None


def _wandb_logged_in() -> bool:
    """Whether ``wandb login`` has left a key in the user's netrc file."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _check_disk(config: TrainConfig, findings: Findings) -> None:
    """Compare what all checkpoints of the run will take with what is free.

    Raises:
        PolygluError: it is too little.
    """
    settings, checkpoint_dir = config.training, Path(config.training.checkpoint_dir)
    resume = max(1, settings.keep_checkpoints + 1 - len(step_folders(checkpoint_dir / RESUME_FOLDER)))
    every = portable_interval(settings)
    due = range((findings.step // every + 1) * every, settings.total_steps + 1, every)
    portable = sum(not (checkpoint_dir / f"portable_step{step}.pt").exists() for step in due)
    parameters = count_parameters(config.model).total
    needed = disk_need(parameters, resume, portable, settings.portable_optimizer)
    free = shutil.disk_usage(existing_parent(checkpoint_dir)).free
    findings.disk = (needed, free)
    if free < needed:
        raise PolygluError(
            f"training.checkpoint_dir {checkpoint_dir} has {free / GIGABYTE:.2f} GB free, the whole run needs "
            f"{needed / GIGABYTE:.2f} GB there: {resume} resume checkpoints and {portable + 1} portable ones; make "
            "room, give another folder, or raise training.portable_checkpoint_every."
        )


def existing_parent(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
