"""What a run is said to need, against counts made another way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyglu.model.config import ModelConfig, Recompute, TrainConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training import estimate
from polyglu.training.loss import LanguageModelLoss
from polyglu.training.memory import long_documents, rows_per_step

PAPER = 597_153_888
SMALL = ModelConfig(
    vocab_size=64, d_model=128, d_ff=512, n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, seq_length=128
)


def test_the_papers_numbers() -> None:
    config = TrainConfig()
    assert estimate.count_parameters(config.model) == estimate.Parameters(PAPER, 151669 * 1024)
    assert estimate.tokens_per_step(config, 1) == 524_288
    seconds = estimate.training_seconds(PAPER, 524_288, 312e12 * estimate.ASSUMED_MFU)
    assert seconds == pytest.approx(44.5, rel=0.01)  # published, on one A100


def test_disk_of_the_papers_run() -> None:
    resume, portable = 12 * PAPER, 4 * PAPER
    assert estimate.disk_need(PAPER, 3, 3, with_moments=False) == 3 * resume + 4 * portable
    assert estimate.disk_need(PAPER, 1, 2, with_moments=True) == 3 * resume + portable


def test_state_is_spread_over_ranks_as_zero_does() -> None:
    assert sum(estimate.state_bytes(100, 1, None).values()) == 1600
    second = estimate.state_bytes(100, 4, {"stage": 2, "reduce_bucket_size": 10, "overlap_comm": True})
    assert second == {"weights": 500, "gradients": 100, "moments": 200, "buckets": 80}
    first = estimate.state_bytes(100, 4, {"stage": 1, "reduce_bucket_size": 10})
    assert first == {"weights": 500, "gradients": 400, "moments": 200, "buckets": 40}


CHANGES = [
    {}, {"routing_scope": "causal"}, {"ffn": "swiglu"}, {"kernels": "reference"},
    {"kernels": "reference", "routing_scope": "causal"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "hidden"])
def test_activations_are_about_what_autograd_keeps(
    change: dict[str, str], dtype: torch.dtype, recompute: Recompute
) -> None:
    config = SMALL.model_copy(update=change)
    loss, batch = LanguageModelLoss(create_model(config), dtype, recompute), long_documents(config, 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in loss.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(batch, 0.5, None)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 0.6 < estimate.activation_bytes(config, 4, dtype, recompute) / counted < 1.4


def test_logits_count_as_many_as_exist_at_once() -> None:
    sizes = [SMALL.model_copy(update={"vocab_size": size}) for size in (1000, 2000, 2**20, 2**21)]
    small, double, most, more = (estimate.activation_bytes(config, 8, torch.float32, "none") for config in sizes)
    head = 4 * 128  # bytes of a token's row in the gradient of the head
    assert double - small == 1000 * (4 * 8 * 128 + head)
    assert more - most == 2**20 * head


def test_recomputation_keeps_one_block_and_the_inputs_of_all() -> None:
    layers = [SMALL.model_copy(update={"n_layers": count}) for count in (1, 11)]
    one, many = (estimate.activation_bytes(config, 1, torch.float32, "full") for config in layers)
    assert many - one == 10 * 128 * 128 * 4
    modes: tuple[Recompute, ...] = ("none", "hidden", "ffn", "full")
    sizes = [estimate.activation_bytes(layers[1], 1, torch.float32, mode) for mode in modes]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[1] == 11 * 4 * 512 * 128


def run(**training: object) -> TrainConfig:
    return TrainConfig(model=SMALL, training=TrainingSection(**training))  # type: ignore[arg-type]


@settings(max_examples=30)
@given(memory=st.floats(0, 1e12), flops=st.floats(1, 1e15), size=st.sampled_from([1, 2, 4, "auto"]))
def test_the_trial_is_the_largest_that_fits(memory: float, flops: float, size: int | str) -> None:
    config = run(micro_batch_size=size, grad_accum_steps=4)
    trial = estimate.choose_trial(config, memory, flops, seconds=60)
    parameters = estimate.count_parameters(trial.config.model).total

    def fits(config: TrainConfig) -> bool:
        tokens = 3 * rows_per_step(config.training) * config.model.seq_length
        needed = estimate.trial_bytes(config, parameters)
        return needed <= memory and estimate.training_seconds(parameters, tokens, flops) <= 60

    assert trial.whole_step == (trial.config == config) and trial.whole_model == (trial.config.model == config.model)
    assert fits(trial.config) or trial.config.model.d_ff == 16
    assert trial.config.model.vocab_size == 64 and trial.config.model.seq_length == 128
    if trial.whole_model:
        assert trial.whole_step or not fits(config)


def test_trials_shrink_from_the_run_to_almost_nothing() -> None:
    everything = estimate.choose_trial(run(), 1e15, 1e18, 60)
    one_micro_batch = estimate.training_seconds(estimate.count_parameters(SMALL).total, 3 * 2 * 128, 1.0)
    cut = estimate.choose_trial(run(), 1e15, 1.0, one_micro_batch)
    nothing = estimate.choose_trial(run(), 0, 1e18, 60)
    assert (everything.whole_step, cut.whole_step, cut.whole_model, nothing.whole_model) == (True, False, True, False)
    assert rows_per_step(cut.config.training) == 2
    assert estimate.count_parameters(nothing.config.model).total < 20_000
