"""The layers of the codec's decoder that are made of convolutions, each a stream, as codec_convolutions.py's.

Owns their arithmetic, the folding of neighbouring linear maps of the checkpoint into one, and which are to be in C.
Does not own the state itself nor who is where in it (codec.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec_convolutions import (
    CausalConv,
    SnakeBeta,
    Stage,
    TailLayout,
    Tensors,
    is_wide,
    linear,
    narrowed,
    read_conv,
    rows,
    spread,
    unfold,
    upsampling_kernel,
    weight,
)
from .codec_kernel import CodecKernel
from .codec_parts import NativeCausal, NativeConvNeXt, Tails, Taps
from .linear import Linear

DILATIONS = (1, 3, 9)
"""Of the residual units of a block."""
NATIVE_CHANNELS = 384
"""Up to so many, a residual unit in fp32 is calculated by fewer operations: its weights are twice as large there."""
_EPSILON = 1e-6
"""Of the ConvNeXt blocks' norm."""


class ConvNeXt(nn.Module):
    """Depthwise convolution, norm and MLP with residual; norm and gamma are folded into the MLP."""

    def __init__(self, tensors: Tensors, layout: TailLayout, channels: int) -> None:
        super().__init__()
        conv, norm = tensors / "dwconv.conv", tensors / "norm"
        self.dwconv = weight(conv.get("weight", channels, 1, 7).squeeze(1).t())  # [7, C]
        self.dwbias = weight(conv.get("bias", channels))
        self.tail = layout.take(6, channels)
        up, down = tensors / "pwconv1", tensors / "pwconv2"
        matrix, gamma = up.get("weight", 4 * channels, channels), tensors.get("gamma", channels)
        bias = up.get("bias", 4 * channels) + matrix @ norm.get("bias", channels)
        self.up = linear(matrix * norm.get("weight", channels), bias)
        matrix, bias = down.get("weight", channels, 4 * channels), down.get("bias", channels)
        self.down = linear(matrix * gamma[:, None], bias * gamma)
        self.native: NativeConvNeXt | None = None

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, T, C] -> [B, T, C]; x may be overwritten."""
        if self.native is not None:
            return self.native.run(x, tails)
        tail = self.tail.of(tails)
        window = torch.cat((tail, x), 1)
        tail.copy_(window[:, -self.tail.rows :])
        hidden = (unfold(window, 7, 1) * self.dwconv).sum(2).add_(self.dwbias)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=_EPSILON)
        return rows(self.down, F.gelu(rows(self.up, hidden))).add_(x)

    def adopt(self, native: CodecKernel) -> None:
        """See Stage."""
        if not native.serves(self.tail.channels):
            return
        weights = {"taps": self.dwconv, "bias": self.dwbias, "up": self.up.weight, "down": self.down.weight}
        assert self.up.bias is not None
        assert self.down.bias is not None
        biases = {"up_bias": self.up.bias, "down_bias": self.down.bias}
        self.native = NativeConvNeXt(native, self.tail.start, weights | biases, _EPSILON)
        del self.dwconv, self.dwbias, self.up, self.down


class Upsample(Stage):
    """A transposed convolution, then a ConvNeXt block."""

    def __init__(self, layout: TailLayout, kernel: Tensor, bias: Tensor, factor: int, tensors: Tensors) -> None:
        """kernel [factor * C, in, 1], bias [factor * C]; `tensors` hold the ConvNeXt block."""
        super().__init__()
        self.factor = factor
        self.conv = CausalConv(layout, kernel, bias)
        self.convnext = ConvNeXt(tensors, layout, bias.shape[0] // factor)

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, T, in] -> [B, T * factor, C]."""
        out: Tensor = self.convnext(spread(self.conv(x, tails), self.factor), tails)
        return out

    def need(self, length: int) -> int:
        """See Stage."""
        return math.ceil((length + self.convnext.tail.rows) / self.factor) + self.conv.tail.rows

    def adopt(self, native: CodecKernel, *, narrow: bool) -> None:
        """See Stage."""
        self.conv.adopt(native, narrow=narrow)
        self.convnext.adopt(native)


class ResidualUnit(nn.Module):
    """snake, dilated convolution, snake, pointwise convolution, plus the input."""

    def __init__(self, tensors: Tensors, layout: TailLayout, channels: int, dilation: int) -> None:
        super().__init__()
        self.act1, self.act2 = SnakeBeta(tensors / "act1", channels), SnakeBeta(tensors / "act2", channels)
        self.conv1 = read_conv(tensors / "conv1.conv", layout, (channels, channels, 7), dilation)
        pointwise = tensors / "conv2.conv"
        self.mix = weight(pointwise.get("weight", channels, channels, 1).squeeze(2).t())  # [in, out]
        self.bias = weight(pointwise.get("bias", channels))
        self.narrow_mix: Linear | None = None
        self.native: NativeCausal | None = None

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """x [B, T, C], contiguous, is overwritten."""
        if self.native is not None:
            return self.native.run(x, tails)
        hidden = self.act2.inplace(self.conv1.activated(self.act1, x, tails))
        if self.narrow_mix is not None:
            return x.add_(rows(self.narrow_mix, hidden))
        x.add_(self.bias).flatten(0, 1).addmm_(hidden.flatten(0, 1), self.mix)
        return x

    def narrow(self) -> None:
        """Have the pointwise product in bf16, if it is one of many channels."""
        if self.native is None and is_wide(self.mix.shape[0]):
            product = linear(self.mix.t(), self.bias)
            self.narrow_mix = product if narrowed(product) is not None else None

    def adopt(self, native: CodecKernel, *, narrow: bool) -> None:
        """See Stage. By fewer operations where there are few channels, and the result is as good as in fp32."""
        taps, channels = self.conv1.kernel.plain(), self.mix.shape[0]
        narrow = narrow and is_wide(channels)
        if taps is None or not native.serves(channels) or narrow > native.narrow:
            self.act1.native = self.act2.native = native
            return
        part, mix = self.conv1.described(native, self.act1), Taps(self.mix.t()[:, None], self.bias)
        if narrow or channels > NATIVE_CHANNELS or channels % native.columns:
            self.native = part.wide_unit(taps, self.act2.wave, mix, narrow=narrow)
        else:
            self.native = part.late_unit(taps, self.act2.wave, mix)
        del self.conv1.kernel, self.mix


class DecoderBlock(Stage):
    """snake, upsampling by a transposed convolution, three residual units."""

    def __init__(self, tensors: Tensors, layout: TailLayout, sizes: tuple[int, int], factor: int) -> None:
        """sizes = (in, out); tensors named block.0, block.1 ..."""
        super().__init__()
        channels_in, channels = sizes
        self.factor = factor
        self.act = SnakeBeta(tensors / "0", channels_in)
        conv = tensors / "1.conv"
        kernel = upsampling_kernel(conv.get("weight", channels_in, channels, 2 * factor), factor)
        self.conv = CausalConv(layout, kernel, conv.get("bias", channels).repeat(factor))
        units = [
            ResidualUnit(tensors / str(index), layout, channels, dilation)
            for index, dilation in enumerate(DILATIONS, 2)
        ]
        self.reach = sum(unit.conv1.tail.rows for unit in units)
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, T, in] -> [B, T * factor, out]."""
        x = spread(self.conv.activated(self.act, x, tails), self.factor)
        for unit in self.units:
            x = unit(x, tails)
        return x

    def need(self, length: int) -> int:
        """See Stage."""
        return math.ceil((length + self.reach) / self.factor) + self.conv.tail.rows

    def adopt(self, native: CodecKernel, *, narrow: bool) -> None:
        """See Stage."""
        self.act.native = native
        self.conv.adopt(native, narrow=narrow, act=self.act)
        for unit in self.units:
            assert isinstance(unit, ResidualUnit)
            unit.adopt(native, narrow=narrow)


class Output(Stage):
    """snake, and the convolution to one channel: the samples."""

    def __init__(self, act: Tensors, conv: Tensors, layout: TailLayout, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(act, channels)
        self.conv = read_conv(conv, layout, (1, channels, 7))
        self.native: NativeCausal | None = None

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, T, C] -> [B, T, 1], within -1 and 1."""
        out = x.new_empty(x.shape[:2])
        self.render(x, tails, out)
        return out.unsqueeze(2)

    def render(self, x: Tensor, tails: Tails, out: Tensor) -> None:
        """[B, T, C] -> out [B, T]."""
        if self.native is not None:
            self.native.run(x, tails, out)
        else:
            out.copy_(self.conv.activated(self.act, x, tails).squeeze(2).clamp_(-1, 1))

    def need(self, length: int) -> int:
        return self.conv.need(length)

    def adopt(self, native: CodecKernel, *, narrow: bool) -> None:
        """See Stage. Never in bf16."""
        taps = self.conv.kernel.plain()
        if taps is not None and native.serves(self.conv.tail.channels):
            self.native = self.conv.described(native, self.act).sound(taps)
            del self.conv.kernel
