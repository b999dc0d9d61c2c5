"""The Redis stream in which usage events wait for the ledger.

Owns the keys, the commands and the time-outs; needs the package redis. Who adds, and who passes on when, is
usage_outbox.py's and usage_flusher.py's; the form of an entry is usage_entry.py's.

All servers of a deployment are consumers of one group. What a consumer has read stays pending until it is done with it;
then the entry is deleted. So the length of the stream is what the ledger lacks, and what a dead consumer has left
pending goes to another. The group begins at the first entry, also where it is made anew because Redis lost it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError

from ..domain import UsageEvent
from .usage_entry import FIELD, pack

PREFIX = "tts:{usage}"
"""Of every key; the braces keep them together in a cluster, as transactions need it."""

_GROUP = "ledger"
_HEALTH_CHECK_S = 10

_FORGET = """
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
    local consumer = {}
    for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
    local meant = ARGV[3] == '' or ARGV[3] == consumer['name']
    if meant and consumer['pending'] == 0 and consumer['idle'] >= tonumber(ARGV[2]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
    end
end
"""
"""In one step: a consumer that wakes up and reads in between would lose what it has read."""


_PUT_BACK = """
local moved = 0
for _, id in ipairs(ARGV) do
    local found = redis.call('XRANGE', KEYS[2], id, id)[1]
    if found then
        local fields = {}
        for i = 1, #found[2], 2 do
            if found[2][i] ~= 'id' and found[2][i] ~= 'reason' then
                table.insert(fields, found[2][i])
                table.insert(fields, found[2][i + 1])
            end
        end
        if #fields > 0 then
            redis.call('XADD', KEYS[1], '*', unpack(fields))
            moved = moved + redis.call('XDEL', KEYS[2], id)
        end
    end
end
return moved
"""
"""In one step, so that a letter is neither lost nor there twice. One that has nothing in it stays."""


class StreamAway(Exception):
    """Redis cannot be reached, is late, or refuses. What was asked of it may have happened."""


class Entry(NamedTuple):
    """`fields` is None for an entry that was deleted while it was pending."""

    id: bytes
    fields: dict[bytes, bytes] | None


class Letter(NamedTuple):
    """An entry that no ledger took, and why. `id` is its own among the dead letters and says when it became one."""

    id: str
    reason: str
    fields: dict[str, str]


class Backlog(NamedTuple):
    """What waits for the ledger, for how long already (by Redis's clock), and what lies among the dead letters."""

    events: int
    oldest_s: float
    dead_letters: int


class UsageStream:
    """One consumer of the stream. `url` is Redis's; a command takes at most about twice `timeout_s`.

    The methods raise StreamAway; the constructor raises ValueError, without quoting a URL that is not understood.
    """

    def __init__(self, url: str, *, timeout_s: float = 1.0) -> None:
        self._redis = _client(url, timeout_s)
        self._consumer = secrets.token_hex(8)
        self._grouped = False
        self._key, self._dead = f"{PREFIX}:events", f"{PREFIX}:dead"

    async def add(self, events: Iterable[UsageEvent]) -> None:
        """Append events, in one round trip. Where this raises, any of them may have been appended."""
        with self._asking():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for event in events:
                    pipeline.xadd(self._key, {FIELD: pack(event)})
                await pipeline.execute()

    async def read(self, count: int) -> list[Entry]:
        """What this consumer has read before and is not done with; if there is nothing, what nobody has read yet."""
        return await self._read("0", count) or await self._read(">", count)

    async def claim(self, count: int, idle_s: float) -> list[Entry]:
        """Take over entries with which another consumer has not been done for `idle_s` seconds."""
        await self._make_group()
        with self._asking():
            claimed = await self._redis.xautoclaim(self._key, _GROUP, self._consumer, round(1000 * idle_s), count=count)
        return [Entry(*entry) for entry in claimed[1] if entry[0] is not None]

    async def done(self, entries: Sequence[Entry]) -> None:
        """Forget these entries: they are in the ledger."""
        await self._end(entries)

    async def bury(self, entries: Sequence[Entry], reason: str) -> None:
        """Move entries to the dead letters."""
        why = reason.encode(errors="backslashreplace")
        letters = [{**(entry.fields or {}), b"id": entry.id, b"reason": why} for entry in entries]
        await self._end(entries, letters)

    async def letters(self, count: int, after: str = "") -> list[Letter]:
        """The dead letters, oldest first, from the one after the id `after` on."""
        with self._asking():
            found: Any = await self._redis.xrange(self._dead, min=f"({after}" if after else "-", count=count)
        return [_letter(id, fields) for id, fields in found]

    async def put_back(self, ids: Sequence[str]) -> int:
        """Make dead letters entries of the stream again; how many of these there were with something in them."""
        with self._asking():
            return int(await self._redis.eval(_PUT_BACK, 2, self._key, self._dead, *ids))

    async def drop(self, ids: Sequence[str]) -> int:
        """Delete dead letters for good; how many of these there were."""
        with self._asking():
            return int(await self._redis.xdel(self._dead, *ids))

    async def backlog(self) -> Backlog:
        with self._asking():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.xlen(self._key)
                pipeline.xrange(self._key, count=1)
                pipeline.xlen(self._dead)
                pipeline.time()
                length, first, dead, (seconds, micros) = await pipeline.execute()
        born = int(first[0][0].partition(b"-")[0]) / 1000 if first else None
        return Backlog(length, 0.0 if born is None else max(0.0, seconds + micros / 1e6 - born), dead)

    async def forget_dead(self, idle_s: float) -> None:
        """Remove consumers that have asked for nothing for `idle_s` seconds and have nothing pending."""
        with self._asking():
            await self._redis.eval(_FORGET, 1, self._key, _GROUP, round(1000 * idle_s), "")

    async def warnings(self) -> list[str]:
        """What of Redis's settings endangers usage events; nothing where it does not tell."""
        with self._asking():
            try:
                told: dict[str, Any] = await self._redis.info("everything")
            except ResponseError:
                return []
        found = []
        if not told.get("aof_enabled"):
            found.append("Redis keeps no append-only file: if it dies, usage events are lost. It needs appendonly yes.")
        if told.get("maxmemory") and told.get("maxmemory_policy") != "noeviction":
            found.append("Redis may evict usage events. It needs maxmemory-policy noeviction.")
        return found

    async def close(self) -> None:
        """Leave the group, unless something is still pending: that is for others to claim. Raises nothing."""
        with suppress(RedisError, OSError, TimeoutError):
            await self._redis.eval(_FORGET, 1, self._key, _GROUP, 0, self._consumer)
        with suppress(RedisError, OSError, TimeoutError):
            await self._redis.aclose()

    async def _read(self, after: str, count: int) -> list[Entry]:
        await self._make_group()
        with self._asking():
            found: Any = await self._redis.xreadgroup(_GROUP, self._consumer, {self._key: after}, count=count)
        return [Entry(*entry) for _, entries in found for entry in entries]

    async def _end(self, entries: Sequence[Entry], letters: Sequence[dict[bytes, bytes]] = ()) -> None:
        ids = [entry.id for entry in entries]
        if not ids:
            return
        with self._asking():
            async with self._redis.pipeline(transaction=True) as pipeline:
                for letter in letters:
                    pipeline.xadd(self._dead, letter)  # type: ignore[arg-type]
                pipeline.xack(self._key, _GROUP, *ids)
                pipeline.xdel(self._key, *ids)
                await pipeline.execute()

    async def _make_group(self) -> None:
        if self._grouped:
            return
        with self._asking():
            try:
                await self._redis.xgroup_create(self._key, _GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise
        self._grouped = True

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            if "NOGROUP" in str(error):
                self._grouped = False
            raise StreamAway(f"{type(error).__name__}: {error}") from error


def _letter(id: bytes, fields: dict[bytes, bytes]) -> Letter:
    texts = {_text(name): _text(value) for name, value in fields.items()}
    reason = texts.pop("reason", "")
    texts.pop("id", None)
    return Letter(_text(id), reason, texts)


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")


def _client(url: str, timeout_s: float) -> Redis:
    try:
        return Redis.from_url(
            url,
            protocol=2,  # one form of the answers, whatever the server's version
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            health_check_interval=_HEALTH_CHECK_S,
            retry=Retry(NoBackoff(), 1, (ConnectionError,)),  # Redis may have been restarted since the last command
            client_name="qwen3-tts",
        )
    except (ValueError, TypeError):
        raise ValueError("Redis's URL is not understood; odd characters of a password are written as %XX.") from None
