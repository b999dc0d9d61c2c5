"""How far the load client itself can be believed, measured on the machine that it runs on.

It listens to a server that makes nothing and stamps each frame with the time of its sending (`paced_server`): what lies
between a stamp and the client's clock is the client's error, the kernel's and that server's part included.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.bench.listening import Heard, Target
from tests.bench.paced_server import FRAME_BYTES, STAMP
from tests.bench.processes import running
from tests.bench.tts_points import closed_loop, percentile
from tests.bench.workload import FRAME_S, ask
from tests.ports import free_port

STREAMS = (8, 64, 128, 256)
SPEED = 8
"""Times real time at which each stream is sent: 64 streams are 512 seconds of sound a second."""

FRAMES = 50
BOUND_MS = 1.0
"""A 99th percentile of the error up to this can be believed."""

_ROUNDS = 2


async def check(folder: Path, streams: tuple[int, ...] = STREAMS) -> list[dict[str, Any]]:
    """For each number of streams: audio_s_per_s, frames_per_s, error_ms p50 and p99, client_cpu_share, trusted."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.paced_server", str(port), str(FRAMES), str(FRAME_S / SPEED)]
    with running(command, port, folder / "paced.log"):
        return [await _check(port, count) for count in streams]


async def _check(port: int, streams: int) -> dict[str, Any]:
    target = Target(f"http://127.0.0.1:{port}", "pcm", keeps_body=True)
    point = await closed_loop(target, [ask(0, id) for id in range(streams * _ROUNDS)], streams, 60.0)
    late = [error for heard in point.heard for error in errors(heard)]
    failed = sum(heard.error is not None for heard in point.heard)
    if failed:
        raise RuntimeError(
            f"{failed} of {len(point.heard)} requests to the paced server failed: {point.heard[-1].error}"
        )
    seconds = point.ended_at - point.started_at
    p50, p99 = percentile(late, 50) or 0.0, percentile(late, 99) or 0.0
    return {
        "streams": streams,
        "audio_s_per_s": round(len(late) * FRAME_S / seconds, 1),
        "frames_per_s": round(len(late) / seconds),
        "error_p50_ms": round(1000 * p50, 3),
        "error_p99_ms": round(1000 * p99, 3),
        "client_cpu_share": round(point.cpu_s / seconds, 3),
        "trusted": 1000 * p99 <= BOUND_MS,
    }


def errors(heard: Heard) -> list[float]:
    """For each stamped frame the seconds from its sending until the client had all of it."""
    body, ends = b"".join(heard.body), list(accumulate(length for _, length in heard.arrivals))
    found, piece = [], 0
    for offset in range(0, len(body) - FRAME_BYTES + 1, FRAME_BYTES):
        while ends[piece] < offset + FRAME_BYTES:
            piece += 1
        (sent_at,) = STAMP.unpack_from(body, offset)
        found.append(heard.arrivals[piece][0] - sent_at)
    return found


def trusted(rows: list[dict[str, Any]]) -> float | None:
    """The highest rate below the first one at which the client was not to be believed; None: none was."""
    found = None
    for row in rows:
        if not row["trusted"]:
            break
        found = row["audio_s_per_s"]
    return found
