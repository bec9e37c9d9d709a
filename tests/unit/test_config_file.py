from pathlib import Path

import pytest
import yaml

from polyglu.config_file import load_config, save_config
from polyglu.data.sources import SourcesConfig
from polyglu.errors import PolygluError
from polyglu.model.config import ModelConfig, SFTConfig, TrainConfig

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {totl_steps: 5}", r"unknown key 'training.totl_steps'; did you mean 'total_steps'"),
        ("trainin: {}", r"unknown key 'trainin'; did you mean 'training'"),
        ("model: {d_modell: 5}", r"did you mean 'd_model'"),
        ("data: {sources: {a: {path: x, mix: 1, mix_end: 1, mixx: 1}}}", r"did you mean 'mix'"),
        ("training: {zzz: 5}", r"known keys: .*learning_rate"),
        ("training: {total_steps: many}", r"training.total_steps: .*integer.*'many'"),
        ("training: {total_steps: 0}", r"training.total_steps: .*greater than 0"),
        ("training: {learning_rate: -1}", r"training.learning_rate"),
        ("training: {learning_rate: .nan}", r"training.learning_rate: .*finite"),
        ("training: {tau_min: 2}", r"tau_min 2.* must not exceed tau_max"),
        ("training: {precision: fp8}", r"training.precision: .*'bf16'"),
        ("model: {n_q_heads: 5, n_kv_heads: 2}", r"n_q_heads 5 must be a multiple"),
        ("model: {head_dim: 7}", r"head_dim must be even"),
        ("model: {n_activations: 7}", r"model.n_activations"),
        ("model: {routing_scope: casual}", r"model.routing_scope: .*'causal'"),
        (
            "data: {sources: {a: {path: x, mix: 0.5, mix_end: 1}}}",
            r"'mix' of all sources must sum to 1, they sum to 0.5",
        ),
        ("data: {sources: {a: {path: x, mix: 1, mix_end: 0.9}}}", r"'mix_end' of all sources must sum to 1"),
        ("data: {sources: {}}", r"data.sources"),
        ("data: {sources: {a: {mix: 1, mix_end: 1}}}", r"data.sources.a.path: Field required"),
        ("- a\n- b", r"must be a mapping"),
        ("training: {learning_rate: true}", r"training.learning_rate: must not be true"),
        ("training: {betas: [true, 0.9]}", r"training.betas: must not be true"),
        ('training: {learning_rate: "3e-4"}', r"training.learning_rate: must be a number, got the text '3e-4'; remove"),
        ("training: {total_steps: '7'}", r"training.total_steps: must be a number, got the text '7'"),
        ("training: {betas: [0.9, '0.95']}", r"training.betas: must be a number, got the text '0.95'"),
        ('training: {micro_batch_size: "2"}', r"training.micro_batch_size: must be a number.*'2'"),
        ("training: {seed: no}", r"training.seed: must not be false"),
        ("training:\n  seed: 1\n  gumbel: true\n  seed: 2\n", r"'seed' is given twice\s.*line 4"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_bad_configs_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolygluError, match=message) as error:
        load_config(TrainConfig, path)
    assert str(path) in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolygluError, match=r"nothing\.yaml does not exist"):
        load_config(TrainConfig, tmp_path / "nothing.yaml")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {total_steps: 7, log_every: 3}")
    config = load_config(TrainConfig, path, ["training.total_steps=9", "model.routing_scope=causal"])
    assert (config.training.total_steps, config.training.log_every, config.training.seed) == (9, 3, 0)
    assert config.model.routing_scope == "causal"
    with pytest.raises(PolygluError, match="section.key=value"):
        load_config(TrainConfig, path, ["training.total_steps"])
    with pytest.raises(PolygluError, match="unknown key 'training.stesp'"):
        load_config(TrainConfig, path, ["training.stesp=1"])


def test_numbers_may_be_written_in_every_plain_way(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {learning_rate: 3e-4, weight_decay: 1, total_steps: 1_000, betas: [0, 9e-1]}")
    settings = load_config(TrainConfig, path, ["training.adam_eps=1e-7"]).training
    assert (settings.learning_rate, settings.weight_decay, settings.total_steps) == (3e-4, 1.0, 1000)
    assert (settings.betas, settings.adam_eps) == ((0.0, 0.9), 1e-7)
    with pytest.raises(PolygluError, match=r"training.seed: must be a number"):
        load_config(TrainConfig, path, ["training.seed='3'"])


def test_texts_of_digits_stay_texts_and_read_back(tmp_path: Path) -> None:
    config = load_config(TrainConfig, write(tmp_path, "training: {run_dir: '7'}\nwandb: {name: 1e5}"))
    assert (config.training.run_dir, config.wandb.name) == ("7", "1e5") and type(config.training.run_dir) is str
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml") == config


def test_sources_are_as_strict(tmp_path: Path) -> None:
    for value, said in (("true", "must not be true"), ("'0.5'", "must be a number")):
        path = write(tmp_path, f"sources: {{a: {{output: o, files: [x], max_bad_share: {value}}}}}")
        with pytest.raises(PolygluError, match=f"sources.a.max_bad_share: {said}"):
            load_config(SourcesConfig, path)


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(TrainConfig, None, ["training.betas=[0.8, 0.9]"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml") == config
    assert set(yaml.safe_load((tmp_path / "resolved.yaml").read_text())["training"]) == set(
        type(config.training).model_fields
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda path: str(path.name))
def test_shipped_configs_are_valid(path: Path) -> None:
    if "sources" in path.name:
        load_config(SourcesConfig, path)
    elif path.parent.name == "suites":
        from polyglu.compare.suite import SuiteConfig

        load_config(SuiteConfig, path)
    else:
        load_config(SFTConfig if "sft" in path.name else TrainConfig, path)


def test_paper_defaults() -> None:
    shipped = load_config(TrainConfig, ROOT / "configs/train_config.yaml")
    assert shipped.model == ModelConfig()
    rows = shipped.training.micro_batch_size * shipped.training.grad_accum_steps
    assert rows * shipped.model.seq_length == 524_288
    assert shipped.training == TrainConfig().training
    sft = load_config(SFTConfig, ROOT / "configs/sft_config.yaml").training
    assert (sft.learning_rate, sft.warmup_steps, sft.tau, sft.epochs) == (2e-5, 100, 0.1, 1)
