"""The forms of a weight: each is the same map, and the 16-bit form holds the same numbers."""

from __future__ import annotations

import pytest
import torch

from api.src.engine.linear import BlockedProduct, HalfProduct, Linear, PackedLinear, settle


def checkpoint_weight(outputs: int, inputs: int, scale: float = 0.02) -> torch.Tensor:
    """As loaded: bf16 numbers in fp32."""
    torch.manual_seed(outputs)
    return (torch.randn(outputs, inputs) * scale).bfloat16().float()


@pytest.mark.parametrize("scale", [1e-9, 0.02, 1e9])
@pytest.mark.parametrize("shape", [(64, 48), (130, 33), (3, 7)])
def test_half_holds_checkpoint_weights_without_loss(shape, scale):
    weight = checkpoint_weight(*shape, scale)
    product = HalfProduct.of(weight, None)
    assert product is not None
    assert torch.equal(product(torch.eye(shape[1])).T, weight)


def test_half_keeps_a_weight_far_below_the_largest():
    weight = torch.zeros(2, 4)
    weight[0] = torch.tensor([1.0, 2.0**-30 * 1.5, 2.0**-60, -(2.0**-20) * 1.9921875])
    product = HalfProduct.of(weight, None)
    assert product is not None
    found = product(torch.eye(4)).T
    assert torch.equal(found[0, [0, 1, 3]], weight[0, [0, 1, 3]])
    assert abs(found[0, 2] - weight[0, 2]) <= 2.0**-40


def test_half_is_refused_where_it_would_lose():
    torch.manual_seed(0)
    assert HalfProduct.of(torch.randn(8, 8), None) is None
    fine = torch.tensor([[1.0, 2.0**-16 * (1 + 2.0**-10)]])
    assert HalfProduct.of(fine, None) is not None
    assert HalfProduct.of(fine + torch.tensor([[0.0, 2.0**-27]]), None) is None  # a twelfth bit
    assert HalfProduct.of(checkpoint_weight(8, 8).bfloat16(), None) is None


def test_half_takes_a_weight_of_zeros():
    product = HalfProduct.of(torch.zeros(4, 4), torch.ones(4))
    assert product is not None
    assert torch.equal(product(torch.ones(2, 4)), torch.ones(2, 4))


@pytest.mark.parametrize("form", [HalfProduct, BlockedProduct])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_is_the_same_map(form, rows, bias):
    weight = checkpoint_weight(96, 80)
    offset = torch.randn(96) if bias else None
    x = torch.randn(rows, 80)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    found = form.of(weight, offset)(x)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-6


@pytest.mark.parametrize("form", [HalfProduct, BlockedProduct])
def test_a_rows_result_is_bitwise_its_own(form):
    product = form.of(checkpoint_weight(256, 128), None)
    x = torch.randn(6, 128)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


@pytest.mark.parametrize("rounded", [True, False])
def test_settling_changes_the_form_and_not_the_map(rounded):
    layer = PackedLinear(16, {"q_proj": 8, "k_proj": 4}).requires_grad_(False)
    for _, part in layer.parts():
        part.copy_(checkpoint_weight(*part.shape) if rounded else torch.randn(part.shape))
    x = torch.randn(3, 16)
    before = layer(x)
    settle(layer)
    settle(layer)  # once is enough, twice does no harm
    assert isinstance(layer._product, HalfProduct if rounded else BlockedProduct)
    assert layer.weight.numel() == 0
    assert torch.allclose(layer(x), before, atol=1e-6)


def test_without_kernels_a_plain_weight_stays(monkeypatch):
    monkeypatch.setattr(HalfProduct, "of", lambda weight, bias: None)
    monkeypatch.setattr(BlockedProduct, "of", lambda weight, bias: None)
    layer = Linear(4, 3, bias=True).requires_grad_(False)
    settle(layer)
    assert layer._product is None
    assert layer.weight.shape == (3, 4)
