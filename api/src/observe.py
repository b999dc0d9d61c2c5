"""Logs with the request's id, and the metric objects. Knows nothing of HTTP or of what is measured."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request that the current task serves."""

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
            "From a speech request's arrival to its first sound",
            ["cache"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.running = Gauge("tts_running_generations", "Generations with a permit", registry=self.registry)
        self.waiting = Gauge("tts_waiting_generations", "Generations in the queue", registry=self.registry)
