"""What limits cost: cache hits a second with a bound, in memory and in Redis, beside the same server without one.

    python -m tests.bench.limits [--rounds 5] [--seconds 1.5] [--concurrency 16]

Three servers with the tests' backend, pressed turn by turn; prints hits a second, the server's CPU for each, and the
ratio to the one without bounds, round by round. Linux only (/proc); Redis as in tests/redis_server.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvloop

from tests.bench import report, speech
from tests.bench.load import http_request, press
from tests.bench.processes import ServerProcess, running
from tests.ports import free_port
from tests.redis_server import running_redis

TEXT = "This sentence is spoken once, and from then on it comes out of the cache each time."
BOUNDS = {
    "TTS_REQUESTS_PER_MINUTE": "1000000",
    "TTS_CONCURRENT_PER_ACCOUNT": "10000",
    "TTS_CHARACTERS_PER_DAY": "1000000000000",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cache hits with and without limits.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    with running_redis() as redis, contextlib.ExitStack() as stack:
        forms = {"none": {}, "memory": BOUNDS, "redis": {**BOUNDS, "TTS_REDIS_URL": redis.url()}}
        servers = {name: stack.enter_context(_serving(environment)) for name, environment in forms.items()}
        turns = uvloop.run(_compete(servers, options.concurrency, options.rounds, options.seconds))
    _report(turns)


@contextlib.contextmanager
def _serving(environment: dict[str, str]) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory(prefix="tts-bench-") as folder:
        port = free_port()
        places = {
            "TTS_PORT": str(port),
            "TTS_CACHE_DIR": f"{folder}/cache",
            "TTS_LEDGER_URL": f"sqlite:///{folder}/ledger.db",
            "TTS_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", "tests.bench.fake_server"]
        log = Path(folder) / "server.log"
        with running(command, port, log, environment=places | environment, ready="/ready") as server:
            yield server


async def _compete(
    servers: dict[str, ServerProcess], concurrency: int, rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Hits a second and microseconds of CPU for each, by server and round; the first, a warm-up, is left out."""
    body = json.dumps({"model": "tts-1", "input": TEXT, "voice": "alloy", "response_format": "mp3"}).encode()
    request = http_request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    lengths = {name: len(speech.speak(s.port, TEXT, "mp3", {}, store=True).body) for name, s in servers.items()}
    for _ in range(rounds + 1):
        for name, server in servers.items():
            cpu = server.cpu_seconds()
            load = await press(server.port, request, concurrency=concurrency, seconds=seconds, length=lengths[name])
            turns[name].append((load.per_second, 1e6 * (server.cpu_seconds() - cpu) / load.answers))
    return {name: results[1:] for name, results in turns.items()}


def _report(turns: dict[str, list[tuple[float, float]]]) -> None:
    rows, figures = [], {}
    for name, results in turns.items():
        ratios = [ours / base for (ours, _), (base, _) in zip(results, turns["none"], strict=True)]
        figures[name] = {
            "hits_per_s": round(statistics.median(rate for rate, _ in results), 1),
            "cpu_us": round(statistics.median(cpu for _, cpu in results)),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }
        rows.append([name, *figures[name].values()])
    report.table("Cache hits by where the limits are", ["limits", "hits/s", "CPU us", "ratio", "min", "max"], rows)
    print(f"\n{json.dumps(figures)}")


if __name__ == "__main__":
    main()
