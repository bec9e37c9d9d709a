"""Configs: defaults < YAML file < ``key=value`` overrides. An unknown key is an error, the resolved config is saved.

defaults (pydantic fields) ──► YAML file ──► --set training.total_steps=100 ──► validated, frozen config
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from polyglu.errors import PolygluError
from polyglu.files import write_text

Config = TypeVar("Config", bound=BaseModel)


class QuotedNumber(str):
    """A text that reads as a number, and was written in quotes."""


class Section(BaseModel):
    """A config or a part of one: frozen, unknown keys forbidden, no NaN or infinity, and only numbers are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _only_numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse switches and quoted texts where numbers are asked for, in lists too: pydantic would convert them."""
        allowed = set(_types_in(cls.model_fields[str(info.field_name)].annotation))
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool) and not allowed & {bool, Any}:
                raise ValueError(f"must not be {str(one).lower()}, for it is no switch")
            if isinstance(one, QuotedNumber) and not allowed & {str, Any}:
                raise ValueError(f"must be a number, got the text '{one}'; remove the quotes")
        return value


def load_config(kind: type[Config], path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a config of class ``kind`` from a YAML file, then apply ``section.key=value`` overrides.

    Raises:
        PolygluError: no such file, not YAML, unknown key (with the nearest known one), wrong type or range.
    """
    values: dict[str, Any] = {} if path is None else read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise PolygluError(f"override {override!r} is not of the form section.key=value.")
        _set(values, key.split("."), _parse(text, f"override {override!r}"))
    return validate(kind, values, source=str(path) if path else kind.__name__)


def validate(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build ``kind`` from plain values; any fault becomes one sentence that names ``source`` and the key.

    Raises:
        PolygluError: unknown key (with the nearest known one), wrong type or range, or a failed check.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = _did_you_mean(str(first["loc"][-1]), _known_keys(kind, first["loc"][:-1]))
            raise PolygluError(f"{source}: unknown key '{key}'{hint}") from None
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r:.80}"
        raise PolygluError(f"{source}: {key + ': ' if key else ''}{message}{got}.") from None


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved config as YAML, every key present."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        PolygluError: no such file, not YAML, empty or no mapping.
    """
    try:
        values = _parse(path.read_text(encoding="utf-8"), f"config file {path}")
    except FileNotFoundError:
        raise PolygluError(f"config file {path} does not exist; the shipped ones are in configs/.") from None
    except IsADirectoryError:
        raise PolygluError(f"config file {path} is a folder; give the YAML file itself.") from None
    except UnicodeDecodeError as error:
        raise PolygluError(f"config file {path} is not UTF-8 text ({error}); save it as UTF-8.") from None
    if values is None:
        raise PolygluError(f"config file {path} is empty; write {{}} into it to take every default.")
    if not isinstance(values, dict):
        raise PolygluError(f"config file {path} must be a mapping of keys to values, got {type(values).__name__}.")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML keeps the last without a word; and tells quoted numbers.

    Plain texts stay texts, for PyYAML reads ``3e-4`` as one.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        return QuotedNumber(value) if getattr(node, "style", None) in ("'", '"') and _is_number(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PolygluError(f"{source} is not valid YAML: {error}") from None


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise PolygluError(f"override '{'.'.join(keys)}': '{key}' is a value, not a section.")
        values = inner
    values[keys[-1]] = value


def _known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the config section at ``location``; names of dictionary entries and list items are passed over."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue
        kind = next((inner for inner in _models_in(field.annotation)), kind)
    return list(kind.model_fields)


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    return (kind for kind in _types_in(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))


def _types_in(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of: ``dict[str, Any] | None`` -> str, Any, NoneType."""
    parts = getattr(annotation, "__args__", ())
    for part in parts:
        yield from _types_in(part)
    if not parts:
        yield annotation


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}."
