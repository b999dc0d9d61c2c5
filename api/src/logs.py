"""The log's lines on their way out: JSON on standard error, and nobody who leaves one waits for it to be written.

Owns the form of a line, the queue and its thread, and which lines come out at once, later or never. What a request
says of itself, and what it holds back, is observe's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import TextIO

from .observe import LEVELS, request_id, request_log

CAPACITY = 10_000
"""Lines that may wait for standard error; beyond them lines are dropped, and counted."""

GATHER_S = 0.005
"""For so long the thread lets lines gather: one write for many, and fewer turns taken from the event loop."""

FLUSH_S = 3.0
"""How long the end waits for a standard error that takes nothing."""

_JSON = json.JSONEncoder(default=str)
"""What json.dumps with this argument would make for each line."""

_log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only: nothing in a message can forge a line or move a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": self._time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.message if hasattr(record, "message") else record.getMessage(),
        }
        if getattr(record, "held", False):
            entry["held"] = True
        entry |= getattr(record, "fields", {})
        if record.exc_text or record.exc_info:
            entry["exception"] = record.exc_text or self.formatException(record.exc_info or (None, None, None))
        return _JSON.encode(entry)

    def _time(self, record: logging.LogRecord) -> str:
        local = time.localtime(record.created)
        milliseconds = int(record.created * 1000) % 1000
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', local)}.{milliseconds:03d}{time.strftime('%z', local)}"


class Lines(logging.Handler):
    """Writes to `stream`: in a thread of its own within `queued`, at once before and after it.

    A line below `least`, or below the level of the account whose request it belongs to, is held by its request; see
    RequestLog. Without a request it goes nowhere.
    """

    def __init__(self, least: int, stream: TextIO | None = None, *, capacity: int = CAPACITY) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.dropped = 0
        self._least = least
        self._stream = stream or sys.stderr
        self._capacity = capacity
        # Its put() may come in the middle of another one: a destructor or a signal's handler may leave a line, too.
        self._waiting: SimpleQueue[logging.LogRecord | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stuck = False
        self._said = 0

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Within the context who leaves a line does not wait; at its end all are written, and the thread is gone."""
        self._thread = threading.Thread(target=self._run, name="log lines", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._end()

    def emit(self, record: logging.LogRecord) -> None:
        line = request_log.get(None)
        if not getattr(record, "held", False):
            if record.levelno < (self._least if line is None else line.level):
                if line is not None:
                    line.hold(self._settled(record))
                return
            if line is not None and record.levelno >= logging.ERROR:
                line.fail()
        self._hand_over(self._settled(record))

    def flush(self) -> None:
        """Wait until what was left so far is written, FLUSH_S at most."""
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            done = threading.Event()
            self._waiting.put(done)
            done.wait(FLUSH_S)

    def close(self) -> None:
        self._end()
        super().close()

    def _settled(self, record: logging.LogRecord) -> logging.LogRecord:
        """With all that may change later, or holds on to much, turned into text."""
        record.request_id = request_id.get()
        record.message = record.getMessage()
        if record.exc_info and not record.exc_text and self.formatter is not None:
            record.exc_text = self.formatter.formatException(record.exc_info)
        return record

    def _hand_over(self, record: logging.LogRecord) -> None:
        if self._thread is None:
            if not self._stuck:
                self._write([record])
        elif self._waiting.qsize() < self._capacity:
            self._waiting.put(record)
        else:
            self.dropped += 1

    def _end(self) -> None:
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        self._waiting.put(None)
        thread.join(FLUSH_S)
        self._stuck = thread.is_alive()  # then nobody reads standard error, and the process must end all the same
        self._thread = None
        if not self._stuck:
            self._write(_records(self._take()))  # left in the last moment

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            if isinstance(taken[0], logging.LogRecord):
                time.sleep(GATHER_S)
            taken += self._take()
            self._write(_records(taken))
            for item in taken:
                if isinstance(item, threading.Event):
                    item.set()
            self._say_dropped()
            if None in taken:
                return

    def _take(self) -> list[logging.LogRecord | threading.Event | None]:
        taken: list[logging.LogRecord | threading.Event | None] = []
        with suppress(Empty):
            while len(taken) < self._capacity:
                taken.append(self._waiting.get_nowait())
        return taken

    def _say_dropped(self) -> None:
        """Once there is room again."""
        if lost := self.dropped - self._said:
            self._said += lost
            about = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "fields": {"lines": lost}}
            self._write([logging.makeLogRecord({**about, "msg": "lines were dropped: standard error is too slow"})])

    def _write(self, records: Sequence[logging.LogRecord]) -> None:
        text = "".join(self._formatted(record) + "\n" for record in records)
        with suppress(OSError, ValueError):  # nobody reads any more, or the stream is closed
            try:
                number = self._stream.fileno()
            except (OSError, ValueError):
                self._stream.write(text)
                self._stream.flush()
            else:
                _write_all(number, text.encode())

    def _formatted(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # one odd record must not end the thread
            return json.dumps({"level": "error", "logger": __name__, "message": f"no line: {type(error).__name__}"})


def configure_logging(level: str) -> Lines:
    """Send every logger's records to standard error as JSON lines; `level` is a name such as "info".

    Our own loggers make debug records whatever the level is, for requests to hold. Those of others never do: an HTTP
    client's have headers in them.
    """
    lines = Lines(LEVELS[level])
    logging.basicConfig(level=logging.INFO, handlers=[lines], force=True)
    logging.getLogger("api").setLevel(logging.DEBUG)
    for client in ("httpx", "httpcore"):  # they log whole URLs, and a webhook's is a secret
        logging.getLogger(client).setLevel(logging.WARNING)
    return lines


def _records(taken: Sequence[logging.LogRecord | threading.Event | None]) -> list[logging.LogRecord]:
    return [item for item in taken if isinstance(item, logging.LogRecord)]


def _write_all(number: int, data: bytes) -> None:
    # Not by the stream: a thread that is stuck in it would keep its lock, which the interpreter's end waits for.
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(number, rest) :]
        except BlockingIOError:  # whoever started us made it so
            time.sleep(GATHER_S)
