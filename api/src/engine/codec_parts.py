"""The codec's layers as the C code has them: packed weights, and the structs of native/codec.c that describe them.

Owns the packed tensors. Does not own the streams' state (codec.py), nor which layers are in C (codec_layers.py).
Shapes: B streams, T rows, C channels, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec_kernel import CodecKernel, aligned, checked

if TYPE_CHECKING:
    from .codec_window import WindowSizes
    from .layers import Rotation

TAPS = 7
_CONVOLUTION, _WIDE_UNIT, _LATE_UNIT, _SOUND = range(4)
_OUTER = ((1, 0), (1, 1), (0, 1))
"""Karatsuba's: factors of a pair of taps."""
_INNER = ((-4, 0, 0, 0), (2 / 3, 2 / 3, 2 / 3, 2 / 3), (-1, 1, -1, 1), (16 / 3, -8 / 3, 4 / 3, -2 / 3), (0, 0, 0, 2))
"""Factors of 4 taps, for the points 0, 1, -1, -1/2 and infinity."""


class _Snake(ctypes.Structure):
    """struct snake."""

    _fields_: ClassVar = [("frequency", ctypes.c_void_p), ("height", ctypes.c_void_p)]


class _Matrix(ctypes.Structure):
    """struct matrix."""

    _fields_: ClassVar = [
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("narrow", "taps", "dilation", "inputs", "outputs")),
    ]


class _Unit(ctypes.Structure):
    """struct unit."""

    _fields_: ClassVar = [
        ("kernel", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("act", _Snake),
        ("mix", ctypes.c_void_p),
        ("mix_bias", ctypes.c_void_p),
        ("channels", ctypes.c_int64),
        ("dilation", ctypes.c_int64),
    ]


class _Causal(ctypes.Structure):
    """struct causal."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("kind", "channels", "start", "tail")),
        ("act", _Snake),
        ("conv", _Matrix),
        ("inner", _Snake),
        ("mix", _Matrix),
        ("unit", _Unit),
    ]


class _ConvNeXt(ctypes.Structure):
    """struct convnext."""

    _fields_: ClassVar = [
        ("taps", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("epsilon", ctypes.c_double),
        ("channels", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("up", _Matrix),
        ("down", _Matrix),
    ]


class _Layer(ctypes.Structure):
    """struct window_layer."""

    _fields_: ClassVar = [(name, _Matrix) for name in ("qkv", "o", "gate_up", "down")]


class _Stack(ctypes.Structure):
    """struct stack."""

    _fields_: ClassVar = [
        ("layer", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("layers", "hidden", "queries", "keys", "head_dim", "inner", "ring", "window")
        ),
        ("epsilon", ctypes.c_double),
    ]


class _Step(ctypes.Structure):
    """struct step."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("streams", "rows")),
        *((name, ctypes.c_void_p) for name in ("slots", "positions", "x", "cache")),
        ("slots_of_layer", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "out", "scratch")),
    ]


class _Streams(ctypes.Structure):
    """struct streams."""

    _fields_: ClassVar = [
        ("tails", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("count", ctypes.c_int64),
    ]


class _Books(ctypes.Structure):
    """struct books."""

    _fields_: ClassVar = [
        ("vectors", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("groups", "codes", "width", "semantic")),
    ]


class Tails:
    """The tails of the streams of a call: rows `slots` [B] of `memory` [R, size].

    In torch's operations row i must be stream i; the C code takes any.
    """

    def __init__(self, memory: Tensor, slots: Tensor) -> None:
        self.memory, self.slots = memory, slots.contiguous()
        self._described: _Streams | None = None

    @classmethod
    def alone(cls, memory: Tensor) -> Tails:
        """Of as many streams as rows."""
        return cls(memory, torch.arange(len(memory), device=memory.device))

    def described(self) -> Any:
        """For the C code.

        Raises:
            ValueError: not in float32 on a CPU.
        """
        if self._described is None:
            size = checked(self.memory).shape[1]
            self._described = _Streams(self.memory.data_ptr(), self.slots.data_ptr(), size, len(self.slots))
        return ctypes.byref(self._described)


class Wave(NamedTuple):
    """A Snake activation: frequency and height of each channel."""

    frequency: Tensor
    height: Tensor


class Taps(NamedTuple):
    """A convolution: kernel [O, k, I] and bias [O]."""

    kernel: Tensor
    bias: Tensor
    dilation: int = 1


class _Holder:
    """Tensors whose addresses the C code has, for as long as this lives."""

    def __init__(self, kernel: CodecKernel) -> None:
        self._kernel, self._held = kernel, list[Tensor]()

    def _place(self, tensor: Tensor) -> int:
        """The address of a tensor in fp32."""
        self._held.append(tensor.detach().float().contiguous())
        return self._held[-1].data_ptr()

    def _wave(self, wave: Wave | None) -> _Snake:
        return _Snake() if wave is None else _Snake(*map(self._place, wave))

    def _matrix(self, kernel: Tensor, bias: Tensor | None, *, dilation: int = 1, narrow: bool = False) -> _Matrix:
        """kernel [O, k, I] in blocks of outputs."""
        outputs, taps, inputs = kernel.shape
        whole = F.pad(kernel.detach().flatten(1), (0, 0, 0, -outputs % self._kernel.columns))
        blocks = whole.view(-1, self._kernel.columns, taps * inputs)
        pairs = blocks.bfloat16().view(*blocks.shape[:2], -1, 2) if narrow else blocks.float()
        weights = aligned(pairs.transpose(1, 2))
        self._held.append(weights)
        place = None if bias is None else self._place(bias)
        return _Matrix(weights.data_ptr(), place, narrow, taps, dilation, inputs, outputs)


class NativeCausal(_Holder):
    """A convolution or a residual unit, with the activation before it, over windows that begin with the tails."""

    def __init__(self, kernel: CodecKernel, channels: int, tail: tuple[int, int], act: Wave | None) -> None:
        """`tail`: where a stream's state has it, and of how many rows. See the functions below."""
        super().__init__(kernel)
        self.narrow_weights = 0
        """How many weights a row is multiplied by in bf16."""
        self._layer = _Causal(channels=channels, start=tail[0], tail=tail[1], act=self._wave(act))

    @property
    def narrow(self) -> bool:
        """Whether its products are in bf16."""
        return self.narrow_weights > 0

    def run(self, x: Tensor, tails: Tails, out: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, O]; a unit's is x itself. The tails advance. `out`: a part of each stream's sound."""
        streams, rows, _ = x.shape
        in_place = self._layer.kind in (_WIDE_UNIT, _LATE_UNIT)
        checked(x[0] if self._apart and streams else x)
        if out is None:
            out = x if in_place else x.new_empty(streams, rows, self._layer.conv.outputs)
        if x.numel():
            library, layer = self._kernel.library, ctypes.byref(self._layer)
            with self._kernel.call(lambda threads: library.causal_scratch(layer, streams, rows, threads)) as (
                pool,
                room,
            ):
                places = (x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0))
                library.run_layer(pool, layer, *places, tails.described(), room, rows)
        return out

    @property
    def _apart(self) -> bool:
        """Whether streams of the input need not follow one another in memory."""
        return self._layer.kind in (_CONVOLUTION, _SOUND) and bool(self._layer.tail)

    def convolution(self, taps: Taps, *, narrow: bool) -> NativeCausal:
        """Be a convolution."""
        self._layer.kind = _CONVOLUTION
        self._layer.conv = self._matrix(taps.kernel, taps.bias, dilation=taps.dilation, narrow=narrow)
        self.narrow_weights = narrow * taps.kernel.numel()
        return self

    def sound(self, taps: Taps) -> NativeCausal:
        """Be a convolution to one channel, cut off at -1 and 1."""
        self._layer.kind = _SOUND
        _, count, inputs = taps.kernel.shape
        self._layer.conv = _Matrix(self._place(taps.kernel), self._place(taps.bias), 0, count, 1, inputs, 1)
        return self

    def wide_unit(self, taps: Taps, inner: Wave, mix: Taps, *, narrow: bool) -> NativeCausal:
        """Be a residual unit by plain products: of many channels."""
        self._layer.kind = _WIDE_UNIT
        self._layer.conv = self._matrix(taps.kernel, taps.bias, dilation=taps.dilation, narrow=narrow)
        self._layer.inner = self._wave(inner)
        self._layer.mix = self._matrix(mix.kernel, mix.bias, narrow=narrow)
        self.narrow_weights = narrow * (taps.kernel.numel() + mix.kernel.numel())
        return self

    def late_unit(self, taps: Taps, inner: Wave, mix: Taps) -> NativeCausal:
        """Be a residual unit of few channels, a multiple of the kernel's columns, and of TAPS taps."""
        self._layer.kind = _LATE_UNIT
        channels = taps.kernel.shape[0]
        weights = [self._place(self._blocks(each)) for each in (factors(taps.kernel), mix.kernel[:, 0].t())]
        bias, mix_bias = self._place(taps.bias), self._place(mix.bias)
        self._layer.unit = _Unit(weights[0], bias, self._wave(inner), weights[1], mix_bias, channels, taps.dilation)
        return self

    def _blocks(self, matrix: Tensor) -> Tensor:
        """[..., I, O] -> [..., O / columns, I, columns]."""
        return matrix.reshape(*matrix.shape[:-1], -1, self._kernel.columns).transpose(-3, -2)


def factors(kernel: Tensor) -> Tensor:
    """kernel [C, 7, I] -> [15, I, C]: what the products of native/codec_unit.h multiply by."""
    outer, inner = torch.tensor(_OUTER, dtype=torch.float64), torch.tensor(_INNER, dtype=torch.float64)
    taps = F.pad(kernel.double(), (0, 0, 1, 0))  # the oldest of 8 is 0
    taps = taps.view(-1, 4, 2, kernel.shape[2])  # [C, ., ., I]
    return torch.einsum("ai,bj,ojic->abco", outer, inner, taps).flatten(0, 1).float()


class NativeConvNeXt(_Holder):
    """A ConvNeXt block."""

    def __init__(self, kernel: CodecKernel, start: int, weights: Mapping[str, Tensor], epsilon: float) -> None:
        """start: of its tail in a slot's state. weights: taps [7, C], bias [C], and up and down [O, I], with biases."""
        super().__init__(kernel)
        self._block = _ConvNeXt(
            taps=self._place(weights["taps"]),
            bias=self._place(weights["bias"]),
            epsilon=epsilon,
            channels=weights["bias"].shape[0],
            start=start,
            up=self._matrix(weights["up"][:, None], weights["up_bias"]),
            down=self._matrix(weights["down"][:, None], weights["down_bias"]),
        )

    def run(self, x: Tensor, tails: Tails) -> Tensor:
        """x [B, T, C], to which it adds. The tails advance."""
        streams, rows, _ = checked(x).shape
        library, block = self._kernel.library, ctypes.byref(self._block)
        if x.numel():
            with self._kernel.call(lambda threads: library.convnext_scratch(block, streams, rows)) as (pool, room):
                library.run_convnext(pool, block, x.data_ptr(), tails.described(), room, rows)
        return x


class NativeLayers(_Holder):
    """The transformer and its norm. Keys and values are in the same rings that torch's operations use."""

    def __init__(self, kernel: CodecKernel, layers: list[list[Tensor]], sizes: WindowSizes) -> None:
        """layers: qkv, o, gate and up, down of each, [O, I]."""
        super().__init__(kernel)
        described = [_Layer(*(self._matrix(weight[:, None], None) for weight in layer)) for layer in layers]
        self._layers, self._sizes = (_Layer * len(described))(*described), sizes
        self._hidden = layers[0][0].shape[1]

    def run(self, x: Tensor, slots: Tensor, positions: Tensor, rotation: Rotation, cache: Tensor) -> Tensor:
        """x [B, T, hidden], overwritten -> [B, T, hidden]. positions [B, T]. rotation: as codec_window's, of all rows.

        cache [layers, slots, R, 2, K, D]: the rings, which are advanced.
        """
        streams, rows, _ = checked(x).shape
        library, out = self._kernel.library, torch.empty_like(x)
        if not x.numel():
            return out
        stack, first = self._stack(checked(cache).shape[2]), positions[:, 0].contiguous()
        needed = library.layers_scratch(ctypes.byref(stack), streams * rows)
        slots, cos, sin = slots.contiguous(), rotation.cos.contiguous(), rotation.sin.contiguous()
        with self._kernel.call(lambda threads: needed) as (pool, room):
            places = [each.data_ptr() for each in (slots, first, x, cache)]
            last = [each.data_ptr() for each in (cos, sin, out)]
            step = _Step(streams, rows, *places, cache.shape[1], *last, room)
            library.run_layers(pool, ctypes.byref(stack), ctypes.byref(step))
        return out

    def _stack(self, ring: int) -> Any:
        s = self._sizes
        sizes = (self._hidden, s.heads, s.kv_heads, s.head_dim, s.inner, ring, s.window)
        return _Stack(ctypes.addressof(self._layers), len(self._layers), *sizes, s.epsilon)


class NativeBooks(_Holder):
    """The codebooks."""

    def __init__(self, kernel: CodecKernel, vectors: Tensor, semantic: int) -> None:
        """vectors [G, codes, D], of which the first `semantic` groups are summed apart."""
        super().__init__(kernel)
        self._books = _Books(self._place(vectors), *vectors.shape, semantic)

    def run(self, codes: Tensor) -> Tensor:
        """codes [B, T, G] -> [B, T, 2 D].

        Raises:
            IndexError: a code that is in no book.
        """
        out = torch.empty(*codes.shape[:2], 2 * self._books.width)
        if codes.numel():
            least, most = map(int, codes.aminmax())
            if least < 0 or most >= self._books.codes or codes.shape[2] != self._books.groups:
                raise IndexError(f"codes {tuple(codes.shape)} from {least} to {most} are beyond the codebooks")
            codes = codes.contiguous()
            with self._kernel.pool.borrow() as pool:
                place = (codes.data_ptr(), out.data_ptr())
                self._kernel.library.look_up(pool, ctypes.byref(self._books), *place, len(out.flatten(0, 1)))
        return out
