"""The only place where the rooms are joined: settings in, a FastAPI app out, and its life from start to stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from .backends.base import Backend
from .backends.chain import Chain
from .backends.choice import Asked, choose
from .backends.embedded import EmbeddedBackend
from .backends.remote import RemoteBackend
from .backends.remote_client import Remote
from .domain import Bounds
from .errors import NotReady
from .logs import configure_logging
from .observe import LEVELS, LogLevels, Metrics, Tracer
from .routers import accounts, billing, openai_compatible, system
from .routers.failures import AccountBreakers
from .routers.guards import HttpPolicy
from .routers.limit_headers import LIMIT_HEADERS
from .routers.middleware import CollapseSlashes, RequestRecord
from .routers.responses import EXCEPTION_HANDLERS
from .settings import Settings
from .shutdown import drain_on_signal
from .speech.access import Access
from .speech.admission import Admission
from .speech.alerts import Alerts
from .speech.catalogue import Catalogue
from .speech.gate import Gate
from .speech.service import Limits, Qwen3TTSService
from .speech.threads import Threads
from .stores.accounts import Accounts
from .stores.cache import SpeechCache
from .stores.cache_choice import cache_at
from .stores.digests import BodyDigests
from .stores.ledger import Ledger
from .stores.ledger_choice import behind_redis, ledger_at
from .stores.limits_choice import limiter_at
from .stores.rates import RateCard

EXPOSED_HEADERS = [
    "Content-Disposition",
    "Retry-After",
    "X-Backend",
    "X-Cache",
    "X-Model",
    "X-Request-Id",
    "X-Voice",
    *LIMIT_HEADERS,
]

EMBEDDED_AT_ONCE = 4
REMOTE_AT_ONCE = 16
GPU_SLOTS = 64
CPU_SLOTS = 8
"""On a CPU each slot takes of the others' time; on a GPU they share the reading of the weights."""

IO_THREADS = 4
"""Threads beside one encoder per generation: cache look-ups and reads."""


_log = logging.getLogger(__name__)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI documents a 422 wherever it validates; this server answers 400 instead."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def create_app(settings: Settings | None = None, *, backend: Backend | None = None) -> FastAPI:
    """The whole server. `backend` replaces the one that the settings name."""
    settings = settings or Settings()
    lines = configure_logging(settings.log_level)
    metrics = Metrics()
    tracer = _build_tracer() if settings.traces else None
    app = _App(
        title="Qwen3-TTS server",
        version=version("qwen3-tts-server"),
        description="OpenAI-compatible text-to-speech.",
        lifespan=_lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # else looked up anew at each request
        middleware=_middleware(settings, metrics, tracer),
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.state.log_lines = lines
    app.state.metrics = metrics
    app.state.tracer = tracer
    app.state.http_policy = _http_policy(settings)
    app.state.account_breakers = AccountBreakers(settings.account_failures, metrics)
    speaker = Speaker(backend, "It was given.", EMBEDDED_AT_ONCE) if backend else build_speaker(settings)
    app.state.backend_reason = speaker.reason
    app.state.tts_service = build_service(settings, speaker.backend, metrics, at_once=speaker.at_once)
    for module in (openai_compatible, billing, accounts, system):
        app.include_router(module.router)
    return app


@dataclass(frozen=True)
class Speaker:
    """A backend, why it is that one, and how many requests it speaks at once."""

    backend: Backend
    reason: str
    at_once: int


def build_speaker(settings: Settings) -> Speaker:
    """The backend, or the chain of them, that the settings or the machine call for."""
    speakers = [_build_member(settings, asked) for asked in settings.backend]
    if len(speakers) == 1:
        return speakers[0]
    chain = Chain([speaker.backend for speaker in speakers])
    return Speaker(chain, " ".join(speaker.reason for speaker in speakers), max(s.at_once for s in speakers))


def _build_member(settings: Settings, asked: Asked) -> Speaker:
    choice = choose(asked, settings.model, settings.device)
    _log.info("the %s backend speaks: %s", choice.backend, choice.reason)
    if choice.backend == "embedded":
        return Speaker(EmbeddedBackend(workers=settings.embedded_workers), choice.reason, EMBEDDED_AT_ONCE)
    if choice.backend == "remote":
        return Speaker(_build_remote(settings), choice.reason, REMOTE_AT_ONCE)
    from .backends.qwen3_tts import Qwen3TTSBackend  # needs torch, which only this backend does

    slots = settings.slots or (CPU_SLOTS if choice.device == "cpu" else GPU_SLOTS)
    qwen3 = Qwen3TTSBackend(
        models=choice.models,
        slots=slots,
        fewer_slots=settings.slots is None,
        device=choice.device,
        cpu_weights=settings.cpu_weights,
        unload_after_s=settings.unload_after_s,
    )
    return Speaker(qwen3, choice.reason, slots)


def _build_remote(settings: Settings) -> RemoteBackend:
    key = settings.remote_api_key
    remote = Remote(
        url=settings.remote_url or "",
        api_key=key.get_secret_value() if key else None,
        sample_rate=settings.remote_sample_rate,
        connect_s=settings.remote_connect_timeout_s,
        first_byte_s=settings.remote_first_byte_timeout_s,
        total_s=settings.remote_total_timeout_s,
        retries=settings.remote_retries,
    )
    return RemoteBackend(remote, models=settings.remote_model, revision=settings.remote_revision)


def build_ledger(settings: Settings) -> Ledger:
    """The ledger behind `settings.ledger_url`, not started yet."""
    with _in_a_sentence():
        return ledger_at(settings.ledger_url.get_secret_value(), lease_s=settings.hold_lease_s)


def build_write_behind(settings: Settings, metrics: Metrics) -> Ledger:
    """The ledger of a service: behind Redis where `settings.redis_url` names one."""
    ledger = build_ledger(settings)
    if settings.redis_url is None:
        return ledger
    behind = behind_redis(
        ledger,
        settings.redis_url.get_secret_value(),
        flush_events=settings.usage_flush_events,
        flush_interval_s=settings.usage_flush_interval_s,
        failures=settings.redis_failures,
        memory_events=settings.usage_memory_events,
        lease_s=settings.hold_lease_s,
    )
    metrics.usage.backlog = behind.backlog
    return behind


def build_accounts(settings: Settings) -> Accounts:
    """Accounts and keys, which are where the ledger is; it is the ledger that makes their tables."""
    with _in_a_sentence():
        return Accounts(settings.ledger_url.get_secret_value())


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What is wrong with a URL in the settings, of which nothing is quoted."""
    try:
        yield
    except ValueError as error:
        raise NotReady(str(error)) from None


def build_cache(settings: Settings) -> SpeechCache:
    """The cache in `settings.cache_dir`; raises rather than leave out the encryption that was asked for."""
    return cache_at(
        settings.cache_dir,
        settings.cache_max_bytes,
        keys=[key.get_secret_value() for key in settings.encryption_key],
        compress=settings.cache_compression == "lz4",
    )


def build_gate(settings: Settings, metrics: Metrics) -> Gate:
    """The limits of accounts, in Redis where `settings.redis_url` names one, not started yet."""
    defaults = Bounds(
        settings.requests_per_minute,
        settings.concurrent_per_account,
        settings.characters_per_day,
        settings.alert_characters_per_day,
    )
    alerts = Alerts(settings.alert_webhook.get_secret_value() if settings.alert_webhook else None, metrics)
    redis_url = settings.redis_url.get_secret_value() if settings.redis_url else None
    limiter = limiter_at(redis_url, on_alert=alerts.tell, on_fallback=metrics.limiter_fallback.set)
    return Gate(limiter, defaults, metrics, alerts)


def build_service(
    settings: Settings, backend: Backend, metrics: Metrics, *, at_once: int = EMBEDDED_AT_ONCE
) -> Qwen3TTSService:
    """The service with everything that it owns, not started yet. `at_once`: unless the settings say how many."""
    concurrent = settings.max_concurrent or at_once
    return Qwen3TTSService(
        backend=backend,
        catalogue=Catalogue(backend, settings.model_aliases),
        cache=build_cache(settings),
        ledger=build_write_behind(settings, metrics),
        rates=RateCard.load(settings.prices_file),
        gate=build_gate(settings, metrics),
        admission=Admission(concurrent, settings.queue_size),
        threads=Threads(concurrent + IO_THREADS),
        metrics=metrics,
        limits=Limits(
            max_input_characters=settings.max_input_characters,
            request_timeout_s=settings.request_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
        ),
    )


def _http_policy(settings: Settings) -> HttpPolicy:
    access = Access(
        [(name, key.get_secret_value()) for name, key in settings.api_keys],
        settings.admin_key.get_secret_value() if settings.admin_key else None,
        build_accounts(settings),
        refresh_s=settings.accounts_refresh_s,
        user_header=settings.user_header,
    )
    digests = BodyDigests([key.get_secret_value() for key in settings.encryption_key])
    return HttpPolicy(access, settings.max_body_bytes, settings.stall_timeout_s, digests.of)


def _build_tracer() -> Tracer:
    """Raises NotReady where OpenTelemetry is not installed."""
    try:
        from .traces import OtelTracer  # an extra
    except ImportError as error:
        raise NotReady("Traces need OpenTelemetry: pip install 'qwen3-tts-server[traces]'.") from error
    return OtelTracer(version("qwen3-tts-server"))


def _middleware(settings: Settings, metrics: Metrics, tracer: Tracer | None) -> list[Middleware]:
    record = Middleware(RequestRecord, metrics=metrics, levels=_levels(settings), tracer=tracer)
    # The slashes first: what a later one replaces in the scope, the record would not see.
    stack = [Middleware(CollapseSlashes), record]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        )
    return stack


def _levels(settings: Settings) -> LogLevels:
    return LogLevels(LEVELS[settings.log_level], {name: LEVELS[level] for name, level in settings.log_levels.items()})


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Qwen3TTSService = app.state.tts_service
    policy: HttpPolicy = app.state.http_policy
    async with AsyncExitStack() as stack:
        stack.enter_context(app.state.log_lines.queued())
        if app.state.tracer is not None:
            stack.push_async_callback(asyncio.to_thread, app.state.tracer.close)
        stack.push_async_callback(policy.access.close)
        stack.push_async_callback(service.close)
        await service.start()
        with drain_on_signal(service.drain):
            yield
