"""The commands `account`, `key` and `audit`, as people and programs run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.src.cli import main
from tests.api.wire import speak
from tests.conftest import Server
from tests.fakes import FakeBackend
from tests.stores.conftest import postgres, redis, redis_server, store  # noqa: F401 (fixtures)
from tests.stores.ledgers import LedgerStore

ROOT = Path(__file__).parents[1]

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command here; returns what it printed."""
    monkeypatch.setenv("TTS_LEDGER_URL", f"sqlite:///{tmp_path / 'ledger.db'}")

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(words) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def test_from_an_account_to_a_revoked_key(
    store: LedgerStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    monkeypatch.setenv("TTS_LEDGER_URL", store.url)

    def ask(*words: str) -> Any:
        return json.loads(run(*words, "--json"))

    made = as_process("account", "create", "acme", "--concurrent", "2", "--trusted", "--json")
    assert (made["name"], made["concurrent"], made["trusted"]) == ("acme", 2, True)
    first = as_process("key", "create", "acme", "--expires-in-s", "3600", "--json")
    second = ask("key", "rotate", "acme", first["id"], "--grace-s", "60")
    ask("key", "revoke", "acme", second["id"])
    shown = ask("account", "show", "acme")
    assert (shown["name"], shown["balance_micros"]) == ("acme", None)
    assert [key["id"] for key in shown["keys"]] == [first["id"], second["id"]]
    assert shown["keys"][1]["revoked_at"]
    entries = ask("audit")
    assert [entry["act"] for entry in entries] == ["key.revoke", "key.rotate", "key.create", "account.create"]
    assert {entry["actor"] for entry in entries} == {"cli"}
    assert first["key"] not in json.dumps([shown, entries])


def as_process(*words: str) -> Any:
    command = [sys.executable, "-m", "api.src.cli", *words]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


def test_a_new_key_is_alone_on_standard_output_and_opens_a_running_server(
    start_server: Callable[..., Server], run: Run, tmp_path: Path
) -> None:
    server = start_server(FakeBackend(), tmp_path, accounts_refresh_s=0.1)
    run("account", "create", "acme")
    key = run("key", "create", "acme").removesuffix("\n")
    assert speak(server.client, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    listed = run("key", "list", "acme")
    assert key[:11] + "..." in listed
    assert key not in listed


def test_terms_are_set_and_unset(run: Run) -> None:
    run("account", "create", "acme", "--requests-per-minute", "60", "--characters-per-day", "0", "--disable")
    assert run("account", "list") == "acme  requests_per_minute=60  characters_per_day=0  disabled\n"
    changed = run("account", "set", "acme", "--requests-per-minute", "default", "--enable", "--log-level", "debug")
    assert changed == "acme  characters_per_day=0  log_level=debug\n"
    run("account", "create", "acme:*", "--concurrent", "1")
    assert [account["name"] for account in json.loads(run("account", "list", "--json"))] == ["acme", "acme:*"]
    assert "balance: no wallet" in run("account", "show", "acme")


def test_a_credit_is_in_the_audit(run: Run) -> None:
    assert run("credit", "acme", "500", "--reference", "invoice 7") == "acme: 500 micro-units\n"
    assert 'cli  credit  acme  {"micros": 500, "reference": "invoice 7"}' in run("audit")
    assert "A credit is from 1" in run("credit", "acme", "0", "--reference", "x", status=1)
    assert len(run("audit", "--account", "acme").splitlines()) == 1


def test_the_commands_of_the_readme_work(run: Run) -> None:
    section = (ROOT / "README.md").read_text().partition("## Accounts and keys")[2].partition("\n## ")[0]
    commands = re.findall(r"^    \.venv/bin/qwen3-tts (.*)$", section, re.MULTILINE)
    for command in commands:
        run(*shlex.split(command, comments=True))
    assert len(commands) >= 9
    assert len(run("account", "list").splitlines()) == 4
    old = json.loads(run("key", "list", "acme", "--json"))[0]["id"]
    rotate = re.search(r"`\.venv/bin/qwen3-tts (key rotate .*?)`", section)
    assert rotate is not None
    run(*shlex.split(rotate.group(1).replace("key_...", old)))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["account", "create", "there"], "There is such an account already"),
        (["account", "create", "a b"], "Not a name"),
        (["account", "create", "x", "--concurrent", "-1"], "Invalid 'concurrent'"),
        (["account", "set", "nobody", "--trusted"], "There is no such account"),
        (["account", "show", "nobody"], "There is no such account"),
        (["key", "create", "nobody"], "There is no such account"),
        (["key", "create", "there", "--expires-in-s", "0"], "'expires_in_s' must be from 1"),
        (["key", "rotate", "there", "key_0"], "The account has no such key"),
        (["key", "revoke", "there", "key_0"], "The account has no such key"),
    ],
)
def test_what_cannot_be_done_is_said(run: Run, words: list[str], complaint: str) -> None:
    run("account", "create", "there")
    assert complaint in run(*words, status=1)
