"""How fast text is continued and scored: python benchmarks/generate.py cpu | gpu [--json FILE]

one       a prompt of 64 tokens and 128 new ones
many      64 prompts of 16 to 128 tokens and 128 new ones each (gpu: 256 of 64 to 256, and 256 new ones)
scoring   questions behind one few-shot beginning, four answers each: log-likelihoods
gsm8k     gpu: 1,319 prompts of about 900 tokens and 256 new ones each: the lengths of GSM8K, 5-shot

Beside ours stand the loop without a cache, as the published code has it (one row, every position and all logits again
for each token, the branches in memory), and transformers' ``generate`` with its cache on a Qwen3 of the same shape, its
prompts padded on the left. Weights and tokens are random: no text ends early. How turns are taken: turns.py.

The loop is timed at 24 of its positions (scoring: requests), evenly spaced, and told as a rate.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # this folder: its tokenize.py must not stand for the module of that name

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import as_table, describe_machine, told
from rich.console import Console
from speed_goals import Goal, goals_table
from steps import qwen3_config, tokens_per_second
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from turns import Build, Case, Group, Rounds, Row, Rows, Stopwatch, compare, measure_groups, start_seconds

from polyglu.errors import PolygluError, run_command
from polyglu.evaluation.scoring import Request, score
from polyglu.files import write_json
from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig
from polyglu.model.generation import generate

OURS, LOOP, QWEN3 = "cached", "loop without a cache", "transformers Qwen3, cached"
TAU = 0.1
TIMED = 24
"""Of the loop's positions or requests, evenly spaced."""
CACHE_BYTES = 40 * 2**30
"""Of a GPU's memory, for keys and values."""
DEMO = ModelConfig(
    vocab_size=1024, d_model=192, d_ff=384, n_layers=3, n_q_heads=6, n_kv_heads=3, head_dim=32, seq_length=256,
    routing_scope="causal",
)  # fmt: skip
MIDDLE = ModelConfig(
    vocab_size=16_384, d_model=512, d_ff=2048, n_layers=8, n_q_heads=8, n_kv_heads=4, head_dim=64, seq_length=512,
    routing_scope="causal",
)  # fmt: skip
PAPER = ModelConfig(routing_scope="causal")


class Kind(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


@dataclass(frozen=True)
class Requests:
    """Prompts of random tokens, and how many are added to each."""

    lengths: tuple[int, ...]
    new: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in self.lengths]

    @property
    def tokens(self) -> int:
        return self.new * len(self.lengths)


def mixed(n: int, least: int, most: int) -> tuple[int, ...]:
    """Lengths spread evenly, in no order."""
    return tuple(least + (most - least) * (7 * i % n) // n for i in range(n))


ONE, MANY = Requests((64,), 128), Requests(mixed(64, 16, 128), 128)
GPU_MANY, GSM8K = Requests(mixed(256, 64, 256), 256), Requests(mixed(1319, 800, 1000), 256)


def make_model(config: ModelConfig, device: torch.device) -> PolychromaticLM:
    with device:
        model = PolychromaticLM(config)
        model.init_weights()
    return model.eval()


def autocast(device: torch.device) -> torch.autocast:
    """fp32 on a CPU, bf16 products on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def ours(config: ModelConfig, requests: Requests, device: torch.device) -> Case:
    model, prompts = make_model(config, device), requests.prompts(config.vocab_size)
    memory = {"cache_bytes": CACHE_BYTES} if device.type == "cuda" else {}

    def case(watch: Stopwatch) -> None:
        watch.start()
        with autocast(device):
            rows = generate(model, prompts, max_new_tokens=requests.new, tau=TAU, eos_ids=(), **memory)
        watch.lap("generate")
        assert [len(row) for row in rows] == [requests.new] * len(prompts)

    return case


def looped(config: ModelConfig, requests: Requests, device: torch.device) -> Case:
    """Each of its positions is a row of its own: what stands there makes no difference to the time."""
    model = make_model(config.model_copy(update={"kernels": "reference"}), device)
    prompts = requests.prompts(config.vocab_size)
    ends = [(prompt, n) for prompt in prompts for n in range(requests.new)]
    rows = [[*prompt, *[5] * n] for prompt, n in spaced(ends)]

    def case(watch: Stopwatch) -> None:
        watch.start()
        for row in rows:
            with torch.inference_mode(), autocast(device):
                model(torch.tensor([row], device=device), tau=TAU)[0, -1].argmax().item()
        watch.lap("loop")

    return case


def spaced(cases: Sequence[Any]) -> Sequence[Any]:
    """At most ``TIMED`` of them."""
    step = -(-len(cases) // TIMED)
    return cases[step // 2 :: step]


def transformers(config: ModelConfig, requests: Requests, device: torch.device) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = Qwen3ForCausalLM(qwen3_config(config, "sdpa", use_cache=True)).to(dtype).eval()
    model.generation_config.eos_token_id = None
    prompts, longest = requests.prompts(config.vocab_size), max(requests.lengths)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in requests.lengths], device=device)
    settings = {"max_new_tokens": requests.new, "do_sample": False, "pad_token_id": 0}

    def case(watch: Stopwatch) -> None:
        watch.start()
        found = model.generate(padded, attention_mask=mask, **settings)
        watch.lap("generate")
        assert found.shape == (len(prompts), longest + requests.new)

    return case


def questions(config: ModelConfig) -> list[Request]:
    """Of one subject: a few-shot beginning of half the context, 24 questions, four answers of one token."""
    generator = torch.Generator().manual_seed(1)

    def text(n: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (n,), generator=generator).tolist()

    beginning = text(config.seq_length // 2)
    asked = [text(n) for n in mixed(24, config.seq_length // 16, config.seq_length // 4)]
    return [Request((*beginning, *question), (answer,)) for question in asked for answer in (5, 6, 7, 8)]


def scored(config: ModelConfig, device: torch.device) -> Case:
    model, requests = make_model(config, device), questions(config)

    def case(watch: Stopwatch) -> None:
        watch.start()
        with autocast(device):
            score(model, requests, TAU, description="scoring")
        watch.lap("score")

    return case


def scored_one_by_one(config: ModelConfig, device: torch.device) -> Case:
    model, requests = make_model(config, device), spaced(questions(config))

    def case(watch: Stopwatch) -> None:
        watch.start()
        for request in requests:
            with autocast(device):
                score(model, [request], TAU, description="scoring")
        watch.lap("score")

    return case


def measure_requests(
    config: ModelConfig, requests: Requests, device: torch.device, cases: Sequence[str], seconds: float
) -> Rows:
    every = len(spaced(range(requests.tokens)))
    kinds = {OURS: (ours, requests.tokens), LOOP: (looped, every), QWEN3: (transformers, requests.tokens)}
    builds: dict[str, Build] = {name: partial(kinds[name][0], config, requests, device) for name in cases}
    rows = compare(builds, device, seconds, rounds=Rounds(3, 9))
    return {name: row | {"tokens": kinds[name][1]} for name, row in rows.items()}


def measure_scoring(config: ModelConfig, device: torch.device, seconds: float) -> Rows:
    builds: dict[str, Build] = {OURS: partial(scored, config, device), LOOP: partial(scored_one_by_one, config, device)}
    rows, all_of_them = compare(builds, device, seconds, rounds=Rounds(3, 9)), questions(config)
    tokens = {OURS: len(all_of_them), LOOP: len(spaced(all_of_them))}
    return {name: row | {"tokens": tokens[name]} for name, row in rows.items()}


def cpu_groups() -> dict[str, Group]:
    device, cases = torch.device("cpu"), (OURS, LOOP, QWEN3)
    groups: dict[str, Group] = {}
    for name, config, weight in (("demo", DEMO, 1), ("512 x 8", MIDDLE, 6)):
        groups[f"one, {name}"] = Group(weight, partial(measure_requests, config, ONE, device, cases))
        groups[f"many, {name}"] = Group(2 * weight, partial(measure_requests, config, MANY, device, cases))
        groups[f"scoring, {name}"] = Group(weight, partial(measure_scoring, config, device))
    return groups


def gpu_groups() -> dict[str, Group]:
    device = torch.device("cuda")
    return {
        "one, paper": Group(2, partial(measure_requests, PAPER, ONE, device, (OURS, LOOP, QWEN3))),
        "many, paper": Group(3, partial(measure_requests, PAPER, GPU_MANY, device, (OURS, QWEN3))),
        "scoring, paper": Group(1, partial(measure_scoring, PAPER, device)),
        "gsm8k, paper": Group(6, partial(measure_requests, PAPER, GSM8K, device, (OURS,))),
    }


def faster(rows: Rows, base: str) -> float | None:
    """Rate as a multiple of another case's in the same round: the median."""
    mine, theirs = rows.get(OURS, {}), rows.get(base, {})
    if "seconds" not in mine or "seconds" not in theirs:
        return None
    return statistics.median(a / b for a, b in zip(tokens_per_second(mine), tokens_per_second(theirs), strict=True))


def of_groups(results: dict[str, Rows], kind: str, base: str) -> dict[str, float]:
    found = {group: faster(rows, base) for group, rows in results.items() if group.startswith(kind)}
    return {group: value for group, value in found.items() if value is not None}


def absolute(results: dict[str, Rows], group: str, of: str) -> dict[str, float]:
    """Tokens a second, or seconds, of ours."""
    row: Row = results.get(group, {}).get(OURS, {})
    if "seconds" not in row:
        return {}
    return {group: statistics.median(tokens_per_second(row) if of == "rate" else row["seconds"]["total"])}


def goals(results: dict[str, Rows]) -> list[Goal]:
    return [
        Goal("one request >= 10 x the loop without a cache", 10, False, of_groups(results, "one", LOOP)),
        Goal("many requests >= 60 x the loop without a cache", 60, False, of_groups(results, "many", LOOP)),
        Goal("one request faster than transformers", 1, False, of_groups(results, "one", QWEN3)),
        Goal("many requests faster than transformers", 1, False, of_groups(results, "many", QWEN3)),
        Goal("scoring >= 5 x a loop over single requests", 5, False, of_groups(results, "scoring", LOOP)),
        Goal("GPU: 256 requests >= 15,000 tokens/s", 15_000, False, absolute(results, "many, paper", "rate")),
        Goal("GPU: GSM8K's problems within 120 s", 120, True, absolute(results, "gsm8k, paper", "seconds")),
    ]


COLUMNS = {
    "seconds": lambda row, rows: told(row["seconds"]["total"]),
    "tokens or requests/s": lambda row, rows: told(tokens_per_second(row), 1),
    "start s": start_seconds,
}


def main(
    device: Annotated[Kind, typer.Argument(help="What to measure.")],
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
    seconds: Annotated[float, typer.Option(help="Budget; each case has three turns at least.")] = 280,
) -> None:
    """Measure, and print a table and the goals."""
    if device == Kind.gpu and not torch.cuda.is_available():
        raise PolygluError("generate.py gpu: there is no CUDA device here; choose cpu.")
    torch.manual_seed(0)
    machine = describe_machine(("torch", "transformers")) | {"threads": torch.get_num_threads()}
    if device == Kind.gpu:
        machine["gpu"] = torch.cuda.get_device_name()
    console, started = Console(width=150), time.perf_counter()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = measure_groups(cpu_groups() if device == Kind.cpu else gpu_groups(), seconds)
    console.print(as_table("Generation", results, COLUMNS))
    console.print(goals_table(goals(results)))
    console.print(f"load {os.getloadavg()[0]:.2f} after; {time.perf_counter() - started:.0f} s")
    if json is not None:
        machine["load_after"] = round(os.getloadavg()[0], 2)
        told_goals = [goal.as_json() for goal in goals(results)]
        write_json(json, {"machine": machine, "goals": told_goals, "results": results})


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
