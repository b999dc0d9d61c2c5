"""`make bench`: the real server, in a process of its own, measured from outside. Linux only (/proc).

    python -m tests.bench.server [--quick] [--backend fake] [--skip-speech]

Prints tables, and as its last line one JSON object with the same figures:

    machine     cpu, cores, memory_gb, python, system, fsync_ms (of the disk that holds cache and ledger)
    backend     what spoke
    memory      ready_s (start to the first 200 of /ready), idle_mb, peak_mb: the server's own; idle_total_mb (RSS),
                peak_total_mb (VmHWM): summed over its worker processes too, shared pages counted in each
    speech      format -> short | long -> first_sound_ms, total_ms, audio_s, real_time_factor, cpu_per_audio_s;
                medians, the cache bypassed by Cache-Control: no-store
    cache_hits  bytes, client_ceiling_per_s (16 connections to an app that does nothing), price_micros, charged_micros,
                and by concurrency ("1", "16"): hits_per_s, bare_per_s, ratio, ratio_min, ratio_max, hit_median_ms,
                bare_median_ms, hit_cpu_us, bare_cpu_us (CPU of the server per answer), cpu_ratio (ours to bare: the
                least noisy on a shared machine)
    seconds     how long the benchmark took
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import hits, report, speech
from tests.bench.load import http_request
from tests.bench.processes import ServerProcess, running
from tests.ports import free_port

CACHED_TEXT = "This sentence is spoken once, and from then on it comes out of the cache each time."
CREDIT_MICROS = 10**15
PRICES = "[default]\nper_1000_characters = 15000\ncached_per_1000_characters = 1500\n"
CONCURRENCIES = (1, 16)
SERVERS = {
    "embedded": [str(Path(sys.executable).with_name("qwen3-tts")), "serve"],
    "fake": [sys.executable, "-m", "tests.bench.fake_server"],
}


@dataclass(frozen=True)
class Effort:
    """How often and how long things are measured."""

    short_times: int = 7
    long_times: int = 2
    rounds: int = 5
    turn_s: float = 1.5


QUICK = Effort(short_times=2, long_times=1, rounds=3, turn_s=0.5)


@dataclass(frozen=True)
class Bench:
    """The running server, the folder it keeps its things in, and its clients' keys."""

    server: ServerProcess
    folder: Path
    key: str
    admin_key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def call(self, method: str, path: str, body: object = None, *, admin: bool = False) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        headers = {"Authorization": f"Bearer {self.admin_key}"} if admin else self.headers
        with contextlib.closing(connection):
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{method} {path}: {response.status} {answer}")
        return answer

    def balance(self) -> int:
        return int(self.call("GET", "/v1/usage?limit=1")["balance_micros"])


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not Path("/proc/self/stat").exists():
        print("The benchmark reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    figures = measure(options.backend, QUICK if options.quick else Effort(), with_speech=not options.skip_speech)
    print(f"\n{json.dumps(figures)}")
    return 0


def measure(backend: str, effort: Effort, *, with_speech: bool = True) -> dict[str, Any]:
    """Run everything and print the tables; the figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tts-bench-") as name:
        folder = Path(name)
        figures: dict[str, Any] = {"machine": report.machine(folder), "backend": backend}
        print(", ".join(f"{key} {value}" for key, value in figures["machine"].items()), flush=True)
        with _serving(backend, folder) as bench:
            idle = bench.server.memory_mb("VmRSS")
            if with_speech:
                figures["speech"] = _speech(bench, effort)
            figures["cache_hits"] = uvloop.run(_cache_hits(bench, effort))
            figures["memory"] = _memory(bench.server, idle)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    return figures


@contextlib.contextmanager
def _serving(backend: str, folder: Path) -> Iterator[Bench]:
    """The server on a free port, with a ledger on disk, prices, and a client with a filled wallet."""
    port, key, admin_key = free_port(), secrets.token_hex(8), secrets.token_hex(8)
    prices = folder / "prices.toml"
    prices.write_text(PRICES)
    environment = {
        "TTS_HOST": "127.0.0.1",
        "TTS_PORT": str(port),
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        "TTS_PRICES_FILE": str(prices),
        "TTS_API_KEYS": f"bench={key}",
        "TTS_ADMIN_KEY": admin_key,
    }
    with running(SERVERS[backend], port, folder / "server.log", environment=environment, ready="/ready") as server:
        bench = Bench(server, folder, key, admin_key)
        credit = {"micros": CREDIT_MICROS, "reference": "benchmark"}
        bench.call("POST", "/v1/accounts/bench/credit", credit, admin=True)
        yield bench


def _speech(bench: Bench, effort: Effort) -> dict[str, dict[str, dict[str, float]]]:
    texts = {"short": (speech.SHORT, effort.short_times), "long": (speech.LONG, effort.long_times)}
    figures = speech.measure(bench.server, texts, bench.headers)
    head = ["format", "text", "first sound ms", "total ms", "sound s", "real-time factor", "CPU s per sound s"]
    rows = [
        [audio_format, name, *values.values()]
        for name in texts
        for audio_format, by_name in figures.items()
        for values in [by_name[name]]
    ]
    report.table("Speech, generated each time (Cache-Control: no-store), one request at a time; medians", head, rows)
    return figures


async def _cache_hits(bench: Bench, effort: Effort) -> dict[str, Any]:
    body = speech.speak(bench.server.port, CACHED_TEXT, "mp3", bench.headers, store=True).body
    path = bench.folder / "bare.mp3"
    path.write_bytes(body)
    ours = hits.Target(bench.server, _speech_request(bench), len(body))
    figures: dict[str, Any] = {"bytes": len(body)}
    with _bare("memory", path) as server:
        target = hits.Target(server, http_request("GET", "/"), len(body))
        figures["client_ceiling_per_s"] = round(await hits.ceiling(target, max(CONCURRENCIES), effort.turn_s), 1)
    before, count = bench.balance(), 0
    with _bare("file", path) as server:
        bare = hits.Target(server, http_request("GET", "/"), len(body))
        for concurrency in CONCURRENCIES:
            contest, answers = await hits.compete(
                ours, bare, concurrency=concurrency, rounds=effort.rounds, seconds=effort.turn_s
            )
            figures[str(concurrency)] = contest.figures()
            count += answers
    figures["price_micros"] = -(-len(CACHED_TEXT) * 1500 // 1000)
    figures["charged_micros"] = before - bench.balance()
    if figures["charged_micros"] != count * figures["price_micros"]:
        raise RuntimeError(f"{count} hits were charged {figures['charged_micros']} micro-units")
    _print_hits(figures)
    return figures


def _speech_request(bench: Bench) -> bytes:
    body = {"model": "tts-1", "input": CACHED_TEXT, "voice": "alloy", "response_format": "mp3"}
    headers = {**bench.headers, "Content-Type": "application/json"}
    return http_request("POST", "/v1/audio/speech", json.dumps(body).encode(), headers)


def _bare(kind: str, path: Path) -> contextlib.AbstractContextManager[ServerProcess]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.bare", kind, str(port), str(path)]
    return running(command, port, path.with_suffix(f".{kind}.log"))


def _print_hits(figures: dict[str, Any]) -> None:
    head = [
        "connections",
        "hits/s",
        "bare/s",
        "ratio",
        "min",
        "max",
        "hit ms",
        "bare ms",
        "hit CPU us",
        "bare CPU us",
        "CPU ratio",
    ]
    rows = [[concurrency, *figures[str(concurrency)].values()] for concurrency in CONCURRENCIES]
    report.table(
        f"Cache hits of {figures['bytes']} bytes, each paid for, beside Starlette's FileResponse, turn by turn\n"
        f"(the load client's own ceiling: {figures['client_ceiling_per_s']} answers/s)",
        head,
        rows,
    )


def _memory(server: ServerProcess, idle: list[float]) -> dict[str, float]:
    peak = server.memory_mb("VmHWM")
    figures = {
        "ready_s": round(server.ready_s, 2),
        "idle_mb": round(idle[0], 1),
        "idle_total_mb": round(sum(idle), 1),
        "peak_mb": round(peak[0], 1),
        "peak_total_mb": round(sum(peak), 1),
    }
    head = ["start to ready s", "idle MB", "with workers", "peak MB", "with workers"]
    report.table("Start and memory of the server process, and the sum with its workers", head, [list(figures.values())])
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.server", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--skip-speech", action="store_true", help="cache hits and memory only")
    parser.add_argument("--backend", choices=SERVERS, default="embedded", help="fake: without a voice")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
