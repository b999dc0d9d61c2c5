"""`make bench-server`: speech over HTTP under load, as a listener meets it. Linux only (/proc).

    python -m tests.bench.tts_load --model FOLDER                      this project's server, started for it
    python -m tests.bench.tts_load --base-url http://127.0.0.1:8091    any OpenAI-compatible server that runs
        --start "COMMAND" --ready /health                              ... or is started for it, by that command
        --frames-field max_new_tokens --field stream_format='"audio"'  ... and what it wants to be told

Closed loops (so many listeners at a time) and open loops (Poisson arrivals, whatever the server does). The same seed
gives every server the same texts, lengths and arrivals. Latencies count from the sending of the request on a
connection that stands. A failed request is infinitely late: percentiles that it reaches have no figure. Quality is not
tested, nor, with random weights, the end of speech.

Prints tables, and as its last line one JSON object:

    machine, versions   where, and with which packages on the client's side (and ours, if our server is measured)
    server              what was measured, says (its versions), ready_s, peak_mb, peak_total_mb (with workers), gpus
    workload            seed, requests, seconds, mean_frames, lengths (fixed: as the request says, or natural)
    client              check (see tts_client_check), trusted_audio_s_per_s: up to where it was right within 1 ms
    first_request       the first one after ready: first_byte_ms, total_ms, error, said (why)
    points              for each load and format: kind, load, requests, failed, errors, first_byte_ms, first_80ms_ms and
                        audible_ms (above -60 dBFS; these two in pcm only), total_ms, underruns (of a player that
                        starts with the first sound), requests_dry, dry_s, audio_s, audio_s_per_s (_full: while all
                        streams were busy), requests_per_s, lag_ms (of sending, open loop), lengths_kept,
                        client_cpu_share
    seconds             how long the benchmark took
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import uvloop

from tests.bench import report, tts_client_check, tts_server
from tests.bench.listening import Target, listen
from tests.bench.tts_points import Point, closed_loop, figures, open_loop
from tests.bench.tts_tables import print_client, print_points, print_server
from tests.bench.workload import MEAN_FRAMES, Ask, arrivals, ask

PACKAGES = ("qwen3-tts-server", "torch", "numpy", "fastapi", "uvicorn", "uvloop", "httptools", "av")
_IDS = 100_000
"""Each point has its own requests: ids from a multiple of this."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.base_url or options.model or options.fake):
        parser.error("--model FOLDER (or TTS_MODEL) or --base-url URL says what to measure")
    if not Path("/proc/self/stat").exists():
        print("The benchmark reads /proc: it needs Linux.", file=sys.stderr)
        return 1
    print(f"\n{json.dumps(measure(options))}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and print the tables; the figures."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tts-load-") as name:
        folder = Path(name)
        found: dict[str, Any] = {"machine": report.machine(folder), "versions": _versions()}
        print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), flush=True)
        check = [] if options.skip_check else uvloop.run(tts_client_check.check(folder))
        found["client"] = {"check": check, "trusted_audio_s_per_s": tts_client_check.trusted(check)}
        print_client(found["client"])
        with _server(options, folder) as server:
            target = _target(options, server)
            found |= uvloop.run(_load(options, target, folder))
            found["server"] = _describe(options, server)
    found["workload"] = _workload(options, found["points"])
    print_server(found)
    print_points(found)
    found["seconds"] = round(time.perf_counter() - started, 1)
    return found


async def _load(options: argparse.Namespace, target: Target, folder: Path) -> dict[str, Any]:
    """The first request, the warm-up, then each point."""
    first = await listen(target, _ask(options, -1))
    first.decode()
    shown = {"first_byte_ms": first.first_byte_s and round(1000 * first.first_byte_s, 2), "error": first.error}
    shown |= {"total_ms": round(1000 * first.total_s, 2), "said": first.said}
    if first.error is not None:
        print(f"the first request failed: {first.error} {first.said}", file=sys.stderr)
    warm_up = [_ask(options, -2 - number) for number in range(options.warm_up)]
    if warm_up:
        await closed_loop(target, warm_up, len(warm_up), options.seconds)
    points = []
    loads = [("closed", load) for load in options.streams] + [("open", load) for load in options.rates]
    for number, (audio_format, kind, load) in enumerate((each, *load) for each in options.formats for load in loads):
        point = await _point(options, replace(target, audio_format=audio_format), kind, load, number)
        points.append(figures(point, fixed_lengths=_fixed(options)))
        print(_progress(points[-1]), file=sys.stderr, flush=True)
    return {"first_request": shown, "points": points}


async def _point(options: argparse.Namespace, target: Target, kind: str, load: float, number: int) -> Point:
    # Each format gets the same requests at the same load.
    place = number % (len(options.streams) + len(options.rates)) * _IDS
    count = max(options.requests, int(load)) if kind == "closed" else options.requests
    asks: list[Ask] = [_ask(options, place + id) for id in range(count)]
    if kind == "closed":
        return await closed_loop(target, asks, int(load), options.seconds)
    return await open_loop(target, asks, arrivals(options.seed, load, count), load, options.seconds)


def _ask(options: argparse.Namespace, id: int) -> Ask:
    return ask(options.seed, id, options.mean_frames)


@contextlib.contextmanager
def _server(options: argparse.Namespace, folder: Path) -> Iterator[tts_server.Measured]:
    if options.base_url and options.start:
        with tts_server.started(options.start, options.base_url, options.ready, folder / "server.log") as server:
            yield server
    elif options.base_url:
        yield tts_server.Measured(options.base_url, {})
    else:
        with tts_server.own_server(
            folder,
            options.model or "",
            options.slots or max([int(load) for load in options.streams] + [8]),
            options.timeout,
            fixed_lengths=_fixed(options),
            fake=options.fake,
        ) as server:
            yield server


def _fixed(options: argparse.Namespace) -> bool:
    """Whether each answer should be as long as its request says."""
    if options.lengths != "auto":
        return bool(options.lengths == "fixed")
    if options.base_url:
        return bool(options.frames_field)
    return not options.fake and (Path(options.model) / tts_server.ENDLESS).is_file()


def _target(options: argparse.Namespace, server: tts_server.Measured) -> Target:
    fields: dict[str, Any] = {"voice": options.voice or ("alloy" if options.fake else "vivian")}
    if options.served_model:
        fields["model"] = options.served_model
    for given in options.field:
        name, _, value = given.partition("=")
        fields[name] = json.loads(value)
    return Target(
        base_url=server.base_url,
        audio_format=options.formats[0],
        fields=fields,
        headers=server.headers | dict(given.split("=", 1) for given in options.header),
        frames_field=options.frames_field,
        frames_extra=options.frames_extra,
        timeout_s=options.timeout,
    )


def _describe(options: argparse.Namespace, server: tts_server.Measured) -> dict[str, Any]:
    shown: dict[str, Any] = {"base_url": options.base_url, "start": options.start, "model": options.model}
    if options.base_url:
        shown["model"] = options.served_model
    shown["says"] = tts_server.says(server, options.ready if options.base_url else "/version")
    shown |= {"fields": options.field, "frames_field": options.frames_field, "gpus": tts_server.graphics()}
    if server.process is not None:
        peak = server.process.memory_mb("VmHWM")
        shown |= {"ready_s": round(server.process.ready_s, 2)}
        shown |= {"peak_mb": round(peak[0], 1), "peak_total_mb": round(sum(peak), 1)}
    return shown


def _workload(options: argparse.Namespace, points: list[dict[str, Any]]) -> dict[str, Any]:
    frames = [_ask(options, id).frames for id in range(options.requests)]
    return {
        "seed": options.seed,
        "requests": options.requests,
        "seconds": options.seconds,
        "mean_frames": round(sum(frames) / len(frames), 1),
        "lengths": "fixed" if _fixed(options) else "natural",
    }


def _progress(point: dict[str, Any]) -> str:
    return (
        f"{point['format']}, {point['kind']} {point['load']:g}: "
        f"{point['requests']} requests, {point['failed']} failed, {point['seconds']} s"
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item.strip()]


def _names(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tts_load", description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what is measured")
    what.add_argument("--model", default=os.environ.get("TTS_MODEL"), help="checkpoint for our own server")
    what.add_argument("--slots", type=int, help="TTS_SLOTS of our own server; default: the most streams, at least 8")
    what.add_argument(
        "--fake", action="store_true", help="our own server without a voice: what all but the engine costs"
    )
    what.add_argument("--base-url", help="a server that speaks OpenAI's API")
    what.add_argument("--start", help="the command that starts it; without: it runs already")
    what.add_argument(
        "--ready", default="/health", help="path that answers 200 once it is ready (and, if JSON, who it is)"
    )
    what.add_argument("--voice", help="default: vivian")
    what.add_argument("--served-model", help="the requests' `model`; default: none is named")
    what.add_argument("--field", action="append", default=[], metavar="NAME=JSON", help="into each request's body")
    what.add_argument("--header", action="append", default=[], metavar="NAME=VALUE")
    what.add_argument("--frames-field", default="", help="field that bounds the frames, such as max_new_tokens")
    what.add_argument("--frames-extra", type=int, default=0, help="added to it: 1 where the last token has no sound")
    what.add_argument(
        "--lengths", choices=("auto", "fixed", "natural"), default="auto", help="auto: fixed if they can be"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--streams", type=_numbers, default=[1, 8, 32, 64], help="closed loops; 1,8,32,64")
    load.add_argument("--rates", type=_numbers, default=[1, 4, 10, 20], help="open loops, requests a second; 1,4,10,20")
    load.add_argument("--formats", type=_names, default=["pcm"], help="pcm, or pcm,mp3")
    load.add_argument("--requests", type=int, default=200, help="of each point (at least one per stream)")
    load.add_argument("--seconds", type=float, default=120.0, help="after which a point begins no more requests")
    load.add_argument("--timeout", type=float, default=120.0, help="seconds after which a request has failed")
    load.add_argument("--mean-frames", type=float, default=MEAN_FRAMES, help="of a request's sound, 80 ms each")
    load.add_argument("--seed", type=int, default=0)
    load.add_argument("--warm-up", type=int, default=8, help="requests at once before the first point")
    load.add_argument("--skip-check", action="store_true", help="do not measure the client itself")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
