"""The log's lines: who leaves one never waits, none is lost at an orderly end, and what a request held comes out when
it fails."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from api.src.domain import Account
from api.src.logs import Lines
from api.src.observe import HELD_LINES, LogLevels, RequestLog, detail, note_account, request_id, request_log

log = logging.getLogger("api.test_logs")

USUAL = LogLevels()


class Reader:
    """The reading end of a pipe, without waiting."""

    def __init__(self, number: int) -> None:
        os.set_blocking(number, False)
        self._number, self._rest = number, b""

    def __call__(self) -> list[dict[str, Any]]:
        """The whole lines that have come since the last call."""
        with suppress(BlockingIOError):
            while part := os.read(self._number, 1 << 16):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]


@pytest.fixture
def pipe() -> Iterator[tuple[Reader, Any]]:
    """A pipe's reader, and a stream that writes to it."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        yield Reader(reading), stream
    os.close(reading)


@contextmanager
def attached(lines: Lines) -> Iterator[None]:
    """The logger of this module writes there, and nowhere else."""
    log.addHandler(lines)
    log.propagate, level = False, log.level
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.propagate = True
        log.setLevel(level)


@contextmanager
def serving(levels: LogLevels = USUAL) -> Iterator[RequestLog]:
    """As the middleware does."""
    line = RequestLog(levels=levels, level=levels.server)
    tokens = request_id.set("req_1"), request_log.set(line)
    try:
        yield line
    finally:
        request_log.reset(tokens[1])
        request_id.reset(tokens[0])


# --- the queue ---


@pytest.mark.timeout(60)
def test_nobody_waits_for_a_reader_that_takes_nothing_and_what_is_lost_is_said(pipe: tuple[Reader, Any]) -> None:
    read, stream = pipe
    lines = Lines(logging.INFO, stream, capacity=50)
    with attached(lines), lines.queued():
        for number in range(2000):  # far more than the pipe takes: who waited would do so for ever
            log.info("line %d %s", number, "x" * 500)
        assert lines.dropped > 1000
        got: list[dict[str, Any]] = []
        deadline = time.monotonic() + 30
        while not [line for line in got if "dropped" in line["message"]]:
            assert time.monotonic() < deadline
            got += read()
            time.sleep(0.01)
        log.info("the last")
        lines.flush()
        got += read()
    said = sum(line["lines"] for line in got if "dropped" in line["message"])
    assert said == lines.dropped
    assert len([line for line in got if line["message"].startswith("line ")]) == 2000 - said
    assert got[-1]["message"] == "the last"


def test_nothing_is_lost_at_the_end_and_no_thread_is_left(pipe: tuple[Reader, Any]) -> None:
    read, stream = pipe
    lines = Lines(logging.INFO, stream)
    before = threading.active_count()
    with attached(lines):
        log.info("before")
        with lines.queued():
            assert threading.active_count() == before + 1
            for number in range(100):
                log.info("%d", number)
        log.info("after")
        assert threading.active_count() == before
    assert [line["message"] for line in read()] == ["before", *map(str, range(100)), "after"]


def test_the_end_does_not_wait_for_ever(pipe: tuple[Reader, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.src.logs.FLUSH_S", 0.2)
    read, stream = pipe
    lines = Lines(logging.INFO, stream)
    began = time.monotonic()
    with attached(lines):
        with lines.queued():
            for _ in range(500):
                log.info("x" * 500)
        log.info("nobody reads this")
    assert time.monotonic() - began < 30
    while "log lines" in [thread.name for thread in threading.enumerate()]:  # ends once somebody reads
        read()
        time.sleep(0.01)


def test_a_line_left_in_the_middle_of_another_is_no_deadlock(pipe: tuple[Reader, Any]) -> None:
    """As a destructor does, which runs anywhere."""

    class Chatty:
        def __str__(self) -> str:
            log.info("inner")
            return "outer"

    read, stream = pipe
    lines = Lines(logging.INFO, stream)
    with attached(lines), lines.queued():
        log.info("%s", Chatty())
    assert [line["message"] for line in read()] == ["inner", "outer"]


def test_what_cannot_be_written_ends_nothing(pipe: tuple[Reader, Any]) -> None:
    read, stream = pipe
    lines = Lines(logging.INFO, stream)
    with attached(lines), lines.queued():
        log.info("odd", extra={"fields": {("no", "key"): 1}})
        log.info("next")
    assert [line["message"] for line in read()] == ["no line: TypeError", "next"]
    stream.close()
    log.info("to a closed stream")


# --- what a request holds ---


@pytest.fixture
def said(pipe: tuple[Reader, Any]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is written at once, by a handler at INFO."""
    with attached(Lines(logging.INFO, pipe[1])):
        yield pipe[0]


def test_details_come_out_only_if_the_request_fails(said: Callable[[], list[dict[str, Any]]]) -> None:
    with serving() as line:
        detail(log, "a step", ms=1.5)
        log.debug("another %s", "step")
        log.info("a line")
        line.end()
    assert [record["message"] for record in said()] == ["a line"]
    with serving() as line:
        detail(log, "a step", ms=1.5)
        log.debug("another %s", "step")
        line.fail()
        assert said() == []
        line.end()
        first, second = said()
    assert (first["message"], first["ms"], first["level"], first["logger"]) == ("a step", 1.5, "debug", log.name)
    assert second["message"] == "another step"
    assert [record["held"] for record in (first, second)] == [True, True]
    assert [record["request_id"] for record in (first, second)] == ["req_1"] * 2
    assert first["time"] <= second["time"]


def test_an_error_makes_a_request_fail_even_after_its_end(said: Callable[[], list[dict[str, Any]]]) -> None:
    with serving() as line:
        detail(log, "before")
        line.end()
        detail(log, "after")
        log.error("what still worked for it has failed")
    assert [record["message"] for record in said()] == ["before", "after", "what still worked for it has failed"]


def test_what_is_held_is_bounded(said: Callable[[], list[dict[str, Any]]]) -> None:
    with serving() as line:
        for number in range(3 * HELD_LINES):
            detail(log, "step", number=number)
        line.fail()
        line.end()
    assert [record["number"] for record in said()] == list(range(2 * HELD_LINES, 3 * HELD_LINES))


def test_without_a_request_details_go_nowhere(said: Callable[[], list[dict[str, Any]]]) -> None:
    detail(log, "in the background")
    assert said() == []


def test_an_account_has_a_level_of_its_own(said: Callable[[], list[dict[str, Any]]]) -> None:
    levels = LogLevels(logging.INFO, {"loud": logging.DEBUG, "quiet": logging.WARNING})
    for account in (Account("loud"), Account("quiet"), Account("other"), Account("third", log_level="debug")):
        with serving(levels):
            note_account(account)
            detail(log, "a step", account=account.name)
            log.info("a line", extra={"fields": {"account": account.name}})
    wrote = [(record["account"], record["message"]) for record in said()]
    assert wrote == [
        ("loud", "a step"),
        ("loud", "a line"),
        ("other", "a line"),
        ("third", "a step"),
        ("third", "a line"),
    ]
    assert levels.of(Account("quiet", log_level="debug")) == logging.WARNING, "the settings go first"


# --- a process of its own ---

SERVE = """
import logging, sys, uvicorn
from api.src.main import create_app
from api.src.settings import Settings
from tests.fakes import FakeBackend
app = create_app(Settings(_env_file=None, cache_dir=sys.argv[1], ledger_url=f"sqlite:///{sys.argv[1]}/l.db"),
                 backend=FakeBackend())
config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        for number in range(500):
            logging.getLogger("api.flood").info("flood", extra={"fields": {"number": number}})
Server(config).run()
"""


def test_nothing_is_lost_at_a_sigterm(tmp_path: Any) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        records = [json.loads(line) for line in iter(lambda: _line_then_end(process), "")]
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert [record["number"] for record in records if record["message"] == "flood"] == list(range(500))
    assert any(record["message"].startswith("Finished server process") for record in records)


def _line_then_end(process: subprocess.Popen[str]) -> str:
    """The next line; asks the process to end once it floods its log."""
    assert process.stderr is not None
    line = process.stderr.readline()
    if '"number": 0}' in line:
        process.send_signal(signal.SIGTERM)
    return line
