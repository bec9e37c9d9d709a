"""From the results of single runs to those of a suite: plain data, which tables, figures, pages and JSON all show."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyglu.compare.heldout import Losses, sees_ahead
from polyglu.compare.statistics import Difference, corrected, digits, paired_difference, verdict
from polyglu.compare.suite import Suite
from polyglu.estimates import LEVEL, Estimate, estimate, ratio_estimate
from polyglu.training.estimate import count_parameters

CPU_INFO = Path("/proc/cpuinfo")
Found = Mapping[str, Mapping[str, Any]]
"""Label of a run -> its result.json."""


def run_label(variant: str, seed: int) -> str:
    """Name of a run, for people and in results."""
    return f"{variant}, seed {seed}"


def summarise(
    suite: Suite, found: Found, failed: Mapping[str, str], flops: Mapping[str, float], tokens: Mapping[str, int]
) -> dict[str, Any]:
    """Results of a suite.

    Args:
        suite: what was compared.
        found: results of the finished runs. A run whose held-out loss is not finite counts as failed.
        failed: label -> why, of runs that ended badly.
        flops: FLOPs of a run of each variant.
        tokens: tokens of a run of each variant.

    Returns:
        What ``results.json`` holds; losses in nats per token.
    """
    settings, reasons = suite.settings, dict(failed)
    by_variant: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in suite.variants}
    for name, runs in by_variant.items():
        for seed in settings.seeds:
            label = run_label(name, seed)
            if label not in found:
                reasons.setdefault(label, "it was not finished")
            elif np.isfinite(heldout_loss(found[label])):
                runs[seed] = found[label]
            else:
                reasons[label] = "it diverged: its held-out loss is not finite"
    losses = {
        name: {seed: heldout_loss(run) for seed, run in runs.items()} for name, runs in by_variant.items() if runs
    }
    differences = _differences(losses, settings.reference)
    variants = []
    for name, runs in by_variant.items():
        row = {"name": name, "parameters": count_parameters(suite.variants[name].model).total}
        row |= {"flops": flops[name], "tokens": tokens[name], "runs": len(runs)}
        row |= {"failed": len(settings.seeds) - len(runs)}
        row |= {"curve_difference": _curve_difference(runs, by_variant[settings.reference])}
        variants.append(row | (_of_runs(list(runs.values())) if runs else {}) | _compared(name, losses, differences))
    ahead = [name for name, config in suite.variants.items() if sees_ahead(config.model) and by_variant[name]]
    leaks = [_leak(name, list(by_variant[name].values())) for name in ahead]
    return {
        "suite": suite.name,
        "reference": settings.reference,
        "seeds": list(settings.seeds),
        "budget": settings.budget.model_dump(exclude_none=True),
        "level": LEVEL,
        "variants": variants,
        "verdict": verdict(differences, settings.reference, len(reasons)),
        "leaks": leaks,
        "leak_sentences": [leak_sentence(leak) for leak in leaks],
        "failed": reasons,
        "settings": {name: config.model_dump(mode="json") for name, config in suite.variants.items()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }


def heldout_loss(run: Mapping[str, Any], key: str = "heldout") -> float:
    """Nats per token of a run over all its sources together."""
    return _joined(run, key).mean


def _joined(run: Mapping[str, Any], key: str) -> Losses:
    return Losses.joined(Losses(part["nats"], part["targets"]) for part in run[key].values())


def _differences(losses: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Difference]:
    """Of each variant but the reference, corrected for their number."""
    theirs = losses.get(reference, {})
    pairs = {name: paired_difference(ours, theirs) for name, ours in losses.items() if name != reference}
    return corrected({name: difference for name, difference in pairs.items() if difference is not None})


def _of_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the runs of a variant."""
    train = [run["train_loss"] for run in runs if run["train_loss"] is not None]
    documents = ratio_estimate(*asdict(_joined(runs[0], "heldout")).values())
    return {
        "steps": runs[0]["steps"],
        "d_ff": runs[0]["d_ff"],
        "tokens_per_second": float(np.mean([run["tokens_per_second"] for run in runs])),
        "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
        "train_loss": float(np.mean(train)) if train else None,
        "by_source": {
            source: float(np.mean([Losses(**run["heldout"][source]).mean for run in runs]))
            for source in runs[0]["heldout"]
        },
        "of_one_run_over_documents": _plain(documents),
        "curve": _mean_curve([_by_step(run) for run in runs]),
    }


def _by_step(run: Mapping[str, Any]) -> dict[int, float]:
    return {step: loss for step, loss in run["curve"] if loss is not None}


def _mean_curve(tables: Sequence[Mapping[int, float]]) -> list[list[float]]:
    """Step, and the mean over tables, at the steps that all have."""
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [[step, float(np.mean([table[step] for table in tables]))] for step in steps]


def _curve_difference(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> list[list[float]]:
    """Step, and the mean of ``ours - theirs`` over the seeds that both have: of one seed, both saw the same data."""
    pairs = [(_by_step(ours[seed]), _by_step(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    return _mean_curve([{step: our[step] - their[step] for step in our.keys() & their.keys()} for our, their in pairs])


def _compared(
    name: str, losses: Mapping[str, Mapping[int, float]], differences: Mapping[str, Difference]
) -> dict[str, Any]:
    """Loss of a variant, and its difference from the reference."""
    if name not in losses:
        return {"loss": None, "difference": None}
    values = losses[name]
    loss = {**_plain(estimate(list(values.values()))), "by_seed": {str(seed): value for seed, value in values.items()}}
    difference = differences.get(name)
    if difference is None:
        return {"loss": loss, "difference": None}
    tested = {"p": difference.p, "p_holm": difference.p_holm, "outcome": difference.outcome}
    return {"loss": loss, "difference": {**_plain(difference.estimate), **tested}}


def _leak(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much lower a variant's loss is as trained than under honest routing: the same weights, on the same rows."""
    leak: dict[str, Any] = {"name": name}
    for honest in ("training", "heldout"):
        trained = f"{honest}_as_trained"
        ours, theirs = (dict(enumerate(heldout_loss(run, key) for run in runs)) for key in (honest, trained))
        difference = paired_difference(ours, theirs)
        assert difference is not None
        leak[honest] = {
            "as_trained": _plain(estimate(list(theirs.values()))),
            "honest": _plain(estimate(list(ours.values()))),
            "difference": _plain(difference.estimate),
            "of_each_run_over_documents": [_plain(_leak_over_documents(run, honest, trained)) for run in runs],
        }
    return leak


def _leak_over_documents(run: Mapping[str, Any], honest: str, trained: str) -> Estimate:
    ours, theirs = _joined(run, honest), _joined(run, trained)
    return ratio_estimate((np.array(ours.nats) - np.array(theirs.nats)).tolist(), ours.targets)


def leak_sentence(leak: Mapping[str, Any]) -> str:
    """What one variant's routing sees ahead, in a sentence that claims no more than its interval."""
    rows, n = leak["training"], leak["training"]["difference"]["n"]
    found, unit = rows["difference"], f"{n} seeds"
    if n == 1:
        found, unit = rows["of_each_run_over_documents"][0], "the documents of one seed's rows"
    if found["low"] is None:
        few = "one document does" if n == 1 else f"{n} equal differences do"
        return f"{leak['name']}: {few} not tell what its routing sees ahead."
    spec = digits(found["low"], found["high"])
    if found["low"] <= 0 <= found["high"]:
        return (
            f"{leak['name']}: whether its loss on training rows is lower with the routing it was trained with than "
            f"with routing that sees only what came before is undecided ({found['mean']:+{spec}} nats, {LEVEL:.0%} "
            f"interval {found['low']:+{spec}} to {found['high']:+{spec}} over {unit})."
        )
    way, (low, high) = "lower" if found["mean"] > 0 else "higher", sorted((abs(found["low"]), abs(found["high"])))
    return (
        f"{leak['name']}: with the routing it was trained with, which sees ahead, its loss on training rows is "
        f"{abs(found['mean']):{spec}} nats {way} than the same weights' with routing that sees only what came before "
        f"({rows['as_trained']['mean']:{spec}} against {rows['honest']['mean']:{spec}}; {LEVEL:.0%} interval "
        f"{low:{spec}} to {high:{spec}} over {unit})."
    )


def machine() -> str:
    """What computed: the GPU's name, or the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def _plain(value: Estimate) -> dict[str, Any]:
    return asdict(value)
