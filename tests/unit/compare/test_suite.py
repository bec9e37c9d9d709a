"""Suites: what follows from the file, and what is refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polyglu.compare.suite import load_suite, nearest_d_ff, run_config
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig
from polyglu.model.feed_forward import PolyGLU
from polyglu.model.model import create_model
from polyglu.training.estimate import count_parameters

ROOT = Path(__file__).parents[3]
BASE = {
    "model": {"vocab_size": 64, "d_model": 16, "d_ff": 24, "n_layers": 1, "seq_length": 32},
    "training": {"seed": 4},
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    suite = {
        "base": str(folder / "base.yaml"),
        "model": {"n_q_heads": 2, "n_kv_heads": 1, "head_dim": 8},
        "training": {"learning_rate": 0.01, "warmup_steps": 3},
        "variants": {
            "swiglu": {"model": {"ffn": "swiglu"}},
            "matched": {"model": {"ffn": "swiglu"}, "match_parameters": "causal"},
            "causal": {"model": {"routing_scope": "causal"}, "training": {"learning_rate": 0.02}},
        },
        "seeds": [0, 1],
        "budget": {"tokens": 1000},
        "validation": {"a": "data/heldout"},
    } | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in suite.items() if value is not None}, sort_keys=False))
    return path


def test_a_run_follows_from_base_suite_and_variant(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path))
    config = run_config(suite, "causal", 7, 30, tmp_path / "run")
    assert (config.model.d_model, config.model.n_q_heads, config.model.routing_scope) == (16, 2, "causal")
    settings = config.training
    assert (settings.learning_rate, settings.warmup_steps, settings.seed, settings.total_steps) == (0.02, 3, 7, 30)
    assert settings.resume_from == "auto" and settings.run_dir == str(tmp_path / "run")
    assert run_config(suite, "swiglu", 7, 30, tmp_path).training.learning_rate == 0.01


@pytest.mark.parametrize("d_model,d_ff,k", [(16, 24, 4), (64, 100, 6), (512, 1536, 2)])
def test_the_matched_width_is_the_nearest(d_model: int, d_ff: int, k: int) -> None:
    shape = {"vocab_size": 64, "d_model": d_model, "d_ff": d_ff, "n_layers": 2}
    goal = count_parameters(ModelConfig(**shape, n_activations=k)).total
    plain = ModelConfig(**shape, ffn="swiglu")

    def distance(width: int) -> int:
        return abs(count_parameters(plain.model_copy(update={"d_ff": width})).total - goal)

    found = nearest_d_ff(plain, goal)
    assert found > d_ff and distance(found) <= min(distance(found - 1), distance(found + 1))


def changed_variants(**changes: Any) -> dict[str, Any]:
    return {"variants": {"swiglu": {"model": {"ffn": "swiglu"}}, "other": {}, **changes}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budjet": {"tokens": 3}}, "unknown key 'budjet'; did you mean 'budget'?"),
        (changed_variants(x={"modle": {}}), "unknown key 'variants.x.modle'; did you mean 'model'?"),
        (changed_variants(x={"model": {"fnn": "geglu"}}), "variant x: unknown key 'model.fnn'; did you mean 'ffn'?"),
        (changed_variants(x={"model": {"ffn": "relu"}}), "variant x: model.ffn: .* got 'relu'"),
        ({"variants": {"a": {}, "b": {}}}, "reference is 'swiglu', which is no variant; add one with .*a, b"),
        ({"variants": {"swiglu": {}, "b": {}}}, "swiglu is the reference, but its ffn is 'polyglu'"),
        ({"variants": {"swiglu": {"model": {"ffn": "swiglu"}}}}, "a comparison needs two"),
        ({"budget": {"tokens": 5, "flops": 1e9}}, "exactly one of tokens, flops and seconds, got tokens and flops"),
        ({"budget": {}}, "exactly one of tokens, flops and seconds, got none"),
        ({"budget": {"tokens": -5}}, "budget.tokens: .*greater than 0, got -5"),
        ({"validation": None}, "validation is empty; name a folder"),
        ({"seeds": []}, "seeds must be different numbers, at least one"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"training": {"seed": 3}}, "training.seed follows from the suite's budget, seeds and output; remove it"),
        (changed_variants(x={"training": {"total_steps": 3}}), "variants.x.training.total_steps follows from"),
        (changed_variants(x={"model": {"seq_length": 16}}), "variants.x has model.seq_length 16, the reference 32"),
        (changed_variants(x={"training": {"grad_accum_steps": 2}}), "variants.x has rows of a step"),
        (changed_variants(x={"match_parameters": "othr"}), "'othr', which is no variant; did you mean 'other'?"),
        (changed_variants(**{"../x": {}}), "variant '../x' names a folder"),
        ({"budget": {"seconds": 9}}, "a mix that changes over the run would differ too"),
        ({"base": "nothing.yaml"}, "nothing.yaml does not exist"),
    ],
)
def test_bad_suites_are_refused_in_one_sentence(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PolygluError, match=said) as refused:
        load_suite(write(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_shipped_suites_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant of both: of the size that is said, and, made small, a model that computes."""
    monkeypatch.chdir(ROOT)
    names = {}
    for name in ("cpu", "gpu_125m"):
        suite = load_suite(Path(f"configs/suites/{name}.yaml"))
        sizes = {variant: count_parameters(config.model).total for variant, config in suite.variants.items()}
        assert abs(sizes["swiglu-matched"] - sizes["causal"]) <= 0.001 * sizes["causal"]
        if name == "gpu_125m":
            assert all(0.99 < size / 125e6 < 1.01 for size in sizes.values())
        for config in suite.variants.values():
            small = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "n_layers": 1, "n_q_heads": 2, "n_kv_heads": 1}
            model = create_model(config.model.model_copy(update={**small, "head_dim": 8}))
            model(torch.arange(12)[None]).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
        names[name] = suite.variants
    made = {
        name: next(module for module in create_small(config.model).modules() if isinstance(module, PolyGLU))
        for name, config in names["gpu_125m"].items()
        if config.model.ffn == "polyglu"
    }
    assert made["k2"].alpha.shape[1] == 2 and made["k6"].alpha.shape[1] == 6


def create_small(config: ModelConfig) -> torch.nn.Module:
    return create_model(config.model_copy(update={"vocab_size": 32, "d_model": 16, "d_ff": 24, "n_layers": 1}))
