"""Model card of an exported folder. It says what is known of a checkpoint and its run, and leaves out the rest."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import quote

from polyglu.config_file import load_config, read_yaml
from polyglu.data.manifest import MANIFEST, read_manifest
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
NOT_ROUTED = "What is read decides nothing between activations: log-likelihoods are those of a language model."
MOST_FILES = 3
"""Names of a source's files that the card tells."""
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


logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """What a training has left."""

    config: TrainConfig | SFTConfig
    metrics: Sequence[Mapping[str, Any]] = ()
    """Rows of its ``metrics.jsonl``."""
    manifests: Mapping[str, Mapping[str, Any] | None] = MappingProxyType({})
    """Source -> manifest of its tokens, where they still are; None: it is damaged."""

    def until(self, step: int) -> "Run":
        """This run as if it had ended after ``step``."""
        return self._replace(metrics=[row for row in self.metrics if row["step"] <= step])


def read_run(folder: Path, checkpoint: Checkpoint) -> Run:
    """Read what a run has left in its ``run_dir``, and the manifests of its data if they are where it had them.

    Raises:
        PolygluError: no run, or one of a model of another shape.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise PolygluError(f"--run {folder} has no config.yaml; give the run_dir of a training.")
    rows = read_rows(folder / "metrics.jsonl")
    metrics = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if "model" not in read_yaml(file):
        return Run(load_config(SFTConfig, file), metrics)
    config = load_config(TrainConfig, file)
    if describe_shape(config.model) != describe_shape(checkpoint.config):
        raise PolygluError(f"--run {folder} trained a model of another shape; give the run of this checkpoint.")
    places = {name: Path(source.path) for name, source in config.data.sources.items()}
    there = {name: place for name, place in places.items() if (place / MANIFEST).is_file()}
    return Run(config, metrics, {name: _manifest(place) for name, place in there.items()})


def _manifest(folder: Path) -> Mapping[str, Any] | None:
    """Manifest of a source; None, and a warning, where it cannot be read: that is no reason not to export."""
    try:
        return read_manifest(folder)
    except PolygluError as error:
        logger.warning("the model card cannot tell what a source was made of: %s", error)
        return None


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
    # A run that goes on after the checkpoint says nothing of it; the step is that of the last stage.
    last = SFTConfig if any(isinstance(run.config, SFTConfig) for run in runs) else TrainConfig
    runs = [run.until(checkpoint.step) if isinstance(run.config, last) else run for run in runs]
    sections = {
        "Use": USAGE,
        "Model": _table(["", ""], _model_rows(checkpoint)),
        "Training": "\n\n".join(_table(["setting", "value"], _run_rows(run)) for run in runs),
        "Data": "\n\n".join(_data(run) for run in runs),
        "Scores": _table(["task", "metric", "value", "standard error"], _scores(results)),
        "Figures": "\n\n".join(f"![{Path(file).stem.replace('_', ' ')}]({quote(file)})" for file in figures),
        "SHA-256": _table(["of", "SHA-256"], list(hashes.items())),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- polyglu\n---\n\n"
    return f"{head}# {name}\n\n{_summary(checkpoint)}\n\n{body}\n"


def _summary(checkpoint: Checkpoint) -> str:
    if checkpoint.config.ffn != "polyglu":
        return f"A decoder-only language model with {checkpoint.config.ffn} feed-forward layers."
    config = checkpoint.config
    scope = SCOPES[config.routing_scope] if config.routed_by_text else NOT_ROUTED
    return (
        "A decoder-only language model whose feed-forward neurons choose among activation functions "
        f"([arXiv 2603.13347](https://arxiv.org/abs/2603.13347)).\n\n{scope}"
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
        scope = config.routing_scope if config.routed_by_text else "none"
        rows["activations"] = str(config.n_activations)
        rows["routing scope, temperature"] = f"{scope}, {checkpoint.tau:g}"
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
    losses = _series(metrics, "train/loss")
    if losses:
        (_, first), (step, last) = min(losses.items()), max(losses.items())
        rows.append((f"training loss, first and at step {step:,}", f"{first:.4f}, {last:.4f}"))
    if speeds := _series(metrics, "train/tokens_per_sec"):
        rows.append(("tokens a second, median", f"{statistics.median(speeds.values()):,.0f}"))
    return rows


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Step -> value, where it was logged as a number."""
    return {row["step"]: row[key] for row in metrics if isinstance(row.get(key), int | float)}


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


def _source(name: str, source: SourceConfig, manifests: Mapping[str, Mapping[str, Any] | None]) -> tuple[str, ...]:
    shares = name, f"{source.mix:.0%}", f"{source.mix_end:.0%}"
    manifest = manifests.get(name)
    if manifest is None:
        return *shares, "", "", "not known: its manifest is damaged" if name in manifests else "", ""
    origin, counts = manifest["source"], [f"{manifest[key]:,}" for key in ("tokens", "documents")]
    called = [str(origin[key]) for key in ("dataset", "config", "split") if origin.get(key)]
    if not called:
        files = [Path(file["path"]).name for file in origin.get("files", [])]
        called = files[:MOST_FILES] + [f"and {len(files) - MOST_FILES:,} more"] * (len(files) > MOST_FILES)
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
            # Of bytes, where they are known: perplexities of other tokenizers are of other tokens.
            key = "bits_per_byte" if values.get("bits_per_byte") is not None else "perplexity"
            error = values.get(f"{key}_stderr")
            rows.append((source, key.replace("_", " "), f"{values[key]:.4f}", "" if error is None else f"{error:.4f}"))
    return rows


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown; nothing without rows."""
    lines = [titles, ["---"] * len(titles), *rows] if rows else []
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
