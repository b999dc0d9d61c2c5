"""A whole frame by the kernel: the talker's step, the choices, the code predictor's passes, and what is kept of them.

Owns the description of a frame, as decoder.c has it, and its scratch. What is calculated is language_model.py's, by the
arenas of slots.py and with the random numbers of sampling.py.
Shapes: B rows of a step, S slots, H talker's hidden, h the predictor's, V a vocabulary, C code groups.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..layers import Rotation
from ..linear import Linear
from ..slots import KeyValues, Slots
from ..talker import Talker
from .products import EXACT, Native, NativeProduct
from .stack import NativeStack, Step


class _Slots(ctypes.Structure):
    """struct slots."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("reals", "settings", "progress", "next_input", "text")),
        ("rows", ctypes.c_int64),
        ("seen", ctypes.c_void_p),
    ]


class _Frame(ctypes.Structure):
    """struct frame."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("talker", "predictor")),
        ("slots", _Slots),
        *((name, Step) for name in ("first", "later")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("heads", "projection", "bias", "inputs", "embeddings", "suppressed")),
        *((name, ctypes.c_int64) for name in ("end", "sequences")),
        *((name, ctypes.c_void_p) for name in ("index", "codes", "scratch")),
    ]


class NativeFrame:
    """Frames of a talker whose linear maps are all the kernel's; see `able`. It holds what it points to."""

    def __init__(
        self,
        native: Native,
        talker: Talker,
        stacks: tuple[NativeStack, NativeStack],
        rotation: Rotation,
        suppressed: Tensor,
        end: int,
    ) -> None:
        """`stacks`: the talker's and the predictor's. `rotation`: the predictor's table. suppressed (V,) bool: first
        codes that are never chosen. `end`: the one that ends the speech."""
        predictor = talker.code_predictor
        embeddings = [talker.model.codec_embedding.weight, *predictor.model.codec_embedding.weight]
        heads = [ctypes.addressof(_product(head).matrix) for head in predictor.lm_head]
        projection = predictor.small_to_mtp_projection
        self._native, self._stacks, self._rotation = native, stacks, rotation
        self._head = _product(talker.codec_head)
        self._projection = None if projection is None else _product(projection)
        self._suppressed, self._end = suppressed, end
        self._held, self._groups = (talker, embeddings, predictor.tables), len(embeddings)
        self._heads = _addresses(heads)
        self._inputs = _addresses([table.data_ptr() for table in predictor.tables])
        self._embeddings = _addresses([table.data_ptr() for table in embeddings])
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._described: tuple[weakref.ref[Slots], _Frame] | None = None

    @staticmethod
    def able(talker: Talker) -> bool:
        """Whether heads and projection are the kernel's; the layers must be as well."""
        predictor = talker.code_predictor
        heads = [talker.codec_head, *predictor.lm_head, predictor.small_to_mtp_projection or talker.codec_head]
        products = [head.product for head in heads if isinstance(head, Linear)]
        return all(isinstance(product, NativeProduct) and product.matrix.kind == EXACT for product in products)

    def run(self, state: Slots, index: Tensor) -> Tensor:
        """One frame of the slots index (B,): codes (B, C). The slots are then ready for their next frame."""
        index = index.contiguous()
        codes = index.new_empty(len(index), self._groups)
        with self._native.pool.borrow() as pool:
            frame = self._of(state)
            frame.sequences, frame.index, frame.codes = len(index), index.data_ptr(), codes.data_ptr()
            frame.scratch = self._room(frame)
            self._native.library.run_frame(pool, ctypes.byref(frame))
        return codes

    def _of(self, state: Slots) -> _Frame:
        """What is the same for all frames of these arenas."""
        if self._described is None or self._described[0]() is not state:
            self._described = weakref.ref(state), self._describe(state)
        return self._described[1]

    def _describe(self, state: Slots) -> _Frame:
        arenas = (state.reals, state.settings, state.progress, state.next_input, state.text)
        first, later = _step(state.talker, state.rotation), _step(state.predictor, self._rotation)
        first.head = ctypes.addressof(self._head.matrix)
        projection = self._projection
        bias = None if projection is None else projection.bias
        return _Frame(
            *(stack.address for stack in self._stacks),
            _Slots(*(tensor.data_ptr() for tensor in arenas), state.text.shape[1], state.seen.data_ptr()),
            first,
            later,
            self._groups,
            ctypes.addressof(self._heads),
            None if projection is None else ctypes.addressof(projection.matrix),
            None if bias is None else bias.data_ptr(),
            *(ctypes.addressof(each) for each in (self._inputs, self._embeddings)),
            self._suppressed.data_ptr(),
            self._end,
        )

    def _room(self, frame: _Frame) -> int:
        """Address of scratch for it; kept, as fresh memory costs more than a layer."""
        needed = self._native.library.frame_scratch(ctypes.byref(frame))
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8, device="cpu")
        return self._scratch.data_ptr()


def _step(arena: KeyValues, rotation: Rotation) -> Step:
    """What is the same in all steps by an arena and a table."""
    return Step(
        keys=arena.keys.data_ptr(),
        values=arena.values.data_ptr(),
        slots_of_layer=arena.keys.shape[1],
        span=arena.keys.shape[3],
        cos=rotation.cos.data_ptr(),
        sin=rotation.sin.data_ptr(),
    )


def _product(linear: object) -> NativeProduct:
    assert isinstance(linear, Linear)
    assert isinstance(linear.product, NativeProduct)
    return linear.product


def _addresses(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)
