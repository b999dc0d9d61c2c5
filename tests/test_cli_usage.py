"""The command `dead-letters`, against a real Redis and a ledger behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from api.src.cli import main
from api.src.cli_usage import PAGE
from api.src.stores.ledger_choice import ledger_at
from api.src.stores.ledger_write_behind import WriteBehind, WriteBehindLedger
from api.src.stores.usage_entry import pack
from tests.redis_server import RedisServer
from tests.stores.conftest import redis, redis_server  # noqa: F401 (fixtures)
from tests.stores.ledgers import eventually, free_event

STREAM, DEAD = "tts:{usage}:events", "tts:{usage}:dead"

Run = Callable[..., str]


@pytest.fixture
def run(
    redis: RedisServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `dead-letters`; returns what it printed."""
    monkeypatch.setenv("TTS_REDIS_URL", redis.url())

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["dead-letters", *words]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


def bury(server: RedisServer, *raws: bytes) -> list[str]:
    """Dead letters as servers leave them; returns their ids."""
    with server.client() as client:
        return [client.xadd(DEAD, {"event": raw, "id": "1-1", "reason": "ValueError: odd"}) for raw in raws]


def left(server: RedisServer, key: str) -> int:
    with server.client() as client:
        return int(client.xlen(key))


async def passed_on(server: RedisServer, folder: Path) -> list[str]:
    """The requests that are in the ledger once a server has been there."""
    behind = WriteBehind(flush_interval_s=0.02)
    ledger = WriteBehindLedger(ledger_at(f"sqlite:///{folder / 'ledger.db'}"), server.url(), behind)
    await ledger.start()
    await eventually(lambda: left(server, STREAM) == 0)
    found = [event.request_id for event in await ledger.usage(None, 100)]
    assert await ledger.check() == []
    await ledger.close()
    return found


def test_letters_are_listed_put_back_and_told_once(
    run: Run,
    redis: RedisServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    good, odd = pack(free_event("r1")), b'{"no": "event \xff"}'
    first, second, third = bury(redis, good, odd, good)
    listed = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert [letter["id"] for letter in listed] == [first, second, third]
    assert listed[0] == {"id": first, "reason": "ValueError: odd", "fields": {"event": good.decode()}}
    assert listed[1]["fields"] == {"event": '{"no": "event \\xff"}'}
    assert first in run("list")
    assert "ValueError: odd" in run("list")

    assert run("requeue", first) == "1 of 1 are back in the stream.\n"
    assert (left(redis, STREAM), left(redis, DEAD)) == (1, 2)
    assert "Not all" in run("requeue", first, third, status=1)
    assert asyncio.run(passed_on(redis, tmp_path)) == ["r1"]
    bury(redis, pack(free_event("r2")))
    assert run("requeue", "--all") == "2 of 2 are back in the stream.\n"
    assert left(redis, DEAD) == 0
    assert sorted(asyncio.run(passed_on(redis, tmp_path))) == ["r1", "r2"]

    (again,) = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert again["fields"] == listed[1]["fields"], "what nobody can read is a dead letter again, as it was"
    assert run("drop", again["id"]) == "1 of 1 are deleted.\n"
    assert left(redis, DEAD) == left(redis, STREAM) == 0
    assert "Not all" in run("drop", again["id"], status=1)


def test_there_may_be_many(run: Run, redis: RedisServer) -> None:  # noqa: F811
    count = PAGE + 3
    with redis.client() as client, client.pipeline() as pipeline:
        for number in range(count):
            pipeline.xadd(DEAD, {"event": pack(free_event(f"r{number}")), "id": "1-1", "reason": "odd"})
        pipeline.execute()
    assert len(set(run("list").splitlines())) == count
    assert run("requeue", "--all") == f"{count} of {count} are back in the stream.\n"
    assert (left(redis, STREAM), left(redis, DEAD)) == (count, 0)


def test_a_letter_with_nothing_in_it_stays(run: Run, redis: RedisServer) -> None:  # noqa: F811
    with redis.client() as client:
        empty = client.xadd(DEAD, {"id": "1-1", "reason": "odd"})
    assert "Not all" in run("requeue", empty, status=1)
    assert (left(redis, STREAM), left(redis, DEAD)) == (0, 1)


def test_what_was_not_said_is_asked_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "their ids, or --all" in run("requeue", status=1)
    assert "their ids, or --all" in run("requeue", "1-1", "--all", status=1)
    assert "their ids" in run("drop", status=1)
    with pytest.raises(SystemExit):
        run("requeue", "-")
    assert "an id looks like" in capsys.readouterr().err
    assert run("list") == ""
    assert run("requeue", "--all") == "0 of 0 are back in the stream.\n"


def test_without_redis_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TTS_REDIS_URL", raising=False)
    assert main(["dead-letters", "list"]) == 1
    assert "TTS_REDIS_URL is not set" in capsys.readouterr().err
    monkeypatch.setenv("TTS_REDIS_URL", f"unix://:secret-word@{tmp_path}/none.sock")
    assert main(["dead-letters", "list"]) == 1
    said = capsys.readouterr().err
    assert "Redis cannot be had" in said
    assert "secret-word" not in said
