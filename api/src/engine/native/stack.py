"""A whole stack of decoder layers by the kernel: what is calculated is layers.py's, in one call for a step's rows.

Owns the description of the layers and of a call, as decoder.c has them, and a call's scratch. Keys and values are the
caller's arenas, the same that torch's operations use, so that either can go on where the other has ended.
Shapes: B sequences of T new rows each, H hidden, O a head's outputs.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..layers import DecoderLayer, RMSNorm, Rotation
from ..linear import Linear
from ..slots import KeyValues
from .products import Matrix, Native, NativeProduct


class _Layer(ctypes.Structure):
    """struct layer."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
    ]


class _Stack(ctypes.Structure):
    """struct stack."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("hidden", "queries", "keys", "head_dim", "inner", "layers")),
        ("epsilon", ctypes.c_double),
        ("layer", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """struct step."""

    _fields_: ClassVar = [
        ("sequences", ctypes.c_int64),
        ("fresh", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "positions", "x", "keys", "values")),
        ("slots_of_layer", ctypes.c_int64),
        ("span", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "normed", "head", "logits", "scratch")),
    ]


class NativeStack:
    """Layers and the norm after them, whose weights are the kernel's. It holds their modules."""

    def __init__(self, native: Native, layers: nn.ModuleList, norm: RMSNorm, config: TransformerConfig) -> None:
        """Every linear map of the layers must be a NativeProduct; see `able`."""
        self._native, self._parts = native, (layers, norm)
        described = [_described(layer) for layer in layers if isinstance(layer, DecoderLayer)]
        self._layers = (_Layer * len(described))(*described)
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self._stack = _Stack(
            *sizes,
            config.intermediate_size,
            len(described),
            config.rms_norm_eps,
            ctypes.addressof(self._layers),
            norm.weight.data_ptr(),
        )
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def address(self) -> int:
        """Of struct stack, as long as this lives."""
        return ctypes.addressof(self._stack)

    @staticmethod
    def able(module: nn.Module) -> bool:
        """Whether all linear maps of `module` are the kernel's."""
        return all(isinstance(part.product, NativeProduct) for part in module.modules() if isinstance(part, Linear))

    def run(
        self,
        x: Tensor,
        slots: Tensor,
        positions: Tensor,
        arena: KeyValues,
        rotation: Rotation,
        *,
        fresh: int = 1,
        span: int,
        head: NativeProduct | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One or several new positions of each sequence: the norm of its last row (B, H), and `head`'s of that (B, O).

        x (B * T, H) is overwritten. slots, positions: (B * T,), of which none reaches `span`. rotation: the table.
        """
        rows, width = x.shape
        sequences = rows // fresh
        slots, positions = slots.contiguous(), positions.contiguous()
        normed = x.new_empty(sequences, width)
        logits = None if head is None else x.new_empty(sequences, head.matrix.outputs)
        with self._native.pool.borrow() as pool:
            step = Step(
                sequences,
                fresh,
                *(tensor.data_ptr() for tensor in (slots, positions, x, arena.keys, arena.values)),
                arena.keys.shape[1],
                arena.keys.shape[3],
                *(tensor.data_ptr() for tensor in (rotation.cos, rotation.sin, normed)),
                None if head is None else ctypes.addressof(head.matrix),
                None if logits is None else logits.data_ptr(),
                self._room(rows, span),
            )
            self._native.library.run_step(pool, ctypes.byref(self._stack), ctypes.byref(step))
        return normed, logits

    def _room(self, rows: int, span: int) -> int:
        """Address of scratch for so many rows and positions; kept, as fresh memory costs more than a layer."""
        needed = self._native.library.step_scratch(ctypes.byref(self._stack), rows, span)
        if len(self._scratch) < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8, device="cpu")
        return self._scratch.data_ptr()


def _described(layer: DecoderLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    matrices = []
    for part in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
        assert isinstance(part.product, NativeProduct)
        matrices.append(part.product.matrix)
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    return _Layer(*matrices, *(norm.weight.data_ptr() for norm in norms))
