"""An exported model is ours, and behaves as transformers' own causal models do."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import TAU, Exported
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from polyglu.model.architecture import PolychromaticLM
from polyglu.model.generation import generate
from polyglu.model.model import load_checkpoint

Pair = Callable[..., tuple[PolychromaticLM, PreTrainedModel]]
CAUSAL = {"routing_scope": "causal"}
KINDS = [
    CAUSAL, {"routing_scope": "document"}, {"routing_scope": "sequence"},
    *({**CAUSAL, "n_activations": k} for k in (1, 2, 3, 5, 6)),
    *({**CAUSAL, "routing": part} for part in ("static", "dynamic")),
    {"routing_scope": "document", "routing": "static"},
    *({"ffn": kind} for kind in ("swiglu", "geglu", "reglu", "tanhglu")),
]  # fmt: skip
SCOPES = KINDS[:2]
LENGTH = 14


def ids_of(rows: int = 2, seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 270, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, pads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that end as ``ids`` do, the first tokens of each replaced by padding; and the mask."""
    mask = torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def no_end(model: PreTrainedModel, **settings: Any) -> dict[str, Any]:
    return {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10, "pad_token_id": 0, **settings}


@torch.no_grad()
@pytest.mark.parametrize("settings", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_logits_are_ours(pair: Pair, settings: dict[str, Any]) -> None:
    ours, theirs = pair(**settings)
    ids = ids_of()
    expected = ours(ids, tau=TAU)
    assert theirs.training is False and expected.std() > 0.1
    torch.testing.assert_close(theirs(ids).logits, expected, atol=5e-6, rtol=0)
    assert (ours(ids, tau=1.0) - expected).abs().max() > 1e-3 or "ffn" in settings or settings.get("n_activations") == 1


def test_the_code_needs_no_polyglu(pair: Pair, exported: Exported) -> None:
    _, theirs = pair(**CAUSAL)
    folder = exported(**CAUSAL)[1]
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert "polyglu." not in "".join(line for file in folder.glob("*.py") for line in imports(file))
    package = type(theirs).__module__.rpartition(".")[0]
    for module in ("modeling_polychromatic", "layers_polychromatic", "layers", "activations"):
        source = inspect.getsource(sys.modules[f"{package}.{module}"])
        assert source == (folder / f"{module}.py").read_text()


def imports(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]


@torch.no_grad()
@pytest.mark.parametrize("settings", [*SCOPES, {"ffn": "swiglu"}], ids=["causal", "document", "swiglu"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_is_invisible_and_tokens_are_ours(pair: Pair, settings: dict[str, Any], use_cache: bool) -> None:
    """Whatever use_cache says: under document scope it would be wrong, and is not used."""
    ours, theirs = pair(**settings)
    padded, mask = left_padded(ids_of(3), [0, 5, 9])
    rows = [row[keep.bool()].tolist() for row, keep in zip(padded, mask, strict=True)]
    logits = theirs(padded, attention_mask=mask).logits
    for row, of_row in zip(rows, logits, strict=True):
        alone = ours(torch.tensor([row]), tau=TAU)[0]
        torch.testing.assert_close(of_row[-len(row) :], alone, atol=5e-6, rtol=0)
    right = theirs(padded.flip(1), attention_mask=mask.flip(1)).logits
    for row, of_row in zip(rows, right, strict=True):
        alone = ours(torch.tensor([row[::-1]]), tau=TAU)[0]
        torch.testing.assert_close(of_row[: len(row)], alone, atol=5e-6, rtol=0)
    expected = generate(ours, rows, max_new_tokens=10, tau=TAU, eos_ids=[])
    new = theirs.generate(padded, attention_mask=mask, **no_end(theirs, use_cache=use_cache))
    assert new[:, LENGTH:].tolist() == expected


WAYS = [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20},
    {"do_sample": True, "num_return_sequences": 3},
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_every_way_of_decoding_is_the_same_with_a_cache(pair: Pair, how: dict[str, Any]) -> None:
    _, theirs = pair(**CAUSAL)
    padded, mask = left_padded(ids_of(), [4, 0])
    results = []
    for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        results.append(theirs.generate(padded, attention_mask=mask, **no_end(theirs, **cache, **how)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("drafts", ["of another model", "of itself", "of the prompt"])
def test_drafted_tokens_change_nothing(pair: Pair, drafts: str) -> None:
    """Assisted decoding rejects drafts, and crops the cache."""
    _, theirs = pair(**CAUSAL)
    assistant = {"of another model": pair(ffn="swiglu")[1], "of itself": theirs}.get(drafts)
    how = {"prompt_lookup_num_tokens": 3} if assistant is None else {"assistant_model": assistant}
    ids = ids_of(rows=1).repeat(1, 2)
    expected = theirs.generate(ids, **no_end(theirs))
    assert torch.equal(theirs.generate(ids, **no_end(theirs, **how)), expected)


@torch.no_grad()
def test_static_cache_goes_on_and_begins_again(pair: Pair) -> None:
    _, theirs = pair(**CAUSAL)
    padded, mask = left_padded(ids_of(), [4, 0])
    whole = theirs(padded, attention_mask=mask).logits
    cache = StaticCache(config=theirs.config, max_cache_len=LENGTH + 3)
    for _ in range(2):
        theirs(padded[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        for end in range(7, LENGTH + 1):
            step = theirs(padded[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            torch.testing.assert_close(step.logits, whole[:, end - 1 : end], atol=5e-6, rtol=0)
        cache.reset()


@torch.no_grad()
def test_cache_goes_on_crops_reorders_and_repeats(pair: Pair) -> None:
    _, theirs = pair(**CAUSAL)
    ids, whole = ids_of(), theirs(ids_of()).logits
    cache = theirs(ids[:, :6], use_cache=True).past_key_values
    assert cache.get_seq_length() == 6 and cache.is_croppable
    torch.testing.assert_close(theirs(ids[:, 6:], past_key_values=cache).logits, whole[:, 6:], atol=5e-6, rtol=0)
    cache.crop(-4)
    torch.testing.assert_close(theirs(ids[:, 10:], past_key_values=cache).logits, whole[:, 10:], atol=5e-6, rtol=0)
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([1, 1]))
    again = theirs(ids[[1, 1], 10:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[[1, 1], 10:], atol=5e-6, rtol=0)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    again = theirs(ids[[1, 1], 10:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[[1, 1], 10:], atol=5e-6, rtol=0)
    cache.reset()
    torch.testing.assert_close(theirs(ids, past_key_values=cache).logits, whole, atol=5e-6, rtol=0)


@torch.no_grad()
def test_generation_goes_on_from_a_cache_and_from_embeddings(pair: Pair) -> None:
    _, theirs = pair(**CAUSAL)
    ids = ids_of()
    whole = theirs.generate(ids, **no_end(theirs))
    cache = DynamicCache(config=theirs.config)
    first = theirs.generate(ids, past_key_values=cache, **no_end(theirs, max_new_tokens=4))
    assert torch.equal(theirs.generate(first, past_key_values=cache, **no_end(theirs, max_new_tokens=6)), whole)
    embeds = theirs.get_input_embeddings()(ids)
    assert torch.equal(theirs(inputs_embeds=embeds).logits, theirs(ids).logits)
    assert torch.equal(theirs.generate(inputs_embeds=embeds, **no_end(theirs)), whole[:, LENGTH:])


@torch.no_grad()
def test_outputs(pair: Pair, exported: Exported) -> None:
    ours, theirs = pair(**CAUSAL)
    ids = ids_of()
    assert [*inspect.signature(theirs.forward).parameters][:2] == ["input_ids", "attention_mask"]
    out = theirs(ids, output_hidden_states=True, return_dict=True)
    layers, width = ours.config.n_layers, ours.config.d_model
    assert [state.shape for state in out.hidden_states] == [(2, LENGTH, width)] * (layers + 1)
    assert torch.equal(theirs(ids, return_dict=False)[0], out.logits)
    kept = torch.tensor([[2, 5], [0, 13]])
    for keep, expected in ((1, out.logits[:, -1:]), (kept, out.logits[torch.arange(2)[:, None], kept])):
        # A product of fewer rows may be summed in another order.
        torch.testing.assert_close(theirs(ids, logits_to_keep=keep).logits, expected, atol=1e-6, rtol=0)
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    assert torch.equal(theirs(ids, position_ids=positions).logits, out.logits)
    assert (theirs(ids, position_ids=positions * 2).logits - out.logits).abs().max() > 1e-3
    folder = exported(**CAUSAL)[1]
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(base(ids).last_hidden_state, out.hidden_states[-1])
    eager = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    seen = eager(ids, output_attentions=True)
    torch.testing.assert_close(seen.logits, out.logits, atol=5e-6, rtol=0)
    assert [weights.shape for weights in seen.attentions] == [(2, ours.config.n_q_heads, LENGTH, LENGTH)] * layers
    assert not seen.attentions[0].triu(1).any()


def test_training(pair: Pair) -> None:
    """The loss is the mean over shifted labels, without noise; recomputing changes no gradient; the head is tied."""
    ours, theirs = pair(**CAUSAL)
    ids, labels = ids_of(), ids_of().clone()
    labels[:, :3] = -100
    gradients = []
    theirs.train()
    for recompute in (False, True):
        if recompute:
            theirs.activation_checkpointing_enable()
        theirs.zero_grad()
        loss = theirs(ids, labels=labels).loss
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in theirs.named_parameters()})
    theirs.activation_checkpointing_disable()
    theirs.eval()
    logits = ours(ids, tau=TAU)[:, 2:-1]
    ours.zero_grad()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[0][f"model.{name}"], parameter.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradients[1][f"model.{name}"], gradients[0][f"model.{name}"])
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


@torch.no_grad()
def test_bf16_keeps_positions_and_routing_in_fp32(pair: Pair, exported: Exported) -> None:
    ours, _ = pair(**CAUSAL)
    half = AutoModelForCausalLM.from_pretrained(exported(**CAUSAL)[1], trust_remote_code=True, dtype=torch.bfloat16)
    kinds = {name.split("mlp.")[-1]: weight.dtype for name, weight in half.named_parameters()}
    assert kinds["alpha"] == kinds["beta"] == kinds["router.out.weight"] == torch.float32
    assert kinds["gate_proj.weight"] == torch.bfloat16 and not list(half.buffers())
    ids, expected = ids_of(), ours(ids_of(), tau=TAU)
    for model in (half, half.to(torch.bfloat16)):  # the second casts all
        logits = model(ids).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().mean() < 0.05 * expected.std()


@torch.no_grad()
def test_layers_may_lie_on_disk(pair: Pair, exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs the package accelerate")
    _, theirs = pair(**CAUSAL)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.0": "cpu"}
    where = {"device_map": parts | {"model.layers.1": "disk"}, "offload_folder": tmp_path}
    folder = exported(**CAUSAL)[1]
    offloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **where)
    assert offloaded.model.layers[1].mlp.alpha.device.type == "meta"
    assert torch.equal(offloaded(ids_of()).logits, theirs(ids_of()).logits)


@torch.no_grad()
def test_resized_and_saved_it_comes_back_everywhere(pair: Pair, exported: Exported, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(exported(**CAUSAL)[1], trust_remote_code=True)
    ids, before = ids_of(), theirs(ids_of()).logits
    theirs.resize_token_embeddings(before.shape[-1] + 10)
    after = theirs(ids).logits
    assert after.shape[-1] == before.shape[-1] + 10 and torch.equal(after[..., :-10], before)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(again(ids).logits, after)
    ours, step, tau = load_checkpoint(tmp_path)
    assert (step, tau, ours.config.vocab_size) == (11, TAU, after.shape[-1])
    torch.testing.assert_close(ours(ids, tau=tau), after, atol=5e-6, rtol=0)


def test_what_cannot_be_exact_is_refused(pair: Pair) -> None:
    _, theirs = pair(**CAUSAL)
    ids = ids_of()
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer keeps no routing sums"):
        theirs(ids, past_key_values=Cache(layers=[DynamicSlidingWindowLayer(4)] * 2))
    filled = DynamicCache(config=theirs.config)
    for index in range(theirs.config.n_layers):
        filled.update(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8), index)
    with pytest.raises(ValueError, match="begin with an empty cache"):
        theirs(ids, past_key_values=filled)
    with pytest.raises(ValueError, match="attention_mask must be"):
        theirs(ids, attention_mask=torch.ones(2, LENGTH + 1))
    with pytest.raises(ValueError, match="exactly one of"):
        theirs(ids, inputs_embeds=torch.zeros(2, LENGTH, 16))
    with pytest.raises(ValueError, match="position_ids begin again"):
        theirs(ids, position_ids=torch.arange(LENGTH)[None] % 9)
    _, document = pair(routing_scope="document")
    with pytest.raises(ValueError, match="give input_ids"):
        document.generate(inputs_embeds=document.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="no exact cache"):
        document(ids, past_key_values=DynamicCache())
    assert document(ids, use_cache=True).past_key_values is None


@torch.no_grad()
def test_new_weights_are_drawn_as_ours_are(pair: Pair) -> None:
    _, theirs = pair(**CAUSAL)
    fresh = type(theirs)(theirs.config)
    layer = fresh.model.layers[0]
    assert not layer.mlp.alpha.any() and (layer.mlp.beta == 1).all() and not layer.mlp.router.out.bias.any()
    assert layer.mlp.up_proj.weight.std() == pytest.approx(0.02, rel=0.2)
    assert layer.mlp.down_proj.weight.std() == pytest.approx(0.01, rel=0.2)  # 2 layers: 1 / sqrt(4)
