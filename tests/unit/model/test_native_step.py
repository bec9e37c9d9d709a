import ctypes

import pytest
import torch
from models import random_tokens, sharp_model

from polyglu.model.cache import Cache
from polyglu.model.kernels import compiled, decode
from polyglu.model.native_step import native_serves

TAU = 0.4


def test_it_serves_a_cpu_in_fp32_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {kernels: sharp_model(kernels=kernels) for kernels in ("auto", "native", "chunked", "reference")}
    assert [native_serves(model, torch.float32) for model in served.values()] == [True, True, False, False]
    assert not native_serves(served["auto"], torch.bfloat16)
    monkeypatch.setattr(decode, "load_library", lambda *_: None)
    assert not native_serves(served["auto"], torch.float32)
    cache = Cache(served["auto"], TAU, 1, 9)
    cache.prefill([[1, 2]], [0])
    assert cache.native is None and cache.step([3]).shape == (1, 50)


@pytest.mark.parametrize("settings", [{"head_dim": 24}, {"n_q_heads": 6, "n_kv_heads": 3}, {"n_activations": 6}])
def test_it_equals_pytorch_for_other_shapes(settings: dict[str, int]) -> None:
    """In the stored keys, values and routing too. A head of 24 is no whole number of vectors."""
    model = sharp_model(seq_length=16, routing_scope="causal", **settings)
    caches = [Cache(model, TAU, 3, 16) for _ in range(2)]
    caches[1].native = None
    assert caches[0].native is not None
    rows = [random_tokens(n, n) for n in (5, 1, 8)]
    for cache in caches:
        cache.prefill(rows, range(3))
    for new in ([1, 2, 3], [4, 5, 6]):
        torch.testing.assert_close(*(cache.step(new) for cache in caches), rtol=1e-4, atol=1e-3)
    for name in ("keys", "values", "totals"):
        torch.testing.assert_close(*(getattr(cache, name) for cache in caches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [*range(1, decode.FEW + 2)])
def test_products_of_few_rows(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for width, outputs in ((16, 4), (512, 12), (48, 100), (40, 12), (32, 10)):  # the last two are left to PyTorch
        x, weight = torch.randn(rows, width, generator=generator), torch.randn(outputs, width, generator=generator)
        torch.testing.assert_close(decode.linear(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_arguments_have_the_layout_of_the_source() -> None:
    """Names in the order of the C++ structures, so that no pointer takes another's place."""
    source = (compiled.SOURCES / "decode.cpp").read_text()
    for structure in (decode.Attention, decode.Route):
        body = source.split(f"struct {structure.__name__} {{")[1].split("};")[0]
        declared = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
        names = [name for line in declared if line for name in line.replace("*", " ").split(None, 1)[1].split(",")]
        names = [name.split()[-1] for name in names]
        assert names == [name for name, _ in structure._fields_]
        assert ctypes.sizeof(structure) % 8 == 0
