"""The tables of `tests.bench.tts_load`: figures in, Markdown out. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.bench import report

UNIT = {"closed": "streams", "open": "requests/s"}
LOOP = {
    "closed": "Closed loop: each stream asks for the next text once it has heard the last",
    "open": "Open loop: Poisson arrivals, whatever the server does",
}


def print_client(client: dict[str, Any]) -> None:
    if not client["check"]:
        return
    head = ["streams", "audio s/s", "frames/s", "error p50 ms", "error p99 ms", "client CPU", "trusted"]
    rows = [[*each.values()] for each in client["check"]]
    believed = client["trusted_audio_s_per_s"]
    verdict = f"it is believed up to {believed} audio s/s" if believed else "it is not to be believed here at any rate"
    report.table(f"The client itself, before a server that only sends; {verdict}", head, rows)


def print_server(found: dict[str, Any]) -> None:
    server, first = found["server"], found["first_request"]
    head = ["start to ready s", "peak MB", "with workers", "GPU MB in use", "first request: first byte ms", "whole ms"]
    gpus = ", ".join(str(each["used_mb"]) for each in server["gpus"])
    cells = [server.get("ready_s"), server.get("peak_mb"), server.get("peak_total_mb"), gpus or None]
    row = [*cells, first["error"] or first["first_byte_ms"], first["total_ms"]]
    report.table("The server", head, [[_cell(cell) for cell in row]])


def print_points(found: dict[str, Any]) -> None:
    """Two tables for each format and kind of loop."""
    workload = found["workload"]
    print(
        f"\nTexts of {workload['mean_frames']} frames on average, lengths {workload['lengths']}, "
        f"seed {workload['seed']}. "
        "A failed request is infinitely late; '-': no figure (failures reach it, or nothing to measure)."
    )
    for audio_format in dict.fromkeys(point["format"] for point in found["points"]):
        for kind in UNIT:
            points = [each for each in found["points"] if (each["format"], each["kind"]) == (audio_format, kind)]
            if points:
                _latencies(points, audio_format, kind)
                _throughput(points, kind)


def _latencies(points: Sequence[dict[str, Any]], audio_format: str, kind: str) -> None:
    names = ["first_byte_ms", "first_80ms_ms", "audible_ms", "total_ms"]
    names = [name for name in names if name in points[0]]
    head = [UNIT[kind], "requests", "failed"]
    head += [f"{name.removesuffix('_ms').replace('_', ' ')} {which}" for name in names for which in points[0][name]]
    rows = [
        [f"{point['load']:g}", point["requests"], point["failed"]]
        + [_cell(value) for name in names for value in point[name].values()]
        for point in points
    ]
    only = "" if audio_format == "pcm" else "; of an encoded sound the first byte is known, not when it can be heard"
    report.table(f"{LOOP[kind]}; {audio_format}; ms{only}", head, rows)


def _throughput(points: Sequence[dict[str, Any]], kind: str) -> None:
    names = {
        "audio_s_per_s": "audio s/s",
        "audio_s_per_s_full": "audio s/s, all busy",
        "requests_per_s": "answers/s",
        "in_flight_most": "most at once",
        "underruns": "underruns",
        "requests_dry": "requests dry",
        "dry_s": "dry s",
        "never_audible": "never audible",
        "lengths_kept": "length as asked",
        "client_cpu_share": "client CPU",
    }
    shown = [name for name in names if name in points[0]]
    head = [UNIT[kind], *(names[name] for name in shown), "sending late p99 ms", "errors"]
    rows = [
        [f"{point['load']:g}"]
        + [_cell(point[name]) for name in shown]
        + [_cell(point.get("lag_ms", {}).get("p99")), _errors(point["errors"])]
        for point in points
    ]
    report.table("What was delivered", head, rows)


def _errors(errors: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in errors.items()) or "-"


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
