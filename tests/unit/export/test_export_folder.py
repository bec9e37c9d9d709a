"""A folder is whole or not there, says what is known, and comes back to the same bits."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import TAU, TEXTS, Exported
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from polyglu.cli import build_app
from polyglu.config_file import save_config
from polyglu.data.chat import render_prompt
from polyglu.data.manifest import new_manifest, write_manifest
from polyglu.data.tokenizer import load_tokenizer, train_bpe
from polyglu.errors import PolygluError
from polyglu.export import export_folder
from polyglu.export.export_folder import export, replacing
from polyglu.export.import_folder import import_checkpoint
from polyglu.files import append_rows, sha256, write_json
from polyglu.inference import open_for_inference
from polyglu.model.config import SFTConfig, TrainConfig
from polyglu.model.model import load_checkpoint, read_checkpoint, save_portable

CAUSAL = {"routing_scope": "causal"}
REFERENCE = Path(__file__).parents[2] / "fixtures/reference_model/portable.pt"


def command(*arguments: object) -> tuple[int, str]:
    """Exit code, and the sentence if the input is refused."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(build_app(words), words)
    refused = isinstance(result.exception, PolygluError)
    return (2, str(result.exception)) if refused else (result.exit_code, result.output)


@pytest.mark.parametrize("settings", [CAUSAL, {"routing_scope": "sequence"}, {"ffn": "reglu"}], ids=str)
def test_round_trip_to_the_same_bits(exported: Exported, settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoint, folder = exported(**settings)
    import_checkpoint(folder, tmp_path / "back.pt")
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "back.pt"))
    assert {key: before[key] for key in before if key != "model"} == {
        key: after[key] for key in after if key != "model"
    }
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(weight, after["model"][name]) for name, weight in before["model"].items())


def test_the_published_layout_is_imported(tmp_path: Path) -> None:
    import_checkpoint(REFERENCE, tmp_path / "ours.pt")
    ours, published = load_checkpoint(tmp_path / "ours.pt"), load_checkpoint(REFERENCE)
    assert ours[1:] == published[1:] == (1234, 0.5)
    ids = torch.arange(8)[None]
    assert torch.equal(ours[0](ids), published[0](ids))


def test_our_commands_open_the_folder_without_its_code(exported: Exported) -> None:
    checkpoint, folder = exported(**CAUSAL)
    (folder / "modeling_polychromatic.py").rename(folder / "kept")
    (folder / "modeling_polychromatic.py").write_text("raise AssertionError('executed')")
    try:
        asked = ["--prompt", "one two", "--max-new-tokens", 5]
        texts = [command("generate", "--checkpoint", path, *asked) for path in (folder, checkpoint)]
        assert [code for code, _ in texts] == [0, 0]
        told = [
            re.sub(r"[0-9,]+ tokens/s", "", text).partition("\n")[2] for _, text in texts
        ]  # but the path and the speed
        assert told[0] == told[1]
        opened = open_for_inference(folder)
    finally:
        (folder / "kept").replace(folder / "modeling_polychromatic.py")
    assert (opened.step, opened.tau, opened.tokenizer.name) == (11, TAU, str(folder))
    assert opened.sha256 == sha256(folder / "model.safetensors")


def test_tokenizer_and_chat_template_are_ours(exported: Exported) -> None:
    _, folder = exported(**CAUSAL)
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "  é ﬁ 12\n\n\t日本語", ""]:
        assert theirs(text)["input_ids"] == ours.encode(text)
    chat = "<|im_start|>user\n1 + 2<|im_end|>\n"
    assert theirs(chat)["input_ids"] == ours.encode(chat, allow_special=True)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (ours.eos_id, ours.eos_id, None)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [ours.eos_id, ours.im_end_id]
    conversations = [
        [{"role": "user", "content": " two\n"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 + 2?"},
         {"role": "assistant", "content": "3", "reasoning_content": "easy"}, {"role": "user", "content": "{{ x }}"}],
        [{"role": "assistant", "content": "", "reasoning_content": ""}],
    ]  # fmt: skip
    for messages in conversations:
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == render_prompt(
            messages
        )
        without_header = render_prompt(messages).removesuffix("<|im_start|>assistant\n")
        assert theirs.apply_chat_template(messages, tokenize=False) == without_header


def test_the_card_says_what_is_known(exported: Exported, tmp_path: Path) -> None:
    checkpoint, folder = exported(**CAUSAL)
    assert "## Data" not in (folder / "README.md").read_text() and "Scores" not in (folder / "README.md").read_text()
    described = read_checkpoint(checkpoint)
    chunk = {"file": "chunk_00000.bin", "tokens": 4200, "documents": 7, "sha256": "0"}
    tokenizer = {"name": "t", "fingerprint": "0", "vocab_size": 9, "eos_id": 8}
    origin = {"dataset": "owner/math", "config": "4plus", "revision": "c0ffee"}
    manifest = new_manifest(tokenizer, origin, 5000)
    manifest |= {"chunks": [chunk], "tokens": 4200, "documents": 7, "complete": True}
    (tmp_path / "math").mkdir()
    write_manifest(tmp_path / "math", manifest)
    sources = TrainConfig().data.model_dump()["sources"]
    sources["math"]["path"] = str(tmp_path / "math")
    train = TrainConfig(model=described.config, data={"sources": sources})
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/entropy_per_layer.png").write_bytes(b"png")
    for name, config in (("pretrain", train), ("sft", SFTConfig())):
        (tmp_path / name).mkdir()
        save_config(config, tmp_path / name / "config.yaml")
    rows = [{"step": step, "train/loss": 12 / step, "train/tokens_per_sec": 1000.0 * step} for step in (1, 2, 3)]
    append_rows(tmp_path / "pretrain/metrics.jsonl", [*rows, {"step": 1500, "train/loss": None}])
    results = {
        "settings": {},
        "versions": {},
        "checkpoint": {"path": "x.pt", "sha256": sha256(checkpoint), "step": 11},
        "results": {"gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01, "n_samples": 4}},
        "perplexity": {"math": {"perplexity": 3.5, "nats_per_token": 1.25276, "documents": 2, "tokens": 9}},
    }
    write_json(tmp_path / "scores.json", results)
    arguments = ["--run", tmp_path / "pretrain", "--run", tmp_path / "sft", "--results", tmp_path / "scores.json"]
    code, said = command("export", checkpoint, tmp_path / "new", *arguments, "--figures", tmp_path / "figures")
    assert code == 0, said
    card = (tmp_path / "new/README.md").read_text()
    for line in (
        "| math | 70% | 85% | 4,200 | 7 | owner/math 4plus | c0ffee |", "| stem | 25% | 10% |  |  |  |  |",
        "| training loss, first and at step 3 | 12.0000, 4.0000 |", "| tokens a second, median | 2,000 |",
        "| learning_rate | 0.0001 |", "| stage | fine-tuning |", "nvidia/Nemotron-Math-v2",
        "| gsm8k | exact_match,strict | 0.2500 | 0.0100 |", "| math | perplexity | 3.5000 |  |",
        "| routing scope, temperature | causal, 0.3 |", "| training step | 11 |", sha256(checkpoint),
        "(figures/entropy_per_layer.png)", "Routing sees only earlier tokens",
    ):  # fmt: skip
        assert line in card
    assert (tmp_path / "new/figures/entropy_per_layer.png").read_bytes() == b"png"
    other = results | {"checkpoint": {"path": "other.pt", "sha256": "0", "step": 11}}
    write_json(tmp_path / "other.json", other)
    write_json(tmp_path / "none.json", [])
    wrong = TrainConfig(model=described.config.model_copy(update={"d_ff": 99}))
    save_config(wrong, tmp_path / "sft/config.yaml")
    for option, value, sentence in (
        ("--results", tmp_path / "other.json", r"other.json has the scores of another checkpoint (other.pt)."),
        ("--results", tmp_path / "none.json", "none.json is not the results file of an evaluation"),
        ("--run", tmp_path, "has no config.yaml"),
        ("--run", tmp_path / "sft", "trained a model of another shape"),
        ("--figures", tmp_path / "sft", "has no .png files"),
    ):
        code, said = command("export", checkpoint, tmp_path / "refused", option, value)
        assert code == 2 and sentence in said
        assert not (tmp_path / "refused").exists()


def test_the_card_is_of_this_step_and_survives_a_damaged_manifest(exported: Exported, tmp_path: Path) -> None:
    checkpoint, _ = exported(**CAUSAL)
    sources = TrainConfig().data.model_dump()["sources"]
    for name, files in (("math", 5), ("stem", 2), ("code", 0)):
        sources[name]["path"] = str(tmp_path / name)
        origin = {"files": [{"path": f"/x/{name}{index}|a.txt"} for index in range(files)]}
        identity = {"name": "t", "fingerprint": "0", "vocab_size": 9, "eos_id": 8}
        write_manifest(tmp_path / name, new_manifest(identity, origin, 5000))
    file = tmp_path / "code/manifest.json"
    file.write_text(file.read_text().replace("5000", "5001"))
    run = tmp_path / "run"
    save_config(TrainConfig(model=read_checkpoint(checkpoint).config, data={"sources": sources}), run / "config.yaml")
    append_rows(run / "metrics.jsonl", [{"step": step, "train/loss": 12 / step} for step in (1, 10, 11, 12, 300)])
    append_rows(run / "metrics.jsonl", [{"step": "4", "train/loss": 9.0}, {"step": 3, "train/loss": "low"}, 5])
    results = {
        "settings": {}, "versions": {}, "results": {},
        "checkpoint": {"path": "x.pt", "sha256": sha256(checkpoint), "step": 11},
        "perplexity": {"held": {
            "perplexity": 3.5, "nats_per_token": 1.25276, "documents": 2, "tokens": 9, "bytes": 30,
            "bits_per_byte": 0.5422, "bits_per_byte_stderr": 0.0125,
        }},
    }  # fmt: skip
    write_json(tmp_path / "scores.json", results)
    code, said = command("export", checkpoint, tmp_path / "new", "--run", run, "--results", tmp_path / "scores.json")
    assert code == 0, said
    card = (tmp_path / "new/README.md").read_text()
    for line in (
        "| training loss, first and at step 11 | 12.0000, 1.0909 |", "| held | bits per byte | 0.5422 | 0.0125 |",
        "math0\\|a.txt math1\\|a.txt math2\\|a.txt and 2 more |", "| stem0\\|a.txt stem1\\|a.txt |",
        "| not known: its manifest is damaged |",
    ):  # fmt: skip
        assert line in card
    assert "perplexity" not in card and "code/manifest.json was changed" in said
    (run / "config.yaml").write_bytes(b"model: \xff")
    code, said = command("export", checkpoint, tmp_path / "refused", "--run", run)
    assert code == 2 and "config.yaml is not UTF-8 text" in said


@pytest.mark.parametrize("settings", [{"ffn": "swiglu"}, {"routing": "static"}, {"n_activations": 1}], ids=str)
def test_without_routing_by_the_text_no_scope_is_told(exported: Exported, settings: dict[str, Any]) -> None:
    _, folder = exported(**settings)
    card = (folder / "README.md").read_text()
    assert "not those of a language model" not in card and "sequence" not in card


def test_sequence_scope_is_told_honestly(exported: Exported) -> None:
    _, folder = exported(routing_scope="sequence")
    assert "not those of a language model" in (folder / "README.md").read_text().replace("\n", " ")
    assert json.loads((folder / "generation_config.json").read_text())["use_cache"] is False


def test_interrupted_there_is_no_half_folder(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = exported(**CAUSAL)
    folder = tmp_path / "new"
    export(checkpoint, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("write_code", "save_tokenizer", "flush"):
        with monkeypatch.context() as patch:
            patch.setattr(export_folder, step, interrupt)
            for target in (folder, tmp_path / "other"):
                with pytest.raises(KeyboardInterrupt):
                    export(checkpoint, target)
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(checkpoint, folder)  # replaces an earlier export
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_neighbours_stay_and_links_are_followed(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = exported(**CAUSAL)
    for name in ("new.old", "new.tmp"):  # somebody else's
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    (tmp_path / "link").symlink_to("new")
    for _ in range(2):
        export(checkpoint, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new/config.json").is_file()
    assert all((tmp_path / name / "kept").exists() for name in ("new.old", "new.tmp"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(checkpoint, Path("."))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "link", "new", "new.old", "new.tmp"}
    assert (tmp_path / "here/config.json").is_file()


def test_what_a_killed_export_left_is_put_back(exported: Exported, tmp_path: Path) -> None:
    checkpoint, _ = exported(**CAUSAL)
    export(checkpoint, tmp_path / "new")
    (tmp_path / ".new.export/new").mkdir(parents=True)  # half of a new one, and the earlier one out of the way
    (tmp_path / "new").rename(tmp_path / ".new.export/old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "new"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and (tmp_path / "new/config.json").is_file()
    with replacing(tmp_path / "new"), pytest.raises(PolygluError, match="another process is writing"):
        export(checkpoint, tmp_path / "new")


def test_large_weights_are_sharded(exported: Exported, tmp_path: Path) -> None:
    checkpoint, _ = exported(**CAUSAL)
    export(checkpoint, tmp_path / "new", max_shard_size="20KB")
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1
    ids = torch.arange(8)[None]
    assert torch.equal(load_checkpoint(tmp_path / "new")[0](ids), load_checkpoint(checkpoint)[0](ids))


Prepare = Callable[[Path, Path], None]


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder, _: folder.write_text(""), "is a file"),
        (lambda folder, _: (folder.mkdir(), (folder / "thesis.tex").touch()), "is not empty and no export"),
        (lambda folder, _: (folder.mkdir(), write_json(folder / "config.json", {"model_type": "qwen3"})),
         "holds another model"),
        (lambda folder, checkpoint: (export(checkpoint, folder), (folder / ".git").mkdir()), "holds '.git'"),
    ],
    ids=["file", "other files", "other model", "more than an export"],
)  # fmt: skip
def test_nothing_else_is_overwritten(exported: Exported, tmp_path: Path, prepare: Prepare, sentence: str) -> None:
    checkpoint, _ = exported(**CAUSAL)
    prepare(tmp_path / "new", checkpoint)
    code, said = command("export", checkpoint, tmp_path / "new")
    assert code == 2 and sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_is_no_checkpoint_or_tokenizer_is_refused(exported: Exported, tmp_path: Path) -> None:
    checkpoint, folder = exported(**CAUSAL)
    (tmp_path / "text.pt").write_text("text")
    train_bpe(["quite another text"], 265, tmp_path / "another")
    for name in ("qwen", "tauless", "twice"):
        shutil.copytree(folder, tmp_path / name)
    write_json(tmp_path / "qwen/config.json", {"model_type": "qwen3"})
    said = json.loads((folder / "config.json").read_text())
    write_json(tmp_path / "tauless/config.json", {key: value for key, value in said.items() if key != "tau"})
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "norm.weight": torch.ones(16)}, tmp_path / "twice/model.safetensors")
    model = load_checkpoint(checkpoint)[0]
    save_portable(tmp_path / "nameless.pt", model.state_dict(), model.config, 1, TAU, {})
    wider = model.config.model_copy(update={"d_ff": 99})
    save_portable(tmp_path / "other.pt", model.state_dict(), wider, 1, TAU, read_checkpoint(checkpoint).tokenizer)
    for arguments, sentence in (
        (["export", tmp_path / "text.pt", tmp_path / "new"], "is not a checkpoint"),
        (["export", tmp_path / "none.pt", tmp_path / "new"], "does not exist"),
        (["export", tmp_path / "other.pt", tmp_path / "new"], "the config expects (99, 4)"),
        (["import", tmp_path / "other.pt", tmp_path / "new.pt"], "the config expects (99, 4)"),
        (["import", tmp_path / "tauless", tmp_path / "new.pt"], "'tau' is missing"),
        (["import", tmp_path / "twice", tmp_path / "new.pt"], "has 'norm.weight' twice"),
        (["export", checkpoint, tmp_path / "new", "--tokenizer", tmp_path / "another"], "is not the one"),
        (["export", tmp_path / "nameless.pt", tmp_path / "new"], "does not say which tokenizer"),
        (["import", tmp_path / "qwen", tmp_path / "new.pt"], "describes a 'qwen3' model"),
        (["import", tmp_path / "text.pt", tmp_path / "new.pt"], "is not a checkpoint"),
        (["import", folder, tmp_path / "text.pt"], "exists already"),
        (["import", folder, tmp_path / "new"], "must end in .pt"),
        (["import", folder, tmp_path / "new.pt", "--tokenizer", tmp_path / "another"], "is not the one"),
        (["import", folder, tmp_path / "text.pt/new.pt"], "is a file"),
    ):  # fmt: skip
        code, said = command(*arguments)
        assert code == 2 and sentence in said
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.pt").exists()
