"""Money over HTTP: what is held, charged and given back for misses, joins, hits, failures and hang-ups."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.src.domain import SpeechRequest
from api.src.text.segment import segment
from tests.api.wire import BYTES_PER_SECOND, FAILS_LATE, FORMATS, STORY, RawClient, assert_error, speak, usage
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.speech.asking import wait_until

PRICES = """
[default]
per_1000_characters = 1000000
cached_per_1000_characters = 100000

[models.tts-1-hd]
per_1000_characters = 2000000
"""
FULL, CACHED = 1000, 100
"""Micro-units per character."""

WALLET = 10_000_000
ADMIN = {"Authorization": "Bearer the-admin-key"}
ALICE = {"Authorization": "Bearer alices-key"}
BOB = {"Authorization": "Bearer bobs-key"}


@pytest.fixture
def start(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Servers with prices; alice and bob have a wallet. In the end every book must be sound and nothing held."""
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES)
    started = []

    def start(backend: FakeBackend) -> Server:
        server = start_server(
            backend,
            prices_file=prices,
            api_keys=[("alice", "alices-key"), ("bob", "bobs-key"), ("carol", "carols-key")],
            admin_key="the-admin-key",
        )
        for account in ("alice", "bob"):
            credit(server, account, WALLET)
        started.append(server)
        return server

    yield start
    for server in started:
        server.wait_idle()
        assert server.call(server.service.ledger.check) == []


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start(FakeBackend())


@pytest.fixture
def slow(start: Callable[..., Server]) -> Server:
    """One that speaks the first segment and then waits until the test lets it go on."""
    return start(FakeBackend(allowed=1))


def go_on(server: Server) -> None:
    server.backend.allowed = math.inf


def speak_meanwhile(server: Server, text: str, headers: dict[str, str]) -> httpx.Response:
    """Ask while another listens, and let the server go on once both do."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(speak, server.client, text, headers)
        wait_until(lambda: answer.done() or len(server.service._listeners) == 2)
        go_on(server)
        return answer.result()


def credit(server: Server, account: str, micros: int) -> None:
    body = {"micros": micros, "reference": "first"}
    answer = server.client.post(f"/v1/accounts/{account}/credit", json=body, headers=ADMIN)
    assert answer.status_code == 200, answer.text


def balance(server: Server, who: dict[str, str] = ALICE) -> int:
    found: int = usage(server.client, who)["balance_micros"]
    return found


def charges(server: Server, who: dict[str, str] = ALICE) -> list[tuple[str, int, int]]:
    """(outcome, characters, price) of the account's requests, oldest first."""
    events = reversed(usage(server.client, who)["data"])
    return [(event["outcome"], event["characters"], event["price_micros"]) for event in events]


def spent(server: Server, who: dict[str, str] = ALICE) -> int:
    return WALLET - balance(server, who)


def test_a_miss_costs_its_characters_and_a_hit_its_own_price(server: Server) -> None:
    for _ in range(3):
        assert speak(server.client, STORY, ALICE).status_code == 200
    n = len(STORY)
    assert charges(server) == [("completed", n, n * FULL), ("cached", n, n * CACHED), ("cached", n, n * CACHED)]
    assert spent(server) == n * (FULL + 2 * CACHED)


def test_the_price_is_that_of_the_model_as_it_was_asked_for(server: Server) -> None:
    speak(server.client, "Dear.", ALICE, model="tts-1-hd")
    speak(server.client, "Dear.", ALICE, model="tts-1")  # the same voice answers, from the cache
    assert charges(server) == [("completed", 5, 10_000), ("cached", 5, 500)]


@pytest.mark.parametrize("fields", [{"stream_format": "sse"}, {"response_format": "pcm"}, {"speed": 4.0}])
def test_the_form_of_the_answer_does_not_change_its_price(server: Server, fields: dict[str, Any]) -> None:
    speak(server.client, "Hello.", ALICE, **fields)
    assert charges(server) == [("completed", 6, 6 * FULL)]


def test_usage_names_the_end_user_where_there_is_one(server: Server) -> None:
    async def speak_for(user: str) -> None:
        request = SpeechRequest(id=f"r-{user}", account="alice", model="tts-1", text="Hi.", voice="alloy", user=user)
        assert [chunk async for chunk in server.service.generate_speech(request)]

    server.call(lambda: speak_for("emma"))
    server.call(lambda: speak_for(""))
    newest, oldest = usage(server.client, ALICE)["data"]
    assert newest["user"] == ""
    assert (oldest["user"], oldest["outcome"]) == ("emma", "completed")


def test_base64_silence_and_no_store_cost_like_any_other(server: Server) -> None:
    server.client.post("/v1/audio/speech/base64", json={"input": "Hello."}, headers=ALICE)
    speak(server.client, "...", ALICE)
    for _ in range(2):
        speak(server.client, "Hello.", {**ALICE, "Cache-Control": "no-store"})
    assert charges(server) == [("completed", n, n * FULL) for n in (6, 3, 6, 6)]


def test_a_join_costs_what_a_miss_costs(slow: Server) -> None:
    with slow.client.stream("POST", "/v1/audio/speech", json={"input": STORY}, headers=ALICE) as miss:
        join = speak_meanwhile(slow, STORY, BOB)
        miss.read()
    assert (miss.headers["x-cache"], join.headers["x-cache"]) == ("miss", "join")
    assert charges(slow, ALICE) == charges(slow, BOB) == [("completed", len(STORY), len(STORY) * FULL)]


def test_the_price_is_held_while_it_speaks_and_settled_before_the_last_byte(slow: Server) -> None:
    price = len(STORY) * FULL
    with slow.client.stream("POST", "/v1/audio/speech", json={"input": STORY}, headers=ALICE) as answer:
        assert spent(slow) == price
        assert charges(slow) == []
        go_on(slow)
        answer.read()
    assert charges(slow) == [("completed", len(STORY), price)]  # at once: not later
    assert spent(slow) == price


def test_a_price_that_does_not_fit_is_a_402_with_the_balance(server: Server) -> None:
    credit(server, "carol", 5999)
    carol = {"Authorization": "Bearer carols-key"}
    for path in ["/v1/audio/speech", "/v1/audio/speech/base64"]:
        answer = server.client.post(path, json={"input": "Hello."}, headers=carol)
        assert "5999" in assert_error(answer, 402, code="insufficient_balance")
        assert answer.json()["error"]["type"] == "insufficient_quota"
    server.wait_idle()
    assert server.backend.spoken == 0
    assert (balance(server, carol), charges(server, carol)) == (5999, [])
    assert speak(server.client, "Hell.", carol).status_code == 200
    assert balance(server, carol) == 999


def test_a_hit_needs_its_own_price_and_no_more(server: Server) -> None:
    speak(server.client, "Hello.", ALICE)
    credit(server, "carol", 11 * CACHED)
    carol = {"Authorization": "Bearer carols-key"}
    assert speak(server.client, "Hello.", carol).headers["x-cache"] == "hit"
    for fields in ({}, {"stream_format": "sse"}):  # refused before the first event, as before the first byte
        assert "500" in assert_error(speak(server.client, "Hello.", carol, **fields), 402)
    assert balance(server, carol) == 5 * CACHED


def test_a_hit_is_held_and_charged_in_one_transaction(server: Server) -> None:
    speak(server.client, "Hello.", ALICE)
    before = server.service.ledger.transactions
    assert speak(server.client, "Hello.", ALICE).headers["x-cache"] == "hit"
    assert server.service.ledger.transactions == before + 1
    assert charges(server)[-1] == ("cached", 6, 6 * CACHED)


def test_an_account_without_a_wallet_is_not_bounded(server: Server) -> None:
    carol = {"Authorization": "Bearer carols-key"}
    assert speak(server.client, STORY, carol).status_code == 200
    assert usage(server.client, carol)["balance_micros"] is None
    assert charges(server, carol) == [("completed", len(STORY), len(STORY) * FULL)]


def test_no_more_is_held_than_there_is_however_many_come_at_once(start: Callable[..., Server]) -> None:
    server = start(FakeBackend(delay_s=0.01))
    credit(server, "carol", 3 * 6 * FULL)
    carol = {"Authorization": "Bearer carols-key"}
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: speak(server.client, "Hello.", carol, seed=seed), range(10)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [402] * 7
    assert balance(server, carol) == 0


@pytest.mark.parametrize("fields", [{}, {"stream_format": "sse"}, {"response_format": "wav"}])
def test_a_failure_before_sound_costs_nothing(server: Server, fields: dict[str, str]) -> None:
    assert_error(speak(server.client, "This will FAIL.", ALICE, **fields), 500)
    server.wait_idle()
    assert (spent(server), charges(server)) == (0, [])


def test_what_is_refused_costs_nothing(server: Server) -> None:
    for fields in [{"voice": "nobody"}, {"speed": 9}, {"language": "klingon"}]:
        assert_error(speak(server.client, STORY, ALICE, **fields), 400, param=next(iter(fields)))
    assert (spent(server), charges(server)) == (0, [])


def test_previews_are_free(server: Server) -> None:
    for _ in range(2):
        server.client.get("/v1/audio/voices/alloy/preview", headers=ALICE)
    assert (spent(server), charges(server)) == (0, [])
    previews = usage(server.client, ADMIN, account="preview")["data"]
    assert {event["price_micros"] for event in previews} <= {0}


def test_a_failure_in_the_middle_costs_nothing(server: Server) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        speak(server.client, FAILS_LATE, ALICE)
    server.wait_idle()
    assert charges(server) == [("failed", segment(FAILS_LATE)[0].end, 0)]


# --- clients that leave ---


@pytest.mark.parametrize("format", FORMATS)
def test_who_leaves_midway_pays_for_the_segments_it_was_sent(start: Callable[..., Server], format: str) -> None:
    server = start(FakeBackend(allowed=2))
    ends = [part.end for part in segment(STORY)]
    with RawClient(server.url) as client:
        client.speak("Authorization: Bearer alices-key", response_format=format)
        client.read_sound(1)
    server.wait_idle()
    ((outcome, characters, price),) = charges(server)
    assert outcome == "cancelled"
    assert characters in ends[:2]
    assert price == characters * FULL == spent(server)


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("read", [1, 2])
def test_sound_that_was_made_but_not_sent_is_not_paid_for(
    start: Callable[..., Server], stream_format: str, read: int
) -> None:
    server = start(FakeBackend(allowed=read))
    bytes_per_segment = 0.4 * BYTES_PER_SECOND * (4 / 3 if stream_format == "sse" else 1)
    with RawClient(server.url) as client:
        client.speak("Authorization: Bearer alices-key", response_format="pcm", stream_format=stream_format)
        client.read_sound(int(read * bytes_per_segment))
    server.wait_idle()
    heard = segment(STORY)[read - 1].end
    assert charges(server) == [("cancelled", heard, heard * FULL)]


def test_who_leaves_before_the_first_sound_pays_nothing(slow: Server) -> None:
    slow.backend.allowed = 0
    with RawClient(slow.url) as client:
        client.speak("Authorization: Bearer alices-key")
        wait_until(lambda: slow.open_holds() == 1)
        assert spent(slow) == len(STORY) * FULL
    slow.wait_idle()
    assert (spent(slow), charges(slow), slow.backend.segments) == (0, [], [])


def test_who_leaves_a_join_leaves_the_other_in_peace(slow: Server) -> None:
    with slow.client.stream("POST", "/v1/audio/speech", json={"input": STORY}, headers=ALICE) as miss:
        with RawClient(slow.url) as client:
            client.speak("Authorization: Bearer bobs-key")
            client.read_sound(1)
        wait_until(lambda: len(slow.service._listeners) == 1)
        go_on(slow)
        miss.read()
    slow.wait_idle()
    assert charges(slow, ALICE) == [("completed", len(STORY), len(STORY) * FULL)]
    ((outcome, characters, price),) = charges(slow, BOB)
    assert outcome == "cancelled"
    assert 0 < characters < len(STORY)
    assert price == characters * FULL


def test_the_first_may_leave_and_the_one_that_joined_gets_all(slow: Server) -> None:
    joined: list[httpx.Response] = []
    with RawClient(slow.url) as client:
        client.speak("Authorization: Bearer alices-key")
        client.read_sound(1)
        thread = threading.Thread(target=lambda: joined.append(speak(slow.client, STORY, BOB)))
        thread.start()
        wait_until(lambda: len(slow.service._listeners) == 2)
    wait_until(lambda: len(slow.service._listeners) == 1)
    go_on(slow)
    thread.join()
    assert joined[0].headers["x-cache"] == "join"
    assert joined[0].content == speak(slow.client, STORY, BOB).content
    slow.wait_idle()
    assert slow.backend.spoken == 1
    assert charges(slow, ALICE)[0][0] == "cancelled"
    assert [outcome for outcome, *_ in charges(slow, BOB)] == ["completed", "cached"]


# --- Idempotency-Key ---

ONCE = {**ALICE, "Idempotency-Key": "once"}


def test_a_repeat_is_not_charged_again(server: Server) -> None:
    first, *repeats = (speak(server.client, STORY, ONCE) for _ in range(3))
    assert {repeat.content for repeat in repeats} == {first.content}
    assert spent(server) == len(STORY) * FULL
    assert [price for *_, price in charges(server)] == [len(STORY) * FULL, 0, 0]


def test_a_repeat_of_what_is_not_stored_is_not_charged_again_either(server: Server) -> None:
    for _ in range(2):
        assert speak(server.client, STORY, {**ONCE, "Cache-Control": "no-store"}).headers["x-cache"] == "bypass"
    assert spent(server) == len(STORY) * FULL


def test_a_repeat_with_another_body_is_a_400(server: Server) -> None:
    speak(server.client, STORY, ONCE)
    for fields in [{"voice": "nova"}, {"seed": 1}, {"response_format": "wav"}]:
        answer = speak(server.client, STORY, ONCE, **fields)
        assert_error(answer, 400, code="idempotency_key_reused", param="Idempotency-Key")
    assert_error(speak(server.client, "Other.", ONCE), 400, param="Idempotency-Key")
    assert spent(server) == len(STORY) * FULL


def test_the_key_belongs_to_the_account(server: Server) -> None:
    assert speak(server.client, STORY, ONCE).status_code == 200
    assert speak(server.client, "Something else.", {**BOB, "Idempotency-Key": "once"}).status_code == 200
    assert spent(server, BOB) == len("Something else.") * FULL


@pytest.mark.parametrize("headers", [{}, {"Cache-Control": "no-store"}])
def test_a_repeat_while_the_first_still_runs(slow: Server, headers: dict[str, str]) -> None:
    once = {**ONCE, **headers}
    with slow.client.stream("POST", "/v1/audio/speech", json={"input": STORY}, headers=once) as first:
        assert_error(speak(slow.client, "Other.", once), 400, param="Idempotency-Key")
        repeat = speak_meanwhile(slow, STORY, once)
        assert repeat.content == first.read()
    assert spent(slow) == len(STORY) * FULL
    assert sorted(price for *_, price in charges(slow)) == [0, len(STORY) * FULL]


def test_a_repeat_fits_into_a_wallet_that_the_first_has_emptied(start: Callable[..., Server]) -> None:
    server = start(FakeBackend(allowed=1))
    credit(server, "carol", len(STORY) * FULL)
    once = {"Authorization": "Bearer carols-key", "Idempotency-Key": "once"}
    with server.client.stream("POST", "/v1/audio/speech", json={"input": STORY}, headers=once) as first:
        assert speak_meanwhile(server, STORY, once).status_code == 200
        first.read()
    assert speak(server.client, STORY, once).status_code == 200
    assert balance(server, {"Authorization": "Bearer carols-key"}) == 0


def test_a_repeat_after_a_hang_up_pays_the_rest(slow: Server) -> None:
    with RawClient(slow.url) as client:
        client.speak("Authorization: Bearer alices-key\nIdempotency-Key: once")
        client.read_sound(1)
    slow.wait_idle()
    assert 0 < spent(slow) < len(STORY) * FULL
    go_on(slow)
    repeat = {"Authorization": "Bearer alices-key", "Idempotency-Key": "once", "Content-Type": "application/json"}
    body = b'{"input": "' + STORY.encode() + b'"}'
    assert slow.client.post("/v1/audio/speech", content=body, headers=repeat).status_code == 200
    assert spent(slow) == len(STORY) * FULL


def test_a_repeat_after_a_failure_is_a_new_try(server: Server) -> None:
    for _ in range(2):
        assert_error(speak(server.client, "This will FAIL.", ONCE), 500)
    server.wait_idle()
    assert spent(server) == 0
