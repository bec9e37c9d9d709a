"""Saving and loading: what comes back is what was saved, and what is no checkpoint is refused in one sentence."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_folder
from safetensors.torch import load_file, save_file

from polyglu.errors import PolygluError
from polyglu.files import sha256
from polyglu.model import model as model_module
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.folder import weights_digest
from polyglu.model.model import (
    create_model,
    load_checkpoint,
    published_name,
    read_checkpoint,
    save_portable,
)

SMALL = ModelConfig(
    vocab_size=31, d_model=16, d_ff=24, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=8, seq_length=16
)
TOKENIZER = {"name": "some/folder", "fingerprint": "f" * 64}
IDS = torch.arange(12).view(2, 6)


def save(path: Path, model: PolychromaticLM, step: int = 7, tau: float = 0.3) -> str:
    return save_portable(path, model.state_dict(), model.config, step, tau, TOKENIZER)


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    path = tmp_path / "portable.pt"
    save(path, create_model(SMALL))
    return path


def to_published(model: PolychromaticLM) -> dict[str, torch.Tensor]:
    """Weights under the published names, with the tables and the tied head that its files carry."""
    template = [
        "embeddings.weight", "rmsnorm.gama", *(
            f"model_core.{layer}.{part}" for layer in range(model.config.n_layers) for part in (
                "rmsnorm_1.gama", "rmsnorm_2.gama", "gqa.W_q.weight", "gqa.W_k.weight", "gqa.W_v.weight",
                "gqa.W_o.weight", "gqa.rmsnorm_q.gama", "gqa.rmsnorm_k.gama", "polyglu.W_gate.weight",
                "polyglu.W_up.weight", "polyglu.W_down.weight", "polyglu.alpha", "polyglu.beta",
                "polyglu.gate_net.0.weight", "polyglu.gate_net.0.bias", "polyglu.gate_net.2.weight",
                "polyglu.gate_net.2.bias",
            )
        ),
    ]  # fmt: skip
    ours = model.state_dict()
    assert {published_name(name) for name in template} == set(ours)
    weights = {name: ours[published_name(name)].clone() for name in template}
    weights["output_head.weight"] = weights["embeddings.weight"].clone()
    tables = {f"rope.{name}": torch.zeros(SMALL.seq_length, SMALL.head_dim // 2) for name in ("cosines", "sines")}
    return weights | tables


def test_weights_follow_from_the_seed() -> None:
    first, again, other = (create_model(SMALL, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.parametrize("changes", [{}, {"routing_scope": "causal"}, {"ffn": "geglu"}, {"n_activations": 6}])
def test_portable_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = create_model(SMALL.model_copy(update=changes), seed=5).eval()
    path = tmp_path / "new" / "portable.pt"
    assert save(path, model) == sha256(path) == weights_digest(path)
    loaded, step, tau = load_checkpoint(path)
    assert (step, tau, loaded.config, loaded.training) == (7, 0.3, model.config, False)
    assert torch.equal(loaded(IDS, tau=tau), model(IDS, tau=tau))
    assert read_checkpoint(path).tokenizer == TOKENIZER


def test_who_computes_is_not_part_of_a_checkpoint(tmp_path: Path) -> None:
    """A model trained on a GPU with its kernels is opened on a machine without."""
    save(tmp_path / "portable.pt", create_model(SMALL.model_copy(update={"kernels": "triton"})))
    write_folder(tmp_path / "folder", read_checkpoint(tmp_path / "portable.pt"))
    for path in (tmp_path / "portable.pt", tmp_path / "folder"):
        assert load_checkpoint(path)[0].config.kernels == "auto"


def test_portable_holds_tensors_and_plain_values_only(portable: Path) -> None:
    content = torch.load(portable, weights_only=True)
    assert content.keys() == {"format", "model", "config", "step", "tau", "tokenizer"}
    assert content["model"].keys() == create_model(SMALL).state_dict().keys()
    assert json.loads(json.dumps({key: content[key] for key in content if key != "model"}))["config"]["d_ff"] == 24


def test_low_precision_weights_are_kept_in_fp32(tmp_path: Path) -> None:
    model = create_model(SMALL).bfloat16()
    save(tmp_path / "portable.pt", model)
    loaded = load_checkpoint(tmp_path / "portable.pt")[0].state_dict()
    for name, weight in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight.float())


def test_safetensors_round_trip(portable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    write_folder(folder, read_checkpoint(portable))
    expected = load_checkpoint(portable)
    for path in (folder, folder / "model.safetensors"):
        loaded, step, tau = load_checkpoint(path)
        assert (step, tau, loaded.config) == (7, 0.3, SMALL)
        assert torch.equal(loaded(IDS), expected[0](IDS))
        assert read_checkpoint(path).tokenizer == TOKENIZER
    assert weights_digest(folder) == sha256(folder / "model.safetensors")


def test_sharded_folder_round_trip(portable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    write_folder(folder, read_checkpoint(portable), shards=3)
    assert torch.equal(load_checkpoint(folder)[0](IDS), load_checkpoint(portable)[0](IDS))
    before = weights_digest(folder)
    last = sorted(folder.glob("model-*"))[-1]
    save_file({name: weight + 1 for name, weight in load_file(last).items()}, last)
    assert weights_digest(folder) != before


@pytest.mark.parametrize("layout", ["pt", "safetensors"])
def test_published_layout_round_trip(tmp_path: Path, layout: str) -> None:
    model, path = create_model(SMALL, seed=2).eval(), tmp_path / f"published.{layout}"
    if layout == "pt":
        torch.save({"model": to_published(model), "optimizer": {}, "scheduler": {}, "step": 9, "tau": 0.4}, path)
    else:
        save_file(to_published(model), path)
    loaded, step, tau = load_checkpoint(path)
    assert loaded.config == SMALL  # read from the shapes
    assert (step, tau) == ((9, 0.4) if layout == "pt" else (0, 1.0))
    assert torch.equal(loaded(IDS), model(IDS))
    assert read_checkpoint(path).tokenizer == {}


def test_another_config_of_the_same_shape_may_be_given(portable: Path) -> None:
    causal = SMALL.model_copy(update={"routing_scope": "causal"})
    assert load_checkpoint(portable, causal)[0].config.routing_scope == "causal"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 25}, r"weight 'layers.0.mlp.alpha' has shape \(24, 4\), the config expects \(25, 4\)"),
        ({"n_layers": 3}, r"weight 'layers.2.* has shape none \(missing\)"),
        ({"n_layers": 1}, r"weight 'layers.1.* the config expects no such weight"),
        ({"ffn": "swiglu"}, r"weight 'layers.0.mlp.alpha' .* the config expects no such weight"),
    ],
)
def test_another_shape_is_refused(portable: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PolygluError, match=rf"portable\.pt: {message}"):
        load_checkpoint(portable, SMALL.model_copy(update=changes))


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before_it(
    portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = portable.read_bytes()

    def cut_off(content: Any, file: Any) -> None:
        file.write(before[: len(before) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(model_module.torch, "save", cut_off)
    with pytest.raises(OSError, match="no space left"):
        save(portable, create_model(SMALL, seed=1))
    assert portable.read_bytes() == before


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("wrapped", ["bare pickle", "torch file", "in a portable checkpoint"])
def test_malicious_pickle_is_refused_and_never_executed(tmp_path: Path, wrapped: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    content: Any = Malicious(trace)
    if wrapped == "in a portable checkpoint":
        content = {"format": model_module.PORTABLE_FORMAT, "model": {}, "tokenizer": content}
    if wrapped == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(PolygluError, match=r"evil\.pt is not a checkpoint: .* nothing in it was executed"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "flipped magic"])
def test_what_is_no_checkpoint_is_refused(portable: Path, kind: str) -> None:
    data = portable.read_bytes()
    damaged = {"empty": b"", "text": b"not a model", "truncated": data[:-100], "flipped magic": b"X" + data[1:]}
    portable.write_bytes(damaged[kind])
    with pytest.raises(PolygluError, match=r"portable\.pt is not a checkpoint"):
        load_checkpoint(portable)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"model": {"other": torch.ones(1)}}, {"model": 3}])
def test_other_torch_files_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(PolygluError, match=r"other\.pt is not a PolyGLU checkpoint"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("key", ["model", "config", "step", "tau", "tokenizer"])
@pytest.mark.parametrize("fault", ["missing", "None"])
def test_portable_with_a_part_missing_is_refused(portable: Path, key: str, fault: str) -> None:
    content = torch.load(portable, weights_only=True)
    content[key] = None
    if fault == "missing":
        del content[key]
    torch.save(content, portable)
    with pytest.raises(PolygluError, match=r"portable\.pt"):
        load_checkpoint(portable)


def test_published_layout_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    weights = to_published(create_model(SMALL))
    for name in ("model_core.0.polyglu.alpha", "model_core.1.gqa.W_o.weight"):
        path = tmp_path / "published.pt"
        torch.save({"model": {other: weights[other] for other in weights if other != name}}, path)
        with pytest.raises(PolygluError, match=r"published\.pt"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nothing there", "does not exist; training writes portable_"),
        ("empty folder", r"has no model\.safetensors"),
        ("damaged weights", r"model\.safetensors is not a whole safetensors file"),
        ("no config", r"config\.json does not exist"),
        ("another architecture", r"config\.json describes a 'qwen3' model, expected 'polychromatic'"),
        ("field missing", r"config\.json: 'd_ff' is missing"),
        ("index that leads elsewhere", r"index\.json names '\.\./model\.safetensors', which is no file of that folder"),
        ("untied head", "the head differs from the embedding"),
        ("config of another kind", r"config\.json says no model_type, expected 'polychromatic'"),
    ],
)
def test_incomplete_folders_are_refused(portable: Path, tmp_path: Path, fault: str, message: str) -> None:
    folder = tmp_path / "exported"
    if fault == "empty folder":
        folder.mkdir()
    elif fault != "nothing there":
        write_folder(folder, read_checkpoint(portable))
    if fault == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"short")
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "config of another kind":
        (folder / "config.json").write_text("[]")
    elif fault == "another architecture":
        (folder / "config.json").write_text('{"model_type": "qwen3"}')
    elif fault == "field missing":
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: said[key] for key in said if key != "d_ff"}))
    elif fault == "index that leads elsewhere":
        (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
        index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif fault == "untied head":
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(PolygluError, match=message):
        load_checkpoint(folder)
