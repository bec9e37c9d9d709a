"""The demo's stages on a corpus and a model so small that it takes seconds: everything is made, nothing made twice."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_page import HtmlPage

from polyglu import demo
from polyglu.data.embedded import write_embedded_corpus
from polyglu.files import sha256

ROOT = Path(__file__).parents[2]
OUTPUTS = [
    *(f"data/tokenized/{name}/manifest.json" for name in ("math", "stem", "code")),
    "checkpoints/portable_final.pt",
    "checkpoints_sft/sft_final.pt",
    "results/pretrain_eval.json",
    "results/sft_eval.json",
    "figures/neurotransmitter_heatmap.png",
    "figures/layer_distribution.png",
    "figures/entropy_per_layer.png",
    "figures/entropy_histogram.png",
    "figures/dynamic_routing_comparison.png",
    "figures/routing_shift_summary.png",
    "figures/entropy_stats.json",
    "metrics.jsonl",
    "config.yaml",
    "report.html",
]


def tiny_configs(folder: Path) -> Path:
    """The shipped demo configs with a smaller model and fewer steps."""
    folder.mkdir()
    train = yaml.safe_load((ROOT / "configs/tiny/train.yaml").read_text())
    train["model"] |= {"vocab_size": 400, "d_model": 32, "d_ff": 48, "n_layers": 2, "n_q_heads": 2, "n_kv_heads": 1}
    train["model"] |= {"head_dim": 16, "seq_length": 128}
    train["training"] |= {"total_steps": 400, "warmup_steps": 2, "checkpoint_every": 20, "log_every": 5}
    sft = yaml.safe_load((ROOT / "configs/tiny/sft.yaml").read_text())
    for name, values in (("train", train), ("sft", sft)):
        values["wandb"] = {"mode": "disabled"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_everything_is_made_and_redone_only_if_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = partial(
        write_embedded_corpus, n_math=300, n_sft=60, n_test=8, stem_characters=150_000, code_characters=150_000
    )
    monkeypatch.setattr(demo, "write_embedded_corpus", small)
    monkeypatch.setattr(demo, "RUNNING", 0.05)
    caplog.set_level("INFO")
    paths = demo.DemoPaths(tmp_path / "demo", tiny_configs(tmp_path / "configs"))
    demo.run_demo(paths)
    assert [name for name in OUTPUTS if not (paths.root / name).exists()] == []
    assert "killed (SIGKILL) after step" in caplog.text

    steps = [json.loads(line)["step"] for line in (paths.root / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(5, 401, 5)]  # killed and resumed, yet each step once, in order
    page = HtmlPage((paths.root / "report.html").read_text())
    assert len(page.images) == 5 + 5 + 6 and {"Stages", "Results", "Fine-tuning", "Samples"} <= set(page.texts)

    def ran() -> list[str]:
        caplog.clear()
        before = {name: sha256(paths.root / name) for name in OUTPUTS if (paths.root / name).exists()}
        demo.run_demo(paths)
        for name in ("checkpoints/portable_final.pt", "checkpoints_sft/sft_final.pt"):
            assert before.get(name, sha256(paths.root / name)) == sha256(paths.root / name)
        return [record.message.split("] ")[1].split(":")[0] for record in caplog.records if ": about" in record.message]

    assert ran() == []
    (paths.root / "figures/layer_distribution.png").unlink()
    assert ran() == ["analyze"]
    base = sha256(paths.base)
    paths.base.unlink()
    assert ran() == ["pretrain"]  # resumed at its end: the same bytes, so that nothing after it is stale
    assert sha256(paths.base) == base
    paths.results("sft").unlink()
    assert ran()[0] == "evaluate"
    sft = paths.configs / "sft.yaml"
    sft.write_text(sft.read_text().replace("epochs: 1", "epochs: 2"))
    paths.tuned.unlink()
    for folder in ("checkpoints_sft", "sft"):
        for path in sorted((paths.root / folder).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    assert ran() == ["sft", "evaluate", "report"]
