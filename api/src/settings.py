"""Every setting of the server: environment variables with the prefix TTS_, or lines of a .env file.

Read by main and the command line alone; rooms receive plain values. `.env.example` lists them all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .domain import LogLevel
from .stores.ledger_choice import SCHEMES

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")

CommaSeparated = Annotated[list[str], NoDecode]
Pairs = Annotated[dict[str, str], NoDecode]
Levels = Annotated[dict[str, LogLevel], NoDecode]
SecretPairs = Annotated[list[tuple[str, SecretStr]], NoDecode]
Secrets = Annotated[list[SecretStr], NoDecode]
Backends = Annotated[list[Literal["auto", "embedded", "qwen3", "remote"]], NoDecode]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TTS_",
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # a mistyped TTS_API_KEYS must not print its secrets
    )

    # --- where it listens ---
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    cors_origins: CommaSeparated = []
    log_level: LogLevel = "info"
    log_levels: Levels = {}
    traces: bool = False

    # --- what speaks ---
    backend: Backends = Field(default=["auto"], min_length=1)
    embedded_workers: int = Field(default=2, ge=1, le=64)
    model: CommaSeparated = []
    device: str = Field(default="auto", pattern=r"auto|cpu|cuda(:\d+)?")
    cpu_weights: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    slots: int | None = Field(default=None, ge=1, le=256)
    unload_after_s: float = Field(default=0.0, ge=0)
    model_aliases: Pairs = {}

    # --- a remote server that speaks ---
    remote_url: str | None = None
    remote_api_key: SecretStr | None = None
    remote_model: CommaSeparated = []
    remote_revision: str = ""
    remote_sample_rate: int = Field(default=24_000, ge=8_000, le=192_000)
    remote_connect_timeout_s: float = Field(default=5.0, gt=0)
    remote_first_byte_timeout_s: float = Field(default=20.0, gt=0)
    remote_total_timeout_s: float = Field(default=120.0, gt=0)
    remote_retries: int = Field(default=2, ge=0, le=10)

    # --- bounds of a request ---
    max_input_characters: int = Field(default=4096, ge=1)
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)

    # --- bounds of an account; 0: none ---
    requests_per_minute: int = Field(default=0, ge=0)
    concurrent_per_account: int = Field(default=0, ge=0)
    characters_per_day: int = Field(default=0, ge=0)
    alert_characters_per_day: int = Field(default=0, ge=0)
    alert_webhook: SecretStr | None = None  # whoever knows it can post there
    account_failures: int = Field(default=20, ge=0)

    # --- load ---
    max_concurrent: int | None = Field(default=None, ge=1)
    queue_size: int = Field(default=32, ge=0)
    request_timeout_s: float = Field(default=60.0, gt=0)
    stall_timeout_s: float = Field(default=30.0, gt=0)
    drain_timeout_s: float = Field(default=30.0, ge=0)

    # --- what is kept ---
    cache_dir: Path = Path("data/cache")
    cache_max_bytes: int = Field(default=2 * 1024**3, ge=0)
    cache_compression: Literal["none", "lz4"] = "none"
    encryption_key: Secrets = []
    ledger_url: SecretStr = SecretStr("sqlite:///data/ledger.db")  # may have a password in it
    hold_lease_s: float = Field(default=60.0, ge=0.5)
    redis_url: SecretStr | None = None  # may have a password in it
    redis_failures: int = Field(default=5, ge=1)
    usage_flush_events: int = Field(default=500, ge=1, le=10_000)
    usage_flush_interval_s: float = Field(default=1.0, gt=0)
    usage_memory_events: int = Field(default=10_000, ge=1)

    # --- who may ask, and what it costs ---
    api_keys: SecretPairs = []
    admin_key: SecretStr | None = None
    accounts_refresh_s: float = Field(default=5.0, gt=0, le=3600)
    user_header: str = Field(default="X-OpenWebUI-User-Id", pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
    prices_file: Path | None = None

    @field_validator("backend", "cors_origins", "model", "remote_model", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return _items(value) if isinstance(value, str) else value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return _pairs(value) if isinstance(value, str) else value

    @field_validator("encryption_key", mode="before")
    @classmethod
    def _split_secrets(cls, value: object) -> object:
        # An empty item stays, and is refused below: a comma alone must not mean "no encryption".
        return [item.strip() for item in value.split(",")] if isinstance(value, str) else value

    @field_validator("encryption_key")
    @classmethod
    def _long_enough(cls, value: list[SecretStr]) -> list[SecretStr]:
        if any(len(key.get_secret_value()) < 16 for key in value):
            raise ValueError("each key has at least 16 characters (commas separate keys)")
        return value

    @field_validator("model_aliases", "log_levels", mode="before")
    @classmethod
    def _split_mapping(cls, value: object) -> object:
        return dict(_pairs(value)) if isinstance(value, str) else value

    @field_validator("backend")
    @classmethod
    def _chain(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value) or ("auto" in value and len(value) > 1):
            raise ValueError("must be auto, or a list of different backends")
        return value

    @field_validator("remote_url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        if value is not None and not _is_plain_url(value):
            raise ValueError("must be an http or https URL without a user, a query or a fragment")
        return value

    @field_validator("redis_url")
    @classmethod
    def _known_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(REDIS_SCHEMES):
            raise ValueError(f"must begin with one of {', '.join(REDIS_SCHEMES)}")
        return value

    @field_validator("alert_webhook")
    @classmethod
    def _web_address(cls, value: SecretStr | None) -> SecretStr | None:
        parts = urlsplit(value.get_secret_value() if value else "")
        if value is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("must be an http or https URL")
        return value

    @field_validator("remote_api_key")
    @classmethod
    def _header_value(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch("[!-~]+", value.get_secret_value()):
            raise ValueError("must be printable ASCII without spaces")
        return value

    @model_validator(mode="after")
    def _remote_is_somewhere(self) -> Self:
        if "remote" in self.backend and self.remote_url is None:
            raise ValueError("TTS_BACKEND=remote needs TTS_REMOTE_URL")
        return self

    @field_validator("ledger_url")
    @classmethod
    def _known_ledger(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(SCHEMES):
            raise ValueError(f"must begin with one of {', '.join(SCHEMES)}")
        return value


def _is_plain_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        return False
    # Whatever is before an @ may be a password, which would stand in logs.
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and not set("@?#") & set(text)


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _pairs(text: str) -> list[tuple[str, str]]:
    """Read `name=value,name2=value2`; a value may hold further equals signs."""
    pairs = []
    for item in _items(text):
        name, _, value = (part.strip() for part in item.partition("="))
        if not (name and value):
            raise ValueError("must be name=value pairs separated by commas")
        pairs.append((name, value))
    return pairs
