"""The commands of the usage guide, as printed, in a copy of the checkout with small data and small configs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polyglu.data.chunks import open_source
from polyglu.data.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]
VOCABULARY = 300
MODEL = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8,
    "seq_length": 64, "routing_scope": "causal",
}  # fmt: skip
FIGURES = {
    "neurotransmitter_heatmap.png", "layer_distribution.png", "entropy_per_layer.png", "entropy_histogram.png",
    "dynamic_routing_comparison.png", "routing_shift_summary.png", "entropy_stats.json",
}  # fmt: skip


def copy_checkout(folder: Path) -> Path:
    for name in ("src", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def edit(path: Path, **sections: dict[str, Any]) -> None:
    """Change keys of a YAML config, as a person would in an editor."""
    values = yaml.safe_load(path.read_text())
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    path.write_text(yaml.safe_dump(values))


def run(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line in a shell, without a network, a GPU or an account."""
    hidden = {"WANDB_API_KEY", "HF_TOKEN", "HF_HUB_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


def succeed(folder: Path, line: str) -> str:
    done = run(folder, line)
    assert done.returncode == 0, done.stderr
    return done.stderr


def fail(folder: Path, line: str) -> str:
    """Run a line that must end with one sentence and exit code 2; return the sentence."""
    done = run(folder, line)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (sentence,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    return sentence


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose configs name small local files, a small tokenizer and a small model; else as shipped."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout"))
    raw = folder / "raw"
    raw.mkdir()
    texts = [f"Question: {a} + {b} =\nAnswer: {a + b}\n#### {a + b}" for a in range(20) for b in range(10)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("math", "stem", "code"):
        (raw / f"{name}.jsonl").write_text(rows)
    problems = [{"question": f"{a} + 1 =", "answer": str(a + 1)} for a in range(4)]
    (raw / "arithmetic_test.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    turns = [
        [{"role": "user", "content": f"{a} + 2 ="}, {"role": "assistant", "content": f"#### {a + 2}"}]
        for a in range(12)
    ]
    (raw / "sft.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    train_bpe(texts, VOCABULARY, folder / "tokenizer")
    files = {
        name: {"files": [f"raw/{name}.jsonl"], "output": f"data/tokenized/{name}"} for name in ("math", "stem", "code")
    }
    sources = {"tokenizer": "tokenizer", "chunk_tokens": 1000, "sources": files}
    (folder / "configs/sources.yaml").write_text(yaml.safe_dump(sources))
    steps = {"total_steps": 6, "checkpoint_every": 3, "log_every": 1, "warmup_steps": 1, "grad_accum_steps": 2}
    edit(folder / "configs/train_config.yaml", model=MODEL, training=steps)
    edit(folder / "configs/sft_config.yaml", data={"files": ["raw/sft.jsonl"], "tokenizer": "tokenizer"})
    return folder


@pytest.fixture(scope="module")
def tokenized(checkout: Path) -> Path:
    succeed(checkout, "bash scripts/tokenize_data.sh")
    return checkout


@pytest.fixture(scope="module")
def trained(tokenized: Path) -> Path:
    command = "deepspeed --num_gpus=1 -m src.training.train --config configs/train_config.yaml"
    succeed(tokenized, command)
    return tokenized


@pytest.fixture(scope="module")
def tuned(trained: Path) -> Path:
    succeed(trained, "bash scripts/run_sft.sh")
    return trained


def test_tokenising_makes_the_three_sources_and_goes_on_where_it_was(tokenized: Path) -> None:
    folders = [tokenized / "data/tokenized" / name for name in ("math", "stem", "code")]
    assert [open_source(folder).n_tokens for folder in folders] == [open_source(folders[0]).n_tokens] * 3
    assert sorted(path.name for path in folders[0].iterdir())[:2] == ["chunk_00000.bin", "chunk_00001.bin"]
    assert succeed(tokenized, "bash scripts/tokenize_data.sh").count("nothing to do") == 3


def test_tokenising_one_source(tokenized: Path) -> None:
    # The guide's flags; the hub dataset needs the hub, local files do not.
    hub = """python -m src.data.tokenize_dataset \\
        --dataset nvidia/Nemotron-CC-Math-v1 \\
        --config 4plus \\
        --output data/tokenized/hub \\
        --max-tokens 7000000000"""
    assert "nvidia/Nemotron-CC-Math-v1 needs the Hugging Face hub" in fail(tokenized, hub)
    assert not (tokenized / "data/tokenized/hub").exists()
    local = "--files raw/math.jsonl --tokenizer tokenizer --output data/tokenized/one --max-tokens 500"
    succeed(tokenized, f"python -m src.data.tokenize_dataset {local}")
    assert 400 < open_source(tokenized / "data/tokenized/one").n_tokens <= 500


def test_training_writes_the_guides_checkpoints_and_metrics(trained: Path) -> None:
    names = {path.name for path in (trained / "checkpoints").iterdir()}
    assert names == {"ds_checkpoint", "portable_step3.pt", "portable_step6.pt", "portable_final.pt"}
    lines = (trained / "runs/pretrain/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert list((trained / "runs/pretrain/wandb").glob("offline-run-*"))
    assert torch.load(trained / "checkpoints/portable_final.pt", weights_only=True)["step"] == 6


def test_resume_from_the_ds_checkpoint_folder_named_in_the_config(trained: Path) -> None:
    whole = torch.load(trained / "checkpoints/portable_final.pt", weights_only=True)["model"]
    shutil.rmtree(trained / "checkpoints/ds_checkpoint/step_00000006")
    config = trained / "configs/train_config.yaml"
    before = config.read_text()
    edit(config, training={"resume_from": "checkpoints/ds_checkpoint"})
    assert "resuming at step 3" in succeed(trained, "bash scripts/run_train.sh")
    config.write_text(before)
    resumed = torch.load(trained / "checkpoints/portable_final.pt", weights_only=True)["model"]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_fine_tuning_then_evaluation_of_both_models_and_analysis(tuned: Path) -> None:
    assert torch.load(tuned / "checkpoints_sft/sft_final.pt", weights_only=True)["tau"] == 0.1
    tasks = "TASKS=demo_arithmetic SFT_TASKS='demo_arithmetic demo_arithmetic_chat' LIMIT=2"
    succeed(tuned, f"{tasks} bash scripts/run_eval.sh --data-dir raw")
    base, sft = (json.loads((tuned / f"results/{name}_eval.json").read_text()) for name in ("pretrain", "sft"))
    assert base["results"]["demo_arithmetic"]["n_samples"] == 2
    assert set(sft["results"]) == {"demo_arithmetic", "demo_arithmetic_chat"}
    assert base["checkpoint"]["path"] == "checkpoints/portable_final.pt"
    assert sft["checkpoint"]["path"] == "checkpoints_sft/sft_final.pt"
    (row,) = [r for r in json.loads((tuned / "results/comparison.json").read_text())["rows"] if r["a"] and r["b"]]
    assert row["name"] == "demo_arithmetic" and row["method"] == "paired" and row["n_pairs"] == 2
    assert (tuned / "results/comparison.png").is_file()
    assert {path.name for path in (tuned / "figures").iterdir()} >= FIGURES | {"analysis.html"}


def test_hub_task_without_a_network_says_so_and_writes_nothing(trained: Path) -> None:
    line = """python -m src.evaluation.run_eval \\
        --checkpoint checkpoints/portable_step3.pt \\
        --tasks gsm8k minerva_math mmlu_stem \\
        --limit 5 \\
        --output results/smoke_test.json"""
    assert "needs the Hugging Face hub, which cannot be reached" in fail(trained, line)
    assert not (trained / "results/smoke_test.json").exists()


def test_quick_verification(checkout: Path) -> None:
    line = f"""python -c "
from src.model.model import create_model
from src.model.config import ModelConfig
m = create_model(ModelConfig(**{MODEL!r}))
print(f'Parameters: {{sum(p.numel() for p in m.parameters()):,}}')
" """
    done = run(checkout, line)
    assert (done.returncode, done.stdout) == (0, "Parameters: 10,304\n"), done.stderr


SAME_COMMANDS = """
import contextlib, io, re, runpy, sys
from polyglu import cli
modules = {(verb,): module for verb, (module, _) in cli.STAGES.items() if verb != "data"}
modules |= {("data", verb): module for verb, (module, _) in cli.DATA_VERBS.items()}
def options(call, *arguments):
    sys.argv[1:] = [*arguments, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        call()
    found = re.findall(r"(?<![\\w-])--[a-z][a-z_-]*", printed.getvalue())
    assert "--help" in found, (arguments, printed.getvalue())
    return found
for words, module in modules.items():
    alias = module.replace("polyglu.", "src.", 1)
    by_verb = options(cli.main, *words)
    assert by_verb == options(lambda: runpy.run_module(alias, run_name="__main__", alter_sys=True)), (words, by_verb)
    print(*words)
"""


def test_each_verb_is_the_same_command_as_its_module(checkout: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAME_COMMANDS], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verbs = {"demo", "train", "sft", "eval", "analyze", "ablate", "generate", "data tokenize", "data inspect"}
    assert verbs <= set(done.stdout.splitlines())


FAKE_PYTHON = """#!/usr/bin/env bash
tr '\\0' ' ' < /proc/$$/cmdline >> "$RECORD.arguments"; echo >> "$RECORD.arguments"
[[ "$1" == "-" ]] && { cat > /dev/null; echo "${HF_TOKEN:-none} ${WANDB_API_KEY:-none}" >> "$RECORD.environment"; }
[[ "$1" == "-" ]] && exit "${LOGIN_EXIT:-0}"
exit 0
"""
HF_CANARY, WANDB_CANARY = "hf_canary=with=equals=", "c0ffeec0ffee"


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    """Run the setup script with a Python that installs nothing; returns all output, arguments seen, tokens seen."""
    folder = copy_checkout(tmp_path / "checkout")
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def start(env_file: str | None, **variables: str) -> tuple[str, str, list[str]]:
        if env_file is not None:
            (folder / ".env").write_text(env_file)
        settings = {"PYTHON": str(python), "RECORD": str(tmp_path / "record"), **variables}
        assignments = " ".join(f"{name}={value}" for name, value in settings.items())
        done = run(folder, f"{assignments} bash scripts/setup_runpod.sh")
        assert done.returncode == 0, done.stderr
        seen = [tmp_path / f"record.{name}" for name in ("arguments", "environment")]
        arguments, environment = (path.read_text() if path.exists() else "" for path in seen)
        return done.stdout + done.stderr, arguments, environment.splitlines()

    start.folder = folder  # type: ignore[attr-defined]
    return start


@pytest.mark.parametrize(
    "env_file",
    [
        f"HF_TOKEN={HF_CANARY}\nWANDB_API_KEY={WANDB_CANARY}\n",
        f"# tokens\n\nOTHER=1\nexport HF_TOKEN='{HF_CANARY}'\r\nWANDB_API_KEY=\"{WANDB_CANARY}\"",
    ],
)
def test_setup_reads_tokens_and_never_shows_them(setup: Any, env_file: str) -> None:
    output, arguments, tokens = setup(env_file)
    assert tokens == [f"{HF_CANARY} {WANDB_CANARY}"] * 2
    assert "canary" not in output + arguments and WANDB_CANARY not in output + arguments
    assert "-r requirements.txt" in arguments
    assert output.endswith("Ready. Next: bash scripts/tokenize_data.sh\n")
    folders = ["data/tokenized/math", "data/tokenized/stem", "data/tokenized/code", "checkpoints", "checkpoints_sft"]
    assert all((setup.folder / name).is_dir() for name in [*folders, "results", "figures"])
    assert (setup.folder / ".env").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("env_file", "missing"),
    [
        (None, ["- .env: create it", "- HF_TOKEN in .env", "- WANDB_API_KEY in .env"]),
        ("", ["- HF_TOKEN in .env", "- WANDB_API_KEY in .env"]),
        (f"HF_TOKEN={HF_CANARY}\n", ["- WANDB_API_KEY in .env"]),
        (f"WANDB_API_KEY={WANDB_CANARY}\nHF_TOKEN=\n", ["- HF_TOKEN in .env"]),
    ],
)
def test_setup_says_what_is_missing(setup: Any, env_file: str | None, missing: list[str]) -> None:
    output, _, _ = setup(env_file)
    listed = [line.strip() for line in output.splitlines() if line.startswith("  - ")]
    assert len(listed) == len(missing)
    assert all(line.startswith(expected) for line, expected in zip(listed, missing, strict=True))


def test_setup_says_which_account_was_not_accepted(setup: Any) -> None:
    output, arguments, _ = setup(f"HF_TOKEN={HF_CANARY}\nWANDB_API_KEY={WANDB_CANARY}\n", LOGIN_EXIT="1")
    assert "Hugging Face: the token in .env was not accepted" in output
    assert "Weights & Biases: the key in .env was not accepted" in output
    assert "canary" not in output + arguments


def test_setup_never_executes_the_env_file(setup: Any) -> None:
    hostile = "touch executed\n`touch executed`\nA=$(touch executed)\nHF_TOKEN=$(touch executed)\n$(touch executed)=1\n"
    hostile += 'PATH=/nowhere\nHF_TOKEN;touch executed=1\nWANDB_API_KEY=";touch executed;"\n'
    _, _, tokens = setup(hostile)
    assert not list(setup.folder.rglob("executed"))
    assert tokens[0].startswith("$(touch executed)")
