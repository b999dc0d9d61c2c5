"""The official OpenAI client for Python against a real server: what it is documented to do, it does here."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.api.wire import FAILS_LATE, FORMATS, PARTS, STORY, events
from tests.conftest import Server
from tests.decoding import decoded
from tests.fakes import OPENAI_VOICES, FakeBackend
from tests.speech.asking import wait_until

SPEECH = {"model": "gpt-4o-mini-tts", "voice": "coral", "input": STORY}


def client_of(server: Server, key: str = "unused", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, **options})


def async_client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def client(house: Server) -> Any:
    with client_of(house) as client:
        yield client


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "ogg"])  # all that the client names
def test_create_in_every_format(client: openai.OpenAI, format: Any) -> None:
    answer = client.audio.speech.create(**SPEECH, response_format=format)
    assert len(decoded(format, answer.read())) / 24_000 == pytest.approx(1.6, abs=0.13)


def test_create_into_a_file(client: openai.OpenAI, tmp_path: Path) -> None:
    client.audio.speech.create(**SPEECH).write_to_file(tmp_path / "speech.mp3")
    assert len(decoded("mp3", (tmp_path / "speech.mp3").read_bytes())) > 24_000


def test_every_parameter(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(
        model="tts-1-hd",
        voice={"id": "NOVA"},
        input=STORY,
        instructions="Cheerful and slow.",
        response_format="pcm",
        speed=2.0,
        stream_format="audio",
        extra_body={"language": "en-GB", "seed": 7, "made_up": True},
        extra_headers={"Idempotency-Key": "once"},
    )
    assert answer.response.headers["x-voice"] == "hum"
    assert len(answer.content) / 48_000 == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("voice", OPENAI_VOICES)
def test_every_voice_that_the_client_names(client: openai.OpenAI, voice: Any) -> None:
    assert client.audio.speech.create(model="tts-1", voice=voice, input="Hello.").read()


@pytest.mark.parametrize("format", ["mp3", "wav", "opus"])
def test_streaming_starts_before_the_end(start_server: Callable[..., Server], tmp_path: Path, format: Any) -> None:
    server = start_server(FakeBackend(allowed=1))
    arrivals = []
    with (
        client_of(server) as client,
        client.audio.speech.with_streaming_response.create(**SPEECH, response_format=format) as answer,
    ):
        assert answer.headers["x-cache"] == "miss"
        for chunk in answer.iter_bytes():
            arrivals.append(chunk)
            server.backend.allowed += 1  # each segment is made only when the one before was heard
    assert len(arrivals) >= len(PARTS)
    with (
        client_of(server) as client,
        client.audio.speech.with_streaming_response.create(**SPEECH, response_format=format) as answer,
    ):
        answer.stream_to_file(tmp_path / "speech")
    assert (tmp_path / "speech").read_bytes() == b"".join(arrivals)


def test_leaving_a_stream_early_stops_the_synthesis(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=1))
    with (
        client_of(server) as client,
        client.audio.speech.with_streaming_response.create(**SPEECH) as answer,
    ):
        next(answer.iter_bytes())
    server.wait_idle()
    assert len(server.backend.segments) == 1


def test_raw_response(client: openai.OpenAI) -> None:
    raw = client.audio.speech.with_raw_response.create(**SPEECH)
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.headers["content-type"] == "audio/mpeg"


# --- events ---


def test_events_by_lines(client: openai.OpenAI) -> None:
    plain = client.audio.speech.create(**SPEECH).read()
    with client.audio.speech.with_streaming_response.create(**SPEECH, stream_format="sse") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *deltas, done = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == plain
    assert done["type"] == "speech.audio.done"


def test_events_whole(client: openai.OpenAI) -> None:
    *_, done = events(client.audio.speech.create(**SPEECH, stream_format="sse").text)
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"] > 0


def stream_events(client: openai.OpenAI, text: str) -> openai.Stream[Any]:
    """The events through the client's own decoder."""
    body = {**SPEECH, "input": text, "stream_format": "sse"}
    return client.post("/audio/speech", body=body, cast_to=object, stream=True, stream_cls=openai.Stream[object])


def test_events_through_the_clients_decoder(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=1))
    with client_of(server) as client, stream_events(client, STORY) as stream:
        first = next(stream)
        server.backend.allowed = math.inf
        kinds = [first["type"], *(event["type"] for event in stream)]
    assert kinds == ["speech.audio.delta"] * (len(kinds) - 1) + ["speech.audio.done"]


def test_an_error_event_is_the_clients_own_error(client: openai.OpenAI) -> None:
    with stream_events(client, FAILS_LATE) as stream, pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "synthesis_failed"
    assert caught.value.message


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"voice": "nobody"}, "voice", "voice_not_found"),
        ({"model": "gpt-9"}, "model", "model_not_found"),
        ({"input": ""}, "input", None),
        ({"input": "a" * 5000}, "input", "string_above_max_length"),
        ({"response_format": "midi"}, "response_format", "invalid_value"),
        ({"speed": 9.0}, "speed", "invalid_value"),
    ],
)
def test_bad_request(client: openai.OpenAI, fields: Any, param: str, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(**{**SPEECH, **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    if code is not None:
        assert caught.value.code == code


def test_authentication(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(), api_keys=[("alice", "right")])
    with client_of(server, "right") as client:
        assert client.audio.speech.create(**SPEECH).read()
    with client_of(server, "wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.audio.speech.create(**SPEECH)
        assert caught.value.code == "invalid_api_key"
        assert client.models.list().data


def test_a_balance_that_does_not_suffice(start_server: Callable[..., Server], tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nper_1000_characters = 1000\n")
    server = start_server(FakeBackend(), prices_file=prices)
    server.call(lambda: server.service.ledger.credit("anonymous", 10, "r"))
    with client_of(server) as client, pytest.raises(openai.APIStatusError) as caught:
        client.audio.speech.create(**SPEECH)
    assert caught.value.status_code == 402
    assert caught.value.code == "insufficient_balance"


def test_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tts-1", messages=[])


def test_a_server_that_is_not_ready(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend())
    server.backend.ready = False
    with client_of(server) as client, pytest.raises(openai.APIStatusError) as caught:
        client.audio.speech.create(**SPEECH)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_failure(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.audio.speech.create(**{**SPEECH, "input": "This will FAIL."})
    assert (caught.value.status_code, caught.value.code) == (500, "synthesis_failed")


def test_a_failure_in_the_middle(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIConnectionError):
        client.audio.speech.create(**{**SPEECH, "input": FAILS_LATE})


def test_a_client_that_retries_comes_back_when_it_was_told_to(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=0), max_concurrent=1, queue_size=0)
    refused = 'tts_http_requests_total{route="/v1/audio/speech",status="503"} 1.0'

    def end_the_first() -> None:
        wait_until(lambda: refused in server.client.get("/metrics").text)
        server.backend.allowed = math.inf

    with client_of(server) as client, client_of(server, max_retries=1) as patient:
        first = threading.Thread(target=lambda: client.audio.speech.create(**{**SPEECH, "input": "First."}))
        first.start()
        wait_until(lambda: server.service.admission.running == 1)
        ending = threading.Thread(target=end_the_first)
        ending.start()
        started = time.monotonic()
        assert patient.audio.speech.create(**{**SPEECH, "input": "Second."}).read()
        assert time.monotonic() - started >= 1
        first.join()
        ending.join()


# --- models ---


def test_models(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == ["tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15", "fake-1"]
    model = client.models.retrieve("tts-1")
    assert (model.id, model.object, model.owned_by) == ("tts-1", "model", "qwen3-tts")
    assert model.created > 0


def test_a_base_url_with_a_trailing_slash(house: Server) -> None:
    with openai.OpenAI(base_url=f"{house.url}/v1//", api_key="unused", max_retries=0) as client:
        assert client.models.list().data
        assert client.audio.speech.create(**SPEECH).read()


# --- the asynchronous client ---


async def test_async_create_and_models(house: Server) -> None:
    async with async_client_of(house) as client:
        answers = await asyncio.gather(
            *(client.audio.speech.create(**SPEECH, response_format=format) for format in ("mp3", "wav", "flac"))
        )
        for format, answer in zip(("mp3", "wav", "flac"), answers, strict=True):
            assert len(decoded(format, answer.read())) >= 1.6 * 24_000
        assert "tts-1" in [model.id async for model in client.models.list()]
        with pytest.raises(openai.BadRequestError):
            await client.audio.speech.create(**{**SPEECH, "voice": "nobody"})


async def test_async_streaming(start_server: Callable[..., Server]) -> None:
    server = await asyncio.to_thread(start_server, FakeBackend(allowed=1))
    arrivals = []
    async with (
        async_client_of(server) as client,
        client.audio.speech.with_streaming_response.create(**SPEECH) as answer,
    ):
        async for chunk in answer.iter_bytes():
            arrivals.append(chunk)
            server.backend.allowed += 1
    assert len(arrivals) >= len(PARTS)
    assert len(decoded("mp3", b"".join(arrivals))) >= 1.6 * 24_000
