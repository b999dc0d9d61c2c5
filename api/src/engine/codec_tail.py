"""The codec decoder's last residual units and its Snake activation in C (native/codec_tail.c), where they work.

What bounds those units in torch is the arithmetic of their convolutions, which run at the processor's fp32 rate: only
fewer operations are faster. The C code makes 4 rows of a convolution of 7 taps by 15 products instead of 28, and goes
through the caches once, where torch goes through memory for each operation: on two cores of Zen 4 the units of 192 and
96 channels take 6.1 ms of a frame instead of 12. As few as 10 products would do, or 12 nested, but their sums lose
another 20 or 5 dB; these lose 1 to 5 dB more than torch's, at -125 dB.

Owns the weights' layout for it, its structs, and the check against torch before it is used. Does not own the streams'
state, which is the layers' (codec_layers.py), nor the compiling (native/library.py).
Shapes: B streams, T rows, C channels, L rows of a window: the tail's and then T.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .native.library import NoKernel, user_folder
from .native.library import load as load_library

SOURCE = Path(__file__).parent / "native" / "codec_tail.c"
TAPS = 7
TOLERANCE = 3e-5
"""How far from torch's, of their largest value, results may be to be used; rounding is a tenth of that, faults are far
more. How close they are is for the tests."""
_OUTER = ((1, 0), (1, 1), (0, 1))
"""Karatsuba's: factors of a pair of taps."""
_INNER = ((-4, 0, 0, 0), (2 / 3, 2 / 3, 2 / 3, 2 / 3), (-1, 1, -1, 1), (16 / 3, -8 / 3, 4 / 3, -2 / 3), (0, 0, 0, 2))
"""Factors of 4 taps, for the points 0, 1, -1, -1/2 and infinity."""

_log = logging.getLogger(__name__)


class _Unit(ctypes.Structure):
    """codec_tail.c's struct unit."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("kernel", "bias", "frequency", "height", "mix", "mix_bias")),
        *((name, ctypes.c_int64) for name in ("channels", "dilation")),
    ]


class UnitWeights:
    """A residual unit's weights as the C code reads them: from the window of its convolution to its output."""

    def __init__(self, tail: CodecTail, parts: Mapping[str, Tensor], dilation: int) -> None:
        """parts: kernel [C, 7, C inputs], mix [C inputs, C], and bias, frequency, height, mix_bias [C] each."""
        self._tail, self._channels = tail, parts["bias"].shape[0]
        outer, inner = torch.tensor(_OUTER, dtype=torch.float64), torch.tensor(_INNER, dtype=torch.float64)
        taps = F.pad(parts["kernel"].double(), (0, 0, 1, 0))  # the oldest of 8 is 0
        taps = taps.view(-1, 4, 2, self._channels)  # [C, ., ., C inputs]
        factors = torch.einsum("ai,bj,ojic->abco", outer, inner, taps).flatten(0, 1)  # [15, C inputs, C]
        packed = {"kernel": tail.packed(factors.float()), "mix": tail.packed(parts["mix"])}
        self._kept = {name: tensor.detach().float().contiguous() for name, tensor in {**parts, **packed}.items()}
        places = {name: tensor.data_ptr() for name, tensor in self._kept.items()}
        self._unit = _Unit(**places, channels=self._channels, dilation=dilation)

    def __call__(self, window: Tensor, x: Tensor) -> Tensor:
        """window [B, L, C], x [B, T, C], both contiguous: the unit's output, which is written into x.

        Raises ValueError: they are not in float32 on a CPU, in that order in memory.
        """
        for each in (window, x):
            if each.dtype != torch.float32 or each.device.type != "cpu" or not each.is_contiguous():
                raise ValueError(f"a unit in C was given {each.dtype} on {each.device}, strides {each.stride()}")
        self._tail.run_unit(self._unit, window, x)
        return x


class CodecTail:
    """The C code. Any number of threads may call it at once."""

    def __init__(self, code: Any) -> None:
        """code: the library, as ctypes has it."""
        self._code = code
        for name in ("columns", "lanes", "scratch_floats"):
            getattr(code, name).restype = ctypes.c_int64
        code.scratch_floats.argtypes = [ctypes.c_int64]
        address, number = ctypes.c_void_p, ctypes.c_int64
        code.snake_rows.argtypes = [address, number, address, number, address, address, number, number, number, number]
        code.residual_unit.argtypes = [ctypes.POINTER(_Unit), address, address, address, number, number, number]
        code.snake_rows.restype = code.residual_unit.restype = None
        self._columns, self._lanes = int(code.columns()), int(code.lanes())

    def serves(self, channels: int) -> bool:
        """Whether it has residual units of so many channels."""
        return channels % self._columns == 0

    def activates(self, x: Tensor, out: Tensor) -> bool:
        """Whether snake() takes these: fp32 on a CPU, rows one behind the other."""
        channels = x.shape[2]
        fp32 = x.dtype == out.dtype == torch.float32 and x.device.type == out.device.type == "cpu"
        return fp32 and channels % self._lanes == 0 and all(each.stride()[1:] == (channels, 1) for each in (x, out))

    def snake(self, x: Tensor, frequency: Tensor, height: Tensor, out: Tensor) -> None:
        """x [B, T, C] + height * sin(x * frequency)^2 into out, which may be x; see activates()."""
        places = (x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), frequency.data_ptr(), height.data_ptr())
        self._code.snake_rows(*places, *x.shape, torch.get_num_threads())

    def packed(self, matrix: Tensor) -> Tensor:
        """[..., inputs, outputs] -> [..., outputs / columns, inputs, columns]."""
        return matrix.reshape(*matrix.shape[:-1], -1, self._columns).transpose(-3, -2).contiguous()

    def run_unit(self, unit: _Unit, window: Tensor, x: Tensor) -> None:
        """See UnitWeights."""
        streams, rows, channels = x.shape
        threads = torch.get_num_threads()
        scratch = x.new_empty(threads * self._code.scratch_floats(channels))
        places = (window.data_ptr(), x.data_ptr(), scratch.data_ptr())
        self._code.residual_unit(ctypes.byref(unit), *places, streams, rows, threads)


def load(source: Path = SOURCE, folder: Path | None = None) -> CodecTail | None:
    """None, and the log says why: it does not compile here, or what it calculates is not what torch does.

    folder: where the library is kept; by default the user's own.
    """
    try:
        tail = CodecTail(load_library(source, folder or user_folder()))
    except NoKernel as reason:
        _log.warning("torch's operations serve for the codec's last layers: %s", reason)
        return None
    error = disagreement(tail)
    if not error <= TOLERANCE:
        _log.warning("%s is %.1e off here; torch's operations serve", source.name, error)
        return None
    return tail


@torch.inference_mode()
def disagreement(tail: CodecTail) -> float:
    """The largest difference from torch in fp64, of the largest value, over units of all dilations."""
    chance = torch.Generator().manual_seed(0)

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape).normal_(0, scale, generator=chance)

    errors = []
    for dilation, channels in ((1, 192), (3, 96), (9, 96)):
        parts = {name: some(channels) for name in ("bias", "frequency", "height", "mix_bias")}
        parts["kernel"] = some(channels, TAPS, channels, scale=(TAPS * channels) ** -0.5)
        parts["mix"] = some(channels, channels, scale=channels**-0.5)
        unit, x = UnitWeights(tail, parts, dilation), some(2, 71, channels)
        activated = torch.empty_like(x)
        tail.snake(x, parts["frequency"], parts["height"], activated)
        window = torch.cat((some(2, (TAPS - 1) * dilation, channels), activated), 1)
        expected = _plain(x.double(), {name: part.double() for name, part in parts.items()}, window.double(), dilation)
        wave = _snake(x.double(), parts["frequency"].double(), parts["height"].double())
        for mine, wanted in ((activated, wave), (unit(window, x.clone()), expected)):
            errors.append(float((mine - wanted).abs().max() / wanted.abs().max()))
    return max(error if error == error else float("inf") for error in errors)


def _snake(x: Tensor, frequency: Tensor, height: Tensor) -> Tensor:
    return x + height * (x * frequency).sin().square()


def _plain(x: Tensor, parts: dict[str, Tensor], window: Tensor, dilation: int) -> Tensor:
    kernel = parts["kernel"].transpose(1, 2)  # [C, C inputs, 7]
    hidden = F.conv1d(window.transpose(1, 2), kernel, parts["bias"], dilation=dilation).transpose(1, 2)
    return x + _snake(hidden, parts["frequency"], parts["height"]) @ parts["mix"] + parts["mix_bias"]
