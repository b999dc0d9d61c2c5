"""What happens to every request before routing: its id, its log line, its doubled slashes.

Plain ASGI: Starlette's BaseHTTPMiddleware would stand between a response and its client's hang-up.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping
from contextvars import Token
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..observe import NO_SPAN, LogLevels, Metrics, RequestLog, Span, Tracer, request_id, request_log
from . import failures

TRACED = "/v1/"
"""Of what is asked for every few seconds by machines there are no traces."""

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
"""Others are a client's own words."""

W3C = (b"traceparent", b"tracestate")

_log = logging.getLogger("api.access")


class CollapseSlashes:
    """Answer `/v1//audio/voices` like `/v1/audio/voices`: a base URL with a trailing slash makes them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "//" in scope["path"]:
            scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"])}
        await self._app(scope, receive, send)


class RequestRecord:
    """Give each request an id, answer it as X-Request-Id, and leave one log line without client data.

    Of speech the line says more: see Listener. What the request held back is written if it fails.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, levels: LogLevels, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer
        self._metrics = metrics
        self._levels = levels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = f"req_{random.getrandbits(128):032x}"  # unique, not secret: a system call would cost more
        tracer = self._tracer if scope["path"].startswith(TRACED) else None
        line = RequestLog(levels=self._levels, level=self._levels.server, tracer=tracer)
        line_token = request_log.set(line)
        id_token: Token[str] | None = request_id.set(identity)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            with tracer.request(_trace_headers(scope)) if tracer else NO_SPAN as span:
                try:
                    await self._app(scope, receive, send_with_id)
                except Exception:
                    status = status or 500  # answered by Starlette, outside of this
                    id_token = None  # the web server, which logs it, finds the id where it was
                    line.fail()
                    raise
                finally:
                    failures.judge(scope, status)
                    self._leave_record(scope, status, line, span)
        finally:
            request_log.reset(line_token)
            if id_token is not None:
                request_id.reset(id_token)

    def _leave_record(self, scope: Scope, status: int, line: RequestLog, span: Span) -> None:
        # The route's template, not the path: what a client sent stays out of logs and label values.
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(route, status).inc()
        fields = {"route": route, "status": status, "ms": round(line.seconds * 1000, 1), **line.fields}
        if status >= 500:
            line.fail()
        if line.tracer is not None:
            fields["trace_id"] = span.trace_id
            _describe(span, scope["method"], fields, failed=line.failed)
        _log.info("request", extra={"fields": fields})
        line.end()


def _trace_headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"] if name in W3C}


def _describe(span: Span, method: str, fields: Mapping[str, Any], *, failed: bool) -> None:
    """What the request's log line says, as attributes of its span."""
    said = {name: value for name, value in fields.items() if name not in ("route", "status", "ms", "user", "trace_id")}
    known = method if method in METHODS else "_OTHER"
    span.rename(f"{known} {fields['route']}")
    span.set(
        http_request_method=known,
        http_route=fields["route"],
        http_response_status_code=fields["status"],
        request_id=request_id.get(),
        **said,
    )
    if failed:
        span.fail(f"status {fields['status']}")
