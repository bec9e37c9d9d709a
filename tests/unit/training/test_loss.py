import pytest
import torch
import torch.nn.functional as F

from polyglu.data.dataloader import IGNORED
from polyglu.model.config import ModelConfig
from polyglu.model.model import create_model
from polyglu.training import loss as loss_module
from polyglu.training.loss import summed_cross_entropy

SMALL = ModelConfig(
    vocab_size=37, d_model=16, d_ff=24, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim=8, seq_length=32
)


@pytest.mark.parametrize("at_once", [1, 37 * 5, 37 * 7, 10**9])
def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    model, features = create_model(SMALL), torch.randn(21, 16, requires_grad=True)
    targets = torch.randint(0, 37, (21,))
    targets[::4] = IGNORED
    expected = F.cross_entropy(features @ model.embed_tokens.weight.T, targets, ignore_index=IGNORED, reduction="sum")
    wanted = torch.autograd.grad(expected, (features, model.embed_tokens.weight))
    actual = summed_cross_entropy(model, features, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, (features, model.embed_tokens.weight)), wanted)
