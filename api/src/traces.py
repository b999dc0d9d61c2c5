"""Traces by OpenTelemetry: observe's Tracer over its SDK, sent in batches by OTLP over HTTP.

Owns the provider and its end; what is a span is said where the work is done. Where to and how it is sent is for the
standard variables to say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME ...). Attributes are
names, numbers and states: no text, no key, and of an exception its class alone, for its message may quote a client.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .observe import Attribute

SERVICE = "qwen3-tts-server"

CLOSE_S = 5.0
"""Given to the last spans at the end."""

CONVENTIONS = {
    "http_request_method": "http.request.method",
    "http_route": "http.route",
    "http_response_status_code": "http.response.status_code",
}
"""https://opentelemetry.io/docs/specs/semconv/http/http-spans/"""


class OtelSpan:
    """Implements observe's Span."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        return f"{self._span.get_span_context().trace_id:032x}"

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes({_dotted(name): value for name, value in attributes.items()})

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def fail(self, reason: str) -> None:
        self._span.set_status(Status(StatusCode.ERROR, reason))


class OtelTracer:
    """Implements observe's Tracer. `close` sends what is left, and takes some seconds if nobody takes it."""

    def __init__(self, version: str) -> None:
        named = SERVICE_NAME in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "") or "OTEL_SERVICE_NAME" in os.environ
        about = {SERVICE_VERSION: version, **({} if named else {SERVICE_NAME: SERVICE})}
        # Not the process's global one: several apps may live in one process, each with its end.
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer: Tracer = self._provider.get_tracer(SERVICE, version)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, headers: Mapping[str, str]) -> AbstractContextManager[OtelSpan]:
        """A span of the trace that the headers name (W3C traceparent), or of one of its own."""
        return self._open("request", SpanKind.SERVER, {}, self._propagator.extract(headers, Context()))

    def span(self, name: str, attributes: Mapping[str, Attribute]) -> AbstractContextManager[OtelSpan]:
        return self._open(name, SpanKind.INTERNAL, attributes, None)

    def close(self) -> None:
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(CLOSE_S)  # else a collector that is away would be waited for as long as for any batch

    @contextmanager
    def _open(
        self, name: str, kind: SpanKind, attributes: Mapping[str, Attribute], context: Context | None
    ) -> Iterator[OtelSpan]:
        dotted = {_dotted(key): value for key, value in attributes.items()}
        with self._tracer.start_as_current_span(
            name, context, kind, dotted, record_exception=False, set_status_on_exception=False
        ) as span:
            opened = OtelSpan(span)
            try:
                yield opened
            except Exception as error:
                if not (isinstance(span, SdkSpan) and span.status.status_code is StatusCode.ERROR):
                    opened.fail(type(error).__name__)
                raise


def _dotted(name: str) -> str:
    """Python's keyword as an attribute's name: those of the semantic conventions, and below tts those of ours."""
    return CONVENTIONS.get(name, f"tts.{name}")
