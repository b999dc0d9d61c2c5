"""What a request leaves in the log, and the metric objects. Knows nothing of HTTP, and measures nothing itself.

How lines are written is logs.py's.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .domain import Account, LogLevel, ModelStats, UsageBacklog

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request that the current task serves."""


LEVELS: Mapping[str, int] = {name: logging.getLevelNamesMapping()[name.upper()] for name in get_args(LogLevel)}

BREAKER_STATES = ("closed", "half_open", "open")

HELD_LINES = 200
"""Lines that a request holds; more push out the oldest."""

_Detail = tuple[float, str, str, dict[str, object]]


@dataclass(frozen=True, slots=True)
class LogLevels:
    """The least level of lines that are written at once, of the server and of accounts by name; logging's numbers."""

    server: int = logging.INFO
    accounts: Mapping[str, int] = field(default_factory=dict)

    def of(self, account: Account) -> int:
        """What the settings say of an account goes before what its own record says."""
        return self.accounts.get(account.name) or LEVELS.get(account.log_level, self.server)


Attribute = str | int | float | bool


class Span(Protocol):
    """A stretch of work in a trace. Attributes are neither text of a client nor keys."""

    @property
    def trace_id(self) -> str:
        """32 hex digits; empty where nothing is traced."""
        ...

    def rename(self, name: str) -> None: ...

    def set(self, **attributes: Attribute) -> None: ...

    def event(self, name: str) -> None: ...

    def fail(self, reason: str) -> None: ...


class Tracer(Protocol):
    """Makes spans, each the parent of those that are opened within its context."""

    def request(self, headers: Mapping[str, str]) -> AbstractContextManager[Span]: ...

    def span(self, name: str, attributes: Mapping[str, Attribute]) -> AbstractContextManager[Span]: ...

    def close(self) -> None:
        """Send what is left. Blocks."""
        ...


class NoSpan:
    """What is opened where nothing is traced: does nothing, and nothing is made for it."""

    trace_id = ""

    def rename(self, name: str) -> None: ...

    def set(self, **attributes: Attribute) -> None: ...

    def event(self, name: str) -> None: ...

    def fail(self, reason: str) -> None: ...

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None: ...


NO_SPAN = NoSpan()


@dataclass(slots=True)
class RequestLog:
    """The log of one request while it is served. `arrived` is by time.perf_counter.

    Who serves the request adds to `fields` of its one line: nothing that a client wrote. Lines below `level` are held,
    and written if the request fails.
    """

    arrived: float = field(default_factory=time.perf_counter)
    fields: dict[str, object] = field(default_factory=dict)
    levels: LogLevels = LogLevels()
    level: int = logging.INFO
    tracer: Tracer | None = None
    _held: deque[logging.LogRecord | _Detail] = field(default_factory=lambda: deque(maxlen=HELD_LINES))
    _failed: bool = False
    _ended: bool = False

    @property
    def failed(self) -> bool:
        return self._failed

    @property
    def seconds(self) -> float:
        """Since the arrival."""
        return time.perf_counter() - self.arrived

    def hold(self, line: logging.LogRecord | _Detail) -> None:
        self._held.append(line)

    def fail(self) -> None:
        """What is held will be written at the request's end, or at once if that is over."""
        self._failed = True
        if self._ended:
            self._write_held()

    def end(self) -> None:
        """The request is answered. Who still works for it may yet fail."""
        self._ended = True
        if self._failed:
            self._write_held()

    def _write_held(self) -> None:
        while self._held:
            line = self._held.popleft()
            record = line if isinstance(line, logging.LogRecord) else _record(*line)
            record.held = True
            logging.getLogger(record.name).handle(record)


request_log: ContextVar[RequestLog] = ContextVar("request_log")
"""Log of the request that the current task serves; not set where nobody will write it."""


def note_account(account: Account) -> None:
    """Say in the current request's line who asks; its lines come by that account's level from here on."""
    line = request_log.get(None)
    if line is not None:
        line.fields["account"] = account.name
        if account.user:
            line.fields["user"] = account.user
        line.level = line.levels.of(account)


def note_failure() -> None:
    """The current request failed, whatever its status says: what it held will be written."""
    line = request_log.get(None)
    if line is not None:
        line.fail()


def detail(logger: logging.Logger, message: str, **fields: object) -> None:
    """Leave a debug line. Far cheaper than logger.debug where the current request holds it: it is not made yet."""
    line = request_log.get(None)
    if line is None or line.level <= logging.DEBUG:
        logger.debug(message, extra={"fields": fields})
    else:
        line.hold((time.time(), logger.name, message, fields))


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
    """A part of the current request's trace, if it has one."""
    line = request_log.get(None)
    if line is None or line.tracer is None:
        return NO_SPAN
    return line.tracer.span(name, attributes)


def _record(created: float, name: str, message: str, fields: dict[str, object]) -> logging.LogRecord:
    about = {"name": name, "levelno": logging.DEBUG, "levelname": "DEBUG", "msg": message}
    return logging.makeLogRecord({**about, "created": created, "fields": fields})


# From a cache hit (a millisecond) to a queue of long texts.
_RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EngineCollector(Collector):
    """Shows counts and levels that others keep: `stats`, by model, is set anew before each scrape.

    A count is shown as it is given. That it never falls, whatever is unloaded, is the owner's duty: only the owner
    sees what an engine did after the last scrape.
    """

    def __init__(self) -> None:
        self.stats: Mapping[str, ModelStats] = {}

    def collect(self) -> Iterable[Metric]:
        frames = CounterMetricFamily("tts_engine_frames", "Codec frames made", labels=["model"])
        requests = CounterMetricFamily(
            "tts_engine_requests",
            "Requests of the engine that have ended (segments, and the warm-up), by how",
            labels=["model", "finish_reason"],
        )
        uncaptured = CounterMetricFamily(
            "tts_engine_uncaptured_steps",
            "Steps on a GPU that no captured graph fitted: always 0 in a sound server",
            labels=["model"],
        )
        slots = GaugeMetricFamily("tts_engine_slots", "Slots in use, by state", labels=["model", "state"])
        waiting = GaugeMetricFamily("tts_engine_waiting", "Requests of the engine without a slot", labels=["model"])
        step = GaugeMetricFamily("tts_engine_step_seconds", "Running mean of a step's time", labels=["model"])
        for model, stats in self.stats.items():
            frames.add_metric([model], stats.frames)
            for reason, count in stats.finished.items():
                requests.add_metric([model, reason], count)
            uncaptured.add_metric([model], stats.uncaptured)
            slots.add_metric([model, "active"], stats.active)
            slots.add_metric([model, "paused"], stats.paused)
            waiting.add_metric([model], stats.waiting)
            step.add_metric([model], stats.step_seconds)
        return frames, requests, uncaptured, slots, waiting, step


class UsageCollector(Collector):
    """Shows usage events on their way to the ledger; `backlog` is asked at each scrape, and None without Redis."""

    def __init__(self) -> None:
        self.backlog: Callable[[], UsageBacklog] | None = None

    def collect(self) -> Iterable[Metric]:
        if self.backlog is None:
            return
        now = self.backlog()
        yield GaugeMetricFamily("tts_usage_stream_events", "Usage events in Redis, not in the ledger", now.stream)
        yield GaugeMetricFamily("tts_usage_stream_oldest_seconds", "Age of the oldest of them", now.oldest_s)
        yield GaugeMetricFamily("tts_usage_memory_events", "Usage events in this process alone", now.memory)
        yield GaugeMetricFamily("tts_usage_dead_letters", "Entries in Redis that no ledger takes", now.dead_letters)
        yield CounterMetricFamily("tts_usage_dropped_events", "Usage events lost for want of room", now.dropped)


class CounterCollector(Collector):
    """Shows a count that somebody else keeps: `count` is set anew before each scrape."""

    def __init__(self, name: str, documentation: str) -> None:
        self.count = 0
        self._name, self._documentation = name, documentation

    def collect(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._documentation, value=self.count)]


class BreakerCollector(Collector):
    """Shows circuit breakers that others keep: each of `sources` says at each scrape what is guarded, and the state."""

    def __init__(self) -> None:
        self.sources: list[Callable[[], Mapping[str, str]]] = []

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "tts_breaker_state", "Circuit breakers: 1 for the state that each is in", labels=["breaker", "state"]
        )
        for source in self.sources:
            for breaker, now in source().items():
                for state in BREAKER_STATES:
                    family.add_metric([breaker, state], float(state == now))
        return [family]


class Metrics:
    """What /metrics shows. One per app, so that two apps in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tts_http_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.speech = Counter(
            "tts_speech_requests", "Speech requests by what answered them", ["cache"], registry=self.registry
        )
        self.generations = Counter(
            "tts_generations", "Runs of the backend by outcome", ["outcome"], registry=self.registry
        )
        self.audio_seconds = Counter(
            "tts_generated_audio_seconds", "Seconds of sound generated", registry=self.registry
        )
        self.first_sound = Histogram(
            "tts_first_sound_seconds",
            "From a speech request's arrival to its first encoded sound",
            ["cache"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.speech_seconds = Histogram(
            "tts_speech_seconds",
            "From a speech request's arrival to the end of its whole answer",
            ["cache"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.real_time_factor = Histogram(
            "tts_real_time_factor",
            "Seconds that a completed run took for each second of sound, without the pauses for a slow listener",
            buckets=_RATIO_BUCKETS,
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            "tts_queue_wait_seconds",
            "How long runs waited for their permit",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.ready = Gauge("tts_ready", "1 while speech can be had, else 0", registry=self.registry)
        self.lines_dropped = CounterCollector("tts_log_lines_dropped", "Log lines that standard error did not take")
        self.registry.register(self.lines_dropped)
        self.running = Gauge("tts_running_generations", "Generations with a permit", registry=self.registry)
        self.waiting = Gauge("tts_waiting_generations", "Generations in the queue", registry=self.registry)
        self.refused = Counter(
            "tts_refused_requests", "Requests refused with 429, by the limit", ["reason"], registry=self.registry
        )
        self.stopped_accounts = Gauge(
            "tts_stopped_accounts", "Accounts that are stopped as their requests kept failing", registry=self.registry
        )
        self.limiter_fallback = Gauge(
            "tts_limiter_fallback", "1 while Redis is away and this process limits alone", registry=self.registry
        )
        self.alerts = Counter(
            "tts_usage_alerts", "Alerts of usage by what became of them", ["outcome"], registry=self.registry
        )
        self.engines = EngineCollector()
        self.registry.register(self.engines)
        self.usage = UsageCollector()
        self.registry.register(self.usage)
        self.breakers = BreakerCollector()
        self.registry.register(self.breakers)
