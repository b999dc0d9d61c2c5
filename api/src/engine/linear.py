"""Linear maps, and the forms of their weights that a CPU reads fastest.

Owns the choice of a form. A frame's time on a CPU is the time to read the weights, so what counts is bytes and how a
kernel streams them. Measured in ms per 79 million fp32 weights, one Zen 4 core, for 1, 4 and 8 rows: plain 23, 44, 120;
oneDNN's blocked form 22, 17, 22; FBGEMM's 16-bit form 7, 10, 15.
Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STREAMING_ROWS = 4
"""oneDNN reads blocked weights faster for 4 rows than for 1 to 3."""
_HALF_MAX = torch.finfo(torch.float16).max
_SUBNORMAL_ERROR = 2.0**-25
"""Half of fp16's smallest step."""
_CHECKED_ROWS = 64


class Product(Protocol):
    """A weight in some form, with its bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, I) -> (N, O)."""
        ...


class HalfProduct:
    """fp32 rows by a weight held as fp16, accumulated in fp32: half the bytes, and the same weights.

    Checkpoints are bf16, whose 8 bits fit the 11 of fp16: times a power of two, all weights down to 2^-32 of a matrix's
    largest are exact, and smaller ones are within 2^-40 of it, far below what fp32 sums resolve.
    """

    def __init__(self, packed: Any, scale: float) -> None:
        self._packed, self._scale = packed, scale

    def __call__(self, x: Tensor) -> Tensor:
        """As Product."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out.mul_(self._scale)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> HalfProduct | None:
        """None where there is no kernel for it, or where anything would be lost."""
        available = torch.backends.quantized.engine in ("x86", "fbgemm")
        if weight.dtype != torch.float32 or not available or not hasattr(torch.ops.quantized, "linear_prepack_fp16"):
            return None
        largest = max(map(abs, map(float, weight.aminmax())))
        scale = 2.0 ** math.floor(math.log2(_HALF_MAX / largest)) if largest > 0 else 1.0
        scaled = weight * scale
        for part in torch.split(scaled, _CHECKED_ROWS):  # in small parts, whose intermediates stay in the caches
            if float(torch.dist(part.half().float(), part, torch.inf)) > _SUBNORMAL_ERROR:
                return None
        packed = torch.ops.quantized.linear_prepack_fp16(scaled, None if bias is None else bias * scale)
        return cls(packed, 1 / scale)


class BlockedProduct:
    """oneDNN's own layout of the weight, same size and precision."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, STREAMING_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """As Product."""
        rows = x.shape[0]
        if rows < STREAMING_ROWS:
            x = F.pad(x, (0, 0, 0, STREAMING_ROWS - rows))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out[:rows]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> BlockedProduct | None:
        """None where oneDNN is not there."""
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return None
        return cls(weight, bias)


class Linear(nn.Module):
    """x (N, I) -> (N, O). Loaded as a plain weight (O, I); `settle` then gives it its form."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self._product: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(x)
        return F.linear(x, self.weight, self.bias)

    def settle(self) -> None:
        """On a CPU, replace the weight by its fastest form that loses nothing. No loading after that."""
        if self._product is None and self.weight.device.type == "cpu":
            weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
            self._product = HalfProduct.of(weight, bias) or BlockedProduct.of(weight, bias)
            if self._product is not None:
                self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)


class PackedLinear(Linear):
    """One product for several of the checkpoint's matrices, stacked: sizes {"q_proj": 2048, "k_proj": 1024, ...}."""

    def __init__(self, inputs: int, sizes: dict[str, int]) -> None:
        super().__init__(inputs, sum(sizes.values()))
        self.sizes = sizes

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each matrix's checkpoint name, beside this module's, and its rows of the weight."""
        for name, rows in zip(self.sizes, torch.split(self.weight, list(self.sizes.values())), strict=True):
            yield f"{name}.weight", rows


def settle(module: nn.Module) -> None:
    """`Linear.settle` for all of `module`, one weight after the other."""
    for part in module.modules():
        settle_one(part)


def settle_one(part: nn.Module) -> None:
    """`Linear.settle`, if `part` is one: what a loader calls with each part that it has filled."""
    if isinstance(part, Linear):
        part.settle()
