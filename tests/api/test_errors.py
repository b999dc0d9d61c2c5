"""Errors over HTTP: every bad input is a 400 that names its field, and all failures have one shape."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.api.wire import FAILS_LATE, FORMATS, PARTS, STORY, RawClient, assert_error, events, speak, usage
from tests.conftest import Server
from tests.fakes import FakeBackend

SPEECH_PATHS = ["/v1/audio/speech", "/v1/audio/speech/base64"]

NOT_JSON = {
    "nothing": b"",
    "white space": b" \n",
    "cut short": b'{"input": "Hello.',
    "single quotes": b"{'input': 'Hello.'}",
    "a form": b"input=Hello.&voice=alloy",
    "a trailing comma": b'{"input": "Hello.",}',
    "two documents": b'{"input": "Hello."}{"input": "Hello."}',
    "NaN": b'{"input": "Hello.", "speed": NaN}',
    "Infinity": b'{"input": "Hello.", "speed": Infinity}',
    "minus Infinity": b'{"input": "Hello.", "speed": -Infinity}',
    "NaN in an unknown field": b'{"input": "Hello.", "other": [NaN]}',
    "an integer of 5,000 digits": b'{"input": "Hello.", "seed": ' + b"9" * 5000 + b"}",
    "a raw control character": b'{"input": "Hello.\x00"}',
    "invalid UTF-8": b'{"input": "Hello \xff."}',
    "UTF-8 cut in a character": b'{"input": "\xf0\x9f\x98"}',
    "Latin-1": '{"input": "Grüße"}'.encode("latin-1"),
    "random bytes": bytes(range(256)),
    "100,000 open brackets": b"[" * 100_000,
    "100,000 open objects": b'{"a":' * 100_000,
    "100,000 nested lists in a field": b'{"input": "Hello.", "voice": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 nested lists in an unknown field": b'{"input": "Hello.", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
NOT_AN_OBJECT = [b"[]", b'["input"]', b'"Hello."', b"1", b"1e999", b"true", b"null", b'[{"input": "Hello."}]']


@pytest.mark.parametrize("path", SPEECH_PATHS)
@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in NOT_JSON.items()])
def test_a_body_that_is_not_json(house: Server, path: str, body: bytes) -> None:
    assert_error(house.client.post(path, content=body), 400, code="invalid_json")


@pytest.mark.parametrize("body", NOT_AN_OBJECT)
def test_json_that_is_not_an_object(house: Server, body: bytes) -> None:
    assert_error(house.client.post("/v1/audio/speech", content=body), 400, code="invalid_json")


TEXT_FIELDS = ["input", "model", "voice", "instructions", "language", "response_format", "stream_format"]
WRONG_TYPES = {
    **{
        name: ["7", "1.5", "true", "[]", "{}", '["alloy"]', '{"id": 7}', '{"id": null}', "1e999"]
        for name in TEXT_FIELDS
    },
    "speed": ['"1.0"', '"fast"', "true", "false", "[1]", "{}", "1e999", "-1e999", "1" * 400],
    "seed": ['"1"', "true", "false", "1.0", "1.5", "[1]", "{}", "1e999", "1e3"],
}
OUT_OF_BOUNDS = {
    "speed": ["0", "-0.0", "-1", "0.2499", "4.0001", "5", "1e308", "5e-324", str(10**300)],
    "seed": [str(2**64), str(-(2**63) - 1), str(10**4000), str(-(10**4000))],
}


def each(table: dict[str, list[str]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}={value[:24]}") for field, row in table.items() for value in row]


@pytest.mark.parametrize(("field", "value"), [*each(WRONG_TYPES), *each(OUT_OF_BOUNDS)])
def test_values_that_do_not_fit_their_field(house: Server, field: str, value: str) -> None:
    given = '"input": "Hello.", ' if field != "input" else ""
    answer = house.client.post("/v1/audio/speech", content=f'{{{given}"{field}": {value}}}'.encode())
    message = assert_error(answer, 400, code="invalid_value", param=field)
    assert field in message


@pytest.mark.parametrize("body", [b"{}", b'{"input": null}', b'{"text": "Hello."}', b'{"Input": "Hello."}'])
def test_no_input(house: Server, body: bytes) -> None:
    answer = house.client.post("/v1/audio/speech", content=body)
    assert_error(answer, 400, code="missing_parameter", param="input")


@pytest.mark.parametrize("text", ["", " ", "\t\r\n", "\u00a0\u2003\u3000", "\x85\v\f"])
def test_a_blank_input(house: Server, text: str) -> None:
    assert_error(speak(house.client, text), 400, param="input")


CONTROLS = ["\x00", "\x07", "\x08", "\x1b", "\x1f", "\x7f", "\x80", "\x9b", "\x9f"]
SURROGATES = [r"\ud800", r"\udfff", r"\ud83d", r"\ude00\ud83d", r"\ud83d\ud83d\ude00"]


@pytest.mark.parametrize("field", TEXT_FIELDS)
@pytest.mark.parametrize("control", CONTROLS, ids=repr)
def test_control_characters(house: Server, field: str, control: str) -> None:
    answer = speak(house.client, **{"input": "Hello.", field: f"a{control}b"})
    assert_error(answer, 400, code="invalid_value", param=field)


@pytest.mark.parametrize("field", TEXT_FIELDS)
@pytest.mark.parametrize("surrogates", SURROGATES)
def test_unpaired_surrogates(house: Server, field: str, surrogates: str) -> None:
    given = '"input": "Hello.", ' if field != "input" else ""
    answer = house.client.post("/v1/audio/speech", content=f'{{{given}"{field}": "a{surrogates}b"}}'.encode())
    assert_error(answer, 400, code="invalid_value", param=field)


def test_surrogates_in_bytes_and_in_a_voice_object(house: Server) -> None:
    encoded = house.client.post("/v1/audio/speech", content=b'{"input": "a\xed\xa0\x80b"}')
    assert_error(encoded, 400, code="invalid_value", param="input")
    for id in [r"\ud800", r"a\u0000"]:
        answer = house.client.post("/v1/audio/speech", content=f'{{"input": "a", "voice": {{"id": "{id}"}}}}'.encode())
        assert_error(answer, 400, code="invalid_value", param="voice")


def test_paired_surrogates_and_white_space_are_fine(house: Server) -> None:
    for text in [r"Hello \ud83d\ude00.", r"One.\n\tTwo.\r\n\fThree.\u000b\u0085", r"\ufeffHello.\u200b"]:
        answer = house.client.post("/v1/audio/speech", content=f'{{"input": "{text}"}}'.encode())
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("voice", "nobody", "voice_not_found"),
        ("voice", "", "voice_not_found"),
        ("voice", {"id": "nobody"}, "voice_not_found"),
        ("voice", "alloy\n", "voice_not_found"),
        ("model", "whisper-1", "model_not_found"),
        ("model", "", "model_not_found"),
        ("model", "qwen3-tts-12hz-1.7b-base", "model_not_loaded"),
        ("model", "Qwen3-TTS-12Hz-0.6B-custom-voice", "model_not_loaded"),
        ("response_format", "wma", "invalid_value"),
        ("response_format", "MP3", "invalid_value"),
        ("response_format", "", "invalid_value"),
        ("stream_format", "websocket", "invalid_value"),
        ("language", "klingon", "language_not_supported"),
        ("language", "fr", "language_not_supported"),  # one that exists, but not on this backend
        ("language", "x-\u202e", "language_not_supported"),
    ],
)
@pytest.mark.parametrize("path", SPEECH_PATHS)
def test_unknown_names(house: Server, path: str, field: str, value: Any, code: str) -> None:
    answer = house.client.post(path, json={"input": "Hello.", field: value})
    assert_error(answer, 400, code=code, param=field)


def test_an_unknown_name_is_told_what_there_is(house: Server) -> None:
    assert "alloy" in assert_error(speak(house.client, voice="nobody"), 400, param="voice")
    assert "tts-1-hd" in assert_error(speak(house.client, model="nothing"), 400, param="model")
    assert "fake-1" in assert_error(speak(house.client, model="qwen3-tts-12hz-1.7b-base"), 400, param="model")
    assert "german" in assert_error(speak(house.client, language="nowhere"), 400, param="language")
    assert "flac" in assert_error(speak(house.client, response_format="no"), 400, param="response_format")


def test_an_input_that_is_too_long(house: Server) -> None:
    answer = speak(house.client, "a" * 4097)
    assert "4096" in assert_error(answer, 400, code="string_above_max_length", param="input")


def test_the_longest_input_is_a_setting(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(), max_input_characters=10)
    assert speak(server.client, "0123456789").status_code == 200
    assert "10" in assert_error(speak(server.client, "01234567890"), 400, param="input")


@pytest.mark.parametrize("path", [*SPEECH_PATHS, "/v1/accounts/anonymous/credit"])
def test_a_body_over_one_mebibyte(start_server: Callable[..., Server], path: str) -> None:
    server = start_server(FakeBackend(), admin_key="root")
    headers = {"Authorization": "Bearer root"}
    fits = json.dumps({"input": "Hello."}).encode().ljust(1024 * 1024)
    assert server.client.post(path, content=fits, headers=headers).status_code in (200, 400)
    assert_error(server.client.post(path, content=fits + b" ", headers=headers), 413, code="payload_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    assert_error(server.client.post(path, content=endless(), headers=headers), 413, code="payload_too_large")


@pytest.mark.parametrize("key", ["", "a b", "a" * 256, "schlüssel", "\x80"])
def test_an_idempotency_key_that_cannot_be_one(house: Server, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1"))]
    answer = house.client.post("/v1/audio/speech", json={"input": "Hello."}, headers=headers)
    assert_error(answer, 400, code="invalid_value", param="Idempotency-Key")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=", "limit=1e999", "limit=NaN"])
def test_a_query_that_does_not_fit(house: Server, query: str) -> None:
    assert_error(house.client.get(f"/v1/usage?{query}"), 400, param="limit")


@pytest.mark.parametrize("account", ["", "%00", "%0A", "a/b", "a%20b", "%ED%A0%80", "a" * 129])
def test_an_account_that_cannot_be_one(house: Server, account: str) -> None:
    assert_error(house.client.get(f"/v1/usage?account={account}"), 400, param="account")


# --- the framework's own errors ---


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/audio", "/v1/nothing", "/v1/audio/speech/mp3", "/%00", "/..%2f"])
def test_not_found(house: Server, path: str) -> None:
    assert_error(house.client.get(path), 404, code="not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/audio/speech"),
        ("PUT", "/v1/audio/speech"),
        ("DELETE", "/v1/audio/voices/alloy"),
        ("POST", "/v1/models"),
        ("PATCH", "/v1/usage"),
        ("POST", "/healthz"),
        ("TRACE", "/ready"),
        ("PROPFIND", "/v1/models"),
    ],
)
def test_method_not_allowed(house: Server, method: str, path: str) -> None:
    answer = house.client.request(method, path)
    assert_error(answer, 405, code="method_not_allowed")
    assert answer.headers["allow"]


# --- failures of the server ---


def planted(secret: str = "") -> FakeBackend:
    """A backend whose failure quotes something that nobody outside may see."""

    class Leaky(FakeBackend):
        def tone(self, voice: Any, seed: int) -> Any:
            raise ValueError(f"/srv/models/{secret}")

    return Leaky()


@pytest.mark.parametrize("path", SPEECH_PATHS)
@pytest.mark.parametrize("fields", [{}, {"stream_format": "sse"}, {"response_format": "wav"}])
def test_a_failure_before_the_first_sound(house: Server, path: str, fields: dict[str, str]) -> None:
    for _ in range(2):  # a failure is not kept
        answer = house.client.post(path, json={"input": "This will FAIL.", **fields})
        message = assert_error(answer, 500, code="synthesis_failed")
        assert "planted" not in message
        assert answer.headers["x-request-id"]


def test_a_failure_tells_no_internals(start_server: Callable[..., Server]) -> None:
    server = start_server(planted("inner-workings"))
    answer = speak(server.client)
    assert_error(answer, 500, code="synthesis_failed")
    for inside in ["inner-workings", "/srv", "ValueError", "Traceback", ".py"]:
        assert inside not in answer.text


def test_an_error_that_nobody_foresaw(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend())

    def broken() -> None:
        raise KeyError("inner-workings")

    server.service.catalogue.models = broken
    answer = server.client.get("/v1/models")
    assert_error(answer, 500, code="internal_error")
    assert "inner-workings" not in answer.text


@pytest.mark.parametrize("format", FORMATS)
def test_a_failure_after_the_first_byte_cuts_the_connection(house: Server, format: str) -> None:
    for _ in range(2):
        request = {"input": FAILS_LATE, "response_format": format}
        with house.client.stream("POST", "/v1/audio/speech", json=request) as cut:
            assert (cut.status_code, cut.headers["x-cache"]) == (200, "miss")
            with pytest.raises(httpx.RemoteProtocolError):
                cut.read()


def test_a_cut_answer_has_sound_but_no_end(house: Server) -> None:
    with RawClient(house.url) as client:
        client.speak(input=FAILS_LATE, response_format="pcm")
        answer = client.read_to_end()
    assert len(answer) > 19_200
    assert not answer.endswith(b"0\r\n\r\n")


def test_a_failure_among_events_is_an_event(house: Server) -> None:
    answer = speak(house.client, FAILS_LATE, stream_format="sse")
    assert answer.status_code == 200
    *deltas, last = events(answer.text)
    assert deltas
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert last["type"] == "error"
    assert last["error"]["code"] == "synthesis_failed"
    assert last["error"]["message"] == last["detail"]
    assert "planted" not in answer.text


def test_a_late_failure_is_an_error_where_the_answer_is_whole(house: Server) -> None:
    answer = house.client.post("/v1/audio/speech/base64", json={"input": FAILS_LATE})
    assert_error(answer, 500, code="synthesis_failed")


def test_no_sound_within_the_time_limit(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=0), request_timeout_s=0.2)
    answer = speak(server.client)
    assert_error(answer, 503, code="timed_out")
    assert answer.headers["retry-after"].isdigit()
    server.wait_idle()
    assert usage(server.client)["data"] == []


def test_a_full_house(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(allowed=1), max_concurrent=1, queue_size=0)
    with server.client.stream("POST", "/v1/audio/speech", json={"input": STORY}) as running:
        answer = speak(server.client, "Something else.")  # which does not wait, for that would never end
        assert_error(answer, 503, code="overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        with server.client.stream("POST", "/v1/audio/speech", json={"input": STORY}) as joining:
            assert joining.headers["x-cache"] == "join"
            server.backend.allowed = math.inf
            running.read()
    server.wait_idle()
    assert speak(server.client, "Something else.").status_code == 200


def test_errors_leave_nothing_behind(house: Server) -> None:
    """The fixture asserts that nothing runs and no hold is open; here that nobody was charged for them."""
    speak(house.client, "This will FAIL.", seed=9)
    speak(house.client, PARTS[0], voice="nobody", seed=9)
    house.wait_idle()
    events = usage(house.client, limit=1000)["data"]
    assert {event["outcome"] for event in events} <= {"completed", "cached", "cancelled", "failed"}
    assert all(event["price_micros"] == 0 for event in events if event["outcome"] == "failed")
