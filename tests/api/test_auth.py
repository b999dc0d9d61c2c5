"""Keys and accounts: who may ask for what, who sees which usage, and who may add credit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.api.wire import PARTS, assert_error, speak, usage
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend

ALICE = {"Authorization": "Bearer alices-key"}
ALICE_TOO = {"Authorization": "Bearer alices-other-key"}
BOB = {"Authorization": "Bearer bobs-key"}
ADMIN = {"Authorization": "Bearer the-admin-key"}
API_KEYS = [("alice", "alices-key"), ("bob", "bobs-key"), ("alice", "alices-other-key")]


SETTINGS = {"api_keys": API_KEYS, "admin_key": "the-admin-key"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For the tests in which nothing happens to an account but alice's speaking."""
    with contextmanager(run_server)(tmp_path_factory.mktemp("shared"), FakeBackend(), **SETTINGS) as server:
        yield server


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(FakeBackend(), **SETTINGS)


def credit(
    server: Server, account: str, micros: int, reference: str, headers: dict[str, str] = ADMIN
) -> httpx.Response:
    body = {"micros": micros, "reference": reference}
    return server.client.post(f"/v1/accounts/{account}/credit", json=body, headers=headers)


# --- over HTTP ---

REFUSED = {
    "nothing": {},
    "an unknown key": {"Authorization": "Bearer wrong"},
    "an empty key": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": "alices-key"},
    "another scheme": {"Authorization": "Basic alices-key"},
    "two keys": {"Authorization": "Bearer alices-key bobs-key"},
    "another header": {"X-API-Key": "alices-key"},
    "a prefix": {"Authorization": "Bearer alices"},
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
def test_speech_and_usage_need_a_key(shared: Server, headers: dict[str, str]) -> None:
    request, spoken = {"input": PARTS[0]}, shared.backend.spoken
    for answer in [
        shared.client.post("/v1/audio/speech", json=request, headers=headers),
        shared.client.post("/v1/audio/speech/base64", json=request, headers=headers),
        shared.client.post("/v1/audio/speech", content=b"not even JSON", headers=headers),
        shared.client.get("/v1/usage", headers=headers),
        credit(shared, "alice", 5, "r", headers),
    ]:
        assert_error(answer, 401, code="invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    assert shared.backend.spoken == spoken


@pytest.mark.parametrize("header", ["Bearer alices-key", "bearer alices-key", "BEARER   alices-key"])
def test_a_key_in_the_forms_of_the_standard(shared: Server, header: str) -> None:
    assert speak(shared.client, headers={"Authorization": header}).status_code == 200


def test_discovery_health_and_previews_need_no_key(shared: Server) -> None:
    for path in [
        "/v1/models",
        "/v1/models/tts-1",
        "/v1/audio/models",
        "/v1/audio/voices",
        "/v1/audio/voices/alloy",
        "/v1/audio/voices/alloy/preview",
        "/healthz",
        "/ready",
        "/version",
        "/metrics",
    ]:
        for headers in [{}, {"Authorization": "Bearer wrong"}]:
            assert shared.client.get(path, headers=headers).status_code == 200, path


def test_usage_belongs_to_the_account_whatever_the_key(server: Server) -> None:
    speak(server.client, headers=ALICE)
    speak(server.client, headers=ALICE_TOO)
    speak(server.client, headers=BOB, voice="nova", model="tts-1-hd")
    mine = usage(server.client, ALICE)
    assert (mine["object"], mine["account"], mine["balance_micros"]) == ("list", "alice", None)
    assert usage(server.client, ALICE_TOO) == mine
    assert [event["outcome"] for event in mine["data"]] == ["cached", "completed"]  # newest first
    (event,) = usage(server.client, BOB)["data"]
    assert event["account"] == "bob"
    assert (event["model"], event["voice"], event["characters"]) == ("tts-1-hd", "hum", len(PARTS[0]))
    assert (event["audio_ms"], event["outcome"], event["price_micros"]) == (400, "completed", 0)
    assert event["created"] > 1.7e9


def test_the_cache_is_shared_between_accounts(server: Server) -> None:
    assert [speak(server.client, headers=who).headers["x-cache"] for who in (ALICE, BOB)] == ["miss", "hit"]


def test_usage_is_bounded_by_limit(server: Server) -> None:
    for seed in range(3):
        speak(server.client, headers=ALICE, seed=seed)
    ids = [event["request_id"] for event in usage(server.client, ALICE)["data"]]
    assert [event["request_id"] for event in usage(server.client, ALICE, limit=2)["data"]] == ids[:2]


def test_only_the_admin_sees_another_account(server: Server) -> None:
    speak(server.client, headers=ALICE)
    answer = server.client.get("/v1/usage", params={"account": "alice"}, headers=BOB)
    assert_error(answer, 400, param="account")
    assert "alice" not in answer.text
    assert usage(server.client, ADMIN, account="alice") == usage(server.client, ALICE)
    assert usage(server.client, ALICE, account="alice") == usage(server.client, ALICE)
    assert usage(server.client, ADMIN)["account"] == "admin"
    assert usage(server.client, ADMIN, account="nobody")["data"] == []


def test_only_the_admin_adds_credit(server: Server) -> None:
    assert_error(credit(server, "alice", 10**9, "gift", ALICE), 401)
    assert usage(server.client, ALICE)["balance_micros"] is None
    answer = credit(server, "alice", 1000, "invoice 1")
    assert answer.json() == {"account": "alice", "balance_micros": 1000}
    assert usage(server.client, ALICE)["balance_micros"] == 1000


def test_a_reference_is_credited_once(server: Server) -> None:
    balances = [credit(server, "alice", 1000, reference).json()["balance_micros"] for reference in ("a", "a", "b")]
    assert balances == [1000, 1000, 2000]
    assert credit(server, "bob", 7, "a").json()["balance_micros"] == 7


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"reference": "r"}, "micros"),
        ({"micros": 0, "reference": "r"}, "micros"),
        ({"micros": -1, "reference": "r"}, "micros"),
        ({"micros": 1.5, "reference": "r"}, "micros"),
        ({"micros": "5", "reference": "r"}, "micros"),
        ({"micros": True, "reference": "r"}, "micros"),
        ({"micros": 2**53, "reference": "r"}, "micros"),
        ({"micros": 5}, "reference"),
        ({"micros": 5, "reference": ""}, "reference"),
        ({"micros": 5, "reference": "a\x00b"}, "reference"),
    ],
)
def test_credit_that_is_no_credit(shared: Server, body: dict[str, object], param: str) -> None:
    answer = shared.client.post("/v1/accounts/alice/credit", json=body, headers=ADMIN)
    assert_error(answer, 400, param=param)
    assert usage(shared.client, ALICE)["balance_micros"] is None


@pytest.mark.parametrize("account", ["a b", "%00", "%0a", "é", "a" * 129])
def test_credit_for_a_name_that_cannot_be_one(shared: Server, account: str) -> None:
    assert_error(credit(shared, account, 5, "r"), 400, param="account")


def test_an_open_server_has_one_account_and_no_admin(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend())
    for headers in [{}, ALICE, {"Authorization": "nonsense"}]:
        assert speak(server.client, headers=headers).status_code == 200
        assert usage(server.client, headers)["account"] == "anonymous"
    assert_error(server.client.get("/v1/usage?account=alice"), 400, param="account")
    assert_error(credit(server, "anonymous", 5, "r", {}), 401)


def test_an_open_server_with_an_admin_key(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(), admin_key="the-admin-key")
    assert speak(server.client).status_code == 200
    assert credit(server, "anonymous", 5, "r").json()["balance_micros"] == 5
    assert usage(server.client, ADMIN, account="anonymous")["balance_micros"] == 5
