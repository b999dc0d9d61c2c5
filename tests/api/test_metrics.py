"""What /metrics and the log say of a speech request and of the engines, on a real server."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.src.domain import ModelStats
from tests.api.stderr import StderrLines, accesses, records, until
from tests.api.wire import FAILS_LATE, PARTS, RawClient, speak
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.speech.asking import stalled, wait_until

DELAY_S = 0.1
SMALL, LARGE = "qwen3-tts-12hz-0.6b-custom-voice", "qwen3-tts-12hz-1.7b-voice-design"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend(delay_s=DELAY_S)


def samples(server: Server, prefix: str) -> dict[tuple[str, ...], float]:
    """The metrics whose names begin so: (name, label values ...) -> value."""
    found = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                found[(sample.name, *(sample.labels[name] for name in sorted(sample.labels)))] = sample.value
    return found


def first_sounds(server: Server) -> dict[str, tuple[float, float]]:
    """By cache status: how many, and how many seconds together."""
    found = samples(server, "tts_first_sound_seconds")
    name = "tts_first_sound_seconds_count"
    return {key[1]: (found[key], found["tts_first_sound_seconds_sum", key[1]]) for key in found if key[0] == name}


# --- engines ---


def test_without_an_engine_there_is_nothing_of_engines(server: Server) -> None:
    assert samples(server, "tts_engine") == {}


def test_each_engine_is_shown_as_it_is_now(server: Server, backend: FakeBackend) -> None:
    backend.engines = {
        SMALL: ModelStats(
            waiting=3, active=8, paused=2, step_seconds=0.05, frames=900, finished={"stop": 5}, uncaptured=4
        ),
        LARGE: ModelStats(finished={"stop": 0, "length": 1}),
    }
    assert samples(server, "tts_engine") == {
        ("tts_engine_frames_total", SMALL): 900,
        ("tts_engine_frames_total", LARGE): 0,
        ("tts_engine_requests_total", "stop", SMALL): 5,
        ("tts_engine_requests_total", "stop", LARGE): 0,
        ("tts_engine_requests_total", "length", LARGE): 1,
        ("tts_engine_uncaptured_steps_total", SMALL): 4,
        ("tts_engine_uncaptured_steps_total", LARGE): 0,
        ("tts_engine_slots", SMALL, "active"): 8,
        ("tts_engine_slots", SMALL, "paused"): 2,
        ("tts_engine_slots", LARGE, "active"): 0,
        ("tts_engine_slots", LARGE, "paused"): 0,
        ("tts_engine_waiting", SMALL): 3,
        ("tts_engine_waiting", LARGE): 0,
        ("tts_engine_step_seconds", SMALL): 0.05,
        ("tts_engine_step_seconds", LARGE): 0,
    }
    backend.engines = {SMALL: ModelStats(frames=901, finished={"stop": 6})}
    assert samples(server, "tts_engine_frames") == {("tts_engine_frames_total", SMALL): 901}
    assert samples(server, "tts_engine_slots") == {
        ("tts_engine_slots", SMALL, "active"): 0,
        ("tts_engine_slots", SMALL, "paused"): 0,
    }


def test_engine_metrics_have_types_and_one_help_each(server: Server, backend: FakeBackend) -> None:
    backend.engines = {SMALL: ModelStats(finished={"stop": 1}), LARGE: ModelStats(finished={"stop": 1})}
    text = server.client.get("/metrics").text
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {name: kind for name, kind in types.items() if name.startswith("tts_engine")} == {
        "tts_engine_frames": "counter",
        "tts_engine_requests": "counter",
        "tts_engine_uncaptured_steps": "counter",
        "tts_engine_slots": "gauge",
        "tts_engine_waiting": "gauge",
        "tts_engine_step_seconds": "gauge",
    }
    assert text.count("# HELP tts_engine_") == 6


# --- the first sound ---


def test_the_first_sound_is_observed_once_for_each_way_to_it(server: Server, backend: FakeBackend) -> None:
    took: dict[str, float] = {}

    def ask(**headers: str) -> None:
        began = time.monotonic()
        status = speak(server.client, headers=headers).headers["x-cache"]
        took[status] = time.monotonic() - began

    backend.allowed = 0
    miss, join = threading.Thread(target=ask), threading.Thread(target=ask)
    miss.start()
    until(lambda: backend.open == 1)
    time.sleep(DELAY_S)
    join.start()
    until(lambda: len(server.service._listeners) == 2)
    backend.allowed = math.inf
    miss.join()
    join.join()
    ask()
    ask(**{"Cache-Control": "no-store"})
    assert sorted(took) == ["bypass", "hit", "join", "miss"]
    found = first_sounds(server)
    assert {status: count for status, (count, _) in found.items()} == dict.fromkeys(took, 1)
    assert found["miss"][1] >= DELAY_S
    assert found["bypass"][1] >= DELAY_S
    for status, (_, seconds) in found.items():
        assert 0 < seconds < took[status], "of this request alone"


def test_the_first_sound_is_counted_from_the_arrival_of_the_request(server: Server) -> None:
    """As the client feels it: its own slow upload included."""
    body = b'{"input": "Hello.", "response_format": "pcm"}'
    with RawClient(server.url) as client:
        client.send("POST /v1/audio/speech HTTP/1.1", body[:9], length=len(body))
        time.sleep(0.3)
        client.socket.sendall(body[9:])
        client.read_sound(1)
    assert first_sounds(server)["miss"][1] > 0.2 + DELAY_S  # the arrival is seen a little after it was sent


def test_what_never_sounds_is_not_observed(server: Server) -> None:
    assert speak(server.client, "This will FAIL.").status_code == 500
    assert speak(server.client, voice="nobody").status_code == 400
    assert first_sounds(server) == {}


def counted(server: Server, name: str, *labels: str) -> tuple[float, float]:
    """Of a histogram: how many, and their sum."""
    found = samples(server, name)
    return found.get((f"{name}_count", *labels), 0.0), found.get((f"{name}_sum", *labels), 0.0)


def test_whole_answers_are_timed_to_their_end(server: Server) -> None:
    speak(server.client, PARTS[0] + PARTS[1])
    began = time.monotonic()
    speak(server.client, PARTS[0] + PARTS[1])
    took = time.monotonic() - began
    with pytest.raises(httpx.RemoteProtocolError):
        speak(server.client, FAILS_LATE)
    server.backend.allowed = 1
    with RawClient(server.url) as client:
        client.speak(seed=1)
        client.read_sound(1)
    server.wait_idle()
    count, seconds = counted(server, "tts_speech_seconds", "miss")
    assert count == 1, "neither what failed nor what was left"
    assert seconds >= 2 * DELAY_S
    assert counted(server, "tts_speech_seconds", "hit")[0] == 1
    assert counted(server, "tts_speech_seconds", "hit")[1] < took


def test_a_run_is_compared_with_its_sound(server: Server) -> None:
    began = time.monotonic()
    speak(server.client, PARTS[0] + PARTS[1])
    took = time.monotonic() - began
    speak(server.client, "This will FAIL.")
    server.wait_idle()
    count, ratio = counted(server, "tts_real_time_factor")
    assert count == 1
    assert 2 * DELAY_S / 0.8 <= ratio <= took / 0.8, "0.8 s of sound took two delays"


def test_a_slow_listener_does_not_make_a_run_look_slow(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(seconds_per_segment=60.0), stall_timeout_s=60)
    began = time.monotonic()
    with RawClient(server.url) as client:
        client.speak("Cache-Control: no-store", response_format="pcm")
        client.read_sound(1)
        (generation,) = server.service._running
        wait_until(stalled(generation))
        paused = time.monotonic()
        time.sleep(0.5)
        paused = time.monotonic() - paused
        while not client.received.endswith(b"0\r\n\r\n"):
            client.received += client.socket.recv(1 << 20)
    elapsed = time.monotonic() - began
    server.wait_idle()
    count, ratio = counted(server, "tts_real_time_factor")
    assert count == 1
    assert ratio * len(PARTS) * 60.0 < elapsed - 0.9 * paused


def test_the_wait_for_a_permit_is_seen(start_server: Callable[..., Server]) -> None:
    backend = FakeBackend(allowed=0)
    server = start_server(backend, max_concurrent=1)
    began = time.monotonic()
    threads = [threading.Thread(target=speak, args=(server.client, part)) for part in PARTS[:3]]
    for thread in threads:
        thread.start()
    until(lambda: server.service.admission.waiting == 2)
    waiting = time.monotonic()
    time.sleep(DELAY_S)
    waited = time.monotonic() - waiting
    backend.allowed = math.inf
    for thread in threads:
        thread.join()
    count, seconds = counted(server, "tts_queue_wait_seconds")
    assert count == 3
    assert 2 * waited <= seconds < 2 * (time.monotonic() - began), "two have waited"


def test_ready_and_lost_lines(server: Server) -> None:
    assert samples(server, "tts_ready") == {("tts_ready",): 1.0}
    assert samples(server, "tts_log_lines_dropped") == {("tts_log_lines_dropped_total",): 0.0}
    server.loop.call_soon_threadsafe(server.service.begin_drain)
    until(lambda: samples(server, "tts_ready") == {("tts_ready",): 0.0})


def test_each_breaker_is_in_one_state(server: Server, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert samples(server, "tts_breaker") == {}
    monkeypatch.setattr(backend, "breakers", lambda: {"remote": "half_open"})
    name = "tts_breaker_state"
    states = {(name, "remote", "closed"): 0.0, (name, "remote", "half_open"): 1.0, (name, "remote", "open"): 0.0}
    assert samples(server, "tts_breaker") == states


# --- the log ---


class TestLog:
    @pytest.fixture
    def server(self, stderr_lines: StderrLines, start_server: Callable[..., Server]) -> Server:
        return start_server(FakeBackend(delay_s=DELAY_S), log_level="info")

    def line(self, lines: StderrLines, answer: httpx.Response) -> dict[str, Any]:
        """The one line of the request."""
        identity = answer.headers["x-request-id"]
        until(lambda: any(record["request_id"] == identity for record in accesses(lines())))
        (record,) = [record for record in accesses(lines()) if record["request_id"] == identity]
        return record

    def generations(self, lines: StderrLines) -> Iterator[dict[str, Any]]:
        for record in records(lines()):
            if record["message"] == "generation":
                yield record

    @pytest.mark.parametrize("headers", [{}, {"Cache-Control": "no-store"}])
    def test_speech_leaves_its_times_and_amounts(
        self, server: Server, stderr_lines: StderrLines, headers: dict[str, str]
    ) -> None:
        answer = speak(server.client, PARTS[0] + PARTS[1], headers, speed=2.0, voice="NOVA", model="TTS-1")
        record = self.line(stderr_lines, answer)
        assert set(record) == {
            *("time", "level", "logger", "request_id", "message", "route", "status", "ms", "account"),
            *("model", "cache", "first_sound_ms", "audio_ms", "frames"),
        }
        assert (record["model"], record["cache"]) == ("fake-1", "bypass" if headers else "miss")
        assert record["audio_ms"] == pytest.approx(400, abs=20)
        assert record["frames"] == 10  # 0.8 s were made, and then spoken at twice the speed
        assert 1000 * DELAY_S <= record["first_sound_ms"] < record["ms"]
        assert record["ms"] >= 2 * 1000 * DELAY_S

    def test_a_hit_leaves_the_same_amounts(self, server: Server, stderr_lines: StderrLines) -> None:
        speak(server.client, speed=2.0)
        record = self.line(stderr_lines, speak(server.client, speed=2.0))
        assert (record["cache"], record["frames"]) == ("hit", 5)
        assert record["audio_ms"] == pytest.approx(200, abs=20)
        assert 0 < record["first_sound_ms"] <= record["ms"]

    def test_a_refusal_leaves_nothing_of_sound(self, server: Server, stderr_lines: StderrLines) -> None:
        record = self.line(stderr_lines, speak(server.client, voice="nobody"))
        assert not {"model", "cache", "first_sound_ms", "audio_ms", "frames"} & set(record)
        failed = self.line(stderr_lines, speak(server.client, "This will FAIL."))
        assert (failed["status"], failed["cache"], failed["frames"]) == (500, "miss", 0)
        assert "first_sound_ms" not in failed

    def test_a_hang_up_leaves_what_was_made_until_then(self, server: Server, stderr_lines: StderrLines) -> None:
        server.backend.allowed = 2
        with RawClient(server.url) as client:
            client.speak(response_format="pcm")
            client.read_sound(1)
            until(lambda: len(server.backend.segments) == 2)
        server.wait_idle()
        until(lambda: len([record for record in accesses(stderr_lines()) if "frames" in record]) == 1)
        (record,) = [record for record in accesses(stderr_lines()) if "frames" in record]
        assert (record["audio_ms"], record["frames"]) in [(400 * made, 5 * made) for made in (1, 2)]

    def test_a_server_that_stops_writes_it_to_the_right_line(self, server: Server, stderr_lines: StderrLines) -> None:
        """The listener is closed by another task then."""
        with RawClient(server.url) as client:
            client.speak(response_format="pcm")
            client.read_sound(1)
            server.loop.call_soon_threadsafe(server.service._cut)
            until(lambda: len(accesses(stderr_lines())) >= 2)
        (record,) = [record for record in accesses(stderr_lines()) if record["route"] == "/v1/audio/speech"]
        assert record["frames"] > 0

    def test_each_generation_leaves_one_line(self, server: Server, stderr_lines: StderrLines) -> None:
        answer = speak(server.client, PARTS[0] + PARTS[1], speed=2.0)
        speak(server.client, PARTS[0] + PARTS[1], speed=2.0)
        with pytest.raises(httpx.RemoteProtocolError):
            speak(server.client, FAILS_LATE)
        server.wait_idle()
        whole, broken = self.generations(stderr_lines)
        assert whole["request_id"] == answer.headers["x-request-id"]
        assert (whole["outcome"], whole["model"], whole["segments"]) == ("completed", "fake-1", 2)
        assert whole["audio_ms"] == pytest.approx(400, abs=20)
        assert whole["frames"] == 10
        assert whole["ms"] >= 2 * 1000 * DELAY_S
        assert "reason" not in whole
        assert (broken["outcome"], broken["frames"]) == ("failed", 5)
        assert broken["reason"] == "The speech could not be generated."
