"""Accounts, their keys, and the audit of what was done to them: all for the admin key alone."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel

from ..domain import ACCOUNT_NAME, STORED_NAME
from ..speech.access import Access
from .account_schemas import (
    AccountChanges,
    AccountInfo,
    AccountsListResponse,
    AuditInfo,
    AuditResponse,
    KeyInfo,
    KeysListResponse,
    KeyTerms,
    NewAccount,
    NewKeyInfo,
    Rotation,
)
from .guards import AdminAccount, http_policy, read_body
from .schemas import ErrorResponse, inline_schema, parse_body

MAX_PAGE = 1000


def get_access(request: Request) -> Access:
    """Where accounts and keys are."""
    return http_policy(request).access


Store = Annotated[Access, Depends(get_access)]
AccountName = Annotated[str, Path(pattern=STORED_NAME)]
KeyOwner = Annotated[str, Path(pattern=ACCOUNT_NAME)]
KeyId = Annotated[str, Path(pattern=r"^key_[0-9a-f]{16}$")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]

router = APIRouter(responses={status: {"model": ErrorResponse} for status in (400, 401, 403, 503)})

_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse}}
_TOO_LARGE: dict[int | str, dict[str, Any]] = {413: {"model": ErrorResponse}}
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"model": ErrorResponse}}


def _body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    content = {"application/json": {"schema": inline_schema(model)}}
    return {"requestBody": {"required": required, "content": content}}


@router.get("/v1/accounts")
async def list_accounts(
    admin: AdminAccount,
    access: Store,
    after: Annotated[
        str, Query(max_length=300, pattern=r"^[!-~]*$", description="The last name of the page before.")
    ] = "",
    limit: Limit = 100,
) -> AccountsListResponse:
    """Accounts by name."""
    page = await access.accounts.page(after, limit)
    return AccountsListResponse(data=[AccountInfo.of(account) for account in page])


@router.post(
    "/v1/accounts",
    status_code=201,
    responses=_NOT_FOUND | _CONFLICT | _TOO_LARGE,
    openapi_extra=_body(NewAccount),
)
async def create_account(admin: AdminAccount, access: Store, request: Request) -> AccountInfo:
    """Make an account, or one for an end user of an account."""
    body = parse_body(NewAccount, await read_body(request))
    return AccountInfo.of(await access.accounts.create(body.name, body.changes(), admin.name))


@router.get("/v1/accounts/{account}", responses=_NOT_FOUND)
async def get_account(account: AccountName, admin: AdminAccount, access: Store) -> AccountInfo:
    """One account."""
    return AccountInfo.of(await access.accounts.get(account))


@router.patch(
    "/v1/accounts/{account}",
    responses=_NOT_FOUND | _TOO_LARGE,
    openapi_extra=_body(AccountChanges),
)
async def change_account(account: AccountName, admin: AdminAccount, access: Store, request: Request) -> AccountInfo:
    """Change an account's bounds, trust and log level, or switch it off and on."""
    body = parse_body(AccountChanges, await read_body(request))
    return AccountInfo.of(await access.accounts.change(account, body.changes(), admin.name))


@router.get("/v1/accounts/{account}/keys", responses=_NOT_FOUND)
async def list_keys(account: KeyOwner, admin: AdminAccount, access: Store) -> KeysListResponse:
    """Every key that the account ever had, without the keys themselves."""
    keys = await access.accounts.keys(account)
    return KeysListResponse(data=[KeyInfo.of(key) for key in keys])


@router.post(
    "/v1/accounts/{account}/keys",
    status_code=201,
    responses=_NOT_FOUND | _TOO_LARGE,
    openapi_extra=_body(KeyTerms, required=False),
)
async def create_key(
    account: KeyOwner, admin: AdminAccount, access: Store, request: Request, response: Response
) -> NewKeyInfo:
    """Make a key. It is in this answer and nowhere else."""
    terms = parse_body(KeyTerms, await read_body(request) or b"{}")
    response.headers["Cache-Control"] = "no-store"
    return NewKeyInfo.made(*await access.accounts.create_key(account, admin.name, terms.expires_in_s))


@router.post(
    "/v1/accounts/{account}/keys/{key_id}/rotate",
    status_code=201,
    responses=_NOT_FOUND | _CONFLICT | _TOO_LARGE,
    openapi_extra=_body(Rotation, required=False),
)
async def rotate_key(
    account: KeyOwner, key_id: KeyId, admin: AdminAccount, access: Store, request: Request, response: Response
) -> NewKeyInfo:
    """Make a key in place of another, which goes on for a while if that is wanted."""
    body = parse_body(Rotation, await read_body(request) or b"{}")
    response.headers["Cache-Control"] = "no-store"
    made = await access.accounts.rotate_key(
        account, key_id, admin.name, grace_s=body.grace_s, expires_in_s=body.expires_in_s
    )
    return NewKeyInfo.made(*made)


@router.delete("/v1/accounts/{account}/keys/{key_id}", responses=_NOT_FOUND)
async def revoke_key(account: KeyOwner, key_id: KeyId, admin: AdminAccount, access: Store) -> KeyInfo:
    """End a key for good."""
    return KeyInfo.of(await access.accounts.revoke_key(account, key_id, admin.name))


@router.get("/v1/audit")
async def audit(
    admin: AdminAccount,
    access: Store,
    account: Annotated[str | None, Query(pattern=STORED_NAME)] = None,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="The last id of the page before.")] = None,
    limit: Limit = 100,
) -> AuditResponse:
    """What was done with the admin key and on the command line, newest first."""
    entries = await access.accounts.audit(limit, account, before)
    return AuditResponse(data=[AuditInfo.of(entry) for entry in entries])
