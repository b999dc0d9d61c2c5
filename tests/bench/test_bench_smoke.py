"""The benchmark itself, in its smallest form: a real server process around the fake backend."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import ledger_load, server
from tests.bench.sound import sound_offset
from tests.bench.speech import FORMATS

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmark reads /proc")

SPEAKING = {"first_sound_ms", "total_ms", "audio_s", "real_time_factor", "cpu_per_audio_s"}
LEDGER = {"hits_per_s", "ratio", "ratio_min", "ratio_max", "median_ms", "cpu_us", "cpu_ratio"}
CONTEST = {
    "hits_per_s",
    "bare_per_s",
    "ratio",
    "ratio_min",
    "ratio_max",
    "hit_median_ms",
    "bare_median_ms",
    "hit_cpu_us",
    "bare_cpu_us",
    "cpu_ratio",
}


@pytest.mark.slow
def test_the_last_line_holds_the_documented_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "QUICK", server.Effort(short_times=1, long_times=1, rounds=1, turn_s=0.1))
    assert server.main(["--quick", "--backend", "fake"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert figures.keys() == {"machine", "backend", "speech", "cache_hits", "memory", "seconds"}
    assert figures["machine"].keys() == {"cpu", "cores", "memory_gb", "python", "system", "fsync_ms"}
    assert figures["memory"].keys() == {"ready_s", "idle_mb", "idle_total_mb", "peak_mb", "peak_total_mb"}
    assert list(figures["speech"]) == list(FORMATS)
    for by_text in figures["speech"].values():
        assert by_text.keys() == {"short", "long"}
        assert all(values.keys() == SPEAKING for values in by_text.values())
        assert all(0 < values["first_sound_ms"] <= values["total_ms"] for values in by_text.values())
        assert by_text["long"]["audio_s"] > by_text["short"]["audio_s"] > 0
    hits = figures["cache_hits"]
    assert hits.keys() == {"bytes", "client_ceiling_per_s", "price_micros", "charged_micros", "1", "16"}
    assert hits["1"].keys() == hits["16"].keys() == CONTEST
    assert hits["charged_micros"] > 0
    assert figures["memory"]["peak_mb"] >= figures["memory"]["idle_mb"] > 10
    for title in ("Speech, generated each time", "Cache hits of", "Start and memory"):
        assert title in printed


@pytest.mark.slow
def test_the_ledger_benchmark_counts_every_hit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger_load, "QUICK", ledger_load.Effort(rounds=1, turn_s=0.1))
    assert ledger_load.main(["--quick", "--connections", "3"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(printed.splitlines()[-1])
    assert figures.keys() == {"machine", "connections", "bytes", "free", "paid", "stored", "seconds"}
    assert figures["connections"] == 3
    kept = ["sqlite", "postgres", "postgres+redis everysec", "postgres+redis always"]
    for kind in ("free", "paid"):
        assert list(figures[kind]) == ["off", *kept]
        assert all(values.keys() == LEDGER for values in figures[kind].values())
        assert figures[kind]["off"]["ratio"] == 1
        assert all(values["hits_per_s"] > 0 for values in figures[kind].values())
    assert list(figures["stored"]) == kept
    assert all(count > 0 for count in figures["stored"].values())
    assert "Cache hits that cost nothing, 3 connections" in printed


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no voice')"]
    with pytest.raises(RuntimeError, match="no voice"), server.running(command, 1, tmp_path / "log"):
        pass


def test_sound_begins_behind_the_headers() -> None:
    def page(granule: int, content: bytes) -> bytes:
        return b"OggS\0\0" + granule.to_bytes(8, "little") + bytes(12) + bytes([1, len(content)]) + content

    headers = page(0, b"OpusHead...") + page(0, b"OpusTags")
    assert sound_offset("opus", headers + page(960, b"sound")) == len(headers)
    block = bytes([0x80, 0, 0, 3]) + b"abc"
    assert sound_offset("flac", b"fLaC" + block + b"\xff\xf8sound") == 4 + len(block)
    assert sound_offset("wav", b"RIFF....WAVEfmt ................data....sound") == 40
    assert sound_offset("mp3", b"\xff\xfb") == sound_offset("pcm", b"\0\0") == 0
