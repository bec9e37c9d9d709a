"""Whatever a resume checkpoint's manifest says, even sealed by one who knows the format: understood or refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saving import ORDER, Saved, SplitEngine, reseal

from polyglu.errors import PolygluError
from polyglu.training.checkpoint import MANIFEST, check_fits, find_resume_point, read_resume_point, restore
from polyglu.training.guard import RunState
from polyglu.training.ranks import Ranks

STATE = RunState(step=7, passed=3, skipped=2, bad_in_a_row=1, rollbacks=1, due=5, losses=(2.5, 0.1), wandb_id="abc")


def set_at(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    *outer, last = path
    inner: Any = manifest
    for key in outer:
        inner = inner[key]
    inner[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [(("state",), {}), (("state", "step"), -1), (("state", "step"), 1.0), (("state", "step"), True),
     (("state", "step"), 2**63), (("state", "due"), -1), (("state", "passed"), "3"), (("state", "skipped"), None),
     (("state", "losses"), [None]), (("state", "losses"), [float("nan")]), (("state", "more"), 1),
     (("state", "wandb_id"), 5), (("updates",), -1),
     (("updates",), 2**63), (("engine",), None), (("order",), None), (("shards",), []), (("shards", 0, "bytes"), 0),
     (("shards", 0, "more"), 1), (("folder",), "/"), (("more",), 1)],
)  # fmt: skip
def test_manifest_of_wrong_values_is_refused(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    """Though it is sealed."""
    saved = Saved(tmp_path)
    saved.save(3)
    folder = saved.root / "step_00000003"
    reseal(folder, lambda manifest: set_at(manifest, path, value))
    with pytest.raises(PolygluError, match=r"manifest\.json is not whole.*; resume from another checkpoint"):
        find_resume_point(str(folder), tmp_path)
    assert find_resume_point("auto", tmp_path) is None


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists are."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


@pytest.fixture(scope="module")
def of_step_7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = Saved(tmp_path_factory.mktemp("step_7"))
    saved.save(STATE)
    return saved.root / "step_00000007"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_sealed_manifest_is_understood_or_refused(of_step_7: Path, data: st.DataObject) -> None:
    text = (of_step_7 / MANIFEST).read_text()
    path = data.draw(st.sampled_from(list(paths_of(json.loads(text)))))
    reseal(of_step_7, lambda manifest: set_at(manifest, path, data.draw(plain_values)))
    try:
        point = read_resume_point(of_step_7)
        check_fits(point, ORDER)
    except PolygluError as error:
        assert str(of_step_7) in str(error) and str(error).endswith(".") and "\n" not in str(error)
    else:
        engine = SplitEngine(Ranks(torch.device("cpu")))
        restore(engine, point)
        assert engine.updates >= 0 and point.state.step >= 0
    finally:
        (of_step_7 / MANIFEST).write_text(text)
