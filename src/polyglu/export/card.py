"""Model card of an exported folder. It says what is known of a checkpoint and its run, and leaves out the rest."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from polyglu.config_file import load_config
from polyglu.data.manifest import read_manifest
from polyglu.errors import PolygluError
from polyglu.evaluation.results import read_results
from polyglu.files import read_rows
from polyglu.model.config import RoutingScope, SFTConfig, SourceConfig, TrainConfig
from polyglu.model.model import Checkpoint, describe_shape

SCOPES: dict[RoutingScope, str] = {
    "causal": "Routing sees only earlier tokens: log-likelihoods are those of a language model, and decoding uses a "
    "cache.",
    "document": "Routing sees the whole document, later tokens included: the training loss and log-likelihoods are not "
    "those of a language model. Decoding is exact, and runs the whole text for each token.",
    "sequence": "Routing was trained on a mean over the whole row, later tokens and other packed documents included: "
    "the training loss and log-likelihoods are not those of a language model. Here a text is a row of its own. "
    "Decoding is exact, and runs the whole text for each token.",
}
USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

trust = True  # the folder brings its own code: read modeling_polychromatic.py first
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Two and two is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

Training by transformers is deterministic: it adds no Gumbel noise and keeps the routing temperature. Rows may be padded
on either side if `attention_mask` says so; they must not be packed."""


class Run(NamedTuple):
    """What a training has left."""

    config: TrainConfig | SFTConfig
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of its ``metrics.jsonl``."""
    manifests: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """Source -> manifest of its tokens, where they still are."""


def read_run(folder: Path, checkpoint: Checkpoint) -> Run:
    """Read what a run has left in its ``run_dir``, and the manifests of its data if they are where it had them.

    Raises:
        PolygluError: no run, one of a model of another shape, or a manifest that is none.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise PolygluError(f"--run {folder} has no config.yaml; give the run_dir of a training.")
    is_training = any(line.startswith("model:") for line in file.read_text(encoding="utf-8").splitlines())
    metrics = [row for row in read_rows(folder / "metrics.jsonl") if isinstance(row, dict) and "step" in row]
    if not is_training:
        return Run(load_config(SFTConfig, file), metrics)
    config = load_config(TrainConfig, file)
    if describe_shape(config.model) != describe_shape(checkpoint.config):
        raise PolygluError(f"--run {folder} trained a model of another shape; give the run of this checkpoint.")
    manifests = {name: read_manifest(Path(source.path)) for name, source in config.data.sources.items()}
    return Run(config, metrics, {name: manifest for name, manifest in manifests.items() if manifest is not None})


def read_scores(file: Path, digest: str) -> Mapping[str, Any]:
    """Read the results of an evaluation of the checkpoint with this SHA-256.

    Raises:
        PolygluError: no such results, or those of another checkpoint.
    """
    results = read_results(file)
    if results["checkpoint"]["sha256"] != digest:
        raise PolygluError(f"--results {file} has the scores of another checkpoint ({results['checkpoint']['path']}).")
    return results


def model_card(
    name: str,
    checkpoint: Checkpoint,
    hashes: Mapping[str, str],
    runs: Sequence[Run] = (),
    results: Sequence[Mapping[str, Any]] = (),
    figures: Sequence[str] = (),
) -> str:
    """Make the text of ``README.md``.

    Args:
        name: heading.
        checkpoint: what is exported.
        hashes: what -> SHA-256 (hex).
        runs: the trainings that led to it.
        results: evaluations of it.
        figures: file names, relative to the card.
    """
    sections = {
        "Use": USAGE,
        "Model": _table(["", ""], _model_rows(checkpoint)),
        "Training": "\n\n".join(_table(["setting", "value"], _run_rows(run)) for run in runs),
        "Data": "\n\n".join(_data(run) for run in runs),
        "Scores": _table(["task", "metric", "value", "standard error"], _scores(results)),
        "Figures": "\n\n".join(f"![{Path(file).stem.replace('_', ' ')}]({file})" for file in figures),
        "SHA-256": _table(["of", "SHA-256"], list(hashes.items())),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- polyglu\n---\n\n"
    return f"{head}# {name}\n\n{_summary(checkpoint)}\n\n{body}\n"


def _summary(checkpoint: Checkpoint) -> str:
    if checkpoint.config.ffn != "polyglu":
        return f"A decoder-only language model with {checkpoint.config.ffn} feed-forward layers."
    return (
        "A decoder-only language model whose feed-forward neurons choose among activation functions "
        f"([arXiv 2603.13347](https://arxiv.org/abs/2603.13347)).\n\n{SCOPES[checkpoint.config.routing_scope]}"
    )


def _model_rows(checkpoint: Checkpoint) -> list[tuple[str, ...]]:
    config = checkpoint.config
    rows = {
        "parameters": f"{sum(weight.numel() for weight in checkpoint.weights.values()):,}",
        "layers, width, neurons": f"{config.n_layers}, {config.d_model}, {config.d_ff}",
        "heads (query, key/value), width": f"{config.n_q_heads}, {config.n_kv_heads}, {config.head_dim}",
        "context": f"{config.seq_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "feed-forward": config.ffn,
    }
    if config.ffn == "polyglu":
        rows["activations"] = str(config.n_activations)
        rows["routing scope, temperature"] = f"{config.routing_scope}, {checkpoint.tau:g}"
    if checkpoint.step:
        rows["training step"] = f"{checkpoint.step:,}"
    if "name" in checkpoint.tokenizer:
        tokenizer = Path(checkpoint.tokenizer["name"])
        rows["tokenizer"] = tokenizer.name if tokenizer.is_absolute() else str(tokenizer)
    return list(rows.items())


def _run_rows(run: Run) -> list[tuple[str, ...]]:
    settings = run.config.training.model_dump(mode="json")
    unsaid = {"init_from", "checkpoint_dir", "run_dir", "resume_from", "log_every", "deepspeed_config"}
    stage = "pre-training" if isinstance(run.config, TrainConfig) else "fine-tuning"
    kept = [(key, str(value)) for key, value in settings.items() if key not in unsaid]
    return [("stage", stage), *_outcome(run.metrics), *kept]


def _outcome(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What came of a run, by its metrics."""
    rows: list[tuple[str, ...]] = []
    losses = {row["step"]: row["train/loss"] for row in metrics if row.get("train/loss") is not None}
    if losses:
        (_, first), (step, last) = min(losses.items()), max(losses.items())
        rows.append((f"training loss, first and at step {step:,}", f"{first:.4f}, {last:.4f}"))
    if speeds := [row["train/tokens_per_sec"] for row in metrics if row.get("train/tokens_per_sec") is not None]:
        rows.append(("tokens a second, median", f"{statistics.median(speeds):,.0f}"))
    return rows


def _data(run: Run) -> str:
    config = run.config
    if isinstance(config, TrainConfig):
        titles = ["source", "share of the mix", "at the end", "its tokens", "its documents", "data set", "revision"]
        return _table(titles, [_source(name, source, run.manifests) for name, source in config.data.sources.items()])
    kept = {"dataset", "config", "splits", "revision"} if not config.data.files else {"files"}
    data = config.data.model_dump(mode="json", include=kept | {"max_conversations"}, exclude_none=True)
    if "files" in data:
        data["files"] = [Path(file).name for file in data["files"]]
    rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in data.items()]
    return _table(["conversations", ""], rows)


def _source(name: str, source: SourceConfig, manifests: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    shares = name, f"{source.mix:.0%}", f"{source.mix_end:.0%}"
    if name not in manifests:
        return *shares, "", "", "", ""
    manifest = manifests[name]
    origin, counts = manifest["source"], [f"{manifest[key]:,}" for key in ("tokens", "documents")]
    called = [str(origin[key]) for key in ("dataset", "config", "split") if origin.get(key)]
    called = called or [Path(file["path"]).name for file in origin["files"][:3]]
    return *shares, *counts, " ".join(called), str(origin.get("revision") or "")


def _scores(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for evaluation in results:
        for task, metrics in evaluation["results"].items():
            for key, value in metrics.items():
                metric, _, variant = key.partition(",")
                if variant and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{variant}")
                    rows.append((task, key, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
        for source, values in evaluation["perplexity"].items():
            rows.append((source, "perplexity", f"{values['perplexity']:.4f}", ""))
    return rows


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown; nothing without rows."""
    lines = [titles, ["---"] * len(titles), *rows] if rows else []
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
