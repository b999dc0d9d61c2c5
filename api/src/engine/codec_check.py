"""Whether the codec's C code can be had, and calculates what torch's operations do: it is used only then.

Owns the comparison, by small random weights: layers of each kind, in fp32 and bf16, for several streams. How close the
results are is for the tests.
Shapes: B streams, T rows, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec_kernel import CodecKernel
from .codec_parts import TAPS, NativeBooks, NativeCausal, NativeConvNeXt, NativeLayers, Tails, Taps, Wave
from .codec_window import Ring, WindowLayer, WindowSizes, rotation_at
from .native.library import NoKernel, user_folder
from .native.library import load as load_library
from .native.pool import Pool

SOURCE = Path(__file__).parent / "native" / "codec.c"
TOLERANCE = 3e-5
"""How far from torch's, of their largest value, results may be to be used; rounding is a tenth of that, faults are far
more."""
_SLACK = {False: 1.0, True: 100.0}
"""In bf16, where a value between two numbers may become either."""
_STREAMS, _ROWS = 2, 71

_log = logging.getLogger(__name__)


def load(source: Path = SOURCE, folder: Path | None = None, pool: Pool | None = None) -> CodecKernel | None:
    """None, and the log says why: it does not compile here, or what it calculates is not what torch does.

    folder: where the library is kept; by default the user's own. `pool`: as CodecKernel's.
    """
    try:
        kernel = CodecKernel(load_library(source, folder or user_folder()), pool)
    except (NoKernel, AttributeError) as reason:
        _log.warning("torch's operations serve for the codec: %s", reason)
        return None
    try:
        error = disagreement(kernel)
    finally:
        kernel.close()  # the threads are of whoever decodes
    if not error <= TOLERANCE:
        _log.warning("%s is %.1e off here; torch's operations serve", source.name, error)
        return None
    return kernel


@torch.inference_mode()
def disagreement(kernel: CodecKernel) -> float:
    """The largest difference from torch in fp64, of the largest value, over layers of all kinds."""
    chance = _Chance()
    cases = [_books, _activation, _late_units, _wide_units, _convolutions, _sound, _convnext, _layers]
    errors = [
        float((pair.mine.double() - pair.wanted).abs().max() / pair.wanted.abs().max()) / pair.slack
        for case in cases
        for pair in case(kernel, chance)
    ]
    return max(error if error == error else float("inf") for error in errors)


class _Pair(NamedTuple):
    """What came out, and what should have, in fp64. `slack`: how many times TOLERANCE is right for it."""

    mine: Tensor
    wanted: Tensor
    slack: float = 1.0


class _Chance:
    """Random numbers, always the same."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def some(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, device="cpu").normal_(0, scale, generator=self._generator)

    def taps(self, outputs: int, count: int, inputs: int, dilation: int = 1) -> Taps:
        return Taps(self.some(outputs, count, inputs, scale=(count * inputs) ** -0.5), self.some(outputs), dilation)

    def wave(self, channels: int) -> Wave:
        return Wave(self.some(channels), self.some(channels))


def _books(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    vectors, codes = chance.some(3, 5, 32), torch.tensor([[[4, 0, 2], [1, 1, 3]]])
    chosen = [vectors[group, codes[..., group]].double() for group in range(3)]
    yield _Pair(NativeBooks(kernel, vectors, 1).run(codes), torch.cat((chosen[0], chosen[1] + chosen[2]), 2))


def _activation(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    x, wave = chance.some(_STREAMS, _ROWS, 96), chance.wave(96)
    out = torch.empty_like(x)
    kernel.snake(x, *wave, out)
    yield _Pair(out, _snake(x.double(), wave))


def _late_units(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    for dilation, channels in ((1, 192), (3, 96), (9, 96)):
        yield from _unit(kernel, chance, channels, dilation, late=True, narrow=False)


def _wide_units(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    for narrow in (False, True)[: 1 + kernel.narrow]:
        yield from _unit(kernel, chance, 64, 3, late=False, narrow=narrow)


def _unit(
    kernel: CodecKernel, chance: _Chance, channels: int, dilation: int, *, late: bool, narrow: bool
) -> Iterator[_Pair]:
    taps, mix = chance.taps(channels, TAPS, channels, dilation), chance.taps(channels, 1, channels)
    act, inner = chance.wave(channels), chance.wave(channels)
    tails, x = chance.some(_STREAMS, (TAPS - 1) * dilation * channels), chance.some(_STREAMS, _ROWS, channels)
    part = NativeCausal(kernel, channels, (0, (TAPS - 1) * dilation), act)
    part = part.late_unit(taps, inner, mix) if late else part.wide_unit(taps, inner, mix, narrow=narrow)
    window = _window(x, tails, act)
    hidden = _rounded(_snake(_convolved(_rounded(window, narrow), taps, narrow), inner), narrow)
    wanted = x.double() + _convolved(hidden, mix, narrow)
    yield _Pair(part.run(x.clone(), Tails.alone(tails)), wanted, _SLACK[narrow])
    yield _Pair(tails.view(_STREAMS, -1, channels), window[:, _ROWS:])


def _convolutions(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    for narrow in (False, True)[: 1 + kernel.narrow]:
        for rows in (1, 2, 5, 40):
            taps, act = chance.taps(80, 3, 48, 2), chance.wave(48)
            tails, x = chance.some(_STREAMS, 4 * 48), chance.some(_STREAMS, rows, 48)
            window = _window(x, tails, act)
            part = NativeCausal(kernel, 48, (0, 4), act).convolution(taps, narrow=narrow)
            yield _Pair(
                part.run(x, Tails.alone(tails)), _convolved(_rounded(window, narrow), taps, narrow), _SLACK[narrow]
            )
            yield _Pair(tails.view(_STREAMS, 4, 48), window[:, rows:])
    taps, x = chance.taps(96, 1, 32), chance.some(_STREAMS, _ROWS, 32)
    part = NativeCausal(kernel, 32, (0, 0), None).convolution(taps, narrow=False)
    yield _Pair(part.run(x, Tails.alone(chance.some(_STREAMS, 16))), _convolved(x.double(), taps, narrow=False))


def _sound(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    taps, act = chance.taps(1, TAPS, 96), chance.wave(96)
    tails, x = chance.some(_STREAMS, (TAPS - 1) * 96), chance.some(_STREAMS, _ROWS, 96)
    wanted = _convolved(_window(x, tails, act), taps, narrow=False).clamp(-1, 1)
    yield _Pair(NativeCausal(kernel, 96, (0, TAPS - 1), act).sound(taps).run(x, Tails.alone(tails)), wanted)


def _convnext(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    channels, wide = 64, 256
    weights = {
        "taps": chance.some(TAPS, channels),
        "bias": chance.some(channels),
        "up": chance.some(wide, channels, scale=channels**-0.5),
        "up_bias": chance.some(wide),
        "down": chance.some(channels, wide, scale=wide**-0.5),
        "down_bias": chance.some(channels),
    }
    tails, x = chance.some(_STREAMS, (TAPS - 1) * channels), chance.some(_STREAMS, 9, channels)
    window = _window(x, tails, None)
    exact = {name: weight.double() for name, weight in weights.items()}
    hidden = (window.unfold(1, TAPS, 1) * exact["taps"].t()).sum(3) + exact["bias"]
    hidden = F.gelu(F.layer_norm(hidden, (channels,), eps=1e-6) @ exact["up"].t() + exact["up_bias"])
    wanted = x.double() + hidden @ exact["down"].t() + exact["down_bias"]
    yield _Pair(NativeConvNeXt(kernel, 0, weights, 1e-6).run(x.clone(), Tails.alone(tails)), wanted)
    yield _Pair(tails.view(_STREAMS, -1, channels), window[:, 9:])


def _layers(kernel: CodecKernel, chance: _Chance) -> Iterator[_Pair]:
    """Two layers, at positions before and beyond their window and the end of the ring."""
    sizes = WindowSizes(heads=4, kv_heads=2, head_dim=32, inner=96, window=6, epsilon=1e-5)
    shapes = ((256, 64), (64, 128), (192, 64), (64, 96))
    weights = [[chance.some(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(2)]
    native, plain = NativeLayers(kernel, weights, sizes), [WindowLayer(layer, sizes).double() for layer in weights]
    cache = chance.some(2, 3, 9, 2, 2, 32)
    exact, slots = cache.double(), torch.tensor([2, 0])
    for first in ((0, 11), (4, 15)):
        x = chance.some(2, 4, 64)
        positions = torch.tensor(first)[:, None] + torch.arange(4)
        rotation, wanted = rotation_at(positions.flatten(), 32, 1e4, torch.float64), x.double()
        ring = Ring(exact, slots, positions, sizes.window)
        for index, layer in enumerate(plain):
            wanted = layer(wanted, rotation, ring, index)
        single = rotation_at(positions.flatten(), 32, 1e4, torch.float32)
        yield _Pair(
            native.run(x.clone(), slots, positions, single, cache), F.rms_norm(wanted, (64,), eps=sizes.epsilon)
        )
        yield _Pair(cache, exact)


def _window(x: Tensor, tails: Tensor, act: Wave | None) -> Tensor:
    x = x.double() if act is None else _snake(x.double(), act)
    return torch.cat((tails.double().view(len(x), -1, x.shape[2]), x), 1)


def _snake(x: Tensor, wave: Wave) -> Tensor:
    return x + wave.height.double() * (x * wave.frequency.double()).sin().square()


def _convolved(window: Tensor, taps: Taps, narrow: bool) -> Tensor:
    kernel = _rounded(taps.kernel.double(), narrow).transpose(1, 2)  # [O, I, k]
    return F.conv1d(window.transpose(1, 2), kernel, taps.bias.double(), dilation=taps.dilation).transpose(1, 2)


def _rounded(x: Tensor, narrow: bool) -> Tensor:
    return x.float().bfloat16().double() if narrow else x
