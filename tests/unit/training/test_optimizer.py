import torch

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.config import ModelConfig, TrainingSection
from polyglu.model.model import create_model
from polyglu.training.optimizer import create_optimizer, is_decayed, parameter_groups

SMALL = ModelConfig(
    vocab_size=32, d_model=16, d_ff=24, n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=16
)


def test_only_matrices_decay() -> None:
    model = PolychromaticLM(SMALL)
    named = model.named_parameters()
    kinds = {name.removeprefix("layers.").lstrip("01."): is_decayed(name, parameter) for name, parameter in named}
    assert {name for name, decayed in kinds.items() if decayed} == {
        "embed_tokens.weight",
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "mlp.router.hidden.weight",
        "mlp.router.out.weight",
    }


def test_groups_partition_all_parameters() -> None:
    model = PolychromaticLM(SMALL)
    groups = parameter_groups(model, 0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_decay_alone_never_moves_alpha() -> None:
    """Without gradient, weight decay is all that could move a parameter."""
    model = create_model(SMALL)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.alpha.fill_(0.7)  # type: ignore[union-attr]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, TrainingSection(weight_decay=0.5, learning_rate=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_decayed(name, parameter), name


def test_alpha_decays_on_request() -> None:
    groups = parameter_groups(model := PolychromaticLM(SMALL), 0.1, alpha_decay=True)
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    plain = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    assert decayed - plain == {id(layer.mlp.alpha) for layer in model.layers}  # type: ignore[union-attr]
    settings = TrainingSection(weight_decay=0.5, learning_rate=0.1, alpha_decay=True)
    assert len(create_optimizer(model, settings).param_groups[0]["params"]) == len(decayed)
