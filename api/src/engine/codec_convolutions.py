"""The codec decoder's convolutions, each a stream: fed any number of rows, it continues where its slot's state ends.

Owns the arithmetic of causal convolutions and activations, the layout of their state, and the reading of their weights.
Does not own the state itself nor who is where in it (codec.py), nor what is made of convolutions (codec_layers.py).
Activations are [batch, time, channels] throughout, so that linear layers, attention and transposed convolutions
(whose output is a reshape) need no transposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec_kernel import CodecKernel
from .codec_parts import NativeCausal, Tails, Taps, Wave
from .errors import CheckpointError
from .linear import Linear
from .products import brain_product
from .weights import Checkpoint

MATMUL_CHANNELS = 256
"""From so many input channels on, a convolution's weights outweigh its input: gathering the taps for one matrix product
is then faster than a convolution routine, which re-orders the weights on every call."""


def is_wide(channels: int) -> bool:
    """Whether it has so many input channels that its products may be in bf16."""
    return channels >= MATMUL_CHANNELS


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

    def adopt(self, native: CodecKernel, *, narrow: bool) -> None:
        """Have in C what it serves: in float32 on a CPU, before `settle`. `narrow`: wide products in bf16.

        What should be narrow and is not to be had in C as fast stays torch's.
        """
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

    def of(self, tails: Tails) -> Tensor:
        """A view [B, rows, channels] of them, where row i of their memory is stream i."""
        flat = tails.memory[:, self.start : self.start + self.rows * self.channels]
        return flat.view(len(flat), self.rows, self.channels)


class SnakeBeta(nn.Module):
    """x + sin(x * exp(alpha))^2 / (exp(beta) + 1e-9), per channel."""

    def __init__(self, tensors: Tensors, channels: int) -> None:
        super().__init__()
        self.frequency = weight(tensors.get("alpha", channels).exp())
        self.height = weight(1.0 / (tensors.get("beta", channels).exp() + 1e-9))
        self.native: CodecKernel | None = None

    @property
    def wave(self) -> Wave:
        """Its numbers."""
        return Wave(self.frequency, self.height)

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

    def plain(self) -> Taps | None:
        """As long as the product has no other form."""
        kernel, bias = self.product.weight, self.product.bias
        if bias is None or not kernel.numel():
            return None
        return Taps(kernel.view(kernel.shape[0], self.taps, -1), bias, self.dilation)


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

    def plain(self) -> Taps:
        """As MatrixKernel's."""
        return Taps(self.kernel, self.bias, self.dilation)


class CausalConv(Stage):
    """A causal convolution that keeps the tail of its input."""

    def __init__(self, layout: TailLayout, kernel: Tensor, bias: Tensor, dilation: int = 1) -> None:
        """kernel [out, in, k], bias [out]."""
        super().__init__()
        _, channels, taps = kernel.shape
        self.tail = layout.take((taps - 1) * dilation, channels)
        form = MatrixKernel if is_wide(channels) else ImageKernel
        self.kernel: MatrixKernel | ImageKernel = form(kernel, bias, dilation)
        self.native: NativeCausal | None = None

    def forward(self, x: Tensor, tails: Tails) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        if self.native is not None:
            return self.native.run(x, tails)
        window = self.window(tails, x.shape[1])
        window[:, self.tail.rows :] = x
        out: Tensor = self.kernel(self.kept(window, tails))
        return out

    def activated(self, act: SnakeBeta, x: Tensor, tails: Tails) -> Tensor:
        """forward(act(x)), the activation being written straight into the window; in C, of the `act` it was given."""
        if self.native is not None:
            return self.native.run(x, tails)
        out: Tensor = self.kernel(self.activated_window(act, x, tails))
        return out

    def activated_window(self, act: SnakeBeta, x: Tensor, tails: Tails) -> Tensor:
        """The window [B, tail + T, in] of act(x), whose end has become the tail."""
        window = self.window(tails, x.shape[1])
        act(x, out=window[:, self.tail.rows :])
        return self.kept(window, tails)

    def window(self, tails: Tails, length: int) -> Tensor:
        """A new [B, tail + length, in] that starts with the tail; the caller fills the rest."""
        memory = tails.memory
        window = memory.new_empty(memory.shape[0], self.tail.rows + length, self.tail.channels)
        window[:, : self.tail.rows] = self.tail.of(tails)
        return window

    def need(self, length: int) -> int:
        """See Stage."""
        return length + self.tail.rows

    def adopt(self, native: CodecKernel, *, narrow: bool, act: SnakeBeta | None = None) -> None:
        """See Stage. `act`: what activated() will be given."""
        taps = self.kernel.plain()
        narrow = narrow and isinstance(self.kernel, MatrixKernel)
        if taps is None or not native.serves(self.tail.channels, taps.kernel.shape[0]) or narrow > native.narrow:
            return
        self.native = self.described(native, act).convolution(taps, narrow=narrow)
        del self.kernel

    def described(self, native: CodecKernel, act: SnakeBeta | None) -> NativeCausal:
        """The C code's layer with this one's window."""
        tail = (self.tail.start, self.tail.rows)
        return NativeCausal(native, self.tail.channels, tail, None if act is None else act.wave)

    def kept(self, window: Tensor, tails: Tails) -> Tensor:
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
