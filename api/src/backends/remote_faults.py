"""What goes wrong with a remote server: each fault as an error for the client, and as a verdict on the server.

Owns the mapping alone: no connection, no clock. Of the remote server's own words only those of a refused request are
passed on, and never the key that it was asked with.
"""

from __future__ import annotations

import base64
import email.utils
import json
import math
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from ..errors import (
    RateLimited,
    SpeechError,
    UpstreamFailed,
    UpstreamRefused,
    UpstreamTimedOut,
    UpstreamUnavailable,
)

OUR_FAULT = (401, 402, 403, 407)
"""The remote server's word on *our* key and *our* balance there: no client of ours can do anything about it, and one
that is told 401 or 402 would look for the fault in its own."""

OUR_QUOTA = "insufficient_quota"
"""What OpenAI says with a 429 that is not about the rate: the same as a 402."""

TRANSIENT = (408, 500, 502, 503, 504)
"""Statuses after which another try may help."""

PASSED_ON = (500, 502, 503, 504)
"""Failures whose status is the client's too; others become 502."""

MAX_MESSAGE = 500
MAX_RETRY_AFTER = 3600


class Fault(Exception):
    """One try that failed.

    `error` is the client's; `again`: another try may help, `wait` seconds from now at the earliest; `alive`: whether it
    shows the remote server at work (True), failing (False), or neither (None). `status`: of its answer, if it had one.
    """

    status: int | None = None

    def __init__(
        self, error: SpeechError, *, again: bool = False, wait: float = 0.0, alive: bool | None = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.again = again
        self.wait = wait
        self.alive = alive


def invalid(what: str) -> Fault:
    """An answer that is not what it should be; `what` completes "The remote server's answer ..."."""
    return Fault(UpstreamFailed(f"The remote server's answer {what}.", code="upstream_invalid"))


def of_transport(error: httpx.HTTPError) -> Fault:
    """A connection that could not be had, or broke before the first byte of sound."""
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return timed_out()
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Fault(UpstreamUnavailable("The remote server cannot be reached."), again=True)
    if isinstance(error, httpx.PoolTimeout):  # says more of us than of it
        return Fault(UpstreamUnavailable("There is no connection to the remote server left."), alive=None)
    return Fault(UpstreamFailed("The connection to the remote server was lost."), again=True)


def timed_out() -> Fault:
    """Another try would only add to what makes it slow."""
    return Fault(UpstreamTimedOut("The remote server did not answer in time."))


def of_answer(status: int, headers: Mapping[str, str], body: bytes, *, secret: str | None) -> Fault:
    """An answer other than 200."""
    fault = _of_answer(status, headers, _error(body), secret)
    fault.status = status
    return fault


def _of_answer(status: int, headers: Mapping[str, str], said: Mapping[str, Any], secret: str | None) -> Fault:
    wait = retry_after(headers)
    if status in OUR_FAULT or (status == 429 and OUR_QUOTA in (said.get("code"), said.get("type"))):
        message = "The remote server refuses this server's account or key."
        return Fault(UpstreamFailed(message, code="upstream_refuses_us"))
    if status == 429:
        busy = RateLimited("The remote server takes no more requests now.", retry_after=_whole(wait))
        return Fault(busy, again=True, wait=wait, alive=None)
    if 400 <= status < 500 and status != 408 and said:
        return Fault(_refused(status, said, secret), alive=True)
    return _failed(status, wait)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 where there is none."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER) if math.isfinite(seconds) else 0.0


def _failed(status: int, wait: float) -> Fault:
    message = f"The remote server failed with status {status}."
    error: SpeechError
    if status == 503:
        error = UpstreamUnavailable(message, retry_after=_whole(wait))
    else:
        error = UpstreamFailed(message)
        error.status = status if status in PASSED_ON else 502
    return Fault(error, again=status in TRANSIENT, wait=wait)


def _refused(status: int, said: Mapping[str, Any], secret: str | None) -> UpstreamRefused:
    message = _words(said.get("message"), secret) or "The remote server refuses the request."
    param, code = (_words(said.get(name), secret) or None for name in ("param", "code"))
    return UpstreamRefused(message, status=status, param=param, code=code)


def _error(body: bytes) -> dict[str, Any]:
    """The `error` object of OpenAI's shape; empty where the body has another."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return {}
    return error if isinstance(error, dict) and isinstance(error.get("message"), str) else {}


def _words(value: object, secret: str | None) -> str:
    """Printable text of bounded length: it goes to our client, through JSON. Nothing if our key is in it, disguised."""
    if not isinstance(value, str) or (secret and any(spelling in value for spelling in _disguises(secret))):
        return ""
    text = value.replace(secret, "...") if secret else value
    return "".join(character if character.isprintable() else " " for character in text).strip()[:MAX_MESSAGE]


def _disguises(secret: str) -> set[str]:
    """What the secret can be read from, but for itself; of one too short for that to be told from other words, none."""
    if len(secret) < 12:
        return set()
    found = {quote(secret), quote(secret, safe=""), secret.encode().hex()}
    for before in range(3):  # base64 of it and of what stands before it, less the characters that both share
        encoded = base64.b64encode(b"\0" * before + secret.encode())[before and 4 : -4].decode()
        found |= {encoded, encoded.translate(str.maketrans("+/", "-_"))}
    return found - {secret}


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
