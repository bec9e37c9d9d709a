"""What an analysis costs: python benchmarks/analysis.py [--json FILE] [--documents N] [--tokens N]

A model of the paper's size (28 layers of 4,096 neurons, 151,669 tokens) with random weights is written in the layout of
the published checkpoints and analysed as ``polyglu analyze`` does, in a process of its own. Told are the seconds of the
whole command, those in the model's forward passes, the rest, and the largest resident memory of the process: seconds by
the clock, and of all cores together, for the clock also counts what other programs take.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import json as json_module
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import describe_machine, say
from rich.console import Console
from rich.table import Table

from polyglu.errors import run_command
from polyglu.files import write_json
from polyglu.interpretability.run_analysis import TextSettings, analyze_checkpoint
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model, published_name

GOAL_SECONDS, GOAL_BYTES = 60, 6 * 2**30
"""Besides forward passes; and in all."""
CLOCKS: dict[str, Callable[[], float]] = {"by the clock": time.perf_counter, "of all cores": time.process_time}
NAMES = (
    (r"^embed_tokens\.", "embeddings."),
    (r"^layers\.", "model_core."),
    (r"\.input_layernorm\.weight$", ".rmsnorm_1.gama"),
    (r"\.post_attention_layernorm\.weight$", ".rmsnorm_2.gama"),
    (r"\.self_attn\.([qk])_norm\.weight$", r".gqa.rmsnorm_\1.gama"),
    (r"\.self_attn\.([qkvo])_proj\.", r".gqa.W_\1."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".polyglu.W_\1."),
    (r"\.mlp\.router\.hidden\.", ".polyglu.gate_net.0."),
    (r"\.mlp\.router\.out\.", ".polyglu.gate_net.2."),
    (r"\.mlp\.", ".polyglu."),
    (r"^norm\.weight$", "rmsnorm.gama"),
)
"""This project's names -> the published ones."""


def main(
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    documents: Annotated[int, typer.Option(help="Of each kind.", min=2)] = TextSettings.documents,
    tokens: Annotated[int, typer.Option(help="Of each document.", min=2)] = TextSettings.tokens,
) -> None:
    """Measure; print a table."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint = Path(place) / "portable_step19531.pt"
        for task, arguments in (("write", []), ("analyse", [str(documents), str(tokens)])):
            say(task)
            command = [sys.executable, __file__, task, str(checkpoint), *arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = json_module.loads(output.splitlines()[-1])
    machine = describe_machine() | {"threads": torch.get_num_threads()}
    table = Table("", *CLOCKS, "goal", title=", ".join(f"{key} {value}" for key, value in machine.items()))
    whole, forward = results["whole"], results["forward"]
    besides = {kind: whole[kind] - forward[kind] for kind in CLOCKS}
    rows = {"whole command": (whole, ""), "forward passes": (forward, "")}
    rows["besides forward passes"] = (besides, f"{GOAL_SECONDS} s")
    for name, (seconds, goal) in rows.items():
        table.add_row(name, *(f"{seconds[kind]:.1f} s" for kind in CLOCKS), goal)
    table.add_row("largest resident memory", f"{results['bytes'] / 2**30:.2f} GiB", "", f"{GOAL_BYTES / 2**30:.0f} GiB")
    Console().print(table)
    if json is not None:
        write_json(json, {"machine": machine, "documents": documents, "tokens": tokens, **results})


def write(checkpoint: Path) -> None:
    """Write the checkpoint; router and preferences are large enough to matter."""
    model = create_model(ModelConfig())
    published: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("alpha", "router.out.weight")):
            weight.normal_(std=0.05 if name.endswith("alpha") else 1.0)
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        published[name] = weight
    assert {published_name(name) for name in published} == set(model.state_dict())
    torch.save({"model": published, "step": 19531, "tau": 0.1}, checkpoint)


def analyse(checkpoint: Path, documents: int, tokens: int) -> None:
    """Analyse it, with a clock around the forward passes."""
    features, forward = PolychromaticLM.features, dict.fromkeys(CLOCKS, 0.0)

    def timed(*arguments: Any, **options: Any) -> Any:
        started = {kind: clock() for kind, clock in CLOCKS.items()}
        result = features(*arguments, **options)
        for kind, clock in CLOCKS.items():
            forward[kind] += clock() - started[kind]
        return result

    PolychromaticLM.features = timed  # type: ignore[method-assign]
    started = {kind: clock() for kind, clock in CLOCKS.items()}
    settings = TextSettings(documents=documents, tokens=tokens)
    analyze_checkpoint(checkpoint, checkpoint.parent / "figures", settings=settings)
    whole = {kind: clock() - started[kind] for kind, clock in CLOCKS.items()}
    n_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json_module.dumps({"whole": whole, "forward": forward, "bytes": n_bytes}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["analyse"]:
        analyse(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        run_command(lambda: typer.run(main))
