"""Quantised weights: what they lose, and that a row loses the same whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from api.src.engine import quantised as module
from api.src.engine.linear import Linear
from api.src.engine.products import BlockedProduct, HalfProduct, brain_product
from api.src.engine.quantised import FineInt8Product, Int4Product, Int8Product, quantised

SHAPE = (96, 320)
KINDS = [Int8Product, FineInt8Product, Int4Product]


def weight_of(outputs: int = SHAPE[0], inputs: int = SHAPE[1], scale: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs + inputs)
    return torch.empty(outputs, inputs).normal_(0, scale, generator=generator).bfloat16().float()


def product_of(kind, weight: torch.Tensor, bias: torch.Tensor | None = None):
    return kind(kind.quantise(weight), bias)


def error(product, weight: torch.Tensor, x: torch.Tensor) -> float:
    exact = x.double() @ weight.T.double()
    return float((product(x) - exact).norm() / exact.norm())


PRODUCTS = {kind.__name__: product_of(kind, weight_of()) for kind in KINDS} | {
    "half": HalfProduct.of(weight_of(), None),
    **({"brain": brain} if (brain := brain_product(weight_of(), None)) else {}),
}


@pytest.mark.parametrize("name", PRODUCTS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scales=st.lists(st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 3.0, 1e6]), min_size=1, max_size=20),
    tail=st.sampled_from([1, 3]),
)
def test_no_bit_of_a_row_depends_on_the_rows_beside_it(name, seed, scales, tail):
    product, generator = PRODUCTS[name], torch.Generator().manual_seed(seed)
    x = torch.empty(len(scales), SHAPE[1]).normal_(generator=generator) ** tail
    x *= torch.tensor(scales)[:, None] / x.abs().amax(dim=1, keepdim=True)  # the largest is the scale itself
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 7, SHAPE[1] - 1])
def test_a_broken_row_breaks_no_other(kind, bad, column):
    product = PRODUCTS[kind.__name__]
    x = torch.randn(4, SHAPE[1])
    for broken in range(4):
        y = x.clone()
        y[broken, column] = bad
        found = product(y)
        others = torch.arange(4) != broken
        assert torch.equal(found[others], product(x)[others])
        assert not found[broken].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 255, 256, 300])
def test_any_number_of_rows(kind, rows):
    x = torch.randn(rows, SHAPE[1])
    assert PRODUCTS[kind.__name__](x).shape == (rows, SHAPE[0])
    assert error(PRODUCTS[kind.__name__], weight_of(), x) < 0.1


@pytest.mark.parametrize(
    ("kind", "least", "most"), [(Int8Product, 0.004, 0.014), (FineInt8Product, 0.003, 0.011), (Int4Product, 0.05, 0.09)]
)
def test_the_error_of_normal_weights_and_rows(kind, least, most):
    weight = weight_of(256, 1024)
    assert least < error(product_of(kind, weight), weight, torch.randn(16, 1024)) < most


def test_rows_with_a_few_large_values_keep_the_small_ones_if_they_are_fine():
    weight = weight_of(256, 1024)
    x = torch.randn(16, 1024)
    x[:, 5] = 300.0
    weight[:, 5] = 0.0  # what remains is the small ones' product
    assert error(product_of(Int8Product, weight), weight, x) > 0.3
    assert error(product_of(FineInt8Product, weight), weight, x) < 0.01


def test_what_fits_8_bits_is_exact():
    codes = torch.randint(-127, 128, SHAPE, generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    made = Int8Product.quantise(codes * 2.0**-9)
    assert torch.equal(made["codes"], codes.to(torch.int8))
    assert torch.equal(made["scales"], torch.full((SHAPE[0],), 2.0**-9))


def test_what_fits_4_bits_is_exact():
    codes = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 8) * 2.0**-5
    found = product_of(Int4Product, weight)(torch.eye(64)).T
    assert torch.equal(found, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_biases(kind):
    bias = torch.randn(64)
    product = product_of(kind, torch.zeros(64, 32), bias)
    assert torch.equal(product(torch.randn(3, 32)), bias.expand(3, 64))
    assert torch.equal(product_of(kind, weight_of(64, 32))(torch.zeros(2, 32)), torch.zeros(2, 64))
    one = torch.randn(5, 32)
    weight = weight_of(64, 32)
    assert torch.equal(product_of(kind, weight, bias)(one), product_of(kind, weight)(one) + bias)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_any_size(kind, scale):
    weight = weight_of(64, 64) * (scale / 0.02)
    x = torch.randn(4, 64)
    limit = 0.1 if scale > 1e-30 else 1.0  # where fp32 itself has few bits left
    assert error(product_of(kind, weight), weight, x) < limit


def test_a_shape_without_a_4_bit_kernel_gets_8_bits():
    assert quantised("int4", 64, 64) is Int4Product
    assert quantised("int4", 60, 64) is Int8Product
    assert quantised("int4", 64, 48) is Int8Product
    assert quantised("int8", 60, 7) is Int8Product
    assert quantised("int8", 60, 7, fine=True) is FineInt8Product
    assert quantised("int4", 64, 64, fine=True) is Int4Product
    assert quantised("fp32", 64, 64) is None


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_or_not_fp32_is_not_quantised(form, dtype):
    layer = Linear(32, 16).to(dtype).requires_grad_(False)
    layer.weight.copy_(torch.randn(16, 32))
    if dtype == torch.float32:
        layer.weight[3, 4] = float("nan")
    layer.settle(form)
    assert isinstance(layer._product, BlockedProduct)
    assert layer(torch.randn(2, 32, dtype=dtype)).isnan().any() == (dtype == torch.float32)


def test_without_kernels_weights_stay_exact(monkeypatch):
    monkeypatch.setattr(Int8Product, "layout", staticmethod(lambda outputs, inputs: None))
    monkeypatch.setattr(Int4Product, "layout", staticmethod(lambda outputs, inputs: None))
    layer = Linear(64, 32).requires_grad_(False)
    layer.weight.copy_(weight_of(32, 64))
    layer.settle("int4")
    assert isinstance(layer._product, HalfProduct)


def test_a_processor_without_vnni_rounds_rows_to_7_bits(monkeypatch):
    monkeypatch.setattr(module, "_multiplies_bytes", lambda: False)
    weight, x = weight_of(256, 1024), torch.randn(8, 1024)
    assert 0.01 < error(product_of(Int8Product, weight), weight, x) < 0.025
    assert error(product_of(FineInt8Product, weight), weight, x) < 0.011
