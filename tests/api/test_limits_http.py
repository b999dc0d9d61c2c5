"""Limits over a real server: headers, refusals as the official client meets them, stopped accounts, alerts."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.src.domain import Account
from api.src.errors import TooManyFailures
from api.src.main import EXPOSED_HEADERS
from api.src.observe import Metrics
from api.src.routers import failures
from api.src.routers.failures import AccountBreakers
from api.src.routers.limit_headers import duration
from api.src.speech import alerts
from api.src.stores.limits_redis import RedisLimiter
from tests.api.stderr import StderrLines
from tests.api.wire import FAILS_LATE, PARTS, assert_error, speak
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend
from tests.redis_server import RedisServer, running_redis
from tests.speech.asking import wait_until
from tests.speech.caller import Caller
from tests.speech.textual import TextualBackend, sentences

Start = Callable[..., Server]
KEYS = "ann=key-of-ann,bob=key-of-bob"
ANN, BOB = ({"Authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
ADMIN = {"Authorization": "Bearer key-of-admin"}
LIMITED = {"requests_per_minute": 60, "concurrent_per_account": 3, "characters_per_day": 10_000}


NOON = 1_800_014_400_000_000
"""Microseconds; 2027-01-15 12:00 UTC."""


def set_clock(server: Server, clock: Callable[[], int] = lambda: NOON) -> None:
    """Let the limits in memory go by this clock: else a slow moment of the machine fills a bucket, or is midnight."""
    server.service._gate._limiter._clock = clock  # type: ignore[attr-defined]


def metric(server: Server, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_durations_as_openai_writes_them() -> None:
    written = [(0, "0s"), (1, "1ms"), (20_000, "20ms"), (1_000_000, "1s"), (1_250_000, "1.25s")]
    written += [(360_000_000, "6m0s"), (59_999_001, "1m0s"), (7_384_500_000, "2h3m4.5s")]
    assert [duration(microseconds) for microseconds, _ in written] == [text for _, text in written]


@pytest.mark.parametrize("form", ["audio", "sse", "base64"])
def test_every_answer_says_how_the_caller_stands(start_server: Start, form: str) -> None:
    server = start_server(FakeBackend(), **LIMITED)
    set_clock(server)
    path = "/v1/audio/speech/base64" if form == "base64" else "/v1/audio/speech"
    body = {"input": PARTS[0], **({"stream_format": "sse"} if form == "sse" else {})}
    server.client.post(path, json=body)
    server.wait_idle()
    headers = server.client.post(path, json=body).headers
    left = 10_000 - 2 * len(PARTS[0])
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "58"
    assert headers["x-ratelimit-reset-requests"] == "2s"
    assert (headers["x-ratelimit-limit-concurrent"], headers["x-ratelimit-remaining-concurrent"]) == ("3", "2")
    assert (headers["x-ratelimit-limit-characters"], headers["x-ratelimit-remaining-characters"]) == (
        "10000",
        str(left),
    )
    assert headers["ratelimit-policy"] == (
        '"requests";q=60;w=60, "concurrent";q=3;qu="concurrent-requests", "characters";q=10000;w=86400;qu="characters"'
    )
    assert headers["ratelimit"] == f'"requests";r=58;t=2, "concurrent";r=2, "characters";r={left};t=43200'
    sent = {name for name in headers if "ratelimit" in name}
    assert sent <= {name.lower() for name in EXPOSED_HEADERS}
    assert len(sent) == 10


def test_an_error_behind_the_gate_says_it_too_and_an_unbounded_answer_does_not(start_server: Start) -> None:
    server = start_server(FakeBackend(), admin_key="key-of-admin", **LIMITED)
    failed = speak(server.client, "This sentence must FAIL.")
    assert_error(failed, 500)
    assert failed.headers["x-ratelimit-remaining-requests"] == "59"
    for headers in (speak(server.client, headers=ADMIN).headers, server.client.get("/v1/models").headers):
        assert [name for name in headers if "ratelimit" in name] == []


def test_the_official_client_is_refused_and_comes_back_when_it_was_told_to(start_server: Start) -> None:
    server = start_server(FakeBackend(), requests_per_minute=60)
    ask = {"model": "tts-1", "voice": "alloy", "input": PARTS[0]}
    refused = 'tts_refused_requests_total{reason="requests"}'
    counter = server.service._metrics.refused.labels("requests")
    set_clock(server, lambda: NOON + 2_000_000 * (counter._value.get() >= 3))  # two seconds later after three refusals
    while speak(server.client).status_code == 200:
        pass
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.audio.speech.create(**ask)
        error, headers = caught.value, caught.value.response.headers
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert (headers["retry-after"], headers["x-ratelimit-remaining-requests"]) == ("1", "0")
        began = time.monotonic()
        client.with_options(max_retries=1).audio.speech.create(**ask)
        assert time.monotonic() - began >= 0.9
    assert metric(server, refused) == 3


def test_the_day_s_characters_come_back_at_midnight_utc(start_server: Start) -> None:
    server = start_server(FakeBackend(), characters_per_day=100)
    set_clock(server)
    assert_error(speak(server.client, "x" * 101), 429, code="daily_quota_exceeded")
    assert speak(server.client, "y" * 60).status_code == 200
    server.wait_idle()
    answer = speak(server.client, "z" * 41)
    assert "40 are left" in assert_error(answer, 429, code="daily_quota_exceeded")
    assert answer.json()["error"]["type"] == "insufficient_quota"
    assert int(answer.headers["retry-after"]) == 12 * 3600
    set_clock(server, lambda: NOON + 12 * 3600 * 1_000_000)
    assert speak(server.client, "z" * 100).status_code == 200


def test_hang_ups_give_places_back(start_server: Start) -> None:
    backend = TextualBackend()
    server = start_server(backend, concurrent_per_account=4)
    for moment in ("before the headers", "between the chunks", "reset"):
        backend.allowed = 0 if moment == "before the headers" else 1
        callers = [Caller(server.url) for _ in range(4)]
        for number, caller in enumerate(callers):
            caller.ask(input=sentences(20, f"{moment} {number}"), response_format="pcm")
        wait_until(lambda: server.service.admission.running == 4)
        assert_error(speak(server.client, "One more."), 429, code="concurrency_limit_exceeded")
        for caller in callers:
            if moment != "before the headers":
                caller.read_head()
            caller.hang_up(reset=moment == "reset")
        server.wait_idle()
    backend.allowed = math.inf
    assert speak(server.client, "One more.").status_code == 200


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A Redis that is waited for, unless it is dead."""
    monkeypatch.setitem(RedisLimiter.__init__.__kwdefaults__, "timeout_s", 30.0)
    with running_redis() as server:
        yield server


def test_two_servers_share_limits_through_redis_and_do_without_it(
    start_server: Start, redis: RedisServer, tmp_path: Any
) -> None:
    settings = {"redis_url": redis.url(), "requests_per_minute": 8, "concurrent_per_account": 8, "api_keys": KEYS}
    servers = [start_server(FakeBackend(), folder=tmp_path / name, **settings) for name in ("one", "two")]
    answers = [speak(servers[number % 2].client, headers=ANN) for number in range(9)]
    assert [answer.status_code for answer in answers] == [200] * 8 + [429]
    assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers[:8]] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert speak(servers[0].client, headers=BOB).status_code == 200
    redis.kill()
    assert [speak(servers[0].client, headers=ANN).status_code for _ in range(9)] == [200] * 8 + [429]
    assert metric(servers[0], "tts_limiter_fallback") == 1
    assert (speak(servers[1].client, headers=ANN).status_code, metric(servers[1], "tts_limiter_fallback")) == (200, 0)
    redis.start()
    wait_until(
        lambda: speak(servers[0].client, headers=BOB).is_success and metric(servers[0], "tts_limiter_fallback") == 0
    )


# --- stopped accounts ---


class Clock:
    """Stands still unless it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The one of all breakers of accounts."""
    clock = Clock()
    monkeypatch.setitem(AccountBreakers.__init__.__kwdefaults__, "clock", clock)
    return clock


def fail(server: Server, headers: dict[str, str] = ANN) -> int:
    return speak(server.client, " ", headers=headers).status_code


def test_an_account_that_keeps_failing_is_stopped_until_it_does_better(start_server: Start, clock: Clock) -> None:
    server = start_server(FakeBackend(), api_keys=KEYS, account_failures=3)
    assert [fail(server) for _ in range(4)] == [400, 400, 400, 429]
    answer = speak(server.client, headers=ANN)
    message = assert_error(answer, 429, code="too_many_failures")
    assert re.search(r"stopped until \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", message)
    assert answer.headers["retry-after"] == "10"
    assert metric(server, "tts_stopped_accounts") == 1
    assert metric(server, 'tts_refused_requests_total{reason="failures"}') == 2
    assert speak(server.client, headers=BOB).status_code == 200, "the others go on"
    clock.now += failures.OPEN_S
    assert [fail(server), fail(server)] == [400, 429]
    clock.now += 1.9 * failures.OPEN_S
    assert fail(server) == 429, "the second stop is longer"
    clock.now += 0.1 * failures.OPEN_S
    assert speak(server.client, headers=ANN).status_code == 200
    assert metric(server, "tts_stopped_accounts") == 0
    assert [fail(server) for _ in range(3)] == [400, 400, 400], "it is counted anew"


def test_a_stopped_account_s_body_is_not_read(start_server: Start) -> None:
    server = start_server(FakeBackend(), api_keys=KEYS, account_failures=1)
    assert fail(server) == 400
    with Caller(server.url) as caller:
        head = "POST /v1/audio/speech HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer key-of-ann\r\n"
        caller.socket.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode())
        assert " 429 " in caller.read_head().partition("\r\n")[0]


FAILURES: list[tuple[str, dict[str, Any], bool]] = [
    ("a blank text", {"input": " "}, True),
    ("no JSON", {"content": b"{"}, True),
    ("too large", {"content": b"x" * 2000}, True),
    ("an unknown voice", {"input": "Hello.", "voice": "nobody"}, True),
    ("a synthesis that fails", {"input": "This must FAIL."}, True),
    ("one that fails late", {"input": FAILS_LATE}, True),
    ("one that fails late, in events", {"input": FAILS_LATE, "stream_format": "sse"}, True),
    ("a limit", {"input": "x" * 900}, False),
    ("a good one", {"input": "Hello."}, False),
]


@pytest.mark.parametrize(("body", "counts"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES])
def test_what_counts_as_a_failure(start_server: Start, body: dict[str, Any], counts: bool) -> None:
    settings = {"account_failures": 2, "max_body_bytes": 1500, "characters_per_day": 800}
    server = start_server(FakeBackend(), api_keys=KEYS, **settings)
    assert fail(server) == 400
    with suppress_cut():
        content = {"content": body["content"]} if "content" in body else {"json": body}
        server.client.post("/v1/audio/speech", headers=ANN, **content)
    server.wait_idle()
    wait_until(lambda: not counts or metric(server, "tts_stopped_accounts") == 1)
    assert metric(server, "tts_stopped_accounts") == counts


@contextmanager
def suppress_cut() -> Iterator[None]:
    try:
        yield
    except httpx.RemoteProtocolError as error:
        assert "incomplete" in str(error)  # noqa: PT017


def test_who_hangs_up_has_not_failed_and_done_nothing_good(start_server: Start) -> None:
    server = start_server(TextualBackend(allowed=1), api_keys=KEYS, account_failures=2)
    assert fail(server) == 400
    for headers_first in (False, True):
        with server.client.stream(
            "POST", "/v1/audio/speech", json={"input": sentences(20), "response_format": "pcm"}, headers=ANN
        ) as answer:
            if headers_first:
                next(answer.iter_raw())
        server.wait_idle()
    assert metric(server, "tts_stopped_accounts") == 0
    assert [fail(server), fail(server)] == [400, 429]


@pytest.mark.parametrize("settings", [{"account_failures": 1}, {"account_failures": 0, "api_keys": KEYS}])
def test_anonymous_is_never_stopped_nor_anybody_if_it_is_off(start_server: Start, settings: dict[str, Any]) -> None:
    server = start_server(FakeBackend(), **settings)
    assert [fail(server) for _ in range(5)] == [400] * 5


def test_the_admin_is_never_stopped(start_server: Start) -> None:
    server = start_server(FakeBackend(), admin_key="key-of-admin", account_failures=1)
    assert [fail(server, ADMIN) for _ in range(3)] == [400] * 3


def end(breakers: AccountBreakers, account: Account, status: int) -> None:
    scope: dict[str, Any] = {}
    breakers.watch(account, scope)
    failures.judge(scope, status)


def test_end_users_are_stopped_one_by_one_and_only_so_many_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOST", 3)
    breakers = AccountBreakers(1, Metrics())
    end(breakers, Account("ann", user="eve"), 400)
    with pytest.raises(TooManyFailures):
        end(breakers, Account("ann", user="eve"), 200)
    for account in (Account("ann"), Account("ann", user="bob")):
        end(breakers, account, 200)
    with pytest.raises(TooManyFailures):  # asked for last, so it is not the one to be forgotten
        end(breakers, Account("ann", user="eve"), 200)
    end(breakers, Account("carol"), 400)
    assert list(breakers._breakers) == [("ann", "bob"), ("ann", "eve"), ("carol", "")]


# --- alerts ---


class Receiver:
    """A webhook: answers with the next of `statuses`, then 204, and keeps what was posted to it."""

    def __init__(self, *statuses: int) -> None:
        self.posts: list[tuple[str, Any]] = []
        self._statuses = list(statuses)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                receiver.posts.append((self.path, body))
                self.send_response(receiver._statuses.pop(0) if receiver._statuses else 204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Not to standard error."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/SECRET-of-the-hook"

    def __enter__(self) -> Receiver:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class House:
    """Servers that share their limits, the webhook that they tell, and what they log."""

    servers: list[Server]
    receiver: Receiver
    log: StderrLines


@pytest.fixture(params=["memory", "redis"])
def house(
    request: pytest.FixtureRequest, stderr_lines: StderrLines, start_server: Start, tmp_path: Path
) -> Iterator[House]:
    with Receiver(500, 429) as receiver:
        settings = {
            "alert_characters_per_day": 100,
            "alert_webhook": receiver.url,
            "api_keys": KEYS,
            "log_level": "debug",
        }
        names = ["alone"]
        if request.param == "redis":
            names, settings["redis_url"] = ["one", "two"], request.getfixturevalue("redis").url()
        servers = [start_server(FakeBackend(), folder=tmp_path / name, **settings) for name in names]
        yield House(servers, receiver, stderr_lines)


def test_an_alert_reaches_its_webhook_exactly_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "FIRST_PAUSE_S", 0.05)
    for server in house.servers:
        for _ in range(3):
            assert speak(server.client, "x" * 45, headers=ANN).status_code == 200
            server.wait_idle()
    told = {"event": "usage_above_threshold", "account": "ann", "user": "", "characters": 135, "threshold": 100}
    told["day"] = datetime.now(UTC).date().isoformat()
    wait_until(lambda: len(house.receiver.posts) == 3)
    time.sleep(0.1)
    assert house.receiver.posts == [("/hook/SECRET-of-the-hook", told)] * 3, "two attempts failed"
    wait_until(lambda: metric(house.servers[0], 'tts_usage_alerts_total{outcome="sent"}') == 1)
    assert len([line for line in house.log() if "usage above the threshold" in line]) == 1
    assert not any("SECRET" in line for line in house.log())
    assert logging.getLogger("httpx").level == logging.WARNING, "below it httpx logs every address"


def test_a_webhook_that_says_nothing_delays_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(alerts, "CLOSING_S", 0.2)
    monkeypatch.setattr(alerts, "TIMEOUT_S", 600.0)
    with (
        closing(Receiver().server.socket) as silent,
        contextmanager(run_server)(
            tmp_path,
            FakeBackend(),
            alert_characters_per_day=10,
            alert_webhook=f"http://127.0.0.1:{silent.getsockname()[1]}/hook",
        ) as server,
    ):
        began = time.monotonic()
        assert speak(server.client).status_code == 200
        server.wait_idle()
        assert time.monotonic() - began < 60
        ending = time.monotonic()
    assert time.monotonic() - ending < 60
