"""What happens to every request before routing: its id, its log line, its doubled slashes.

Plain ASGI: Starlette's BaseHTTPMiddleware would stand between a response and its client's hang-up.
"""

from __future__ import annotations

import logging
import random
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..observe import Metrics, RequestLog, request_id, request_log
from . import failures

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

    Of speech the line says more: see Listener.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = f"req_{random.getrandbits(128):032x}"  # unique, not secret: a system call would cost more
        line, status = RequestLog(), 0
        id_token, line_token = request_id.set(identity), request_log.set(line)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            status = status or 500  # answered by Starlette, outside of this
            raise
        finally:
            failures.judge(scope, status)
            self._leave_record(scope, status, line)
            request_log.reset(line_token)
            request_id.reset(id_token)

    def _leave_record(self, scope: Scope, status: int, line: RequestLog) -> None:
        # The route's template, not the path: what a client sent stays out of logs and label values.
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.requests.labels(route, status).inc()
        fields = {"route": route, "status": status, "ms": round(line.seconds * 1000, 1), **line.fields}
        _log.info("request", extra={"fields": fields})
