"""Weights in 8 and 4 bits: fewer bytes to read for a frame, and what that loses.

Owns the two quantisations, the tensors that hold one (`Codes`, which a cache can keep), and their products. Measured in
ms per 79 million weights, one Zen 4 core, for 1, 2, 4 and 8 rows, beside 6.4, 6.7, 9.7, 15.9 of the exact 16-bit form:
int8 4.2, 4.3, 4.5, 5.7, where reading the bytes takes 3.6; int4 4.7, 5.8, 8.0, 15.6. So int4 is for memory, and for
processors that read more slowly than they calculate.
Others were measured and left: torch._weight_int8pack_mm, oneDNN's int8 (6.9 for 1 row), fp32 rows by int4 (134);
onnxruntime's MatMulNBits in int8 (3.8, 4.4, 6.1, 9.2) and in int4 (3.2, 3.7, 6.2, 10.6) and OpenVINO's int8 (5.3, 7.2,
12.9, 34.7), which both calculate only in sessions of their own; torchao's wheels have no kernels for CPUs.
Shapes: N rows, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import Product

Codes = dict[str, Tensor]
"""A quantised weight, the same on every machine."""
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes of Codes."""
GROUP = 32
"""Inputs that share a scale in 4 bits; the smallest for which there is a kernel."""
_TINY = torch.finfo(torch.float32).tiny
_ENDS = torch.tensor([[-1.0, 1.0]], device="cpu").repeat(256, 1)
_PADDING = 2
_STEPS, _NARROW_STEPS = 127.5, 63.5
"""FBGEMM's from 0 to 1, where -1 .. 1 is the range of 8 bits, or of 7."""
_WITHIN = 1 - 2.0**-10
"""What rounding has left must not leave the range, not by an error of its own subtraction."""
_PART = 256
"""Rows of a weight that are quantised at once: their intermediates stay in the caches."""


class Quantiser(Protocol):
    """How a weight is quantised, and what makes the product by it: one of the classes below, or a kernel's."""

    def __call__(self, codes: Codes, bias: Tensor | None) -> Product:
        """The product."""
        ...

    def layout(self, outputs: int, inputs: int) -> Layout | None:
        """Of Codes for a weight (O, I). None where there is no kernel for such a one."""
        ...

    def quantise(self, weight: Tensor) -> Codes:
        """weight (O, I) in fp32, all finite."""
        ...


class Kernel(Protocol):
    """Another maker of int8 products, by the same codes."""

    def quantiser(self, fine: bool) -> Quantiser:
        """`fine`: for rows with values far above the rest."""
        ...


class Int8Product:
    """fp32 rows by int8 weights with a scale for each output; a row is rounded to 8 bits as it comes.

    FBGEMM takes one range for all rows of a call. So that a row's rounding is its own, each is divided by its largest
    value, and two more inputs, whose weights are 0, hold the ends -1 and 1 of the range that all rows have then.
    """

    weight_bytes: float = 1.0

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        self._packed = _packed(F.pad(codes["codes"], (0, _PADDING)), codes["scales"])
        self._bias = bias
        self._narrow = not _multiplies_bytes()
        self._steps = _NARROW_STEPS if self._narrow else _STEPS

    def __call__(self, x: Tensor) -> Tensor:
        """As Product. A row with NaN or infinity becomes NaN."""
        largest = x.abs().amax(dim=1, keepdim=True)  # the norms of torch.linalg take ten times as long
        out = self._product(x / largest).mul_(largest)
        return out if self._bias is None else out.add_(self._bias)

    def _product(self, x: Tensor) -> Tensor:
        """Of rows within -1 .. 1, or of NaN: divided by their largest value, which was 0 or not finite."""
        rows = x.shape[0]
        ends = _ENDS[:rows] if rows <= len(_ENDS) else _ENDS[:1].expand(rows, 2)
        ranged = torch.cat((x, ends), dim=1).nan_to_num_(0.0)
        out: Tensor = torch.ops.quantized.linear_dynamic(ranged, self._packed, self._narrow)
        return out

    @staticmethod
    def layout(outputs: int, inputs: int) -> Layout | None:
        """As Quantiser."""
        available = torch.backends.quantized.engine in ("x86", "fbgemm")
        if not available or not hasattr(torch.ops.quantized, "linear_prepack"):
            return None
        return {"codes": (torch.int8, (outputs, inputs)), "scales": (torch.float32, (outputs,))}

    @staticmethod
    def quantise(weight: Tensor) -> Codes:
        """As Quantiser: symmetric, by each output's largest weight."""
        codes, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
        for part, into, scale in zip(*(torch.split(each, _PART) for each in (weight, codes, scales)), strict=True):
            scale.copy_(part.abs().amax(dim=1).div_(127).clamp_(min=_TINY))
            into.copy_((part / scale[:, None]).round_())
        return {"codes": codes, "scales": scales}


class FineInt8Product(Int8Product):
    """The same weights by rows rounded to 16 bits: for rows with a few values far above the rest, as SwiGLU's are.

    A second row holds what the rounding of the first has left, made as large as the range allows. The weights are read
    once for both.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """As Product. A row with NaN or infinity becomes NaN."""
        rows, finer = x.shape[0], 2 * self._steps * _WITHIN
        largest = x.abs().amax(dim=1, keepdim=True)
        rest = x / largest
        rounded = (rest * self._steps).round_().clamp_(0.5 - self._steps, self._steps - 0.5).div_(self._steps)
        rest = rest.sub_(rounded).mul_(finer)
        out = self._product(torch.cat((rounded, rest)))
        out = torch.add(out[:rows], out[rows:], alpha=1 / finer).mul_(largest)
        return out if self._bias is None else out.add_(self._bias)


class Int4Product:
    """Rows in bf16 by 4-bit weights: in groups of 32 inputs, each with the scale and the middle of its own range."""

    weight_bytes: float = 0.5 + 4 / GROUP

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        pairs = codes["codes"]
        wide = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).int()
        self._packed = torch._convert_weight_to_int4pack_for_cpu(wide, 1)
        self._scales, self._bias = codes["scales"], bias

    def __call__(self, x: Tensor) -> Tensor:
        """As Product."""
        out = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), self._packed, GROUP, self._scales).to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    @staticmethod
    def layout(outputs: int, inputs: int) -> Layout | None:
        """As Quantiser."""
        available = hasattr(torch, "_weight_int4pack_mm_for_cpu")
        if not available or outputs % 16 or inputs % GROUP:
            return None
        codes, scales = (outputs, inputs // 2), (inputs // GROUP, outputs, 2)
        return {"codes": (torch.uint8, codes), "scales": (torch.bfloat16, scales)}

    @staticmethod
    def quantise(weight: Tensor) -> Codes:
        """As Quantiser: code q stands for (q - 8) * scale + middle, both rounded to bf16 before q is chosen."""
        parts = [_four_bits(part) for part in torch.split(weight, _PART)]
        codes, scales = (list(column) for column in zip(*parts, strict=True))
        return {"codes": torch.cat(codes), "scales": torch.cat(scales, dim=1)}


QUANTISED: dict[str, tuple[Quantiser, ...]] = {"int8": (Int8Product,), "int4": (Int4Product, Int8Product)}
"""By form, what is tried in turn."""


def quantised(
    form: str, outputs: int, inputs: int, *, fine: bool = False, native: Kernel | None = None
) -> Quantiser | None:
    """How a weight (O, I) is quantised in a form; None: not at all. `fine`: its rows have values far above the rest.

    `native`: takes int8's place, on any processor.
    """
    for kind in QUANTISED.get(form, ()):
        if kind is Int8Product and native is not None:
            return native.quantiser(fine)
        if kind.layout(outputs, inputs):
            return FineInt8Product if fine and kind is Int8Product else kind
    return None


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)  # (O, G, 32)
    low, high = torch.aminmax(groups, dim=2, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float().clamp_(min=_TINY)
    middle = (low + 8 * scale).bfloat16().float()
    codes = ((groups - middle) / scale).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    scales = torch.cat((scale, middle), dim=2).transpose(0, 1).contiguous().bfloat16()  # (G, O, 2)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def _packed(codes: Tensor, scales: Tensor) -> Any:
    """FBGEMM's layout, which only torch's quantised tensors lead to; they are gone when it is made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning)
        zeros = torch.zeros(len(scales), dtype=torch.long)
        held = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(held, None)


def _multiplies_bytes() -> bool:
    """Whether sums of byte products are exact (VNNI): without, FBGEMM's have 16 bits, enough for rows of 7 bits."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
