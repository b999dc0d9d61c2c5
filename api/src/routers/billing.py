"""What an account has used, and credit for its wallet."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from ..domain import ACCOUNT_NAME
from ..errors import InvalidRequest
from .guards import AdminAccount, CurrentAccount, Service, http_policy, read_body
from .schemas import (
    BalanceResponse,
    CreditRequest,
    ErrorResponse,
    UsageEntry,
    UsageResponse,
    inline_schema,
    parse_body,
)

MAX_USAGE_EVENTS = 1000

router = APIRouter(
    responses={
        400: {"model": ErrorResponse},
        401: {"model": ErrorResponse},
        403: {"model": ErrorResponse},
        503: {"model": ErrorResponse},
    }
)


@router.get("/v1/usage")
async def usage(
    caller: CurrentAccount,
    service: Service,
    account: Annotated[str | None, Query(pattern=ACCOUNT_NAME, description="With the admin key: whose.")] = None,
    user: Annotated[str | None, Query(pattern=ACCOUNT_NAME, description="Of this end user alone.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_USAGE_EVENTS)] = 100,
) -> UsageResponse:
    """The caller's usage events, newest first, and its balance."""
    if account is not None and account != caller.name and not caller.admin:
        raise InvalidRequest("Only the admin key may see another account.", param="account")
    name = account or caller.name
    return UsageResponse(
        account=name,
        balance_micros=await service.ledger.balance(name),
        data=[UsageEntry.of(event) for event in await service.ledger.usage(name, limit, user=user)],
    )


@router.post(
    "/v1/accounts/{account}/credit",
    responses={413: {"model": ErrorResponse}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": inline_schema(CreditRequest)}},
        }
    },
)
async def credit(
    account: Annotated[str, Path(pattern=ACCOUNT_NAME)],
    admin: AdminAccount,
    service: Service,
    request: Request,
) -> BalanceResponse:
    """Add credit to an account's wallet, which the first credit makes.

    The audit is written first: no credit is without its line. A crash in between leaves a line without a credit; what
    was credited, the ledger's own entries say.
    """
    body = parse_body(CreditRequest, await read_body(request))
    accounts = http_policy(request).access.accounts
    await accounts.note(admin.name, "credit", account, {"micros": body.micros, "reference": body.reference})
    balance = await service.ledger.credit(account, body.micros, body.reference)
    return BalanceResponse(account=account, balance_micros=balance)
