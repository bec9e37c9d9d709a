"""A suite: what is compared, how often, for how much. Every run follows from the file alone.

suite.yaml ──► SuiteConfig ──► base config < the suite's settings < a variant's ──► one TrainConfig a run
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from polyglu.config_file import Section, load_config, read_yaml, validate
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, TrainConfig
from polyglu.training.estimate import count_parameters
from polyglu.training.memory import rows_per_step

Values = dict[str, Any]

SET_BY_THE_SUITE = (
    "total_steps", "seed", "run_dir", "checkpoint_dir", "resume_from", "portable_checkpoint_every", "portable_optimizer"
)  # fmt: skip
"""Keys of ``training`` that follow from budget, seeds and output."""


class Budget(Section):
    """What each run may spend; exactly one of them is given."""

    tokens: PositiveInt | None = None
    """Tokens trained on."""
    flops: PositiveFloat | None = None
    """FLOPs of forward and backward: 6 for each parameter and token, and those of attention."""
    seconds: PositiveFloat | None = None
    """Wall time of training, at the speed that a short run of each variant is measured to have."""

    @model_validator(mode="after")
    def _check(self) -> "Budget":
        given = [kind for kind in ("tokens", "flops", "seconds") if getattr(self, kind) is not None]
        if len(given) != 1:
            said = f"got {' and '.join(given)}" if given else "got none"
            raise ValueError(f"give exactly one of tokens, flops and seconds, {said}")
        return self

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(kind for kind in ("tokens", "flops", "seconds") if getattr(self, kind) is not None)


class Variant(Section):
    """In what a variant differs from the suite's common settings."""

    model: Values = {}
    """Keys of the training config's section ``model``."""
    training: Values = {}
    """Keys of its section ``training``."""
    match_parameters: str | None = None
    """Another variant; ``d_ff`` becomes the one whose number of parameters is nearest to that variant's."""


class SuiteConfig(Section):
    """A comparison."""

    base: str
    """Training config (YAML) that all variants start from."""
    embedded: str | None = None
    """Folder in which the embedded corpus is made and tokenised first, if it is not there."""
    model: Values = {}
    """Keys of section ``model`` that differ from the base in all variants."""
    data: Values = {}
    """Likewise, section ``data``."""
    training: Values = {}
    """Likewise, section ``training``."""
    variants: dict[str, Variant]
    """Name -> variant."""
    reference: str = "swiglu"
    """Variant that all others are compared with; its feed-forward layer must be SwiGLU."""
    seeds: list[int]
    """Each variant is trained once with each: of initialisation, data order and noise."""
    budget: Budget
    """The same for every run."""
    validation: dict[str, str] = Field(default_factory=dict)
    """Name -> folder of tokenised data that training never sees."""
    validation_tokens: PositiveInt = 50_000
    """Tokens that are taken of each, from its beginning."""

    @model_validator(mode="after")
    def _check(self) -> "SuiteConfig":
        for name in self.variants:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(f"variant '{name}' names a folder; use letters, digits, '_', '-' and '.' only")
        if len(self.variants) < 2:
            raise ValueError("variants: a comparison needs two at least")
        if self.reference not in self.variants:
            known = ", ".join(self.variants)
            raise ValueError(
                f"reference is '{self.reference}', which is no variant; add one with model: {{ffn: swiglu}}, or name "
                f"one of {known}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {self.seeds}")
        if not self.validation:
            raise ValueError("validation is empty; name a folder of tokenised data that training never sees")
        return self


@dataclass(frozen=True)
class Suite:
    """A suite and what it stands for."""

    name: str
    settings: SuiteConfig
    variants: dict[str, TrainConfig]
    """Name -> config, but for what ``run_config`` sets."""


def load_suite(path: Path) -> Suite:
    """Read a suite and resolve its variants.

    Raises:
        PolygluError: an unknown key, a variant that is no model, or variants that could not be compared.
    """
    settings = load_config(SuiteConfig, path)
    base = read_yaml(Path(settings.base))
    common = {section: getattr(settings, section) for section in ("model", "data", "training")}
    _check_free(path, "training", settings.training)
    values = {}
    for name, variant in settings.variants.items():
        _check_free(path, f"variants.{name}.training", variant.training)
        own = {"model": variant.model, "training": variant.training}
        merged = _merged(_merged(base, common), own)
        free = {key: value for key, value in merged.get("training", {}).items() if key not in SET_BY_THE_SUITE}
        values[name] = {**merged, "training": free, "wandb": {"mode": "disabled"}}
    variants = {name: _validated(path, name, value) for name, value in values.items()}
    for name, variant in settings.variants.items():
        if variant.match_parameters is not None:
            goal = _matched(path, name, settings.variants, variants)
            values[name]["model"]["d_ff"] = nearest_d_ff(variants[name].model, count_parameters(goal.model).total)
    suite = Suite(path.stem, settings, {name: _validated(path, name, value) for name, value in values.items()})
    for fault in _faults(suite):
        raise PolygluError(f"{path}: {fault}.")
    return suite


def run_config(suite: Suite, variant: str, seed: int, total_steps: int, folder: Path) -> TrainConfig:
    """Config of an ordinary training run in ``folder``, which resumes itself."""
    config = suite.variants[variant]
    training = {
        **config.training.model_dump(),
        "total_steps": total_steps,
        "seed": seed,
        "run_dir": str(folder),
        "checkpoint_dir": str(folder / "checkpoints"),
        "resume_from": "auto",
        "portable_checkpoint_every": total_steps,
    }
    return validate(TrainConfig, {**config.model_dump(), "training": training}, source=f"{suite.name}: {variant}")


def nearest_d_ff(config: ModelConfig, parameters: int) -> int:
    """The ``d_ff`` with which a model has a number of parameters nearest to ``parameters``, which is linear in it."""
    one, two = (count_parameters(config.model_copy(update={"d_ff": d_ff})).total for d_ff in (1, 2))
    return max(1, round(1 + (parameters - one) / (two - one)))


def _check_free(path: Path, place: str, values: Mapping[str, Any]) -> None:
    for key in SET_BY_THE_SUITE:
        if key in values:
            raise PolygluError(f"{path}: {place}.{key} follows from the suite's budget, seeds and output; remove it.")


def _validated(path: Path, name: str, values: Mapping[str, Any]) -> TrainConfig:
    return validate(TrainConfig, values, source=f"{path}, variant {name}")


def _matched(path: Path, name: str, stated: Mapping[str, Variant], variants: Mapping[str, TrainConfig]) -> TrainConfig:
    """Config of the variant whose number of parameters another one shall have."""
    goal = str(stated[name].match_parameters)
    if goal not in variants:
        near = difflib.get_close_matches(goal, variants, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(variants)}."
        raise PolygluError(f"{path}: variants.{name}.match_parameters is '{goal}', which is no variant; {hint}")
    if stated[goal].match_parameters is not None:
        raise PolygluError(f"{path}: variants.{name}.match_parameters: '{goal}' is itself matched to another variant.")
    return variants[goal]


def _faults(suite: Suite) -> Iterator[str]:
    """Why the variants could not be compared."""
    settings = suite.settings
    reference = suite.variants[settings.reference]
    if reference.model.ffn != "swiglu":
        yield (
            f"variants.{settings.reference} is the reference, but its ffn is '{reference.model.ffn}'; give it "
            "model: {ffn: swiglu}"
        )
    for name, config in suite.variants.items():
        for what, value in _data_shape(config).items():
            expected = _data_shape(reference)[what]
            if value != expected:
                yield (
                    f"variants.{name} has {what} {value}, the reference {expected}: they would not see the same data; "
                    "set it for all variants"
                )
    mixes = [(source.mix, source.mix_end) for source in reference.data.sources.values()]
    if settings.budget.kind != "tokens" and any(first != last for first, last in mixes):
        yield (
            f"budget.{settings.budget.kind}: runs differ in length, so a mix that changes over the run would differ "
            "too; give each source a mix_end equal to its mix, or budget.tokens"
        )


def _data_shape(config: TrainConfig) -> dict[str, int]:
    """What must be equal for the same data to mean the same task."""
    return {
        "model.vocab_size": config.model.vocab_size,
        "model.seq_length": config.model.seq_length,
        "rows of a step (micro_batch_size and grad_accum_steps)": rows_per_step(config.training),
    }


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Values:
    """``values`` with ``changes`` put into it, section by section."""
    merged = dict(values)
    for key, change in changes.items():
        inner = merged.get(key)
        if isinstance(change, Mapping) and isinstance(inner, Mapping):
            merged[key] = _merged(inner, change)
        else:
            merged[key] = change
    return merged
