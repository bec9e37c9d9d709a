"""Two ranks of DeepSpeed ZeRO-2 on which all goes wrong that can: run by test_bad_numbers.py, one start for all of it.

    python tests/integration/bad_numbers.py FOLDER

Each rank writes what it saw to FOLDER/rank_<N>.json: name of the run -> what came of it.
"""

import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fork_ranks import start_ranks, wait_for

sys.path.append(str(Path(__file__).parents[1]))
from tiny_run import ROWS, SMALL, Rows, Run, Watching, plan_of, steps_bad  # noqa: E402

from polyglu.errors import Interrupted, PolygluError  # noqa: E402
from polyglu.model.config import TrainingSection  # noqa: E402
from polyglu.model.model import create_model  # noqa: E402
from polyglu.training.engine import DeepSpeedEngine  # noqa: E402
from polyglu.training.loss import LanguageModelLoss  # noqa: E402
from polyglu.training.ranks import Ranks, connect  # noqa: E402
from polyglu.training.signals import Stop, stop_on_signals  # noqa: E402

FAULTS = [
    ("loss", math.nan, 1), ("loss", math.inf, 3), ("times", math.nan, 0), ("penalty", math.nan, 1),
    ("penalty", math.inf, 2), ("gradient", math.nan, 1), ("gradient", math.inf, 3), ("gradient", -math.inf, 0),
]  # fmt: skip
"""Kind, value and place in the step: rows 0 and 2 are rank 0's, 1 and 3 rank 1's, each a micro batch."""
SINGLE_STEPS = 2 * len(FAULTS) + 1
STREAK = (5, 6, 7)
STEPS = 12


def single_faults() -> dict[int, tuple[str, float]]:
    """Every second step has one."""
    found = {}
    for number, (kind, value, place) in enumerate(FAULTS):
        found |= steps_bad(2 * number + 1, kind=kind, value=value, place=place)
    return found


def streak() -> dict[int, tuple[str, float]]:
    """Three steps in a row, bad on rank 1 or on rank 0 alone."""
    first, second, third = STREAK
    return steps_bad(first, place=1) | steps_bad(second, kind="gradient", place=0) | steps_bad(third, place=3)


class SignalledRun(Run):
    """Rank 1 alone is sent a signal while a step is under way."""

    def go(self, stop: Stop | None = None, loader: Rows | None = None) -> Any:
        with stop_on_signals() as asked:
            return super().go(asked, loader)


def engine_on(ranks: Ranks, signalled_at: int = -1) -> Any:
    def engine_of(faults: Mapping[int, tuple[str, float]]) -> Any:
        torch.manual_seed(0)
        settings = TrainingSection(
            grad_clip=1.0, deepspeed_config=str(Path(__file__).parents[2] / "configs/ds_config.json")
        )
        engine = DeepSpeedEngine(LanguageModelLoss(create_model(SMALL), torch.float32, False), settings, ranks)

        def forward(self: Any, batch: Any, *rest: Any) -> Any:
            if ranks.rank == 1 and batch.sample_ids[0] // ROWS == signalled_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return Watching.forward(self, batch, *rest)

        engine.__class__ = type("WatchedDeepSpeed", (Watching, DeepSpeedEngine), {"forward": forward})
        engine.watch(faults)  # type: ignore[attr-defined]
        return engine

    return engine_of


def outcome(run: Run, loader: Rows | None = None) -> dict[str, Any]:
    """Run; what came of it on this rank."""
    try:
        run.go(loader=loader)
        end = "done"
    except (Interrupted, PolygluError) as error:
        end = f"{type(error).__name__}: {error}"
    except SystemExit as error:
        end = f"SystemExit: {error.code}"
    weights = [weight.detach().numpy().tobytes() for weight in run.engine.loss.model.parameters()]
    return {
        "end": end,
        "unchanged": [step.unchanged for step in run.engine.watched],
        "trained": run.trained,
        "updates": run.engine.updates,
        "weights": hashlib.sha256(b"".join(weights)).hexdigest(),
        "moments": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in run.engine.bits())).hexdigest(),
    }


def meet(ranks: Ranks) -> dict[str, Any]:
    """What ranks do together."""
    tensor = torch.full((2,), float(ranks.rank + 1))
    ranks.add_up(tensor)
    found: dict[str, Any] = {"sum": ranks.sum([ranks.rank, 2.0**40 + 0.5]), "add_up": tensor.tolist()}
    found["gather"], found["agree"] = ranks.gather(f"rank {ranks.rank}"), ranks.agree(lambda: ranks.rank + 5)
    return found


def work(folder: Path, rank: int) -> None:
    ranks = connect()
    normal, bad = engine_on(ranks), streak()
    seen = {"meet": meet(ranks)}
    seen["single"] = outcome(Run(folder / "single", plan_of(SINGLE_STEPS), single_faults(), normal))
    seen["streak"] = outcome(Run(folder / "streak", plan_of(STEPS), bad, normal))
    # In the first step after the return, that is with batch 8.
    seen["signal"] = outcome(SignalledRun(folder / "signal", plan_of(STEPS), bad, engine_on(ranks, signalled_at=8)))
    seen["resumed"] = outcome(Run(folder / "signal", plan_of(STEPS), bad, normal))
    seen["hopeless"] = outcome(Run(folder / "hopeless", plan_of(STEPS, max_rollbacks=0), bad, normal))
    loader = Rows(1, rank, 2, bad_step=6 if rank == 1 else -1)
    seen["bad data"] = outcome(Run(folder / "data", plan_of(STEPS), {}, normal), loader)
    (folder / f"rank_{rank}.json").write_text(json.dumps(seen))
    ranks.close()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # once, not in every rank

    folder = Path(sys.argv[1])
    codes = wait_for(start_ranks(2, lambda rank: work(folder, rank), folder / "log.txt"))
    if any(codes):
        sys.exit(f"ranks ended with {codes}:\n{(folder / 'log.txt').read_text()[-4000:]}")
