"""Logs: one JSON line a request, and nothing that a client sent in any of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from api.src.domain import Segment, Voice
from api.src.errors import SynthesisFailed
from api.src.observe import detail
from tests.api.stderr import StderrLines, accesses, records, until
from tests.api.wire import FAILS_LATE, PARTS, RawClient, speak
from tests.conftest import Server
from tests.fakes import FakeBackend

MARK = "Zebrafish"
"""Part of everything hostile that is sent."""

HOSTILE = [
    f'{MARK}\r\n{{"level": "info", "message": "forged"}}',
    f"{MARK}\x1b[2J\x1b]0;title\x07",
    f"{MARK}\u202e\u2028\x9b31m",
    f"{MARK} %s %d {{0}} ${{jndi:ldap://x}}",
]


@pytest.fixture
def server(stderr_lines: StderrLines, start_server: Callable[..., Server]) -> Server:
    return start_server(
        FakeBackend(delay_s=0.02), log_level="info", api_keys=[("alice", "alices-key")], admin_key="the-admin-key"
    )


def hostile_answers(server: Server, text: str) -> Iterator[httpx.Response]:
    """Put `text` into every place of a request that a client can write to."""
    client, key = server.client, {"Authorization": "Bearer alices-key"}
    latin = text.replace("\r\n", "\t").replace("\x1b", "\xa7").replace("\x07", "").encode("latin-1", "replace")
    odd = [(name, latin) for name in (b"User-Agent", b"X-Request-Id", b"Cookie", b"Origin", b"Referer", b"Accept")]
    yield client.get("/v1/audio/voices/" + quote(text))
    yield client.get("/v1/models", params={text: text})
    yield client.get("/v1/usage", params={"account": text, "limit": text}, headers=key)
    yield client.get(f"/{MARK}/%0d%0a%1b%5b31m")
    yield client.post(f"/v1//audio//{MARK}", content=text.encode())
    yield client.get("/v1/usage", headers=[(b"Authorization", b"Bearer " + latin)])
    yield client.get("/v1/models", headers=odd)
    yield speak(client, text, key)  # controls in it: refused
    yield speak(client, f"{MARK} speaks.", {**key, "Idempotency-Key": MARK})
    yield speak(client, f"{MARK} will FAIL.", key)
    for field in ["voice", "model", "language", "response_format", "stream_format", "instructions", "seed", text]:
        yield speak(client, f"{MARK} speaks.", key, **{field: text})
    yield client.post("/v1/audio/speech", content=text.encode(), headers=key)
    yield client.post("/v1/accounts/alice/credit", json={"micros": 5, "reference": text}, headers=key)
    yield client.post(f"/v1/accounts/{MARK}%0a/credit", json={}, headers={"Authorization": "Bearer the-admin-key"})


@pytest.mark.parametrize("text", HOSTILE, ids=["a line", "escapes", "Unicode", "templates"])
def test_nothing_that_a_client_sent_is_in_the_log(server: Server, stderr_lines: StderrLines, text: str) -> None:
    answers = list(hostile_answers(server, text))
    asked = {(answer.headers["x-request-id"], answer.status_code) for answer in answers}
    until(lambda: asked <= {(record["request_id"], record["status"]) for record in accesses(stderr_lines())})
    lines = stderr_lines()
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 404, 500}
    assert not [line for line in lines if MARK.lower() in line.lower()]
    assert not [line for line in lines if "alices-key" in line or "the-admin-key" in line]
    assert {record["message"] for record in accesses(lines)} == {"request"}


def test_a_request_leaves_its_route_and_id(server: Server, stderr_lines: StderrLines) -> None:
    answer = server.client.get("/v1/audio/voices/alloy")
    until(lambda: accesses(stderr_lines())[-1]["route"] == "/v1/audio/voices/{voice_id}")
    record = accesses(stderr_lines())[-1]
    assert record["status"] == 200
    assert record["request_id"] == answer.headers["x-request-id"]
    assert record["level"] == "info"
    assert record["ms"] > 0


def test_a_failure_is_logged_with_its_traceback_and_the_requests_id(server: Server, stderr_lines: StderrLines) -> None:
    answer = speak(server.client, "This will FAIL.", {"Authorization": "Bearer alices-key"})
    server.wait_idle()
    errors = [record for record in records(stderr_lines()) if record["level"] == "error"]
    assert [record["message"] for record in errors] == ["generation failed"]
    assert "planted failure" in errors[0]["exception"]
    assert errors[0]["request_id"] == answer.headers["x-request-id"]


def test_a_hang_up_or_a_cut_answer_is_a_quiet_line(server: Server, stderr_lines: StderrLines) -> None:
    with RawClient(server.url) as client:
        client.speak("Authorization: Bearer alices-key", seed=1)
        client.read_sound(1)
    with RawClient(server.url) as client:
        client.send(
            "POST /v1/audio/speech HTTP/1.1\nAuthorization: Bearer alices-key",
            b'{"input": "' + MARK.encode(),
            length=1000,
        )
    with pytest.raises(httpx.RemoteProtocolError):
        speak(server.client, FAILS_LATE, {"Authorization": "Bearer alices-key"})
    server.wait_idle()
    until(lambda: [record["status"] for record in accesses(stderr_lines())].count(499) == 1)
    lines = stderr_lines()
    assert not [line for line in lines if MARK in line or PARTS[0][:20] in line]
    warned = [record["message"] for record in records(lines) if record["level"] in ("warning", "error")]
    assert sorted(warned) == [
        "ASGI callable returned without completing response.",  # uvicorn's word for a cut answer
        "generation failed",
        "response cut: SynthesisFailed",
    ]


def test_what_is_not_http_is_not_quoted(server: Server, stderr_lines: StderrLines) -> None:
    with RawClient(server.url) as client:
        client.socket.sendall(f"{MARK} \x1b[31m / HTTP/9.9\r\n{MARK}\r\n\r\n".encode())
        assert client.read_to_end().startswith(b"HTTP/1.1 400")
    lines = stderr_lines()
    assert records(lines)
    assert not [line for line in lines if MARK in line]


# --- what a request holds until it fails ---


def held(lines: list[str]) -> list[dict[str, Any]]:
    return [record for record in records(lines) if record.get("held")]


def test_a_failure_brings_out_what_led_to_it(server: Server, stderr_lines: StderrLines) -> None:
    alice = {"Authorization": "Bearer alices-key"}
    good = [speak(server.client, headers=alice), speak(server.client, headers=alice)]
    assert [answer.headers["x-cache"] for answer in good] == ["miss", "hit"]
    server.wait_idle()
    assert held(stderr_lines()) == []
    answer = speak(server.client, "It will FAIL.", alice)
    assert answer.status_code == 500
    server.wait_idle()
    until(lambda: held(stderr_lines()) != [])
    found = held(stderr_lines())
    assert {record["request_id"] for record in found} == {answer.headers["x-request-id"]}
    told = [record["message"] for record in found]
    assert told[:4] == ["source found", "price held", "permit granted", "recording opened"]
    assert {record["level"] for record in found} == {"debug"}


class GivesUp(FakeBackend):
    """Ends its second segment with an error of ours, which nobody logs as one."""

    def sound(self, segment: Segment, voice: Voice, seed: int) -> np.ndarray:
        if segment.start:
            raise SynthesisFailed("It cannot go on.")
        return super().sound(segment, voice, seed)


@pytest.fixture
def tired(stderr_lines: StderrLines, start_server: Callable[..., Server]) -> Server:
    return start_server(GivesUp(delay_s=0.05), log_level="info")


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
def test_so_does_a_failure_after_the_first_byte(tired: Server, stderr_lines: StderrLines, stream_format: str) -> None:
    with suppress(httpx.RemoteProtocolError):
        assert "error" in speak(tired.client, PARTS[0] + PARTS[1], stream_format=stream_format).text
    tired.wait_idle()
    until(lambda: "left" in [record["message"] for record in held(stderr_lines())])
    assert accesses(stderr_lines())[-1]["status"] == 200
    sounded = [record for record in held(stderr_lines()) if record["message"] == "a segment sounds"]
    assert [record["start"] for record in sounded] == [0]
    assert not [line for line in stderr_lines() if PARTS[0][:20] in line]


def test_a_refusal_or_a_hang_up_is_no_failure(server: Server, stderr_lines: StderrLines) -> None:
    alice = {"Authorization": "Bearer alices-key"}
    assert speak(server.client, voice="nobody", headers=alice).status_code == 400
    with RawClient(server.url) as client:
        client.speak("Authorization: Bearer alices-key", response_format="pcm")
        client.read_sound(1)
    server.wait_idle()
    until(lambda: len(accesses(stderr_lines())) >= 3)
    assert held(stderr_lines()) == []


@pytest.fixture
def levelled(stderr_lines: StderrLines, start_server: Callable[..., Server]) -> Server:
    keys = [(name, f"{name}-key") for name in ("loud", "quiet", "usual")]
    levels = {"loud": "debug", "quiet": "warning"}
    return start_server(FakeBackend(), log_level="info", api_keys=keys, log_levels=levels)


def test_each_account_has_its_level(levelled: Server, stderr_lines: StderrLines) -> None:
    for name in ("loud", "quiet", "usual"):
        assert speak(levelled.client, headers={"Authorization": f"Bearer {name}-key"}).status_code == 200
    levelled.wait_idle()
    until(lambda: len([line for line in accesses(stderr_lines()) if "account" in line]) == 2)
    lines = records(stderr_lines())
    assert {record["account"] for record in lines if "account" in record} == {"loud", "usual"}
    by_level = {record["request_id"] for record in lines if record["level"] == "debug"}
    assert by_level == {record["request_id"] for record in accesses(stderr_lines()) if record.get("account") == "loud"}
    assert "held" not in {name for record in lines for name in record}


def test_an_unexpected_exception_has_its_requests_id(
    server: Server, stderr_lines: StderrLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        detail(logging.getLogger("api.test"), "before it broke")
        raise RuntimeError("planted")

    monkeypatch.setattr(type(server.service.catalogue), "voices", broken)
    answer = server.client.get("/v1/audio/voices")
    assert answer.status_code == 500
    until(lambda: any("exception" in record for record in records(stderr_lines())))
    (line,) = [record for record in records(stderr_lines()) if "exception" in record]
    (access,) = [record for record in accesses(stderr_lines()) if record["status"] == 500]
    assert line["request_id"] == access["request_id"] != "-"
    assert [record["message"] for record in held(stderr_lines())] == ["before it broke"]
