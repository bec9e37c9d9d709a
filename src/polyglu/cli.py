"""The command ``polyglu``: one verb a stage, the same functions as ``python -m src.<stage>``.

Only the stage that is called is imported, so that ``polyglu --help`` answers at once.
"""

import sys
from importlib import import_module

import typer

from polyglu.errors import run_command

STAGES = {
    "demo": ("polyglu.demo", "Run the whole system on embedded data, on the CPU, in minutes."),
    "data": ("polyglu.data", "Tokenise documents; check, join and look at tokenised data."),
    "train": ("polyglu.training.train", "Pre-train a model."),
    "sft": ("polyglu.sft.sft", "Fine-tune a model on conversations."),
    "eval": ("polyglu.evaluation.run_eval", "Evaluate a checkpoint with lm-evaluation-harness."),
    "compare-evals": ("polyglu.eval_comparison", "Compare two evaluations, with standard errors."),
    "compare": ("polyglu.compare.run", "Train variants under one budget and say which is better."),
    "analyze": ("polyglu.interpretability.run_analysis", "Draw which activations a checkpoint's neurons choose."),
    "ablate": ("polyglu.interpretability.run_ablation", "Measure what a trained model loses without its routing."),
    "generate": ("polyglu.generate", "Continue prompts."),
    "chat": ("polyglu.chat", "Talk to a fine-tuned checkpoint."),
    "export": ("polyglu.export.export_folder", "Write a checkpoint as a folder that transformers loads."),
    "import": ("polyglu.export.import_folder", "Turn such a folder, or a published checkpoint, into a portable file."),
}
"""Verb -> (module that has its ``main``, help)."""

DATA_VERBS = {
    "tokenize": ("polyglu.data.tokenize_dataset", "Tokenise documents from the hub or from files."),
    "train-tokenizer": ("polyglu.data.train_tokenizer", "Train a small BPE tokenizer on local files."),
    "inspect": ("polyglu.data.inspect", "Show what tokenised data holds."),
    "verify": ("polyglu.data.verify", "Check every bit of tokenised data."),
    "merge": ("polyglu.data.merge", "Join the shards of a source."),
    "report": ("polyglu.data_report", "Lengths, cut windows, repeats and samples of tokenised data."),
}
"""Verbs of ``polyglu data``."""


def build_app(arguments: list[str]) -> typer.Typer:
    """Make the command line; stages other than the one named first in ``arguments`` have their help only."""
    app = _group("Train language models whose feed-forward neurons choose among activation functions.")
    called = arguments[0] if arguments else None
    for verb, (module, text) in STAGES.items():
        if verb == "data":
            data = _group(text)
            for inner, (inner_module, inner_text) in DATA_VERBS.items():
                _add(data, inner, inner_module, inner_text, imported=arguments[:2] == [verb, inner])
            app.add_typer(data, name=verb, help=text)
        else:
            _add(app, verb, module, text, imported=verb == called)
    return app


def main() -> None:
    """Entry point of the command ``polyglu``."""
    run_command(lambda: build_app(sys.argv[1:])(prog_name="polyglu"))


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _add(app: typer.Typer, verb: str, module: str, text: str, imported: bool) -> None:
    app.command(verb, help=text)(import_module(module).main if imported else lambda: None)
