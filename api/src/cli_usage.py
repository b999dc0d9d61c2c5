"""The command `dead-letters`: usage events that no ledger took, in Redis, listed and put back without a server.

Owns its arguments and how they print. What a dead letter is, is stores/usage_stream.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .building import build_usage_stream
from .errors import InvalidRequest, NotFound, NotReady
from .settings import Settings

if TYPE_CHECKING:
    from .stores.usage_stream import Letter, UsageStream

PAGE = 500
"""Letters of one question to Redis, which does nothing else meanwhile."""

Run = Callable[[argparse.Namespace, "UsageStream"], Awaitable[None]]


def add_usage(commands: Any) -> None:
    """Register the command with argparse's sub-parsers."""
    letters = commands.add_parser("dead-letters", help="usage events in Redis that no ledger took")
    letters = letters.add_subparsers(required=True)
    listing = _command(letters, "list", "the letters, oldest first, and why nobody took them", _list)
    listing.add_argument("--json", action="store_true", help="for programs: all fields, a letter a line")
    requeue = _command(letters, "requeue", "put letters back into the stream, for the servers to try again", _requeue)
    drop = _command(letters, "drop", "delete letters for good", _drop)
    for parser in (requeue, drop):
        parser.add_argument("id", nargs="*", type=_id, help="as in the list")
    requeue.add_argument("--all", action="store_true", help="all that there are now")


def _command(commands: Any, name: str, help: str, run: Run) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help)

    def work(settings: Settings, options: argparse.Namespace) -> int:
        asyncio.run(_with_stream(settings, lambda stream: run(options, stream)))
        return 0

    parser.set_defaults(run=work)
    return parser


async def _with_stream(settings: Settings, work: Callable[[UsageStream], Awaitable[None]]) -> None:
    stream = build_usage_stream(settings)
    from .stores.usage_stream import StreamAway  # needs redis, which is there by now

    try:
        await work(stream)
    except StreamAway as error:
        raise NotReady(f"Redis cannot be had: {error}") from error
    finally:
        await stream.close()


def _id(text: str) -> str:
    if not re.fullmatch(r"\d{1,20}-\d{1,20}", text):
        raise argparse.ArgumentTypeError("an id looks like 1700000000000-0")
    return text


# --- the commands ---


async def _list(options: argparse.Namespace, stream: UsageStream) -> None:
    after = ""
    while page := await stream.letters(PAGE, after):
        for letter in page:
            print(json.dumps(letter._asdict()) if options.json else _in_words(letter))
        after = page[-1].id


async def _requeue(options: argparse.Namespace, stream: UsageStream) -> None:
    if bool(options.id) == options.all:
        raise InvalidRequest("Say which letters: their ids, or --all.")
    ids: Sequence[str] = options.id or await _all(stream)
    moved = 0
    for start in range(0, len(ids), PAGE):
        moved += await stream.put_back(ids[start : start + PAGE])
    print(f"{moved} of {len(ids)} are back in the stream.")
    if options.id and moved < len(options.id):
        raise NotFound("Not all of them are dead letters with something in them.")


async def _drop(options: argparse.Namespace, stream: UsageStream) -> None:
    if not options.id:
        raise InvalidRequest("Say which letters: their ids.")
    dropped = await stream.drop(options.id)
    print(f"{dropped} of {len(options.id)} are deleted.")
    if dropped < len(options.id):
        raise NotFound("Not all of them are dead letters.")


async def _all(stream: UsageStream) -> list[str]:
    """Those that there are before the first is put back: it may become a letter again meanwhile."""
    ids: list[str] = []
    while page := await stream.letters(PAGE, ids[-1] if ids else ""):
        ids += [letter.id for letter in page]
    return ids


def _in_words(letter: Letter) -> str:
    at = datetime.fromtimestamp(int(letter.id.partition("-")[0]) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{letter.id}  {at}  {letter.reason}  {json.dumps(letter.fields)}"
