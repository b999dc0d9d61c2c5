"""Weights that lose nothing, or their last bits alone, in the forms that a CPU reads fastest.

Owns torch's packed forms of a weight in 16 and 32 bits, and what a product is. A frame's time on a CPU is the time to
read the weights, so what counts is bytes and how a kernel streams them. Measured in ms per 79 million weights, one core
of Zen 4, for 1, 4 and 8 rows: plain fp32 23, 44, 120; oneDNN's blocked fp32 22, 17, 22, and in bf16 9, 8, 12; FBGEMM's
16-bit form, which is exact, 6, 10, 16. Fewer bits are quantised.py's.
Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

STREAMING_ROWS = 4
"""oneDNN reads blocked weights faster for 4 rows than for 1 to 3."""
_HALF_MAX = torch.finfo(torch.float16).max
_SUBNORMAL_ERROR = 2.0**-25
"""Half of fp16's smallest step."""
_CHECKED_ROWS = 64


class Product(Protocol):
    """A weight in some form, with its bias."""

    weight_bytes: float
    """Per weight, of what a call reads."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, I) -> (N, O), each row by itself: no bit of it depends on the rows beside it."""
        ...


class HalfProduct:
    """fp32 rows by a weight held as fp16, accumulated in fp32: half the bytes, and the same weights.

    Checkpoints are bf16, whose 8 bits fit the 11 of fp16: times a power of two, all weights down to 2^-32 of a matrix's
    largest are exact, and smaller ones are within 2^-40 of it, far below what fp32 sums resolve.
    """

    weight_bytes = 2.0

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
        if not math.isfinite(largest):
            return None
        scale = 2.0 ** math.floor(math.log2(_HALF_MAX / largest)) if largest > 0 else 1.0
        scaled = weight * scale
        for part in torch.split(scaled, _CHECKED_ROWS):  # in small parts, whose intermediates stay in the caches
            if float(torch.dist(part.half().float(), part, torch.inf)) > _SUBNORMAL_ERROR:
                return None
        packed = torch.ops.quantized.linear_prepack_fp16(scaled, None if bias is None else bias * scale)
        return cls(packed, 1 / scale)


class BlockedProduct:
    """oneDNN's own layout of the weight, same size and precision; rows are calculated in the weight's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dtype, self.weight_bytes = weight.dtype, float(weight.element_size())
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, STREAMING_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """As Product."""
        rows, dtype = x.shape[0], x.dtype
        if rows < STREAMING_ROWS:
            x = F.pad(x, (0, 0, 0, STREAMING_ROWS - rows))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._weight, self._bias, "none", [], "")
        return out[:rows].to(dtype)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> BlockedProduct | None:
        """None where oneDNN is not there."""
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return None
        return cls(weight, bias)


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bf16 faster than fp32 (AVX-512 BF16, AMX), and does not only imitate it."""
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)


def brain_product(weight: Tensor, bias: Tensor | None) -> BlockedProduct | None:
    """In bf16, rows too: the checkpoint's own bits, but less precise sums. None where oneDNN has no kernel for it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return BlockedProduct.of(weight.bfloat16(), None if bias is None else bias.bfloat16())
