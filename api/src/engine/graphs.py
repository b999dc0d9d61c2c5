"""Work in a few fixed shapes, each captured before the first request: a replay costs one launch instead of hundreds.

Owns the sizes, the choice of one, the padding up to it, and the capture. What is computed is language_model.py's and
codec.py's. Rows that pad a batch work on the arenas' last slot, which nobody sits in. On a CPU the very same path runs
with `eagerly` for a capture, which is how it is tested without a GPU.
A shape that was not captured runs as it is and is counted: on the request path that should never happen.
Shapes: B rows of a step, L rows of a prompt, H talker's hidden, T frames, C code groups.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sizes of a batch. Padding costs little where weights are what is read, so they may be coarse."""
SPANS = (128, 256, 512, 1024, 2048, 4096)
"""How many positions a step's attention reads."""
PROMPT_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PROMPT_BATCH = (1, 2, 4, 8)
LONG_PROMPT = 128
"""Longer prompts go alone: shorter ones beside them would be padded to many times their length."""
CODEC_FRAMES = (16, 8, 4, 2, 1)
"""What chunks are taken apart into, largest first: no frame can be added to a stream to fill a shape."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]


def eagerly(run: Run) -> Run:
    """A capture that captures nothing."""
    return run


class CudaCapture:
    """Captures into CUDA graphs that share one pool of memory, as no two of them run at once.

    `stream`: where they are captured. Libraries keep a workspace for each stream, so graphs that run beside each other
    must come from different captures.
    """

    WARM_UPS = 2
    """Libraries choose their kernels and allocate their workspaces in the first runs, which a capture must not see."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(self.WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only this thread's calls are to be captured.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def up_to(sizes: Sequence[int], limit: int) -> list[int]:
    """Those of ascending `sizes` that are below `limit`, and `limit` itself."""
    return [*sizes[: bisect_left(sizes, limit)], limit]


def fitting(sizes: Sequence[int], wanted: int) -> int | None:
    """The smallest of ascending `sizes` that is `wanted` or more; None if there is none."""
    place = bisect_left(sizes, wanted)
    return sizes[place] if place < len(sizes) else None


def parts(frames: int, sizes: Sequence[int] = CODEC_FRAMES) -> list[int]:
    """`frames` as a sum of descending `sizes`, of which the last is 1, with as few parts as that gives."""
    found: list[int] = []
    for size in sizes:
        found += [size] * (frames // size)
        frames %= size
    return found


class Graphs:
    """Captured runs by their shape. `missed`: how often one was looked for in vain."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._runs: dict[Hashable, Run] = {}
        self._broken = False
        self.missed = 0

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, shape: Hashable, run: Run, capture: Capture | None = None) -> None:
        """Capture `run`, which reads and writes the same tensors each time. It is run: its slots must be free.

        `capture`: another one than that of all others.

        Where the device refuses, this shape and all later ones go without: slow speech is better than none.
        """
        if self._broken:
            return
        try:
            self._runs[shape] = (capture or self._capture)(run)
        except RuntimeError:  # torch's, out of memory included
            _log.exception("the device refuses a graph for %s: this and all further work runs without", shape)
            self._broken = True

    def find(self, shape: Hashable) -> Run | None:
        """The captured run; None, and counted, if there is none."""
        run = self._runs.get(shape)
        if run is None:
            self.missed += 1
            if not self._broken:
                _log.warning("no graph was foreseen for %s", shape)
        return run


class Index:
    """The slots of a step in a tensor of fixed size (B,): those that are meant, then the spare one."""

    def __init__(self, size: int, spare: int, device: torch.device) -> None:
        self.tensor = torch.full((size,), spare, dtype=torch.int64, device=device)
        self._spare, self._size = spare, size

    def set(self, slots: Sequence[int]) -> None:
        """At most as many slots as it was made for."""
        padded = [*slots, *[self._spare] * (self._size - len(slots))]
        self.tensor.copy_(torch.tensor(padded), non_blocking=True)
