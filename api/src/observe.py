"""Logs with the request's id, and the metric objects. Knows nothing of HTTP, and measures nothing itself."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .domain import ModelStats, UsageBacklog

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request that the current task serves."""


@dataclass(slots=True)
class RequestLog:
    """The log line of one request while it is served. `arrived` is by time.perf_counter.

    Who serves the request adds to `fields`: nothing that a client wrote.
    """

    arrived: float = field(default_factory=time.perf_counter)
    fields: dict[str, object] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the arrival."""
        return time.perf_counter() - self.arrived


request_log: ContextVar[RequestLog] = ContextVar("request_log")
"""Log line of the request that the current task serves; not set where nobody will write it."""

# From a cache hit (a millisecond) to a queue of long texts.
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only: nothing in a message can forge a line or move a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get(),
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(level: str) -> None:
    """Send every logger's records to standard error as JSON lines; `level` is a name such as "INFO"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for client in ("httpx", "httpcore"):  # they log whole URLs, and a webhook's is a secret
        logging.getLogger(client).setLevel(logging.WARNING)


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
        breaker = GaugeMetricFamily(
            "tts_usage_breaker", "1 for the state of the breaker between usage events and Redis", labels=["state"]
        )
        for state in ("closed", "open", "half_open"):
            breaker.add_metric([state], float(now.breaker == state))
        yield breaker


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
