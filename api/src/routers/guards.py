"""Who asks: dependencies that turn a request into an Account, a body or the service."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ..domain import Account
from ..errors import NotReady, PayloadTooLarge, Unauthorized
from ..speech.service import Qwen3TTSService

ANONYMOUS = Account("anonymous")


class Keys:
    """The API keys of a deployment; without any, the server is open and everyone is `anonymous`."""

    def __init__(self, api_keys: Sequence[tuple[str, str]], admin_key: str | None) -> None:
        self._accounts = [(_digest(key), Account(name)) for name, key in api_keys]
        self._admin = (_digest(admin_key), Account("admin", admin=True)) if admin_key else None

    def account(self, key: str | None) -> Account | None:
        """The account behind `key`; None where the key opens nothing.

        Every key is compared, and digests rather than keys, so that time tells nothing of either.
        """
        digest = _digest(key or "")
        candidates = [*self._accounts, self._admin] if self._admin else self._accounts
        found = None
        for known, account in candidates:
            if hmac.compare_digest(known, digest):
                found = account
        return found or (None if self._accounts else ANONYMOUS)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class HttpPolicy:
    """What the routers let in and how long they wait: set once by main as `app.state.http_policy`."""

    keys: Keys
    max_body_bytes: int
    stall_timeout_s: float


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
    """The account behind the bearer key; 401 where keys are required and this one is unknown."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    account = http_policy(request).keys.account(key.strip() if scheme.lower() == "bearer" else None)
    if account is None:
        raise Unauthorized("A valid API key is required: 'Authorization: Bearer <key>'.")
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
