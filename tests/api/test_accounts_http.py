"""Accounts and keys over HTTP: the admin's routes, what a key may do, and where it is never shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.src.domain import SpeechRequest
from api.src.errors import Unavailable
from tests.api.stderr import StderrLines
from tests.api.wire import PARTS, assert_error, speak, usage
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend

ADMIN = {"Authorization": "Bearer the-admin-key"}
ALICE = {"Authorization": "Bearer alices-key"}
SETTINGS = {"api_keys": [("alice", "alices-key")], "admin_key": "the-admin-key"}
UNKNOWN_KEY = "key_0123456789abcdef"


@pytest.fixture
def server(start_server: Callable[..., Server]) -> Server:
    return start_server(FakeBackend(), admin_key="the-admin-key")


@pytest.fixture(scope="module")
def house_with_admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With an account `there`; for tests that make no other."""
    with contextmanager(run_server)(tmp_path_factory.mktemp("house"), FakeBackend(), **SETTINGS) as server:
        create(server, "there")
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] = ADMIN) -> httpx.Response:
    return server.client.request(method, path, json=body, headers=headers)


def done(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code in (200, 201), answer.text
    body: dict[str, Any] = answer.json()
    return body


def create(server: Server, name: str, **terms: Any) -> dict[str, Any]:
    return done(ask(server, "POST", "/v1/accounts", {"name": name, **terms}))


def new_key(server: Server, account: str, **terms: Any) -> dict[str, Any]:
    return done(ask(server, "POST", f"/v1/accounts/{account}/keys", terms or None))


# --- accounts ---


def test_an_account_is_made_listed_and_changed(server: Server) -> None:
    answer = ask(server, "POST", "/v1/accounts", {"name": "acme", "concurrent": 2, "requests_per_minute": None})
    assert answer.status_code == 201
    made = answer.json()
    assert made.pop("created") == pytest.approx(time.time(), abs=10)
    assert made == {
        "object": "account",
        "name": "acme",
        "requests_per_minute": None,
        "concurrent": 2,
        "characters_per_day": None,
        "alert_characters_per_day": None,
        "trusted": False,
        "log_level": "",
        "disabled": False,
    }
    changed = done(ask(server, "PATCH", "/v1/accounts/acme", {"concurrent": None, "characters_per_day": 0}))
    assert (changed["concurrent"], changed["characters_per_day"]) == (None, 0)
    assert done(ask(server, "PATCH", "/v1/accounts/acme", {})) == changed
    assert done(ask(server, "GET", "/v1/accounts/acme")) == changed
    create(server, "acme:*")
    create(server, "acme:ann")
    names = [account["name"] for account in done(ask(server, "GET", "/v1/accounts"))["data"]]
    assert names == ["acme", "acme:*", "acme:ann"]
    page = done(ask(server, "GET", "/v1/accounts?limit=1&after=acme"))
    assert [account["name"] for account in page["data"]] == ["acme:*"]
    assert done(ask(server, "GET", "/v1/accounts/acme:*"))["name"] == "acme:*"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "admin"}, "name"),
        ({"name": "acme\n"}, "name"),
        ({"name": "x", "concurrent": -1}, "concurrent"),
        ({"name": "x", "concurrent": "5"}, "concurrent"),
        ({"name": "x", "concurrent": True}, "concurrent"),
        ({"name": "x", "characters_per_day": 2**53}, "characters_per_day"),
        ({"name": "x", "trusted": None}, "trusted"),
        ({"name": "x", "disabled": 1}, "disabled"),
        ({"name": "x", "log_level": "loud"}, "log_level"),
        ({"name": "there:x", "trusted": True}, "trusted"),
    ],
)
def test_an_account_that_cannot_be(house_with_admin: Server, body: dict[str, Any], param: str) -> None:
    assert_error(ask(house_with_admin, "POST", "/v1/accounts", body), 400, param=param)


def test_what_is_there_already_and_what_is_not(house_with_admin: Server) -> None:
    server = house_with_admin
    assert_error(ask(server, "POST", "/v1/accounts", {"name": "there"}), 409, code="account_exists", param="name")
    assert_error(ask(server, "POST", "/v1/accounts", {"name": "no:x"}), 404, param="account")
    for method, path in [
        ("GET", ""),
        ("PATCH", ""),
        ("GET", "/keys"),
        ("POST", "/keys"),
        ("POST", f"/keys/{UNKNOWN_KEY}/rotate"),
        ("DELETE", f"/keys/{UNKNOWN_KEY}"),
    ]:
        param = "key_id" if UNKNOWN_KEY in path else "account"
        assert_error(ask(server, method, f"/v1/accounts/nobody{path}", {}), 404, param=param)
    for path in ("/v1/accounts/a%20b", "/v1/accounts/a:b:c", "/v1/accounts/there:x/keys", "/v1/audit?account=a%20b"):
        assert_error(ask(server, "GET", path), 400, param="account")
    assert_error(ask(server, "DELETE", "/v1/accounts/there/keys/key_1"), 400, param="key_id")
    assert_error(ask(server, "POST", "/v1/accounts/there/keys", {"expires_in_s": 0}), 400, param="expires_in_s")


def test_all_of_it_is_for_the_admin_alone(house_with_admin: Server) -> None:
    server = house_with_admin
    key = new_key(server, "there")
    before = done(ask(server, "GET", "/v1/audit"))
    for headers in [{}, ALICE, bearer(key["key"]), bearer("wrong")]:
        for method, path in [
            ("GET", "/v1/accounts"),
            ("POST", "/v1/accounts"),
            ("GET", "/v1/accounts/there"),
            ("PATCH", "/v1/accounts/there"),
            ("GET", "/v1/accounts/there/keys"),
            ("POST", "/v1/accounts/there/keys"),
            ("POST", f"/v1/accounts/there/keys/{key['id']}/rotate"),
            ("DELETE", f"/v1/accounts/there/keys/{key['id']}"),
            ("GET", "/v1/audit"),
        ]:
            assert_error(ask(server, method, path, {"name": "mine"}, headers), 401, code="invalid_api_key")
    assert done(ask(server, "GET", "/v1/audit")) == before


# --- keys ---


def test_the_first_key_closes_the_server_and_opens_its_account(server: Server) -> None:
    assert speak(server.client).status_code == 200
    create(server, "acme")
    assert speak(server.client).status_code == 200
    key = new_key(server, "acme", expires_in_s=3600)
    assert key["expires"] == pytest.approx(time.time() + 3600, abs=10)
    assert_error(speak(server.client), 401, code="invalid_api_key")
    assert speak(server.client, headers=bearer(key["key"])).status_code == 200
    mine = usage(server.client, bearer(key["key"]))
    assert (mine["account"], len(mine["data"])) == ("acme", 1)
    ask(server, "DELETE", f"/v1/accounts/acme/keys/{key['id']}")
    assert_error(speak(server.client, headers=bearer(key["key"])), 401, code="invalid_api_key")
    assert_error(speak(server.client), 401)


def test_a_rotated_key_and_its_grace(server: Server) -> None:
    create(server, "acme")
    first = new_key(server, "acme")
    path = f"/v1/accounts/acme/keys/{first['id']}/rotate"
    answer = ask(server, "POST", path, {"grace_s": 60})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    second = answer.json()
    assert len({first["key"], second["key"]}) == 2
    for key in (first, second):
        assert speak(server.client, headers=bearer(key["key"])).status_code == 200
    third = done(server.client.post(path, headers=ADMIN))  # without a body
    assert_error(speak(server.client, headers=bearer(first["key"])), 401)
    for key in (second, third):
        assert speak(server.client, headers=bearer(key["key"])).status_code == 200
    assert_error(ask(server, "POST", path, {}), 409, code="key_is_dead")


def test_a_key_is_in_one_answer_and_nowhere_else(
    stderr_lines: StderrLines, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_server(FakeBackend(), admin_key="the-admin-key", log_level="debug")
    create(server, "acme", trusted=True)
    answer = ask(server, "POST", "/v1/accounts/acme/keys")
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    secret = made["key"]
    speak(server.client, headers=bearer(secret))
    shown = [
        ask(server, method, path, body, headers).text
        for method, path, body, headers in [
            ("GET", "/v1/accounts", None, ADMIN),
            ("GET", "/v1/accounts/acme/keys", None, ADMIN),
            ("DELETE", f"/v1/accounts/acme/keys/{made['id']}", None, ADMIN),
            ("GET", "/v1/audit", None, ADMIN),
            ("GET", "/v1/usage", None, bearer(secret)),
            ("GET", "/metrics", None, {}),
            ("GET", "/version", None, {}),
        ]
    ]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = "".join(shown) + "".join(stderr_lines())
    assert secret[:11] in everything  # the hint
    assert secret[11:] not in everything
    assert secret[11:].encode() not in written
    assert "the-admin-key" not in everything


def test_the_official_client_speaks_with_a_stored_key(server: Server) -> None:
    create(server, "acme")
    key = new_key(server, "acme")

    def say() -> bytes:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key["key"], max_retries=0) as client:
            return client.audio.speech.create(model="tts-1", voice="alloy", input=PARTS[0]).content

    assert len(say()) > 1000
    ask(server, "PATCH", "/v1/accounts/acme", {"disabled": True})
    with pytest.raises(openai.PermissionDeniedError) as raised:
        say()
    assert (raised.value.code, raised.value.type) == ("account_disabled", "permission_error")
    ask(server, "PATCH", "/v1/accounts/acme", {"disabled": False})
    assert len(say()) > 1000
    ask(server, "DELETE", f"/v1/accounts/acme/keys/{key['id']}")
    with pytest.raises(openai.AuthenticationError):
        say()


def test_a_second_server_on_the_database_follows(start_server: Callable[..., Server]) -> None:
    settings = {"admin_key": "the-admin-key", "accounts_refresh_s": 0.2}
    here, there = start_server(FakeBackend(), **settings), start_server(FakeBackend(), **settings)
    assert speak(there.client).status_code == 200
    create(here, "acme")
    key = new_key(here, "acme")
    time.sleep(0.2)
    assert_error(speak(there.client), 401)
    assert speak(there.client, headers=bearer(key["key"])).status_code == 200
    ask(here, "DELETE", f"/v1/accounts/acme/keys/{key['id']}")
    assert_error(speak(here.client, headers=bearer(key["key"])), 401)
    time.sleep(0.2)
    assert_error(speak(there.client, headers=bearer(key["key"])), 401)


# --- end users ---


@pytest.fixture
def asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The listeners of all that was asked to be spoken."""
    listeners: list[Any] = []
    service_open = server.service.open

    def note(request: SpeechRequest, **options: Any) -> Any:
        listeners.append(service_open(request, **options))
        return listeners[-1]

    monkeypatch.setattr(server.service, "open", note)
    return listeners


def test_a_trusted_account_asks_for_its_users_and_pays(server: Server, asked: list[Any]) -> None:
    create(server, "webui", trusted=True)
    create(server, "plain")
    webui, plain = (bearer(new_key(server, name)["key"]) for name in ("webui", "plain"))
    user = {"X-OpenWebUI-User-Id": "8f14e45f-ceea-467f-a8a9-0123456789ab"}
    for headers in (webui | user, webui, plain | user):
        assert speak(server.client, headers=headers).status_code == 200
    requests = [listener.script.request for listener in asked]
    assert [(request.account, request.user) for request in requests] == [
        ("webui", user["X-OpenWebUI-User-Id"]),
        ("webui", ""),
        ("plain", ""),
    ]
    recorded = [listener._event(1, "completed") for listener in asked]
    assert [(event.account, event.user) for event in recorded] == [(r.account, r.user) for r in requests]
    assert len(usage(server.client, webui)["data"]) == 2
    bad = speak(server.client, headers=webui | {"X-OpenWebUI-User-Id": "a b"})
    assert_error(bad, 400, code="invalid_value", param="X-OpenWebUI-User-Id")
    assert speak(server.client, headers=plain | {"X-OpenWebUI-User-Id": "a b"}).status_code == 200


def test_the_header_is_a_setting(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(), user_header="X-Someone", **SETTINGS)
    create(server, "alice", trusted=True)
    assert_error(speak(server.client, headers=ALICE | {"x-someone": "a b"}), 400, param="X-Someone")
    assert speak(server.client, headers=ALICE | {"X-OpenWebUI-User-Id": "a b"}).status_code == 200


def test_usage_can_be_that_of_one_user(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []

    async def note(account: str, limit: int, *, user: str | None = None) -> list[Any]:
        wanted.append((account, limit, user))
        return []

    monkeypatch.setattr(server.service.ledger, "usage", note)
    usage(server.client, user="ann", limit=5)
    usage(server.client)
    assert wanted == [("anonymous", 5, "ann"), ("anonymous", 100, None)]
    assert_error(server.client.get("/v1/usage?user=a%20b"), 400, param="user")


# --- the audit ---


def test_what_the_admin_does_is_in_the_audit(server: Server) -> None:
    create(server, "acme", concurrent=3)
    key = new_key(server, "acme")
    ask(server, "POST", "/v1/accounts/acme/credit", {"micros": 5, "reference": "invoice 1"})
    ask(server, "POST", "/v1/accounts/acme/credit", {"micros": -5, "reference": "nothing"})
    entries = done(ask(server, "GET", "/v1/audit"))["data"]
    assert [(entry["actor"], entry["act"], entry["account"]) for entry in entries] == [
        ("admin", "credit", "acme"),
        ("admin", "key.create", "acme"),
        ("admin", "account.create", "acme"),
    ]
    assert [entry["detail"] for entry in entries] == [
        {"micros": 5, "reference": "invoice 1"},
        {"key": key["id"], "expires_at": None},
        {"concurrent": 3},
    ]
    older = done(ask(server, "GET", f"/v1/audit?limit=1&before={entries[0]['id']}"))["data"]
    assert older == entries[1:2]
    assert done(ask(server, "GET", "/v1/audit?account=other"))["data"] == []


def test_no_credit_without_its_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise Unavailable("planted")

    monkeypatch.setattr(server.service.ledger, "credit", fail)
    body = {"micros": 5, "reference": "r"}
    assert ask(server, "POST", "/v1/accounts/acme/credit", body).status_code == 503
    assert done(ask(server, "GET", "/v1/audit"))["data"][0]["act"] == "credit"
