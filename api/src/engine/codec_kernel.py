"""The C code of the codec's decoder (native/codec.c): the library, its threads, and the memory that calls work in.

What bounds a chunk of the codec on a CPU is arithmetic, if nothing else keeps the cores waiting. In torch much does: a
chunk was 330 parallel sections, between which threads sleep and are woken, and copies of taps and windows through
memory. A layer is one call here, by threads that stay awake between calls.

Owns the signatures, and whether the processor's bf16 products are the best ones. Does not own the layers' weights and
descriptions (codec_parts.py), the comparison with torch (codec_check.py), nor the compiling (native/library.py).
Shapes: B streams, T rows, C channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .native.pool import Pool

_LINE = 64
_PAGE = 2 << 20
"""A huge page: weights in such are read faster."""


class CodecKernel:
    """The functions and their threads. Calls from several threads wait for one another. `close` ends the threads."""

    def __init__(self, library: Any, pool: Pool | None = None) -> None:
        """library: native/codec.c's, as ctypes has it. `pool`: threads to share, the same source's of another library.

        Raises:
            AttributeError: a library that lacks a function.
        """
        _declare(library)
        self.library, self.pool = library, pool or Pool(library)
        self.columns, self._lanes = int(library.columns()), int(library.lanes())
        self.narrow = bool(library.multiplies_narrow()) and not _has_tiles()
        self._scratch = torch.empty(0, dtype=torch.uint8, device="cpu")

    def close(self) -> None:
        """As Pool.close; gives back the memory that calls have worked in."""
        self.pool.close()
        self._scratch = self._scratch.new_empty(0)

    def serves(self, *sizes: int) -> bool:
        """Whether layers of these numbers of channels can be calculated."""
        return all(size % self._lanes == 0 for size in sizes)

    @contextmanager
    def call(self, scratch: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        """For one call: addresses of the threads, and of as much memory as `scratch` says for their number.

        The memory is kept for the next call: the system would have to clear fresh one.
        """
        with self.pool.borrow() as pool:
            needed, room = scratch(self.library.pool_threads(pool)) + _LINE, self._scratch
            if len(room) < needed:
                room = self._scratch = torch.empty(needed, dtype=torch.uint8, device="cpu")
            address = room.data_ptr()
            yield pool, address + -address % _LINE
            del room  # held until here, whoever closes meanwhile

    def activates(self, x: Tensor, out: Tensor) -> bool:
        """Whether snake() takes these: fp32 on a CPU, rows one behind the other."""
        channels = x.shape[2]
        rows = all(each.stride()[1:] == (channels, 1) for each in (x, out))
        return rows and x.numel() > 0 and _plain(x) and _plain(out) and self.serves(channels)

    def snake(self, x: Tensor, frequency: Tensor, height: Tensor, out: Tensor) -> None:
        """x [B, T, C] + height * sin(x * frequency)^2 into out, which may be x; see activates()."""
        with self.pool.borrow() as pool:
            places = (x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0))
            self.library.activate(pool, frequency.data_ptr(), height.data_ptr(), *places, *x.shape)


def aligned(packed: Tensor) -> Tensor:
    """A copy that begins on a page."""
    room = torch.empty(packed.nbytes + _PAGE, dtype=torch.uint8, device="cpu")
    begin = -room.data_ptr() % _PAGE
    return room[begin : begin + packed.nbytes].view(packed.dtype).view(packed.shape).copy_(packed)


def checked(x: Tensor) -> Tensor:
    """x, if the C code reads it as torch does.

    Raises:
        ValueError: not in float32 on a CPU, in order in memory.
    """
    if not _plain(x) or not x.is_contiguous():
        raise ValueError(f"a layer in C was given {x.dtype} on {x.device}, strides {x.stride()}")
    return x


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _has_tiles() -> bool:
    """Whether the processor has AMX, by which oneDNN multiplies several times as fast as by AVX-512."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def _declare(library: Any) -> None:
    """The functions' signatures; pointers are addresses."""
    number, address = ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[list[Any], type | None]] = {
        "columns": ([], number),
        "lanes": ([], number),
        "multiplies_narrow": ([], ctypes.c_bool),
        "pool_new": ([number], address),
        "pool_free": ([address], None),
        "pool_threads": ([address], number),
        "causal_scratch": ([address, number, number, number], number),
        "run_layer": ([address] * 3 + [number, address, number, address, address, number], None),
        "convnext_scratch": ([address, number, number], number),
        "run_convnext": ([address] * 5 + [number], None),
        "layers_scratch": ([address, number], number),
        "run_layers": ([address] * 3, None),
        "look_up": ([address] * 4 + [number], None),
        "activate": ([address] * 4 + [number, address] + [number] * 4, None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
