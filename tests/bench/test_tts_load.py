"""The load benchmark: its arithmetic on servers whose every moment is known, and end to end on real ones."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.src.text.segment import segment
from tests.bench import peer_server, tts_client_check, tts_load, tts_server
from tests.bench.listening import Heard, Target, listen
from tests.bench.paced_server import Pace, serving
from tests.bench.processes import running
from tests.bench.tts_points import Point, closed_loop, figures, open_loop, percentile
from tests.bench.workload import FRAME_S, Ask, arrivals, ask, frames_of
from tests.moments import measured_again
from tests.ports import free_port

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the benchmark reads /proc")

ROOT = Path(__file__).parents[2]
ASKS = [ask(0, id) for id in range(8)]
LATE = 0.3
"""Seconds by which anything may be late on a busy machine."""


async def hear(pace: Pace, **target: Any) -> Heard:
    async with serving(pace) as url:
        return await listen(Target(url, **target), ASKS[0])


async def closed(pace: Pace, streams: int = 2, asks: Sequence[Ask] = ASKS, **target: Any) -> dict[str, Any]:
    async with serving(pace) as url:
        return figures(await closed_loop(Target(url, **target), asks, streams, 60.0), fixed_lengths=True)


# --- the work ---


def test_the_same_seed_gives_the_same_work() -> None:
    assert [ask(3, id) for id in range(50)] == [ask(3, id) for id in range(50)]
    assert len({ask(3, id).text for id in range(500)}) == 500
    assert ask(3, 0).text != ask(4, 0).text
    frames = [ask(3, id).frames for id in range(2000)]
    assert 49 < sum(frames) / len(frames) < 55
    assert min(frames) >= 10
    assert max(frames) <= 160


def test_a_text_takes_its_frames_also_when_cut_into_segments() -> None:
    for id in range(300):
        asked = ask(0, id)
        assert abs(sum(frames_of(part.text) for part in segment(asked.text)) - asked.frames) <= 2


def test_arrivals_are_poisson() -> None:
    times = arrivals(0, 10.0, 5000)
    assert times == arrivals(0, 10.0, 5000)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(0.01, rel=0.1)


# --- one request ---


@measured_again
async def test_a_delay_before_the_first_sound_shows_and_sound_is_counted() -> None:
    heard = await hear(Pace(frames=10, delay_s=0.2))
    assert heard.error is None
    assert heard.first_byte_s is not None
    assert 0.2 <= heard.first_byte_s < 0.2 + LATE
    assert heard.first_byte_s == heard.first_frame_s == heard.audible_s
    assert heard.total_s >= heard.first_byte_s
    assert heard.audio_s == pytest.approx(10 * FRAME_S)
    assert (heard.underruns, heard.dry_s) == (0, 0)


@measured_again
async def test_silence_at_the_start_delays_what_can_be_heard() -> None:
    heard = await hear(Pace(frames=6, gap_s=0.1, silent=4))
    assert heard.first_frame_s is not None
    assert heard.audible_s is not None
    assert heard.audible_s - heard.first_frame_s >= 0.4 - LATE
    assert (await hear(Pace(frames=2, silent=2))).audible_s is None


@measured_again
async def test_a_server_slower_than_sound_starves_the_player() -> None:
    heard = await hear(Pace(frames=5, gap_s=0.3))
    assert heard.underruns == 4
    assert heard.dry_s == pytest.approx(4 * (0.3 - FRAME_S), abs=LATE)


async def test_failures_have_their_reasons() -> None:
    refused = await hear(Pace(status=b"503"))
    assert (refused.error, refused.audio_s) == ("503", 0)
    assert (await hear(Pace(cut_after=3))).error == "cut"
    assert (await hear(Pace(delay_s=5.0), timeout_s=0.1)).error == "timeout"
    assert (await hear(Pace(frames=0))).error == "no sound"
    nobody = await listen(Target(f"http://127.0.0.1:{free_port()}"), ASKS[0])
    assert nobody.error == "connection: ConnectionRefusedError"


async def test_what_a_request_says() -> None:
    target = Target("http://h:1/v1/", "mp3", {"voice": "x"}, {"A": "b"}, "max_new_tokens", frames_extra=1)
    head, _, body = target.request(ASKS[0]).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/audio/speech HTTP/1.1\r\nHost: h:1\r\n")
    assert b"Cache-Control: no-store" in head
    expected = {"input": ASKS[0].text, "response_format": "mp3", "voice": "x", "max_new_tokens": ASKS[0].frames + 1}
    assert json.loads(body) == expected


# --- points ---


def test_failures_never_leave_a_percentile() -> None:
    assert percentile([1, 2, 3, 4], 50) == 2
    assert percentile([1, 2, 3, 4], 99) == 4
    assert percentile([], 50) is None
    heard = [Heard(ASKS[0], 0.0, first_byte_s=0.001 * (rank + 1)) for rank in range(94)]
    heard += [Heard(ASKS[0], 0.0, first_byte_s=0.001, error="503") for _ in range(6)]
    found = figures(Point("open", 1, "mp3", heard, ended_at=1.0), fixed_lengths=False)
    assert found["first_byte_ms"] == {"p50": 50.0, "p95": None, "p99": None}
    assert (found["requests"], found["failed"], found["errors"]) == (100, 6, {"503": 6})


@measured_again
async def test_a_closed_loop_keeps_its_streams_busy() -> None:
    found = await closed(Pace(frames=10, delay_s=0.1), streams=4)
    assert (found["requests"], found["failed"], found["in_flight_most"]) == (8, 0, 4)
    assert found["seconds"] >= 0.2
    assert found["audio_s"] == pytest.approx(8 * 10 * FRAME_S)
    assert found["audio_s_per_s"] == pytest.approx(found["audio_s"] / found["seconds"], rel=0.02)
    assert found["lengths_kept"] == sum(abs(each.frames - 10) <= 2 for each in ASKS)


@measured_again
async def test_an_open_loop_does_not_wait_for_answers() -> None:
    async with serving(Pace(frames=1, delay_s=0.6)) as url:
        times = [0.0, 0.05, 0.1, 9.0]
        point = await open_loop(Target(url), ASKS[:4], times, 1.0, seconds=5.0)
    found = figures(point, fixed_lengths=False)
    assert (found["requests"], found["failed"], found["in_flight_most"]) == (3, 0, 3)
    sent = sorted(heard.sent_at - point.started_at for heard in point.heard)
    assert all(0 <= late - due < LATE for due, late in zip(times, sent, strict=False))
    assert found["lag_ms"]["p99"] < 1000 * LATE


@measured_again
async def test_the_client_measures_itself(tmp_path: Path) -> None:
    (row,) = await tts_client_check.check(tmp_path, streams=(2,))
    assert 0 < row["audio_s_per_s"] < 1.1 * 2 * tts_client_check.SPEED
    assert 0 < row["error_p50_ms"] <= row["error_p99_ms"]
    assert row["trusted"] == (row["error_p99_ms"] <= tts_client_check.BOUND_MS)
    rows = [{"trusted": good, "audio_s_per_s": rate} for good, rate in ((True, 1.0), (True, 2.0), (False, 3.0))]
    assert tts_client_check.trusted(rows) == 2.0
    assert tts_client_check.trusted(rows[2:]) is None


# --- end to end ---


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    assert tts_load.main([*arguments, "--skip-check"]) == 0
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]), printed


@pytest.mark.slow
def test_the_last_line_holds_the_documented_figures(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--streams", "1,3", "--rates", "20", "--formats", "pcm,mp3", "--requests", "4", "--warm-up", "2"]
    found, printed = run(capsys, "--fake", *load)
    assert found.keys() == {
        "machine", "versions", "client", "first_request", "points", "server", "workload", "seconds",
    }  # fmt: skip
    assert [(point["format"], point["kind"], point["load"]) for point in found["points"]] == [
        (audio_format, *load)
        for audio_format in ("pcm", "mp3")
        for load in (("closed", 1), ("closed", 3), ("open", 20))
    ]
    assert found["first_request"]["error"] is None
    assert found["server"]["ready_s"] > 0
    assert found["server"]["says"]["backend"] == "fake"
    assert found["server"]["peak_total_mb"] >= found["server"]["peak_mb"] > 10
    for point in found["points"]:
        assert (point["requests"], point["failed"]) == (4, 0)
        assert 0 < point["first_byte_ms"]["p50"] <= point["total_ms"]["p99"]
        assert ("audible_ms" in point) == (point["format"] == "pcm")
    for pcm, mp3 in zip(found["points"][:3], found["points"][3:], strict=True):  # the same requests in both
        assert pcm["audio_s"] % 3.0 == pytest.approx(0)  # the fake backend's segments have 3 s
        assert mp3["audio_s"] == pytest.approx(pcm["audio_s"], rel=0.1)
    for title in ("The server", "Closed loop", "Open loop", "What was delivered"):
        assert title in printed


@pytest.mark.slow
@measured_again
def test_a_peer_is_started_slow_sound_shows_and_refusals_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    for name, value in (("PORT", port), ("CACHE_DIR", tmp_path / "c"), ("LEDGER_URL", f"sqlite:///{tmp_path}/l.db")):
        monkeypatch.setenv(f"TTS_{name}", str(value))
    command = f"{sys.executable} -m tests.speech.serve_textual 0.2 0.05"
    load = ["--streams", "1", "--rates", "", "--requests", "2", "--warm-up", "0"]
    peer = ["--base-url", f"http://127.0.0.1:{port}/v1", "--start", command, "--ready", "/ready", "--voice", "alloy"]
    three = (
        f'--field=input="{" ".join(f"This is sentence number {n} which is long enough to be alone." for n in "123")}"'
    )
    found, _ = run(capsys, *peer, *load, three)
    (point,) = found["points"]
    assert point["audio_s"] == pytest.approx(2 * 3 * 0.05)
    assert point["first_byte_ms"]["p50"] >= 200
    assert point["underruns"] == 4
    assert point["dry_s"] >= 4 * (0.2 - 0.05) - 0.1
    found, printed = run(capsys, *peer, *load, "--field=voice=7")
    assert found["points"][0]["errors"] == {"400": 2}
    assert found["points"][0]["first_byte_ms"]["p50"] is None
    assert "2 x 400" in printed


@pytest.mark.slow
def test_a_checkpoint_without_an_end_is_spoken_as_long_as_was_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more wait for each other where the machine is busy
    model = endless(tmp_path / "endless")
    load = [
        "--streams",
        "3",
        "--rates",
        "9",
        "--requests",
        "3",
        "--warm-up",
        "0",
        "--slots",
        "4",
        "--mean-frames",
        "15",
    ]
    found, printed = run(capsys, "--model", str(model), *load)
    assert found["workload"]["lengths"] == "fixed"
    for place, point in enumerate(found["points"]):
        asks = [ask(0, place * tts_load._IDS + id, 15) for id in range(3)]
        assert (point["failed"], point["lengths_kept"]) == (0, 3)
        assert point["audio_s"] == pytest.approx(FRAME_S * sum(each.frames for each in asks), abs=3 * 2 * FRAME_S)
        assert 0 < point["first_byte_ms"]["p50"] <= point["first_80ms_ms"]["p50"] <= point["total_ms"]["p50"]
    assert "length as asked" in printed


def endless(folder: Path) -> Path:
    """The tiny checkpoint with the row of its end of speech zeroed, as random_checkpoint makes them."""
    pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from tests.bench.random_checkpoint import STAMP
    from tests.engine.checkpoints import EOS, tiny

    shutil.copytree(tiny("custom_voice"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["talker.codec_head.weight"][EOS] = 0
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / STAMP).write_text("{}")
    return folder


def test_without_a_server_to_measure_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TTS_MODEL", raising=False)
    with pytest.raises(SystemExit):
        tts_load.main([])
    assert "--base-url" in capsys.readouterr().err


class Tones:
    """A peer whose sound comes in pieces of 80 ms, none without frames. `most`: requests that it spoke at once."""

    def __init__(self) -> None:
        self.speaking = self.most = 0

    def speak(self, body: dict[str, Any]) -> Iterator[np.ndarray]:
        self.speaking += 1
        self.most = max(self.most, self.speaking)
        time.sleep(0.02)
        for _ in range(body["max_new_tokens"] - 1):
            yield np.full(1920, 0.5, np.float32)
        self.speaking -= 1


async def test_the_peers_server_streams_what_its_package_gives() -> None:
    peer = Tones()
    serving = peer_server.server(peer, 0)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    target = Target(f"http://127.0.0.1:{serving.server_port}", "pcm", frames_field="max_new_tokens", frames_extra=1)
    try:
        spoken = figures(await closed_loop(target, ASKS[:4], 2, 60.0), fixed_lengths=True)
        assert (spoken["failed"], spoken["lengths_kept"], spoken["never_audible"]) == (0, 4, 0)
        assert peer.most == 1
        assert (await listen(replace(target, audio_format="mp3"), ASKS[0])).error == "400"
        silent = replace(target, frames_extra=1 - ASKS[0].frames)
        assert (await listen(silent, ASKS[0])).error == "500"
        assert tts_server.says(tts_server.Measured(target.base_url, {}), "/").keys() >= {"torch"}
    finally:
        serving.shutdown()
        serving.server_close()


async def test_a_paced_server_of_its_own(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.paced_server", str(port), "3", "0.01"]
    with running(command, port, tmp_path / "log"):
        assert (await listen(Target(f"http://127.0.0.1:{port}"), ASKS[0])).audio_s == pytest.approx(3 * FRAME_S)
