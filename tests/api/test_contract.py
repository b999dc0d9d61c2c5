"""Speech over HTTP: what a request may look like, and the headers and the forms of the answer."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.wire import FORMATS, OPENAI_MODELS, PARTS, STORY, RawClient, events, pitch, speak, usage
from tests.conftest import Server
from tests.decoding import decoded
from tests.fakes import FakeBackend

MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "pcm": "audio/pcm",
}


@pytest.mark.parametrize("format", FORMATS)
def test_headers_of_speech(house: Server, format: str) -> None:
    answer = speak(house.client, response_format=format, voice="nova", model="TTS-1", seed=1)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == MEDIA_TYPES[format]
    assert answer.headers["content-disposition"] == f'attachment; filename="speech.{format}"'
    assert answer.headers["x-model"] == "fake-1"
    assert answer.headers["x-voice"] == "hum"
    assert answer.headers["x-cache"] == "miss"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"].startswith("req_")


def test_every_answer_has_a_request_id_of_its_own(house: Server) -> None:
    paths = ["/healthz", "/nowhere", "/v1/models", "/v1/models"]
    ids = [house.client.get(path, headers={"X-Request-Id": "mine"}).headers["x-request-id"] for path in paths]
    assert len({*ids, "mine"}) == 5


def test_the_request_id_is_the_one_in_the_usage(house: Server) -> None:
    answer = speak(house.client)
    assert answer.headers["x-request-id"] == usage(house.client)["data"][0]["request_id"]


@pytest.mark.parametrize("format", FORMATS)
def test_miss_join_and_hit_are_the_same_bytes(start_server: Callable[..., Server], format: str) -> None:
    server = start_server(FakeBackend(allowed=1))
    request = {"input": STORY, "response_format": format}
    with (
        server.client.stream("POST", "/v1/audio/speech", json=request) as miss,  # answered at the first sound
        server.client.stream("POST", "/v1/audio/speech", json=request) as join,
    ):
        server.backend.allowed = math.inf
        missed, joined = miss.read(), join.read()
    hit = server.client.post("/v1/audio/speech", json=request)
    assert [answer.headers["x-cache"] for answer in (miss, join, hit)] == ["miss", "join", "hit"]
    assert missed == joined == hit.content
    assert hit.headers["content-length"] == str(len(missed))
    assert server.backend.spoken == 1


@pytest.mark.parametrize("format", FORMATS)
def test_no_store_neither_reads_nor_writes_the_cache(house: Server, format: str) -> None:
    spoken, headers = house.backend.spoken, {"Cache-Control": "max-age=0, No-Store"}
    bypass = [speak(house.client, headers=headers, response_format=format, seed=2) for _ in range(2)]
    stored = speak(house.client, response_format=format, seed=2)
    assert [answer.headers["x-cache"] for answer in [*bypass, stored]] == ["bypass", "bypass", "miss"]
    assert bypass[0].content == bypass[1].content == stored.content
    assert house.backend.spoken == spoken + 3


# --- what a request may look like ---


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json; charset=utf-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "text/plain",
        "application/octet-stream",
        "nonsense",
        "\xff\xfe",
    ],
)
def test_any_content_type_with_a_json_body(house: Server, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
    answer = house.client.post("/v1/audio/speech", content=b'{"input": "Hello."}', headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_the_encodings_of_json(house: Server, encoding: str) -> None:
    body = json.dumps({"input": "Grüße aus Köln, 你好 😀."}, ensure_ascii=False).encode(encoding)
    assert house.client.post("/v1/audio/speech", content=body).status_code == 200


def test_nulls_count_as_absent_and_unknown_fields_are_tolerated(house: Server) -> None:
    optional = ["model", "voice", "response_format", "speed", "instructions", "stream_format", "language", "seed"]
    plain = speak(house.client, seed=None)
    answer = speak(house.client, **dict.fromkeys(optional), user="bob", metadata={"deep": [None, {"x": 1}]})
    assert answer.status_code == 200
    assert answer.content == plain.content
    assert answer.headers["x-cache"] == "hit"


@pytest.mark.parametrize("voice", ["nova", "NOVA", "hum", "Hum", {"id": "nova"}, {"id": "HUM", "extra": None}])
def test_a_voice_by_any_of_its_names(house: Server, voice: Any) -> None:
    answer = speak(house.client, voice=voice, response_format="pcm")
    assert answer.headers["x-voice"] == "hum"
    assert pitch(decoded("pcm", answer.content)) == pytest.approx(330, abs=5)


@pytest.mark.parametrize("model", [*OPENAI_MODELS, "fake-1", "FAKE-1"])
def test_every_listed_model_speaks(house: Server, model: str) -> None:
    answer = speak(house.client, model=model)
    assert answer.status_code == 200
    assert answer.headers["x-model"] == "fake-1"


@pytest.mark.parametrize("language", ["auto", "", "English", "en", "en-GB", "EN_us", "german", "de-AT"])
def test_languages_by_name_and_code(house: Server, language: str) -> None:
    assert speak(house.client, language=language).status_code == 200


@pytest.mark.parametrize("seed", [0, 1, -(2**63), 2**64 - 1])
def test_the_seed_decides_the_sound(house: Server, seed: int) -> None:
    headers = {"Cache-Control": "no-store"}
    first, again, other = (speak(house.client, headers=headers, seed=value) for value in (seed, seed, seed // 2 + 3))
    assert first.content == again.content != other.content


def test_the_longest_input_and_the_shortest(house: Server) -> None:
    assert speak(house.client, ("A bit of text. " * 300)[:4096]).status_code == 200
    assert speak(house.client, "I").status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1//audio/voices", "//v1/audio/voices", "/v1/audio///voices", "//v1////audio//voices"]
)
def test_doubled_slashes(house: Server, path: str) -> None:
    assert house.client.get(house.url + path).json() == house.client.get("/v1/audio/voices").json()


def test_doubled_slashes_in_a_speech_request(house: Server) -> None:
    answer = house.client.post(f"{house.url}//v1//audio//speech", json={"input": PARTS[0]})
    assert answer.headers["content-type"] == "audio/mpeg"


# --- the other two forms of a speech answer ---


@pytest.mark.parametrize("format", FORMATS)
def test_base64_is_the_same_answer_whole(house: Server, format: str) -> None:
    request = {"input": STORY, "response_format": format, "seed": 4}
    body = house.client.post("/v1/audio/speech/base64", json=request).json()
    assert set(body) == {"audio", "format", "sample_rate", "duration_ms"}
    assert (
        base64.b64decode(body["audio"], validate=True)
        == speak(house.client, STORY, response_format=format, seed=4).content
    )
    assert (body["format"], body["sample_rate"], body["duration_ms"]) == (format, 24_000, 1600)


@pytest.mark.parametrize("format", FORMATS)
def test_events_carry_the_same_bytes(house: Server, format: str) -> None:
    plain = speak(house.client, STORY, response_format=format, seed=5)
    answer = speak(house.client, STORY, response_format=format, seed=5, stream_format="sse")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-cache"] == "hit"
    *deltas, done = events(answer.text)
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(event["audio"], validate=True) for event in deltas) == plain.content
    tokens = {"input_tokens": len(STORY), "output_tokens": 20, "total_tokens": len(STORY) + 20}  # 1.6 s of 80 ms
    assert done == {"type": "speech.audio.done", "usage": tokens}


def test_events_leave_while_the_rest_is_made(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=1))
    request = {"input": STORY, "response_format": "mp3", "stream_format": "sse"}
    with server.client.stream("POST", "/v1/audio/speech", json=request) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: speech.audio.delta"
        assert server.backend.open == 1
        server.backend.allowed = math.inf
        assert '"speech.audio.done"' in [*lines][-2]


# --- hang-ups before there is an answer ---


def test_a_client_that_leaves_in_the_middle_of_its_upload_is_no_error(server: Server) -> None:
    with RawClient(server.url) as client:
        client.send("POST /v1/audio/speech HTTP/1.1", b'{"input": "Hel', length=1000)
    deadline = time.monotonic() + 30
    while 'route="/v1/audio/speech"' not in (metrics := server.client.get("/metrics").text):
        assert time.monotonic() < deadline
    assert 'tts_http_requests_total{route="/v1/audio/speech",status="499"} 1.0' in metrics
