"""Where a device's work runs, and how its results reach the host without anybody waiting before they are wanted.

Owns the queue of work beside the one that frames go through, and copies to the host. On a CPU all work is done in its
turn, by the time that its call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .graphs import Capture, CudaCapture
from .pending import Made, Pending

T = TypeVar("T")


class Lane:
    """A queue of work beside the main one; `capture`: of its graphs. This one is the main one itself."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def mark(self) -> None:
        """What the lane gets from now on needs all that the main queue has got so far, and nothing later."""

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is asked for here goes into the lane."""
        yield

    def join(self) -> None:
        """What the main queue gets from now on comes after all that the lane has got so far."""


class CudaLane(Lane):
    """A stream that goes before the main one's work, where both have some."""

    def __init__(self, device: torch.device) -> None:
        capture = CudaCapture(device, priority=-1)
        super().__init__(capture)
        self._stream = capture.stream
        self._needed, self._done = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """As Lane."""
        self._needed.record()

    @contextmanager
    def work(self) -> Iterator[None]:
        """As Lane."""
        self._stream.wait_event(self._needed)
        with torch.cuda.stream(self._stream):
            yield
            self._done.record()

    def join(self) -> None:
        """As Lane."""
        torch.cuda.current_stream().wait_event(self._done)


class _Arriving(Generic[T]):
    """Tensors on their way to the host's pinned memory."""

    def __init__(self, tensors: Sequence[Tensor], then: Callable[..., T]) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._then = then
        self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._there.record()

    def ready(self) -> bool:
        """As Pending."""
        return bool(self._there.query())  # type: ignore[no-untyped-call]

    def get(self) -> T:
        """As Pending."""
        self._there.synchronize()
        return self._then(*self._tensors)


def arriving(tensors: Sequence[Tensor], then: Callable[..., T]) -> Pending[T]:
    """What `then` makes of `tensors`, all of one device, when they are on the host."""
    if tensors[0].device.type == "cpu":
        return Made(then(*tensors))
    return _Arriving(tensors, then)
