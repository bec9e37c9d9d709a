"""The whole system on embedded data, on the CPU: ``make demo`` or ``polyglu demo``.

    corpus ─► tokenize ─► pretrain (killed half-way, resumed) ─► sft ─► evaluate base, fine-tuned ─► analyze ─► report

Each stage notes the SHA-256 of what it read. Run again, a stage is redone only if an output is missing or an input has
other bytes. Training and fine-tuning run as the same commands that a person would type.
"""

import logging
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from polyglu.config_file import read_yaml
from polyglu.data.embedded import write_embedded_corpus
from polyglu.data.embedded_tokens import SOURCES, tokenize_embedded
from polyglu.errors import PolygluError, run_command
from polyglu.files import read_json, read_rows, sha256, write_json, write_text
from polyglu.interpretability import FIGURES, STATS_FILE
from polyglu.logs import configure_logging, console

logger = logging.getLogger(__name__)

TYPICAL_SECONDS = {"corpus": 5, "tokenize": 5, "pretrain": 90, "sft": 100, "evaluate": 30, "analyze": 5, "report": 5}
"""On two CPU cores; for the time left."""
RUNNING = 1.0
"""Seconds between looks at a running training process."""


@dataclass(frozen=True)
class DemoPaths:
    """Where everything of a demo run lies."""

    root: Path
    configs: Path

    @property
    def raw(self) -> Path:
        """Embedded corpus."""
        return self.root / "data/raw"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer trained on the corpus."""
        return self.root / "data/tokenizer"

    @property
    def base(self) -> Path:
        """Pre-trained model."""
        return self.root / "checkpoints/portable_final.pt"

    @property
    def tuned(self) -> Path:
        """Fine-tuned model."""
        return self.root / "checkpoints_sft/sft_final.pt"

    def tokenized(self, source: str) -> Path:
        """Token chunks of a source."""
        return self.root / "data/tokenized" / source

    def results(self, name: str) -> Path:
        """Evaluation results: ``pretrain`` or ``sft``."""
        return self.root / f"results/{name}_eval.json"


@dataclass(frozen=True)
class Stage:
    """One step of the demo: what it reads, what it makes, how."""

    name: str
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    run: Callable[[], None]


def main(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("runs/demo"),
    configs: Annotated[Path, typer.Option(help="Folder with train.yaml and sft.yaml.")] = Path("configs/tiny"),
) -> None:
    """Run the whole system on embedded data, on the CPU."""
    configure_logging()
    run_demo(DemoPaths(output, configs))


def run_demo(paths: DemoPaths) -> None:
    """Run the stages that are not up to date, then show the table."""
    stages = make_stages(paths)
    state_file = paths.root / "stages.json"
    state: dict[str, Any] = read_json(state_file) if state_file.exists() else {}
    for index, stage in enumerate(stages):
        inputs = {str(path): sha256(path) for path in stage.inputs}
        done = state.get(stage.name, {})
        heading = f"[{index + 1}/{len(stages)}] {stage.name}"
        if done.get("inputs") == inputs and all(path.exists() for path in stage.outputs):
            logger.info("%s: up to date", heading)
            continue
        left = sum(TYPICAL_SECONDS[later.name] for later in stages[index:])
        logger.info("%s: about %d s; the demo ends in about %d s", heading, TYPICAL_SECONDS[stage.name], left)
        started = time.monotonic()
        stage.run()
        state[stage.name] = {"inputs": inputs, "seconds": round(time.monotonic() - started, 1)}
        write_json(state_file, state)
    console().print(summary_table(summary(paths, state)))
    console().print(f"report: {paths.root / 'report.html'}", soft_wrap=True)


def make_stages(paths: DemoPaths) -> list[Stage]:
    """Stages in their order."""
    train_config, sft_config = paths.configs / "train.yaml", paths.configs / "sft.yaml"
    raw = [paths.raw / f"{name}.jsonl" for name in SOURCES]
    manifests = [paths.tokenized(source) / "manifest.json" for source in SOURCES]
    heldout = [paths.raw / f"heldout_{name}.jsonl" for name in SOURCES]
    test = paths.raw / "arithmetic_test.jsonl"
    figures = paths.root / "figures"
    results = [paths.results("pretrain"), paths.results("sft")]
    return [
        Stage("corpus", [], [*raw, *heldout, test, paths.raw / "sft.jsonl"], lambda: _write_corpus(paths)),
        Stage("tokenize", raw, [*manifests, paths.tokenizer / "tokenizer.json"], lambda: _tokenize(paths)),
        Stage("pretrain", [train_config, *manifests], [paths.base], lambda: _pretrain(paths, train_config)),
        Stage("sft", [sft_config, paths.base, paths.raw / "sft.jsonl"], [paths.tuned], lambda: _sft(paths, sft_config)),
        Stage("evaluate", [paths.base, paths.tuned, test, *heldout], results, lambda: _evaluate(paths)),
        Stage("analyze", [paths.base], [figures / name for name in (*FIGURES, STATS_FILE)], lambda: _analyze(paths)),
        Stage("report", [*results, figures / STATS_FILE], [paths.root / "report.html"], lambda: _report(paths)),
    ]


def _write_corpus(paths: DemoPaths) -> None:
    files = write_embedded_corpus(paths.raw)["files"]
    logger.info("corpus: %s", ", ".join(f"{name} {file['bytes'] / 1e6:.2f} MB" for name, file in sorted(files.items())))


def _tokenize(paths: DemoPaths) -> None:
    vocab_size = read_yaml(paths.configs / "train.yaml")["model"]["vocab_size"]
    tokenize_embedded(paths.raw, SOURCES, vocab_size, paths.tokenizer, paths.tokenized("."))


def _pretrain(paths: DemoPaths, config: Path) -> None:
    """Train as a process of its own, kill it half-way as a pre-empted machine would, and run the same command again."""
    overrides = [f"data.sources.{name}.path={paths.tokenized(name)}" for name in SOURCES]
    command = _training_command("polyglu.training.train", config, paths.root, paths.base.parent, overrides)
    settings = read_yaml(config)["training"]
    kill_after = settings["total_steps"] // 2
    if not paths.base.exists() and _last_step(paths.root) < kill_after:
        process = subprocess.Popen(command)
        while process.poll() is None and _last_step(paths.root) < kill_after:
            time.sleep(RUNNING)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            logger.info("killed (SIGKILL) after step %d; now the same command again", _last_step(paths.root))
    _run(command)


def _sft(paths: DemoPaths, config: Path) -> None:
    overrides = [f"data.files=[{paths.raw / 'sft.jsonl'}]", f"data.tokenizer={paths.tokenizer}"]
    overrides.append(f"training.init_from={paths.base}")
    _run(_training_command("polyglu.sft.sft", config, paths.root / "sft", paths.tuned.parent, overrides))


def _training_command(module: str, config: Path, run_dir: Path, checkpoint_dir: Path, sets: list[str]) -> list[str]:
    sets = [*sets, f"training.run_dir={run_dir}", f"training.checkpoint_dir={checkpoint_dir}"]
    return [sys.executable, "-m", module, "--config", str(config), *(part for one in sets for part in ("--set", one))]


def _run(command: list[str]) -> None:
    code = subprocess.run(command, check=False).returncode
    if code:
        raise PolygluError(f"{command[2]} ended with exit code {code}; its own message is above.")


def _evaluate(paths: DemoPaths) -> None:
    from polyglu.evaluation.run_eval import EvalSettings, evaluate_checkpoint

    heldout = {name: paths.raw / f"heldout_{name}.jsonl" for name in SOURCES}
    runs = (("pretrain", paths.base, "demo_arithmetic"), ("sft", paths.tuned, "demo_arithmetic_chat"))
    for name, checkpoint, task in runs:
        settings = EvalSettings(
            checkpoint=checkpoint,
            tasks=[task],
            perplexity=heldout,
            data_dir=paths.raw,
            perplexity_tokens=30_000,
            apply_chat_template=name == "sft",
        )
        evaluate_checkpoint(settings, paths.results(name))
        logger.info("%s: %.1f%% of the held-out problems", name, 100 * _accuracy(paths, name)["exact_match"])


def _analyze(paths: DemoPaths) -> None:
    from polyglu.interpretability.run_analysis import analyze_checkpoint

    analyze_checkpoint(paths.base, paths.root / "figures")


def _report(paths: DemoPaths) -> None:
    from polyglu.report import build_report
    from polyglu.training.metrics import EVENTS_FILE, read_events

    state = read_json(paths.root / "stages.json")
    page = build_report(
        title="PolyGLU demo",
        lead="A small model, trained on embedded data and fine-tuned on arithmetic, from first step to answers.",
        stages=summary(paths, state),
        metrics=read_rows(paths.root / "metrics.jsonl"),
        sft_metrics=read_rows(paths.root / "sft/metrics.jsonl"),
        events=[event for folder in (paths.root, paths.root / "sft") for event in read_events(folder / EVENTS_FILE)],
        figures=[paths.root / "figures" / name for name in FIGURES],
        samples=[sample for name in ("pretrain", "sft") for sample in _samples(name, read_json(paths.results(name)))],
        results={name: read_json(paths.results(name)) for name in ("pretrain", "sft")},
        settings=read_yaml(paths.root / "config.yaml"),
        versions=read_json(paths.results("sft"))["versions"],
    )
    write_text(paths.root / "report.html", page)


def summary(paths: DemoPaths, state: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a stage: name, seconds, loss first -> last, accuracy, routing entropy; None where it does not apply."""
    rows = []
    for stage in make_stages(paths):
        row: dict[str, Any] = {"name": stage.name, "seconds": state.get(stage.name, {}).get("seconds")}
        folder = {"pretrain": paths.root, "sft": paths.root / "sft"}.get(stage.name)
        metrics = read_rows(folder / "metrics.jsonl") if folder else []
        if metrics:
            row["loss"] = (metrics[0]["train/loss"], metrics[-1]["train/loss"])
            row["entropy"] = (metrics[-1]["routing_entropy/mean"], metrics[-1]["dynamic_routing_entropy/mean"])
        if stage.name == "evaluate" and paths.results("sft").exists():
            row["accuracy"] = tuple(_accuracy(paths, name)["exact_match"] for name in ("pretrain", "sft"))
            row["most_frequent_answer"] = most_frequent_share(paths.raw / "arithmetic_test.jsonl")
        rows.append(row)
    return rows


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows of ``summary``."""
    table = Table(title="demo")
    for heading in ("stage", "seconds", "loss first → last", "accuracy base → fine-tuned", "entropy static / dynamic"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in rows:
        loss, accuracy, entropy = row.get("loss"), row.get("accuracy"), row.get("entropy")
        table.add_row(
            row["name"],
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            f"{loss[0]:.2f} → {loss[1]:.2f}" if loss else "",
            f"{accuracy[0]:.1%} → {accuracy[1]:.1%}" if accuracy else "",
            f"{entropy[0]:.3f} / {entropy[1]:.3f} nats" if entropy else "",
        )
    total = sum(row["seconds"] or 0 for row in rows)
    table.add_row("all", f"{total:.0f}", "", "", "", style="bold")
    share = next((row["most_frequent_answer"] for row in rows if "most_frequent_answer" in row), None)
    if share is not None:
        table.caption = f"held-out sums and differences; always giving the most frequent answer would score {share:.1%}"
    return table


def most_frequent_share(test: Path) -> float:
    """Accuracy of always giving the test's most frequent answer."""
    answers = Counter(row["answer"] for row in read_rows(test))
    return answers.most_common(1)[0][1] / answers.total()


def _accuracy(paths: DemoPaths, name: str) -> dict[str, float]:
    results: dict[str, dict[str, float]] = read_json(paths.results(name))["results"]
    metrics = next(iter(results.values()))
    return {key.partition(",")[0]: value for key, value in metrics.items()}


def _samples(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": name, **sample} for samples in results["samples"].values() for sample in samples]


def _last_step(run_dir: Path) -> int:
    rows = read_rows(run_dir / "metrics.jsonl")  # which is being written
    return rows[-1]["step"] if rows else 0


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
