"""Attention on the CPU: each document by itself equals one attention over everything under a mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyglu.model.flash_attention import attention, flash_serves
from polyglu.model.packing import Packing, Stacks

HEAD_DIM = 6


def masked(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Textbook form over the flattened rows: each token sees itself and the earlier tokens of its document."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = (document[:, None] == document).tril()
    groups = q.shape[2] // k.shape[2]
    flat_q, flat_k, flat_v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))  # [heads, N, d]
    flat_k, flat_v = (torch.stack([x[head // groups] for head in range(q.shape[2])]) for x in (flat_k, flat_v))
    scores = (flat_q @ flat_k.mT / HEAD_DIM**0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ flat_v).transpose(0, 1).reshape(q.shape)


def random_qkv(rows: int, columns: int, heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns * 10 + heads)
    kv_heads = heads // groups
    shapes = [(rows, columns, count, HEAD_DIM) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def packing_of(rows: int, columns: int, lengths: list[int] | None) -> Packing:
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    return Packing.of(torch.Size((rows, columns)), bounds, torch.device("cpu"))


cuts = st.lists(st.integers(1, 11), max_size=4, unique=True).map(lambda found: [0, *sorted(found), 12])
row_lengths = cuts.map(lambda bounds: [end - start for start, end in zip(bounds, bounds[1:], strict=False)])


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(row_lengths, min_size=1, max_size=3), heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (1, 1)]))
def test_documents_equal_masked_full_attention(rows: list[list[int]], heads: tuple[int, int]) -> None:
    lengths = [length for row in rows for length in row]
    inputs = random_qkv(len(rows), 12, *heads)
    actual = attention(*inputs, packing_of(len(rows), 12, lengths), use_flash=True)
    expected = masked(*inputs, lengths)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=1e-6, atol=1e-8
    )


LONG = [1, 2, 15, 16, 17, 249, 255, 45, 256, 44, 257, 43, 300]
"""Four rows of 300 and one document that is a row: on both sides of the steps that lengths are rounded up to."""


def test_documents_of_many_lengths_equal_masked_full_attention() -> None:
    inputs = random_qkv(5, 300, 4, 2)
    actual, expected = attention(*inputs, packing_of(5, 300, LONG), use_flash=False), masked(*inputs, LONG)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [[20, 20, 220], [240, 20], [255, 5], [1] * 260])
def test_a_document_is_the_same_to_the_bit_beside_any_others(dtype: torch.dtype, others: list[int]) -> None:
    """Even if theirs are not finite."""
    results = []
    for lengths, fill in (([40, 260], 0.0), ([40, *others], torch.nan)):
        inputs = [x.detach().to(dtype) for x in random_qkv(1, 300, 4, 2)]
        for x in inputs:
            x[:, 40:] += fill
            x.requires_grad_()
        out = attention(*inputs, packing_of(1, 300, lengths), use_flash=False)
        gradients = torch.autograd.grad(out[:, :40].square().sum(), inputs)
        results.append([x[:, :40] for x in (out, *gradients)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=30))
def test_stacks_hold_each_token_once_and_pad_with_the_documents_own(lengths: list[int]) -> None:
    stacks = Stacks.of(lengths, torch.device("cpu"))
    token = torch.arange(sum(lengths))
    assert torch.equal(stacks.tokens[stacks.places], token)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for stack in stacks.stack(torch.stack([token, document], 1)):
        assert (stack[:, 1:, 0] - stack[:, :-1, 0]).unique().tolist() in ([0], [1], [0, 1])  # in order; the last again
        assert torch.equal(stack[:, :, 1], stack[:, :1, 1].expand(stack.shape[:2]))
    assert stacks.tokens.numel() <= sum(-(-length // 16) * 16 if length < 256 else length + 63 for length in lengths)
    assert all(places % (16 if places < 256 else 64) == 0 for _, places in stacks.shapes)


def test_without_bounds_a_row_is_a_document() -> None:
    inputs = random_qkv(3, 8, 4, 2)
    by_rows, by_bounds = (
        attention(*inputs, packing_of(3, 8, lengths), use_flash=False) for lengths in (None, [8, 8, 8])
    )
    assert torch.equal(by_rows, by_bounds)
    torch.testing.assert_close(by_rows, masked(*inputs, [8, 8, 8]))


def test_neighbouring_heads_share_a_key_head() -> None:
    """Query heads 0 and 1 go with key head 0, heads 2 and 3 with key head 1: the order of published weights."""
    q, k, v = random_qkv(1, 5, 4, 2)
    out = attention(q, k, v, packing_of(1, 5, None), use_flash=False)
    for head in range(4):
        shared = slice(head // 2, head // 2 + 1)
        alone = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q[:, :, head : head + 1], k[:, :, shared], v[:, :, shared])), is_causal=True
        )
        torch.testing.assert_close(out[:, :, head], alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_shape_are_kept(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype) for x in random_qkv(2, 6, 4, 2))
    out = attention(q, k, v, packing_of(2, 6, [4, 2, 1, 5]), use_flash=True)
    assert (out.dtype, out.shape) == (dtype, q.shape)


def test_first_token_of_a_document_is_its_own_value() -> None:
    q, k, v = random_qkv(1, 9, 2, 1)
    out = attention(q, k, v, packing_of(1, 9, [4, 1, 4]), use_flash=False)
    for start in (0, 4, 5):
        torch.testing.assert_close(out[0, start], v[0, start])


@pytest.mark.parametrize("lengths", [None, [5, 7, 12]])
def test_short_documents_in_bf16_are_rounded_once(lengths: list[int] | None) -> None:
    inputs = [x.detach().bfloat16() for x in random_qkv(2, 12, 4, 2)]
    packing = packing_of(2, 12, lengths)
    exact = attention(*(x.float() for x in inputs), packing, use_flash=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*inputs, packing, use_flash=False), exact.bfloat16())


def test_what_flash_attention_has_kernels_for() -> None:
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert [flash_serves(cuda, half, width) for width in (8, 64, 256, 6, 20, 264)] == [True] * 3 + [False] * 3
    assert not flash_serves(cuda, torch.float32, 64) and not flash_serves(torch.device("cpu"), half, 64)
