"""Who asks: dependencies that turn a request into an Account, a body or the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ..domain import Account
from ..errors import NotReady, PayloadTooLarge, Unauthorized
from ..observe import note_account
from ..speech.access import Access
from ..speech.service import Qwen3TTSService


@dataclass(frozen=True, slots=True)
class HttpPolicy:
    """What the routers let in and how long they wait: set once by main as `app.state.http_policy`."""

    access: Access
    max_body_bytes: int
    stall_timeout_s: float
    body_digests: Callable[[bytes], tuple[str, ...]]
    """All digests that a body may be known by under its Idempotency-Key; the first is kept."""


def http_policy(request: Request) -> HttpPolicy:
    """No dependency: FastAPI spends more on solving one than the rest of a route does."""
    policy: HttpPolicy = request.app.state.http_policy
    return policy


async def get_tts_service(request: Request) -> Qwen3TTSService:
    """The service that main injected as `app.state.tts_service`; 503 while there is none."""
    service: Qwen3TTSService | None = getattr(request.app.state, "tts_service", None)
    if service is None:
        raise NotReady("The speech service is not available.")
    return service


async def require_account(request: Request) -> Account:
    """The account behind the bearer key, and the end user for whom a trusted one asks.

    A dependency; the routes that speak call it themselves, for the reason that http_policy gives.
    401 where keys are required and this one opens nothing, 403 for an account that is switched off, 400 for an end user
    with an impossible name, 503 where the database would have to be asked and is away.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    access = http_policy(request).access
    bearer = key.strip() if scheme.lower() == "bearer" else None
    account = await access.account(bearer, request.headers.get(access.user_header))
    note_account(account)
    return account


async def require_admin(account: Annotated[Account, Depends(require_account)]) -> Account:
    if not account.admin:
        raise Unauthorized("This needs the admin key.")
    return account


async def read_body(request: Request) -> bytes:
    """The whole body, at most the bound of the settings; PayloadTooLarge beyond it."""
    limit = http_policy(request).max_body_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise PayloadTooLarge(f"The body is larger than {limit} bytes.")
    return bytes(body)


CurrentAccount = Annotated[Account, Depends(require_account)]
AdminAccount = Annotated[Account, Depends(require_admin)]
Service = Annotated[Qwen3TTSService, Depends(get_tts_service)]
