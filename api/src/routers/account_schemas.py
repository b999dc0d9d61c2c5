"""Bodies of the routes for accounts, keys and the audit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from ..domain import STORED_NAME, AuditEntry, LogLevel, StoredAccount, StoredKey

_Bound = Annotated[StrictInt, Field(ge=0, lt=2**53)] | None
_Seconds = Annotated[StrictInt, Field(ge=1, le=10 * 366 * 86400)]
_LogLevel = Literal["", LogLevel]

_AS_DEPLOYED = "null: as the deployment has it; 0: no bound."


class AccountChanges(BaseModel):
    """The body of PATCH /v1/accounts/{account}: what is named is changed, null included."""

    model_config = ConfigDict(extra="ignore")

    requests_per_minute: _Bound = Field(None, description=_AS_DEPLOYED)
    concurrent: _Bound = Field(None, description=f"Requests at once. {_AS_DEPLOYED}")
    characters_per_day: _Bound = Field(None, description=_AS_DEPLOYED)
    alert_characters_per_day: _Bound = Field(None, description="Beyond it the operator is told.")
    trusted: StrictBool = Field(False, description="May say for which of its users it asks.")
    log_level: _LogLevel = Field("", description="The least level of its log lines; empty: the server's.")
    disabled: StrictBool = Field(False, description="Switched off: its requests are answered with 403.")

    def changes(self) -> dict[str, Any]:
        """What was named."""
        return self.model_dump(exclude_unset=True, exclude={"name"})


class NewAccount(AccountChanges):
    """The body of POST /v1/accounts."""

    name: str = Field(
        pattern=STORED_NAME, description="NAME; NAME:USER for an end user of it; NAME:* for all others of its."
    )


class KeyTerms(BaseModel):
    """The body of POST /v1/accounts/{account}/keys."""

    model_config = ConfigDict(extra="ignore")

    expires_in_s: _Seconds | None = Field(None, description="Seconds; null: it does not expire.")


class Rotation(BaseModel):
    """The body of POST /v1/accounts/{account}/keys/{key_id}/rotate."""

    model_config = ConfigDict(extra="ignore")

    grace_s: Annotated[StrictInt, Field(ge=0, le=10 * 366 * 86400)] = Field(
        0, description="Seconds for which the old key goes on."
    )
    expires_in_s: _Seconds | None = Field(
        None, description="Of the new key; null: for as long as the old one was made."
    )


class AccountInfo(BaseModel):
    object: Literal["account"] = "account"
    name: str
    requests_per_minute: int | None
    concurrent: int | None
    characters_per_day: int | None
    alert_characters_per_day: int | None
    trusted: bool
    log_level: str
    disabled: bool
    created: float

    @classmethod
    def of(cls, account: StoredAccount) -> AccountInfo:
        return cls(
            name=account.name,
            requests_per_minute=account.bounds.requests_per_minute,
            concurrent=account.bounds.concurrent,
            characters_per_day=account.bounds.characters_per_day,
            alert_characters_per_day=account.bounds.alert_characters_per_day,
            trusted=account.trusted,
            log_level=account.log_level,
            disabled=account.disabled,
            created=account.created_at,
        )


class AccountsListResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[AccountInfo]


class KeyInfo(BaseModel):
    """A key without the key: `hint` is its first characters. Times are Unix seconds."""

    object: Literal["api_key"] = "api_key"
    id: str
    account: str
    hint: str
    created: float
    expires: float | None
    revoked: float | None

    @classmethod
    def of(cls, key: StoredKey) -> KeyInfo:
        return cls(**_key_fields(key))


class NewKeyInfo(KeyInfo):
    """The only answer that holds a key."""

    key: str

    @classmethod
    def made(cls, secret: str, key: StoredKey) -> NewKeyInfo:
        return cls(key=secret, **_key_fields(key))


class KeysListResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyInfo]


class AuditInfo(BaseModel):
    id: int
    created: float
    actor: str
    act: str
    account: str
    detail: dict[str, Any]

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditInfo:
        return cls(
            id=entry.id,
            created=entry.at,
            actor=entry.actor,
            act=entry.act,
            account=entry.account,
            detail=dict(entry.detail),
        )


class AuditResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[AuditInfo]


def _key_fields(key: StoredKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "account": key.account,
        "hint": key.hint,
        "created": key.created_at,
        "expires": key.expires_at,
        "revoked": key.revoked_at,
    }
