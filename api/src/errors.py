"""The error tree: each class carries its HTTP status and its OpenAI type and code.

    SpeechError
    ├── InvalidRequest              400
    │   ├── PayloadTooLarge         413
    │   └── UpstreamRefused         4xx, as the remote server has it
    ├── Unauthorized                401
    ├── InsufficientBalance         402
    ├── Forbidden                   403
    ├── NotFound                    404
    ├── Conflict                    409
    ├── RateLimited                 429, Retry-After
    │   ├── TooManyAtOnce
    │   ├── QuotaExceeded
    │   └── TooManyFailures
    ├── SynthesisFailed             500
    │   └── HoldLost                500
    ├── UpstreamFailed              502, or 500 or 504 as the remote server has it
    │   └── UpstreamTimedOut        504
    └── Unavailable                 503, Retry-After
        ├── NotReady
        │   └── NeedsNewProcess
        ├── Overloaded
        ├── ShuttingDown
        ├── TimedOut
        └── UpstreamUnavailable

Messages are written for the client: they never quote internals. Rooms raise these; routers map them.
"""

from __future__ import annotations


class SpeechError(Exception):
    """Base of all that is answered as an OpenAI error body."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(SpeechError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"


class UpstreamRefused(InvalidRequest):
    """A remote server that speaks for this one refuses the request; status and words are its own."""

    def __init__(self, message: str, *, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class Unauthorized(SpeechError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class InsufficientBalance(SpeechError):
    status = 402
    type = "insufficient_quota"
    code = "insufficient_balance"

    def __init__(self, balance_micros: int, price_micros: int) -> None:
        super().__init__(f"The balance of {balance_micros} micro-units does not cover {price_micros}.")
        self.balance_micros = balance_micros


class Forbidden(SpeechError):
    """The key is known, and its account is switched off."""

    status = 403
    type = "permission_error"
    code = "account_disabled"


class NotFound(SpeechError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(SpeechError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class SynthesisFailed(SpeechError):
    code = "synthesis_failed"


class HoldLost(SynthesisFailed):
    """A hold was released by another process because this one seemed dead (its lease ran out)."""

    code = "hold_lost"


class UpstreamFailed(SpeechError):
    """A remote server that speaks for this one failed, or what it answered cannot be believed."""

    status = 502
    code = "upstream_failed"


class UpstreamTimedOut(UpstreamFailed):
    status = 504
    code = "upstream_timed_out"


class Retryable(SpeechError):
    """Something that may succeed later: answered with Retry-After."""

    def __init__(self, message: str, *, retry_after: int = 1, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class RateLimited(Retryable):
    status = 429
    type = "requests"  # as OpenAI has it
    code = "rate_limit_exceeded"


class TooManyAtOnce(RateLimited):
    code = "concurrency_limit_exceeded"


class QuotaExceeded(RateLimited):
    type = "insufficient_quota"  # as OpenAI has it
    code = "daily_quota_exceeded"


class TooManyFailures(RateLimited):
    """An account whose requests kept failing is stopped for a while."""

    code = "too_many_failures"


class Unavailable(Retryable):
    status = 503
    code = "unavailable"


class NotReady(Unavailable):
    code = "not_ready"


class NeedsNewProcess(NotReady):
    """What speaks can do so no more, and never again in this process."""


class Overloaded(Unavailable):
    code = "overloaded"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class TimedOut(Unavailable):
    code = "timed_out"


class UpstreamUnavailable(Unavailable):
    """A remote server that speaks for this one cannot be reached, or is not asked for a while as it keeps failing."""

    code = "upstream_unavailable"
