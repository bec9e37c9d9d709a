"""Files that are no checkpoint, or a malicious one: refused in one sentence, never executed, nothing half written."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import READ_CHECKPOINT, Place, call, contents, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saving import Malicious, reseal

from polyglu.data.chunks import open_source
from polyglu.data.statistics import scan_documents
from polyglu.errors import PolygluError
from polyglu.model.model import load_checkpoint
from polyglu.training.checkpoint import step_folders


def plain_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, plain_pickle], ids=["torch file", "plain pickle"])
@pytest.mark.parametrize("verb", READ_CHECKPOINT)
def test_malicious_checkpoint_is_never_executed(place: Place, verb: str, save: Callable[..., None]) -> None:
    evil, trace = place.here / "evil.pt", place.here / "trace"
    content = torch.load(place.checkpoint, weights_only=True) | {"tokenizer": Malicious(trace)}
    save(*((content, evil) if save is torch.save else (evil, content)))
    sentence = refused(place.line(READ_CHECKPOINT[verb], checkpoint=evil))
    assert "evil.pt is not a checkpoint" in sentence and "nothing in it was executed" in sentence
    assert not trace.exists() and not place.out.exists()


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_malicious_resume_state_is_never_executed(place: Place, verb: str) -> None:
    """A shard that is a pickle, with a manifest that is not its own or sealed for it, and files as DeepSpeed's."""
    line = place.line(f"{verb} --config {{here}}/{verb}.yaml")
    assert call(line)[0] == 0
    step, *_ = step_folders(place.out / "checkpoints/ds_checkpoint")
    trace = place.here / "trace"
    plain_pickle(step / "shard_00000.safetensors", Malicious(trace))
    (step.parent / "latest").write_text(step.name)
    for name in ("state.pt", "mp_rank_00_model_states.pt"):
        torch.save({"module": Malicious(trace), "optimizer": {}}, step / name)
    before = contents(place.out / "checkpoints")
    assert "shard_00000.safetensors has" in refused(f"{line} --set training.resume_from={step}")
    reseal(step)
    before[f"ds_checkpoint/{step.name}/manifest.json"] = (step / "manifest.json").read_bytes()
    for folder in (step, step.parent, "auto"):
        sentence = refused(f"{line} --set training.resume_from={folder}")
        assert "shard_00000.safetensors is no shard of a checkpoint" in sentence
    assert not trace.exists() and contents(place.out / "checkpoints") == before


def test_the_optimiser_state_in_a_checkpoint_is_passed_over(place: Place) -> None:
    """By all that do not resume a run, whatever it holds; a run that it is not of starts AdamW anew."""
    content = torch.load(place.checkpoint, weights_only=True)
    torch.save({**content, "training": {"moments": 5, "order": {"seed": torch.ones(2)}}}, place.checkpoint)
    for verb in ("generate", "sft", "train"):
        code, said = call(place.line(READ_CHECKPOINT[verb]))
        assert code == 0, said
        assert ("weights alone" in said) == (verb == "train")


def spoil(place: Place, kind: str) -> Path:
    path, data = place.here / "bad.pt", place.checkpoint.read_bytes()
    state = torch.load(place.checkpoint, weights_only=True)
    whole = {
        "empty": b"", "text": b"model: 1\n", "JSON": b'{"model": 1}', "cut in half": data[: len(data) // 2],
        "one byte short": data[:-1], "zip garbage": b"PK\x03\x04" + bytes(range(256)), "zeros": bytes(1000),
    }  # fmt: skip
    if kind in whole:
        path.write_bytes(whole[kind])
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"garbage")
    elif kind == "safetensors garbage":
        path = path.with_suffix(".safetensors")
        path.write_bytes(bytes(range(200)))
    elif kind == "folder without files":
        path.mkdir()
    else:
        other = {
            "list": [1, 2],
            "state dict": state["model"],
            "number": 5,
            "another model": {"model": {"w": torch.ones(2)}},
        }
        torch.save(other[kind], path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["empty", "text", "JSON", "cut in half", "one byte short", "zip garbage", "zeros", "another zip", "list", "number",
     "safetensors garbage", "folder without files", "state dict", "another model"],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(place: Place, kind: str) -> None:
    path = spoil(place, kind)
    for verb in ("generate", "analyze", "sft"):
        assert str(path) in refused(place.line(READ_CHECKPOINT[verb], checkpoint=path))
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "x"}, "step: .*'x'"),
        ({"step": None}, "step"),
        ({"step": -1}, "step"),
        ({"tau": None}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": 0.0}, "tau"),
        ({"config": [1]}, r"\[1\]"),
        ({"config": {"d_modell": 3}}, "unknown key 'd_modell'; did you mean 'd_model'"),
        ({"config": {"d_ff": 25}}, "weight"),
        ({"tokenizer": "name"}, "tokenizer"),
        ({"tokenizer": {"name": 5}}, r"tokenizer\.name"),
        ({"model": [1]}, "weights are not named"),
        ({"model": {1: torch.ones(1)}}, "weights are not named"),
        ({"embed_tokens.weight": 5}, "'embed_tokens.weight' is not a tensor"),
        ({"embed_tokens.weight": torch.ones(2, 2, dtype=torch.int64)}, "'embed_tokens.weight' is not a tensor"),
        ({"embed_tokens.weight": torch.ones(2, 2).to_sparse()}, "'embed_tokens.weight' is not a tensor"),
        (
            {"embed_tokens.weight": torch.full((2, 2), torch.nan)},
            "'embed_tokens.weight' has values that are not finite",
        ),
        ({"embed_tokens.weight": torch.ones(2, 2)}, r"'embed_tokens.weight' has shape \(2, 2\)"),
    ],
)
def test_right_keys_with_wrong_values_are_refused(good: Path, tmp_path: Path, change: Any, named: str) -> None:
    content = torch.load(good / "good.pt", weights_only=True)
    for key, value in change.items():
        (content["model"] if "." in key else content)[key] = value
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(PolygluError, match=rf"bad\.pt.*{named}"):
        load_checkpoint(tmp_path / "bad.pt")


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(key=st.sampled_from(["format", "model", "config", "step", "tau", "tokenizer"]), value=plain_values)
def test_any_plain_value_in_a_checkpoint_is_understood_or_refused(
    good: Path, tmp_path: Path, key: str, value: Any
) -> None:
    content = torch.load(good / "good.pt", weights_only=True)
    torch.save({**content, key: value}, tmp_path / "any.pt")
    try:
        model, step, tau = load_checkpoint(tmp_path / "any.pt")
    except PolygluError as error:
        assert "any.pt" in str(error)
    else:
        assert isinstance(step, int) and step >= 0 and 0 < tau < float("inf") and not model.training


@quick
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_checkpoint_with_damaged_bytes_never_ends_in_a_traceback(good: Path, tmp_path: Path, places: Any) -> None:
    data = bytearray((good / "good.pt").read_bytes())
    for position, value in places:
        data[int(position * len(data))] = value
    (tmp_path / "damaged.pt").write_bytes(data)
    try:
        load_checkpoint(tmp_path / "damaged.pt")
    except PolygluError as error:
        assert "damaged.pt" in str(error)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists are."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


@quick
@given(data=st.data())
def test_any_value_in_a_manifest_is_understood_or_refused(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "data"
    shutil.copytree(good / "data", folder, dirs_exist_ok=True)
    manifest = json.loads((good / "data/manifest.json").read_text())
    *outer, last = data.draw(st.sampled_from(list(paths_of(manifest))))
    inner = manifest
    for key in outer:
        inner = inner[key]
    inner[last] = data.draw(plain_values)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        source = open_source(folder)
    except PolygluError as error:
        assert str(folder) in str(error)
    else:
        assert len(source.read(0, source.n_tokens)) == source.n_tokens
        assert source.eos_id < source.vocab_size and scan_documents(source).lengths.sum() <= source.n_tokens
