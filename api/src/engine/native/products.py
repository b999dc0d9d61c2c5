"""Products by the kernel: packed weights, and the structs of decoder.c that describe them.

Owns the packed tensors. A weight is int8 with rows rounded to 8 or to 16 bits, as quantised.py's are, or bf16 with
exact rows: a checkpoint's own numbers, in half of fp32's bytes.
Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..quantised import Codes, Int8Product, Layout
from .memory import WeightMemory
from .pool import Pool

DECODER = Path(__file__).parent / "decoder.c"
INT8, FINE, EXACT = range(3)


class Matrix(ctypes.Structure):
    """struct matrix."""

    _fields_: ClassVar = [
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    ]


class Native:
    """The kernel's functions and threads, shared by all weights of a model. `close` ends the threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """`library`: DECODER's. Raises AttributeError for one that lacks a function."""
        _declare(library)
        self.library, self.pool = library, Pool(library)
        self._memory = WeightMemory()
        self.has_exact = bool(library.multiplies_floats())

    def close(self) -> None:
        """As Pool.close."""
        self.pool.close()

    def quantiser(self, fine: bool) -> NativeInt8:
        """What makes products in int8; `fine`: rows keep 16 bits."""
        return NativeInt8(self, fine)

    def exact(self, weight: Tensor, bias: Tensor | None) -> NativeProduct | None:
        """By weight (O, I) in fp32. None if not all are bf16 numbers, or if torch's product is faster here."""
        if not self.has_exact:
            return None
        weight = weight.contiguous()
        if not self.library.fits_bf16(weight.data_ptr(), weight.numel()):
            return None
        packed = self._packed(EXACT, *weight.shape)
        self.library.pack_exact(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return NativeProduct(self, EXACT, weight.shape[0], weight.shape[1], packed, (), bias)

    def int8(self, codes: Codes, bias: Tensor | None, *, fine: bool) -> NativeProduct:
        """By the codes of quantised.Int8Product."""
        weights, scales = codes["codes"].contiguous(), codes["scales"].contiguous()
        outputs, inputs = weights.shape
        packed, shifts = self._packed(INT8, outputs, inputs), torch.empty(outputs, dtype=torch.int32)
        self.library.pack_int8(weights.data_ptr(), outputs, inputs, packed.data_ptr(), shifts.data_ptr())
        return NativeProduct(self, FINE if fine else INT8, outputs, inputs, packed, (scales, shifts), bias)

    def _packed(self, kind: int, outputs: int, inputs: int) -> Tensor:
        return self._memory.take(self.library.packed_bytes(kind, outputs, inputs))


class NativeInt8:
    """Implements quantised.Quantiser by the kernel."""

    weight_bytes: float = 1.0

    def __init__(self, native: Native, fine: bool) -> None:
        self._native, self._fine = native, fine

    def __call__(self, codes: Codes, bias: Tensor | None) -> NativeProduct:
        return self._native.int8(codes, bias, fine=self._fine)

    def layout(self, outputs: int, inputs: int) -> Layout | None:
        """As Quantiser."""
        return {"codes": (torch.int8, (outputs, inputs)), "scales": (torch.float32, (outputs,))}

    def quantise(self, weight: Tensor) -> Codes:
        """As Quantiser."""
        return Int8Product.quantise(weight)


class NativeProduct:
    """Implements products.Product. `matrix` describes it to the kernel, as long as this lives."""

    def __init__(
        self,
        native: Native,
        kind: int,
        outputs: int,
        inputs: int,
        packed: Tensor,
        beside: tuple[Tensor, ...],
        bias: Tensor | None,
    ) -> None:
        """`packed`: the weights; `beside`: in int8, scales and shifts of the outputs."""
        self.native, self.bias = native, bias
        self._held = (packed, *beside)
        addresses = [tensor.data_ptr() for tensor in self._held] + [None, None]
        self.matrix = Matrix(*addresses[:3], kind, outputs, inputs)
        self.weight_bytes = 2.0 if kind == EXACT else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """As Product."""
        library, matrix = self.native.library, ctypes.byref(self.matrix)
        x, rows = x.contiguous(), x.shape[0]
        out = x.new_empty(rows, self.matrix.outputs)
        if rows:
            scratch = torch.empty(library.product_scratch(matrix, rows), dtype=torch.uint8, device="cpu")
            with self.native.pool.borrow() as pool:
                library.multiply(pool, matrix, rows, x.data_ptr(), out.data_ptr(), scratch.data_ptr())
        return out if self.bias is None else out.add_(self.bias)


def _declare(library: ctypes.CDLL) -> None:
    """The functions' signatures; pointers are addresses."""
    number, address, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    signatures: dict[str, tuple[list[type], type | None]] = {
        "packed_bytes": ([number] * 3, number),
        "pack_int8": ([address, number, number, address, address], None),
        "multiplies_floats": ([], ctypes.c_bool),
        "fits_bf16": ([address, number], ctypes.c_bool),
        "pack_exact": ([address, number, number, address], None),
        "product_scratch": ([address, number], number),
        "multiply": ([address, address, number, address, address, address], None),
        "step_scratch": ([address, number, number], number),
        "run_step": ([address, address, address], None),
        "scratch_to_choose": ([number], number),
        "choose_one": ([address, number, ctypes.c_bool, real, number, real, real, address], number),
        "frame_scratch": ([address], number),
        "run_frame": ([address, address], None),
        "pool_new": ([number], address),
        "pool_free": ([address], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
