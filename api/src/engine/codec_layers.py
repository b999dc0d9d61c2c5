"""The layers of the codec's decoder, each a stream: fed any number of rows, it continues where its slot's state ends.

Owns the arithmetic and the layout of the state of causal convolutions, and the folding of neighbouring linear maps of
the checkpoint into one. Does not own the state itself nor who is where in it (codec.py).
Activations are [batch, time, channels] throughout, so that linear layers, attention and transposed convolutions
(whose output is a reshape) need no transposition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec_tail import CodecTail, UnitWeights
from .errors import CheckpointError
from .linear import Linear
from .products import brain_product
from .weights import Checkpoint

DILATIONS = (1, 3, 9)
"""Of the residual units of a block."""
MATMUL_CHANNELS = 256
"""From so many input channels on, a convolution's weights outweigh its input: gathering the taps for one matrix product
is then faster than a convolution routine, which re-orders the weights on every call."""
NATIVE_CHANNELS = 384
"""Up to so many, a residual unit in fp32 is calculated in C: its weights are twice as large there."""


class Tensors:
    """A checkpoint's tensors below a prefix, with their shapes checked and their use recorded."""

    def __init__(self, checkpoint: Checkpoint, prefix: str = "", used: set[str] | None = None) -> None:
        self.checkpoint, self.prefix = checkpoint, prefix
        self.used: set[str] = set() if used is None else used

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.checkpoint, f"{self.prefix}{name}.", self.used)

    def get(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` in float32.

        Raises:
            CheckpointError: missing, unreadable or not of `shape`.
        """
        name = self.prefix + name
        tensor = self.checkpoint.tensor(name)
        if tensor.shape != shape:
            shapes = f"{tuple(tensor.shape)} in {self.checkpoint.folder}, {shape} by its config.json"
            raise CheckpointError(f"{name} is {shapes}")
        self.used.add(name)
        return tensor.float()

    def unused(self) -> list[str]:
        return sorted(self.checkpoint.names(self.prefix) - self.used)


def weight(tensor: Tensor) -> nn.Parameter:
    """A copy of its own in float32: `tensor` may be part of a larger one, or a wider intermediate result."""
    return nn.Parameter(tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True), requires_grad=False)


def linear(matrix: Tensor, bias: Tensor | None = None) -> Linear:
    """The Linear of matrix [out, in] and bias [out]."""
    with torch.device("meta"):
        layer = Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    layer.weight = weight(matrix)
    if bias is not None:
        layer.bias = weight(bias)
    return layer


def narrowed(layer: Linear) -> torch.dtype | None:
    """Have the product in bf16: the dtype of its rows. None, and nothing has changed, where there is none."""
    product = brain_product(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    if product is None:
        return None
    layer.adopt(product)
    return torch.bfloat16


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) of each row of x [B, T, in]."""
    out: Tensor = layer(x.flatten(0, 1))
    return out.view(*x.shape[:2], -1)


def spread(x: Tensor, factor: int) -> Tensor:
    """[B, T, factor * C] -> [B, T * factor, C]."""
    return x.reshape(x.shape[0], x.shape[1] * factor, -1)


class Stage(nn.Module):
    """What follows the transformer, rows [B, T, in] to rows [B, T * factor, out], reading and advancing the tails."""

    def need(self, length: int) -> int:
        """How many last rows of input decide the last `length` rows of output and the state."""
        raise NotImplementedError


@dataclass
class TailLayout:
    """Where each convolution's tail, the last rows of its input, lies in a slot's flat state."""

    size: int = 0

    def take(self, rows: int, channels: int) -> Tail:
        tail = Tail(self.size, rows, channels)
        self.size += rows * channels
        return tail


@dataclass(frozen=True)
class Tail:
    start: int
    rows: int
    channels: int

    def of(self, tails: Tensor) -> Tensor:
        """tails [B, size] -> a view [B, rows, channels]."""
        flat = tails[:, self.start : self.start + self.rows * self.channels]
        return flat.view(tails.shape[0], self.rows, self.channels)


class SnakeBeta(nn.Module):
    """x + sin(x * exp(alpha))^2 / (exp(beta) + 1e-9), per channel."""

    def __init__(self, tensors: Tensors, channels: int) -> None:
        super().__init__()
        self.frequency = weight(tensors.get("alpha", channels).exp())
        self.height = weight(1.0 / (tensors.get("beta", channels).exp() + 1e-9))
        self.native: CodecTail | None = None

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """x [B, T, C] into out, which must not be x."""
        if self.native is not None and self.native.activates(x, out):
            self.native.snake(x, self.frequency, self.height, out)
            return out
        torch.mul(x, self.frequency, out=out).sin_()
        out.mul_(out)
        return torch.addcmul(x, out, self.height, out=out)

    def inplace(self, x: Tensor) -> Tensor:
        if self.native is not None and self.native.activates(x, x):
            self.native.snake(x, self.frequency, self.height, x)
            return x
        wave = (x * self.frequency).sin_()
        return x.addcmul_(wave.mul_(wave), self.height)


class MatrixKernel(nn.Module):
    """A convolution as one product with the gathered taps."""

    def __init__(self, kernel: Tensor, bias: Tensor, dilation: int) -> None:
        super().__init__()
        self.taps, self.dilation = kernel.shape[2], dilation
        self.dtype: torch.dtype | None = None  # of the product's rows, where it is not the window's
        self.product = linear(kernel.transpose(1, 2).flatten(1), bias)  # [out, k * in]

    def forward(self, window: Tensor) -> Tensor:
        narrow = window.to(self.dtype or window.dtype)  # before the taps multiply it
        return rows(self.product, unfold(narrow, self.taps, self.dilation).flatten(2)).to(window.dtype)

    def narrow(self) -> None:
        """Have the product in bf16."""
        self.dtype = narrowed(self.product)

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """Kernel [out, k, in] and bias [out], as long as the product has no other form."""
        kernel, bias = self.product.weight, self.product.bias
        if bias is None or not kernel.numel():
            return None
        return kernel.view(kernel.shape[0], self.taps, -1), bias


class ImageKernel(nn.Module):
    """A convolution by the library's routine, channels last."""

    def __init__(self, kernel: Tensor, bias: Tensor, dilation: int) -> None:
        super().__init__()
        self.kernel = weight(kernel.transpose(1, 2))  # [out, k, in]
        self.bias = weight(bias)
        self.dilation = dilation

    def forward(self, window: Tensor) -> Tensor:
        image = window.transpose(1, 2).unsqueeze(2)  # [B, in, 1, L]
        kernel = self.kernel.transpose(1, 2).unsqueeze(2)  # [out, in, 1, k]
        return F.conv2d(image, kernel, self.bias, dilation=(1, self.dilation)).squeeze(2).transpose(1, 2)

    def plain(self) -> tuple[Tensor, Tensor]:
        """As MatrixKernel's."""
        return self.kernel, self.bias


class CausalConv(Stage):
    """A causal convolution that keeps the tail of its input."""

    def __init__(self, layout: TailLayout, kernel: Tensor, bias: Tensor, dilation: int = 1) -> None:
        """kernel [out, in, k], bias [out]."""
        super().__init__()
        _, channels, taps = kernel.shape
        self.tail = layout.take((taps - 1) * dilation, channels)
        form = MatrixKernel if channels >= MATMUL_CHANNELS else ImageKernel
        self.kernel: MatrixKernel | ImageKernel = form(kernel, bias, dilation)

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        window = self.window(tails, x.shape[1])
        window[:, self.tail.rows :] = x
        out: Tensor = self.kernel(self.kept(window, tails))
        return out

    def activated(self, act: SnakeBeta, x: Tensor, tails: Tensor) -> Tensor:
        """forward(act(x)), the activation being written straight into the window."""
        out: Tensor = self.kernel(self.activated_window(act, x, tails))
        return out

    def activated_window(self, act: SnakeBeta, x: Tensor, tails: Tensor) -> Tensor:
        """The window [B, tail + T, in] of act(x), whose end has become the tail."""
        window = self.window(tails, x.shape[1])
        act(x, out=window[:, self.tail.rows :])
        return self.kept(window, tails)

    def window(self, tails: Tensor, length: int) -> Tensor:
        """A new [B, tail + length, in] that starts with the tail; the caller fills the rest."""
        window = tails.new_empty(tails.shape[0], self.tail.rows + length, self.tail.channels)
        window[:, : self.tail.rows] = self.tail.of(tails)
        return window

    def need(self, length: int) -> int:
        """See Stage."""
        return length + self.tail.rows

    def kept(self, window: Tensor, tails: Tensor) -> Tensor:
        """The window [B, tail + T, in]; its end becomes the tail."""
        self.tail.of(tails).copy_(window[:, window.shape[1] - self.tail.rows :])
        return window


def unfold(window: Tensor, taps: int, dilation: int) -> Tensor:
    """[B, L, C] -> the view [B, T, k, C] of the rows that each output row sees."""
    span = (taps - 1) * dilation + 1
    return window.unfold(1, span, 1)[..., ::dilation].transpose(2, 3)


def read_conv(tensors: Tensors, layout: TailLayout, sizes: tuple[int, int, int], dilation: int = 1) -> CausalConv:
    """The causal convolution in `tensors`; sizes = (out, in, k)."""
    return CausalConv(layout, tensors.get("weight", *sizes), tensors.get("bias", sizes[0]), dilation)


def upsampling_kernel(kernel: Tensor, stride: int) -> Tensor:
    """A transposed convolution's kernel [in, out, n * stride] as that of a convolution [stride * out, in, n].

    Output row t * stride + p sums, over j < n, input row t - j times kernel[:, :, j * stride + p].
    """
    taps = kernel.view(*kernel.shape[:2], -1, stride).flip(2)  # [in, out, n, stride], oldest row first
    return taps.permute(3, 1, 0, 2).flatten(0, 1)


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

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        tail = self.tail.of(tails)
        window = torch.cat((tail, x), 1)
        tail.copy_(window[:, -self.tail.rows :])
        hidden = (unfold(window, 7, 1) * self.dwconv).sum(2).add_(self.dwbias)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return rows(self.down, F.gelu(rows(self.up, hidden))).add_(x)


class Upsample(Stage):
    """A transposed convolution, then a ConvNeXt block."""

    def __init__(self, layout: TailLayout, kernel: Tensor, bias: Tensor, factor: int, tensors: Tensors) -> None:
        """kernel [factor * C, in, 1], bias [factor * C]; `tensors` hold the ConvNeXt block."""
        super().__init__()
        self.factor = factor
        self.conv = CausalConv(layout, kernel, bias)
        self.convnext = ConvNeXt(tensors, layout, bias.shape[0] // factor)

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """[B, T, in] -> [B, T * factor, C]."""
        out: Tensor = self.convnext(spread(self.conv(x, tails), self.factor), tails)
        return out

    def need(self, length: int) -> int:
        """See Stage."""
        return math.ceil((length + self.convnext.tail.rows) / self.factor) + self.conv.tail.rows


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
        self.native: UnitWeights | None = None

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """x [B, T, C], contiguous, is overwritten."""
        if self.native is not None:
            return self.native(self.conv1.activated_window(self.act1, x, tails), x)
        hidden = self.act2.inplace(self.conv1.activated(self.act1, x, tails))
        if self.narrow_mix is not None:
            return x.add_(rows(self.narrow_mix, hidden))
        x.add_(self.bias).flatten(0, 1).addmm_(hidden.flatten(0, 1), self.mix)
        return x

    def narrow(self) -> None:
        """Have the pointwise product in bf16, if it is one of many channels."""
        if self.mix.shape[0] >= MATMUL_CHANNELS:
            product = linear(self.mix.t(), self.bias)
            self.narrow_mix = product if narrowed(product) is not None else None

    def adopt(self, native: CodecTail) -> None:
        """Have it in C, if it is one of few enough channels that the C code serves, and not in bf16."""
        conv, channels = self.conv1.kernel.plain(), self.mix.shape[0]
        if conv is None or channels > NATIVE_CHANNELS or not native.serves(channels):
            return
        act = {"frequency": self.act2.frequency, "height": self.act2.height}
        parts = {"kernel": conv[0], "bias": conv[1], **act, "mix": self.mix, "mix_bias": self.bias}
        self.native = UnitWeights(native, parts, self.conv1.kernel.dilation)
        del self.conv1.kernel


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

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """[B, T, in] -> [B, T * factor, out]."""
        x = spread(self.conv.activated(self.act, x, tails), self.factor)
        for unit in self.units:
            x = unit(x, tails)
        return x

    def need(self, length: int) -> int:
        """See Stage."""
        return math.ceil((length + self.reach) / self.factor) + self.conv.tail.rows


class Output(Stage):
    """snake, and the convolution to one channel: the samples."""

    def __init__(self, act: Tensors, conv: Tensors, layout: TailLayout, channels: int) -> None:
        super().__init__()
        self.act = SnakeBeta(act, channels)
        self.conv = read_conv(conv, layout, (1, channels, 7))

    def forward(self, x: Tensor, tails: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, 1], within -1 and 1."""
        return self.conv.activated(self.act, x, tails).clamp_(-1, 1)

    def need(self, length: int) -> int:
        return self.conv.need(length)
