"""Linear maps: a plain weight as it is loaded, and then the form that it is calculated in.

Owns the choice of a weight's form; the forms are products.py's (nothing is lost) and quantised.py's (something is).
Which module gets which is the caller's: see forms.py.
Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native.products import Native
from .products import BlockedProduct, HalfProduct, Product, brain_product
from .quantised import Codes, Quantiser, quantised

Form = Literal["fp32", "bf16", "int8", "int4"]
"""On a CPU. fp32: the fastest that loses nothing; the others: the nearest to them that the processor has."""


class Linear(nn.Module):
    """x (N, I) -> (N, O). Loaded as a plain weight (O, I); `settle` or `adopt` then gives it its form."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self._product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(x)
        return F.linear(x, self.weight, self.bias)

    @property
    def product(self) -> Product | None:
        """What the weight has become."""
        return self._product

    @property
    def weight_bytes(self) -> float:
        """Per weight, of what a call reads."""
        return self.weight.element_size() if self._product is None else self._product.weight_bytes

    def settle(self, form: Form = "fp32", *, fine: bool = False, native: Native | None = None) -> None:
        """On a CPU, replace the weight by that form, or by one that loses less. No loading after that.

        `fine`: the rows have values far above the rest, see quantised.FineInt8Product. `native`: the CPU's kernel,
        which has the forms int8 and, for numbers of bf16, fp32.
        """
        if self._product is None and self.weight.device.type == "cpu":
            weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
            kind = quantised(form, *weight.shape, fine=fine, native=native) if weight.dtype == torch.float32 else None
            if kind is not None and self.quantise(kind) is not None:
                return
            if product := _product(form, weight, bias, native):
                self.adopt(product)

    def quantise(self, kind: Quantiser) -> Codes | None:
        """Replace the weight, which is on a CPU and in fp32, by that; its codes. None: some value is not finite."""
        weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
        if self._product is not None or not bool(weight.isfinite().all()):
            return None
        codes = kind.quantise(weight)
        self.adopt(kind(codes, bias))
        return codes

    def adopt(self, product: Product) -> None:
        """Have the product, and no plain weight any more."""
        self._product = product
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class PackedLinear(Linear):
    """One product for several of the checkpoint's matrices, stacked: sizes {"q_proj": 2048, "k_proj": 1024, ...}."""

    def __init__(self, inputs: int, sizes: dict[str, int]) -> None:
        super().__init__(inputs, sum(sizes.values()))
        self.sizes = sizes

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each matrix's checkpoint name, beside this module's, and its rows of the weight."""
        for name, rows in zip(self.sizes, torch.split(self.weight, list(self.sizes.values())), strict=True):
            yield f"{name}.weight", rows


def settle(module: nn.Module, form: Form = "fp32", native: Native | None = None) -> None:
    """`Linear.settle` for all of `module`, one weight after the other."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.settle(form, native=native)


def _product(form: Form, weight: Tensor, bias: Tensor | None, native: Native | None) -> Product | None:
    if form == "bf16" and weight.dtype == torch.float32 and (product := brain_product(weight, bias)):
        return product
    if native and weight.dtype == torch.float32 and (exact := native.exact(weight, bias)):
        return exact
    return HalfProduct.of(weight, bias) or BlockedProduct.of(weight, bias)
