"""The only place where the rooms are joined: settings in, a FastAPI app out, and its life from start to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from .backends.base import Backend
from .building import EMBEDDED_AT_ONCE, Speaker, build_accounts, build_service, build_speaker
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
from .shutdown import EndOfProcess, drain_on_signal
from .speech.access import Access
from .speech.service import Qwen3TTSService
from .stores.digests import BodyDigests

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
    digests = BodyDigests([key.get_secret_value() for key in settings.encryption_key])  # while the cache's are made
    app.state.http_policy = _http_policy(settings, digests)
    app.state.account_breakers = AccountBreakers(settings.account_failures, metrics)
    speaker = Speaker(backend, "It was given.", EMBEDDED_AT_ONCE) if backend else build_speaker(settings)
    app.state.backend_reason = speaker.reason
    app.state.end_of_process = EndOfProcess(settings.drain_timeout_s)
    app.state.tts_service = build_service(
        settings, speaker.backend, metrics, at_once=speaker.at_once, end_process=app.state.end_of_process.begin
    )
    digests.wait()
    for module in (openai_compatible, billing, accounts, system):
        app.include_router(module.router)
    return app


def _http_policy(settings: Settings, digests: BodyDigests) -> HttpPolicy:
    access = Access(
        [(name, key.get_secret_value()) for name, key in settings.api_keys],
        settings.admin_key.get_secret_value() if settings.admin_key else None,
        build_accounts(settings),
        refresh_s=settings.accounts_refresh_s,
        user_header=settings.user_header,
    )
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
