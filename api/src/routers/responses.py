"""Spoken answers on the wire, and errors as JSON: the only place that maps one to the other."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..domain import MEDIA_TYPES, SpeechChunk
from ..errors import InvalidRequest, Retryable, SpeechError
from ..observe import note_failure
from ..speech.listener import Listener
from . import failures
from .limit_headers import limit_headers

T = TypeVar("T")
_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client hung up before its answer was ready; nobody is left to read a response."""


async def until_hangup(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but no longer than the client stays: ClientGone once it has hung up.

    A handler that awaits does not notice a hang-up by itself. `work` has ended when this returns.
    """
    stay = asyncio.timeout(None)
    try:
        async with stay:
            watch = asyncio.create_task(_end_at_hangup(receive, stay))
            try:
                return await work
            finally:
                watch.cancel()
    except TimeoutError:
        if stay.expired():
            raise ClientGone from None
        raise


async def _end_at_hangup(receive: Receive, stay: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    stay.reschedule(asyncio.get_running_loop().time())


class SpeechResponse(Response):
    """Streams a started listener's chunks, and lets the listener go whatever happens.

    An error after the first byte, or a client that reads nothing for `stall_timeout_s`, cuts the connection:
    the body never gets its end, so the client notices.
    """

    def __init__(self, listener: Listener, stall_timeout_s: float) -> None:
        self._listener = listener
        self._stall_timeout_s = stall_timeout_s
        self._begun = False
        super().__init__(headers=self._speech_headers(), media_type=self._media_type())
        if self._content_length() is None:
            del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # What comes in one piece is paid for before it is sent: to watch for a hang-up would change nothing.
            streaming = self._stream(send)
            await (streaming if self._listener.in_memory else until_hangup(receive, streaming))
        except (ClientGone, SpeechError, TimeoutError) as error:
            if not self._begun:
                raise  # it can still be answered as a proper error
            failures.cut(scope, error)
            left = isinstance(error, ClientGone)
            _log.log(logging.INFO if left else logging.WARNING, "response cut: %s", type(error).__name__)
            if not left:
                note_failure()
        finally:
            self._listener.close()

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._body()) as body:
            async for chunk in body:
                async with asyncio.timeout(self._stall_timeout_s):
                    await self._send(send, chunk)

    async def _send(self, send: Send, chunk: SpeechChunk) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk.data, "more_body": not chunk.is_last})

    def _body(self) -> AsyncGenerator[SpeechChunk, None]:
        return self._listener.chunks()

    def _media_type(self) -> str:
        return MEDIA_TYPES[self._listener.script.request.format]

    def _content_length(self) -> int | None:
        return self._listener.length

    def _speech_headers(self) -> dict[str, str]:
        script, length = self._listener.script, self._content_length()
        return {
            **({} if length is None else {"Content-Length": str(length)}),
            "Content-Disposition": f'attachment; filename="speech.{script.request.format}"',
            "X-Backend": script.request.backend,
            "X-Model": script.request.model,
            "X-Voice": script.voice.id,
            "X-Cache": self._listener.cache_status,
            "X-Accel-Buffering": "no",
            **limit_headers(self._listener.standings),
        }


class SpeechEventResponse(SpeechResponse):
    """The same bytes as server-sent events; an error after the first event is an `error` event."""

    _error: SpeechError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)
        if self._error is not None:
            failures.cut(scope, self._error)

    def _media_type(self) -> str:
        return "text/event-stream"

    def _content_length(self) -> int | None:
        return None

    async def _body(self) -> AsyncGenerator[SpeechChunk, None]:
        try:
            async with aclosing(self._listener.chunks()) as chunks:
                async for chunk in chunks:
                    if chunk.data:
                        audio = base64.b64encode(chunk.data).decode("ascii")
                        yield _event({"type": "speech.audio.delta", "audio": audio})
            yield _event({"type": "speech.audio.done", "usage": self._usage()}, is_last=True)
        except SpeechError as error:
            self._error = error
            note_failure()
            yield _event({"type": "error", **error_body(error)}, is_last=True)

    def _usage(self) -> dict[str, int]:
        usage = self._listener.usage
        return {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
        }


def _event(data: dict[str, Any], *, is_last: bool = False) -> SpeechChunk:
    return SpeechChunk(f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode("ascii"), is_last)


def error_body(error: SpeechError) -> dict[str, Any]:
    """OpenAI's shape, and FastAPI's `detail` beside it."""
    detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return {"error": detail, "detail": error.message}


def error_response(error: SpeechError) -> Response:
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Retryable) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


# --- FastAPI's exception handlers ---


async def on_speech_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SpeechError)
    response = error_response(error)
    response.headers.update(limit_headers(getattr(request.state, "standings", ())))
    return response


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what proxies log for a client that left."""
    return Response(status_code=499)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors (404, 405, ...) in the same shape as ours."""
    assert isinstance(error, HTTPException)
    ours = SpeechError(str(error.detail))
    ours.status = error.status_code
    if error.status_code < 500:
        ours.type = "invalid_request_error"
        ours.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    response = error_response(ours)
    response.headers.update(error.headers or {})
    return response


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Path and query parameters that do not fit: a 400, as everywhere."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = str(fault["loc"][-1])
    return error_response(InvalidRequest(f"Invalid '{param}': {fault['msg']}.", param=param))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """Internals stay inside; the server logs the traceback."""
    return error_response(SpeechError("The server had an error while processing the request."))


EXCEPTION_HANDLERS: dict[int | type[Exception], Callable[[Request, Exception], Coroutine[Any, Any, Response]]] = {
    SpeechError: on_speech_error,
    ClientGone: on_client_gone,
    ClientDisconnect: on_client_gone,
    HTTPException: on_http_exception,
    RequestValidationError: on_validation_error,
    Exception: on_unexpected_error,
}
