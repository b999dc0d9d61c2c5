"""Distinct secrets in every setting and in every place that a client writes to; then everything that the server says
and writes is searched for each of them, also in base64, hex and percent-encoding."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from api.src.main import create_app
from api.src.settings import Settings
from tests.backends.faulty_upstream import (
    FaultyUpstream,
    bare,
    chunked,
    document,
    faulty_upstream,
    refusal,
    tone,
    whole,
)

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "api.src.cli", "serve"]

PLANTED = {
    "alice": "alice/Kq7+key=planted",
    "bob": "bob/Wn3+key=planted",
    "admin": "admin/Zt5+key=planted",
    "first encryption": "first/Yb8+sealing=planted",
    "second encryption": "second/Pd2+sealing=planted",
    "ledger": "ledger/Mv4+password=planted",
    "redis": "redis/Hc9+password=planted",
    "remote": "remote/Xs6+key=planted",
    "wrong": "wrong/Jf1+key=planted",
    "text": "The planted merger with Bramblewick is off.",
    "instructions": "Whisper it, planted, like Thistledown.",
}
"""Characters that base64 and percent-encoding change, and none that the settings split at."""


def forms(secret: str) -> Iterator[bytes]:
    """All that the secret can be read from."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    yield quote(secret, safe="").encode()
    yield quote(secret).encode()
    for before in range(3):  # wherever it begins in what was encoded, less the characters that its neighbours share
        yield base64.b64encode(b"\0" * before + raw)[before and 4 : -4]
        yield base64.urlsafe_b64encode(b"\0" * before + raw)[before and 4 : -4]


NEEDLES = [(name, form) for name, secret in PLANTED.items() for form in set(forms(secret))]


def assert_clean(where: str, said: bytes) -> None:
    found = {name for name, form in NEEDLES if form in said or form in said.replace(b"\\", b"")}
    assert not found, f"{where} gives away: {', '.join(sorted(found))}"


def test_the_search_finds_what_it_looks_for() -> None:
    for name, secret in PLANTED.items():
        text = f"Bearer {secret}."
        for said in (
            text.encode(),
            base64.b64encode(text.encode()),
            base64.b64encode(f"x{text}".encode()),
            base64.b64encode(f"xy{text}".encode()),
            quote(text, safe="").encode(),
            text.encode().hex().encode(),
        ):
            with pytest.raises(AssertionError, match=name):
                assert_clean("it", said)
    assert_clean("nothing", b"the quick brown fox")


def planted_settings(folder: Path, upstream: str) -> dict[str, str]:
    return {
        "TTS_PORT": "0",
        "TTS_LOG_LEVEL": "debug",
        "TTS_CACHE_DIR": str(folder / "cache"),
        "TTS_LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}",
        "TTS_API_KEYS": f"alice={PLANTED['alice']},bob={PLANTED['bob']}",
        "TTS_ADMIN_KEY": PLANTED["admin"],
        "TTS_ENCRYPTION_KEY": f"{PLANTED['first encryption']},{PLANTED['second encryption']}",
        "TTS_REDIS_URL": f"redis://keeper:{quote(PLANTED['redis'], safe='')}@127.0.0.1:1/0",  # which is away
        "TTS_REQUESTS_PER_MINUTE": "100000",  # so that it is asked for
        "TTS_BACKEND": "remote",
        "TTS_REMOTE_URL": upstream,
        "TTS_REMOTE_API_KEY": PLANTED["remote"],
        "TTS_REMOTE_RETRIES": "0",
        "TTS_MAX_BODY_BYTES": "4096",
    }


@dataclass
class Watched:
    """A server process; all that it says goes into `said`."""

    url: str
    client: httpx.Client
    log: Path
    said: list[tuple[str, bytes]] = field(default_factory=list)

    def ask(self, method: str, path: str, key: str | None = "alice", **request: Any) -> httpx.Response | None:
        headers = dict(request.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {PLANTED[key]}"
        try:
            answer = self.client.request(method, path, headers=headers, **request)
        except httpx.RemoteProtocolError as error:  # cut, on purpose
            self.said.append((f"{method} {path}", str(error).encode()))
            return None
        head = "\n".join(f"{name}: {value}" for name, value in answer.headers.multi_items())
        self.said.append((f"{method} {path}: {answer.status_code}", head.encode() + b"\n\n" + answer.content))
        return answer

    def speak(self, text: str = PLANTED["text"], **fields: Any) -> httpx.Response | None:
        headers, key = fields.pop("headers", {}), fields.pop("key", "alice")
        path = fields.pop("path", "/v1/audio/speech")
        body = {"input": text, "instructions": PLANTED["instructions"], **fields}
        return self.ask("POST", path, key, json=body, headers=headers)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
    return own | {"PYTHONPATH": str(ROOT)} | dict(settings)


@contextmanager
def serving(folder: Path, settings: Mapping[str, str], ready: int = 200) -> Iterator[Watched]:
    """`qwen3-tts serve` in a process of its own; at the end its log and its files are searched."""
    log = folder / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(COMMAND, cwd=folder, env=environment(settings), stderr=stderr, stdout=stderr)
    try:
        url = _url(process, log)
        with httpx.Client(base_url=url, timeout=20) as client:
            _until_ready(client, ready)
            watched = Watched(url, client, log)
            yield watched
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()
    for where, said in watched.said:
        assert_clean(where, said)
    assert_files_clean(folder)


def assert_files_clean(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert_clean("a file's name", str(path.relative_to(folder)).encode())
        if path.is_file():
            assert_clean(path.name, path.read_bytes())


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 30
    while not (found := re.search(r"running on (http://[\d.:]+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found[1]


def _until_ready(client: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + 30
    while client.get("/ready").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def echoing(upstream: FaultyUpstream) -> Sequence[Any]:
    """Answers of an upstream that gives our key back, in every place that it can."""
    key = PLANTED["remote"]
    told = f"Incorrect API key provided: {key}. Authorization: Bearer {key}"
    back = {"Authorization": f"Bearer {key}", "X_Echo": key}
    cut = chunked(tone(0.3), tone(0.3), ends=False, **back)
    return [
        whole(tone(), **back),
        refusal(401, told, **back),
        refusal(400, told, code=key, param=key, **back),
        refusal(404, f"{base64.b64encode(key.encode()).decode()} {quote(key, safe='')}", **back),
        refusal(429, told, Retry_After="3600", **back),
        refusal(500, told, **back),
        document({"error": {"message": told}}, 503, **back),
        whole(told.encode(), Content_Type=f"text/plain; key={key}"),
        whole(told.encode(), 200, length=5000, **back),
        whole(told.encode(), 302, Location=f"http://127.0.0.1/{key}"),
        bare(f"HTTP/1.1 200 OK\r\nX-Broken {key}\r\n\r\n".encode()),
        bare(f"{key}\r\n\r\n".encode()),
        cut,
    ]


def test_a_server_in_and_out_of_trouble(tmp_path: Path) -> None:
    with faulty_upstream() as upstream, serving(tmp_path, planted_settings(tmp_path, upstream.url)) as server:
        _use(server)
        _misuse(server)
        for number, answer in enumerate(echoing(upstream)):
            upstream.speech = [answer]
            for form in ("audio", "sse"):
                server.speak(f"{PLANTED['text']} {number}", stream_format=form, headers={"Cache-Control": "no-store"})
        upstream.models = refusal(401, PLANTED["remote"])
        upstream.down()
        server.speak("Away, says " + PLANTED["text"])
        _look(server)
        upstream.up()
    log = (tmp_path / "stderr").read_text()
    assert '"level": "debug"' in log
    assert "failed a segment" in log


def _use(server: Watched) -> None:
    statuses = []
    for fields in ({}, {}, {"stream_format": "sse"}, {"path": "/v1/audio/speech/base64"}, {"response_format": "wav"}):
        answer = server.speak(headers={"Idempotency-Key": f"key-{len(statuses)}"}, **fields)
        assert answer is not None
        statuses.append(answer.status_code)
    assert statuses == [200] * 5
    server.ask("POST", "/v1/accounts/alice/credit", "admin", json={"micros": 5, "reference": "a"})
    _look(server)


def _look(server: Watched) -> None:
    """Everything that can be looked at."""
    paths = ["/healthz", "/ready", "/version", "/metrics", "/openapi.json", "/docs", "/v1/models", "/v1/audio/voices"]
    for path in [*paths, "/v1/models/tts-1", "/v1/audio/voices/alloy", "/v1/audio/voices/alloy/preview", "/v1/usage"]:
        server.ask("GET", path)
    server.ask("GET", "/v1/usage?account=alice", "admin")


def _misuse(server: Watched) -> None:
    text = PLANTED["text"]
    for key in ("wrong", "text", None):
        server.speak(key=key)
        server.ask("GET", "/v1/usage", key)
    for header in ("Idempotency-Key", "X-Request-Id", "Cookie", "Origin", "User-Agent", "Referer", "traceparent"):
        server.speak(headers={header: PLANTED["wrong"]}, voice=text)
    for name in ("model", "voice", "language", "response_format", "stream_format", "seed", "speed", text):
        server.speak(**{name: PLANTED["wrong"] + text})
    server.speak(text * 60)
    server.speak(text * 200)
    for content in (text.encode(), f'{{"input": "{text}"'.encode(), b'{"input": 1, "x": "' + text.encode() + b'"}'):
        server.ask("POST", "/v1/audio/speech", content=content)
    for secret in (PLANTED["alice"], PLANTED["wrong"], text):
        for path in (f"/{quote(secret, safe='')}", f"/v1/models/{quote(secret)}", f"/v1/usage?account={quote(secret)}"):
            server.ask("GET", path)
            server.ask("DELETE", path)
        server.ask("POST", f"/v1/accounts/{quote(secret, safe='')}/credit", "admin", json={"micros": secret})
    # In other schemes than Bearer, and with the key of another server in the query.
    basic = base64.b64encode(f"alice:{PLANTED['alice']}".encode()).decode()
    server.ask("GET", "/v1/usage", None, headers={"Authorization": f"Basic {basic}"})
    server.ask("GET", f"/v1/usage?key={quote(PLANTED['alice'])}", None)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid:5432"])
def test_a_ledger_that_is_away(tmp_path: Path, host: str) -> None:
    url = f"postgresql://keeper:{quote(PLANTED['ledger'], safe='')}@{host}/money?connect_timeout=2"
    settings = planted_settings(tmp_path, "http://127.0.0.1:1") | {"TTS_LEDGER_URL": url, "TTS_REQUEST_TIMEOUT_S": "3"}
    with serving(tmp_path, settings, ready=503) as server:
        deadline = time.monotonic() + 20
        while "tried again" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.speak()
        _look(server)
        server.ask("POST", "/v1/accounts/alice/credit", "admin", json={"micros": 5, "reference": "a"})
    commands = (["check-ledger"], ["say", PLANTED["text"], "-o", "a.wav"], ["credit", "ann", "5", "--reference", "r"])
    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(assert_command_clean, tmp_path, settings), commands))


def assert_command_clean(folder: Path, settings: Mapping[str, str], command: Sequence[str]) -> str:
    """It fails, and says why without giving anything away; returns what it says."""
    ran = subprocess.run(
        [sys.executable, "-m", "api.src.cli", *command],
        cwd=folder,
        env=environment(settings),
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode not in (0, None)
    assert_clean(" ".join(command[:1]), ran.stdout + ran.stderr)
    return (ran.stdout + ran.stderr).decode()


WRONG = {
    "TTS_API_KEYS": PLANTED["alice"].replace("=", ""),
    "TTS_ENCRYPTION_KEY": f"{PLANTED['first encryption']},short",
    "TTS_LEDGER_URL": f"mysql://keeper:{PLANTED['ledger']}@host/money",
    "TTS_REDIS_URL": f"http://keeper:{PLANTED['redis']}@host/0",
    "TTS_REMOTE_API_KEY": PLANTED["remote"] + " with a space",
    "TTS_REMOTE_URL": f"http://keeper:80/{PLANTED['remote']}@host/v1",
    "TTS_LOG_LEVELS": f"alice={PLANTED['alice']}",
}
"""Settings that are refused, each with a secret in it."""


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_is_refused_is_not_quoted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (planted_settings(tmp_path, "http://127.0.0.1:1") | {name: WRONG[name]}).items():
        monkeypatch.setenv(setting, value)
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None)
    for said in (str(caught.value), repr(caught.value), caught.value.json(include_input=False)):
        assert_clean(name, said.encode())
        assert WRONG[name] not in said


def test_the_command_line_does_not_quote_them_either(tmp_path: Path) -> None:
    said = assert_command_clean(tmp_path, planted_settings(tmp_path, "http://127.0.0.1:1") | WRONG, ["serve"])
    assert "validation errors" in said
    odd = f"postgresql://keeper:{PLANTED['ledger']}@{PLANTED['ledger']}@host:port/money"
    settings = planted_settings(tmp_path, "http://127.0.0.1:1") | {"TTS_LEDGER_URL": odd}
    for command in (["serve"], ["check-ledger"]):
        said = assert_command_clean(tmp_path, settings, command)
        assert "%XX" in said
        assert "Traceback" not in said


def all_planted(folder: Path) -> Settings:
    return Settings(
        _env_file=None,
        cache_dir=folder / "cache",
        ledger_url=f"postgresql://keeper:{quote(PLANTED['ledger'], safe='')}@127.0.0.1:1/money",
        redis_url=f"redis://keeper:{quote(PLANTED['redis'], safe='')}@127.0.0.1:1/0",
        api_keys=f"alice={PLANTED['alice']},bob={PLANTED['bob']}",
        admin_key=PLANTED["admin"],
        encryption_key=f"{PLANTED['first encryption']},{PLANTED['second encryption']}",
        backend="remote",
        remote_url="http://127.0.0.1:1",
        remote_api_key=PLANTED["remote"],
    )


def secret_fields() -> set[str]:
    """Settings whose names say that they are secret, and URLs, which may have passwords in them."""
    named = {name for name in Settings.model_fields if re.search("key|secret|password|token", name)}
    return named | {"ledger_url", "redis_url"}


def test_every_secret_setting_is_a_secret_string(tmp_path: Path) -> None:
    settings = all_planted(tmp_path)
    for name in secret_fields():
        assert "SecretStr" in repr(getattr(settings, name)), name
    assert isinstance(settings.ledger_url, SecretStr)
    for said in (repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()):
        assert_clean("the settings", said.encode())


def ours(root: object) -> Iterator[object]:
    """Everything of this project's, and all dataclasses, that can be reached from `root` by attributes and items."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | type(None)):
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        elif type(thing).__module__.startswith(("api.", "starlette.datastructures")):
            yield thing
            names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting += [getattr(thing, name, None) for name in {*names, *getattr(thing, "__dict__", {})}]


def test_nothing_that_the_app_holds_shows_them_when_printed(tmp_path: Path) -> None:
    app = create_app(all_planted(tmp_path))
    found = list(ours(app.state))
    assert {"Remote", "PostgresLedger", "HttpPolicy", "Qwen3TTSService", "Session"} <= {type(x).__name__ for x in found}
    for thing in found:
        assert_clean(type(thing).__name__, f"{thing!r} {thing}".encode())


CRASH = """
import sys
from api.src import building, cli, main
from api.src.settings import Settings
from tests.fakes import FakeBackend

class Crashing(FakeBackend):
    async def speak(self, request, voice, segments):
        settings = Settings()
        async for segment in segments:
            raise RuntimeError(f"{settings!r} {settings} {self.remote!r} {vars(self.policy)!r}")
            yield

create = main.create_app
def create_app(settings):
    backend = Crashing()
    app = create(settings, backend=backend)
    backend.remote = building._build_remote(settings)._remote
    backend.policy = type("Policy", (), {})()
    backend.policy.it = app.state.http_policy
    return app
cli.create_app = create_app
sys.exit(cli.main(["serve"]))
"""


def test_a_crash_with_the_settings_in_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", [sys.executable, str(script)])
    settings = planted_settings(tmp_path, "http://127.0.0.1:1")
    with serving(tmp_path, settings) as server:
        answer = server.speak()
        assert answer is not None
        assert answer.status_code == 500
    log = (tmp_path / "stderr").read_text()
    assert "Traceback" in log
    assert "SecretStr" in log, "the settings were printed"
