"""A remote server that speaks for this one, over HTTP on both sides: a second one of ours, and one that misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.src.backends.chain import Chain
from api.src.backends.remote import RemoteBackend
from api.src.backends.remote_client import Remote
from api.src.breaker import Breaker
from tests.api.wire import PARTS, STORY, RawClient, assert_error, events, speak, usage
from tests.backends.faulty_upstream import (
    SECRET,
    Answer,
    FaultyUpstream,
    chunked,
    faulty_upstream,
    held,
    late,
    refusal,
    tone,
    whole,
)
from tests.backends.test_remote import CUT, NOT_BELIEVED
from tests.conftest import Server, run_server
from tests.decoding import decoded
from tests.fakes import FakeBackend
from tests.ports import free_port
from tests.speech.asking import wait_until
from tests.speech.launching import ROOT, Process, launching

SENTENCE = "The river runs past the old mill and on into the valley."
PRICES = "[default]\nper_1000_characters = 1000000\n"
TONE = tone(3.0)


def remote(url: str, *, failures: int = 1_000_000, **fields: Any) -> RemoteBackend:
    return RemoteBackend(Remote(**{"url": url, "api_key": SECRET, **fields}), breaker=Breaker(failures=failures))


# --- a second server of ours ---


@contextmanager
def serving(folder: Path, port: int | None = None, **settings: object) -> Iterator[Process]:
    """`qwen3-tts serve` in a process of its own, ready to speak."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "TTS_PORT": str(port or free_port()),
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        "TTS_EMBEDDED_WORKERS": "1",
        **{f"TTS_{name.upper()}": str(value) for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "api.src.cli", "serve"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as popen:
        process = Process(popen, folder)
        threading.Thread(target=lambda: process.log.extend(popen.stderr or ()), daemon=True).start()
        try:
            wait_until(lambda: httpx.get(f"{process.url}/ready").status_code == 200, 60)
            yield process
        finally:
            popen.kill()


def counts(url: str, name: str) -> dict[str, int]:
    """A counter of /metrics by its only label."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return {line.split('"')[1]: int(float(line.split()[-1])) for line in lines}


@pytest.mark.slow
def test_two_servers_of_ours(tmp_path: Path) -> None:
    """One speaks with the other's embedded voice, through its own cache; and with its own when the other is gone."""
    with serving(tmp_path / "far", backend="embedded", api_keys=f"near={SECRET}") as far:
        chain = {"backend": "remote,embedded", "remote_url": far.url, "remote_api_key": SECRET}
        with (
            serving(tmp_path / "near", remote_first_byte_timeout_s=30, **chain) as near,
            httpx.Client(base_url=near.url, timeout=60) as client,
        ):
            wait_until(lambda: client.get("/ready").json()["phase"] == "ready", 60)
            key = {"Authorization": f"Bearer {SECRET}"}
            straight = httpx.post(
                f"{far.url}/v1/audio/speech",
                json={"input": SENTENCE, "response_format": "pcm", "voice": "pico-de"},
                headers=key,
                timeout=60,
            )
            through = speak(client, SENTENCE, response_format="pcm", voice="pico-de")
            assert through.status_code == straight.status_code == 200, through.text
            assert through.content == straight.content
            assert (through.headers["x-backend"], through.headers["x-cache"]) == ("remote", "miss")
            assert (straight.headers["x-backend"], straight.headers["x-model"]) == ("embedded", "embedded")
            for format in ("mp3", "opus", "flac"):
                answer = speak(client, SENTENCE, response_format=format, voice="pico-de")
                assert abs(len(decoded(format, answer.content)) - len(straight.content) / 2) < 4000
            assert client.get("/version").json()["backend"] == "remote,embedded"
            voices = [voice["id"] for voice in client.get("/v1/audio/voices").json()["voices"]]
            assert {"joe", "pico-de", "alloy"} <= set(voices)
            far.popen.kill()
            far.popen.wait()
            heard = speak(client, SENTENCE, response_format="pcm", voice="pico-de")
            assert (heard.headers["x-backend"], heard.headers["x-cache"]) == ("remote", "hit"), "before it is noticed"
            assert heard.content == straight.content
            answers = []
            while not answers or answers[-1].headers.get("x-backend") != "embedded":
                answers.append(speak(client, f"Number {len(answers)}. {SENTENCE}", voice="pico-de"))
                assert len(answers) < 6
            for answer in answers[:-1]:
                assert_error(answer, 503, code="upstream_unavailable")
                assert answer.headers["retry-after"].isdigit()
            state = client.get("/ready")
            assert (state.status_code, state.json()["phase"]) == (200, "degraded")
            own = speak(client, SENTENCE, response_format="pcm", voice="pico-de")
            assert (own.headers["x-backend"], own.headers["x-cache"]) == ("embedded", "miss")
            assert SECRET not in "".join(near.log)
            port = int(far.url.rpartition(":")[2])
            with serving(tmp_path / "far", port, backend="embedded", api_keys=f"near={SECRET}"):
                wait_until(lambda: client.get("/ready").json()["phase"] == "ready", 60)
                again = speak(client, SENTENCE, response_format="pcm", voice="pico-de")
                assert (again.headers["x-backend"], again.headers["x-cache"]) == ("remote", "hit")
                assert speak(client, "This is new.", voice="pico-de").headers["x-backend"] == "remote"


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a second server whose voice is a fake, in a process and a folder of its own."""
    folder = tmp_path / "far"
    folder.mkdir()
    yield from launching(folder)


def test_sound_passes_through_while_it_is_made_and_a_hang_up_goes_on_to_the_far_end(
    far: Callable[..., Process], start_server: Callable[..., Server]
) -> None:
    process = far(0.3, 2.0, max_concurrent=8)
    server = start_server(remote(process.url))
    with RawClient(server.url) as client:
        client.speak(input=STORY, response_format="pcm")
        client.read_sound(10_000)
        assert counts(process.url, "tts_generations_total").get("completed", 0) < len(PARTS), "not all is made yet"
    server.wait_idle()
    before = counts(process.url, "tts_generations_total")
    assert sum(before.values()) < len(PARTS), "what nobody listens to is not asked for"
    slow = start_server(remote(far(30.0, 2.0).url), server.folder / "slow")
    with RawClient(slow.url) as client:
        client.speak(input=STORY)
        wait_until(lambda: slow.service.admission.running == 1)
        url = slow.backend._remote.url
        wait_until(lambda: "tts_running_generations 1.0" in httpx.get(f"{url}/metrics").text)
    slow.wait_idle()
    wait_until(lambda: counts(url, "tts_generations_total") == {"stopped": 1})


# --- one that misbehaves ---


@pytest.fixture(scope="module")
def upstream() -> Iterator[FaultyUpstream]:
    with faulty_upstream() as server:
        yield server


@pytest.fixture(scope="module")
def near(upstream: FaultyUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that costs money, before the one that misbehaves; in the end its books must be sound."""
    folder = tmp_path_factory.mktemp("near")
    prices = folder / "prices.toml"
    prices.write_text(PRICES)
    backend = remote(upstream.url, first_byte_s=60.0, retries=1)
    with contextmanager(run_server)(folder, backend, prices_file=prices) as server:
        server.call(lambda: server.service.ledger.credit("anonymous", 2**40, "start"))
        yield server
        server.wait_idle()
        assert server.call(server.service.ledger.check) == []


@contextmanager
def impatient(server: Server) -> Iterator[None]:
    """Let it wait for first bytes no longer than they take where they come at all."""
    client = server.backend._client
    patient = client._remote
    client._remote = replace(patient, first_byte_s=0.5)
    try:
        yield
    finally:
        client._remote = patient


def balance(server: Server) -> int:
    return int(usage(server.client)["balance_micros"])


def entries(server: Server) -> set[Path]:
    return {path for path in (server.folder / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"}


FAULTS: dict[str, Answer] = {
    **{name: answer for name, (answer, _) in NOT_BELIEVED.items()},
    **CUT,
    "a slow first byte": late(20, whole(TONE)),
    "429": refusal(429, Retry_After="30"),
    "500": refusal(500),
    "503": refusal(503),
    "401": refusal(401),
    "404": refusal(404),
}


@pytest.mark.parametrize("form", ["/v1/audio/speech", "/v1/audio/speech/base64"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_false_is_cached_and_nothing_is_charged_for_it(
    near: Server, upstream: FaultyUpstream, fault: str, form: str
) -> None:
    text = f"{fault} by {form.rpartition('/')[2]}, or so."
    before, kept = balance(near), entries(near)
    upstream.asked.clear()
    upstream.speech = [FAULTS[fault]]
    ask: dict[str, Any] = {"input": text, "response_format": "mp3"}
    try:
        with impatient(near) if "slow" in fault else nullcontext():
            answer = near.client.post(form, json=ask)
    except httpx.RemoteProtocolError:
        assert form == "/v1/audio/speech", "an answer that is sent whole is never cut"
    else:
        assert answer.status_code >= 400
        assert_error(answer, answer.status_code)
    near.wait_idle()
    assert balance(near) == before
    assert entries(near) == kept
    upstream.speech = [whole(TONE)]
    answer = near.client.post(form, json=ask)
    assert answer.status_code == 200
    assert answer.headers.get("x-cache", "miss") == "miss"
    near.wait_idle()
    assert balance(near) == before - 1000 * len(text)
    assert len(entries(near)) > len(kept)


def test_what_was_heard_of_a_cut_answer_is_in_the_books_and_costs_nothing(
    near: Server, upstream: FaultyUpstream
) -> None:
    upstream.asked.clear()
    upstream.speech = [whole(TONE), CUT["a length that is too long"]]
    before = balance(near)
    with pytest.raises(httpx.RemoteProtocolError):
        speak(near.client, f"{STORY} And then it is cut.", response_format="pcm")
    near.wait_idle()
    event = usage(near.client)["data"][0]
    assert (event["outcome"], event["price_micros"], balance(near)) == ("failed", 0, before)


@pytest.mark.parametrize(
    ("answer", "status", "code", "param"),
    [
        (refusal(400, "No such voice.", code="voice_gone", param="voice"), 400, "voice_gone", "voice"),
        (refusal(404, "No such model.", code="model_not_found", param="model"), 404, "model_not_found", "model"),
        (refusal(413, "Too long."), 413, "invalid_request", None),
        (refusal(429, Retry_After="30"), 429, "rate_limit_exceeded", None),
        (refusal(401, f"Incorrect API key provided: {SECRET}."), 502, "upstream_refuses_us", None),
        (refusal(403, "Forbidden."), 502, "upstream_refuses_us", None),
        (refusal(500, "Oh."), 500, "upstream_failed", None),
        (refusal(503, "Oh.", Retry_After="20"), 503, "upstream_unavailable", None),
        (refusal(504, "Oh."), 504, "upstream_failed", None),
        (late(20, whole(TONE)), 504, "upstream_timed_out", None),
        (whole(b"<html>", Content_Type="text/html"), 502, "upstream_invalid", None),
    ],
)
def test_the_upstream_s_errors_in_our_shape(
    near: Server, upstream: FaultyUpstream, answer: Answer, status: int, code: str, param: str | None
) -> None:
    upstream.asked.clear()
    upstream.speech = [answer]
    with impatient(near) if code == "upstream_timed_out" else nullcontext():
        told = speak(near.client, f"What is told for {code} and {status}?", headers={"Cache-Control": "no-store"})
    message = assert_error(told, status, code=code, param=param)
    assert SECRET not in message
    assert "www-authenticate" not in told.headers
    assert told.headers.get("retry-after") == {429: "30", 503: "20"}.get(status)


def test_an_error_in_the_middle_is_an_event(near: Server, upstream: FaultyUpstream) -> None:
    upstream.asked.clear()
    upstream.speech = [chunked(TONE, TONE, ends=False)]
    answer = speak(near.client, "An error as an event.", stream_format="sse")
    *heard, last = events(answer.text)
    assert {event["type"] for event in heard} == {"speech.audio.delta"}
    assert (last["type"], last["error"]["code"]) == ("error", "upstream_failed")


def test_the_first_byte_passes_through_and_a_hang_up_too(near: Server, upstream: FaultyUpstream) -> None:
    upstream.asked.clear()
    upstream.speech = [chunked(TONE, TONE, pause_s=60)]
    with RawClient(near.url) as client:
        client.speak(input="The first byte of this.", response_format="pcm")
        sound = client.read_sound(100_000)
        assert np.abs(np.frombuffer(sound[10 : 10 + 2 * 1000], "<i2")).max() > 1000
        assert not upstream.spoken[0].left.is_set()
    assert upstream.spoken[0].left.wait(30)
    near.wait_idle()


def test_who_leaves_before_the_first_byte(near: Server, upstream: FaultyUpstream) -> None:
    upstream.asked.clear()
    upstream.speech = [late(60, whole(TONE))]
    before = balance(near)
    with RawClient(near.url) as client:
        client.speak(input="Nobody waits for this.")
        wait_until(lambda: len(upstream.spoken) == 1)
    assert upstream.spoken[0].left.wait(30)
    near.wait_idle()
    assert balance(near) == before


def test_joins_ask_the_upstream_once(near: Server, upstream: FaultyUpstream) -> None:
    upstream.asked.clear()
    all_are_there = threading.Event()
    upstream.speech = [held(all_are_there, whole(TONE))]
    answers: list[httpx.Response] = []
    ask = {"input": "This is asked for twice.", "response_format": "pcm"}
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(f"{near.url}/v1/audio/speech", json=ask, timeout=60)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(near.service._listeners) == 3)
    all_are_there.set()
    for thread in threads:
        thread.join()
    assert {answer.content for answer in answers} == {TONE}
    assert sorted(answer.headers["x-cache"] for answer in answers) == ["join", "join", "miss"]
    assert len(upstream.spoken) == 1


def test_a_chain_falls_through_before_the_first_byte_of_a_request_and_never_within_it(
    upstream: FaultyUpstream, start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    far, fake = remote(upstream.url, failures=1, retries=0), FakeBackend(name="own")
    server = start_server(Chain([far, fake]))
    wait_until(lambda: server.client.get("/ready").json()["phase"] == "ready")  # the other is so from the beginning
    upstream.asked.clear()
    upstream.speech = [whole(TONE)]
    first = speak(server.client, "First.", response_format="pcm")
    assert (first.headers["x-backend"], first.content) == ("remote", TONE)
    upstream.speech = [refusal(501)]
    assert_error(speak(server.client, "Second."), 502)
    assert fake.spoken == 0
    third = speak(server.client, "Second.")
    assert (third.status_code, third.headers["x-backend"]) == (200, "own")
    assert len(upstream.spoken) == 2
    assert speak(server.client, "Third.", voice="hum").headers["x-voice"] == "hum"
    assert server.client.get("/ready").json()["phase"] == "degraded"


def test_lists_and_hits_outlive_the_upstream(upstream: FaultyUpstream, start_server: Callable[..., Server]) -> None:
    server = start_server(remote(upstream.url, failures=2, retries=1))
    upstream.speech = [whole(TONE)]
    first = speak(server.client, "Kept.")
    voices = server.client.get("/v1/audio/voices").json()
    upstream.down()
    try:
        assert_error(speak(server.client, "New."), 503, code="upstream_unavailable")
        assert_error(speak(server.client, "New."), 503, code="upstream_unavailable")
        again = speak(server.client, "Kept.")
        assert (again.headers["x-cache"], again.content) == ("hit", first.content)
        assert server.client.get("/v1/audio/voices").json() == voices
        assert "tts-1" in [model["id"] for model in server.client.get("/v1/models").json()["data"]]
        state = server.client.get("/ready")
        assert (state.status_code, state.json()["phase"]) == (200, "failing")
    finally:
        upstream.up()
