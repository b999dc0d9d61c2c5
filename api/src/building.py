"""What the settings call for: the backends that speak, what outlives a request, and the service around them.

Owns how each is made from settings; nothing is started here. main joins them with HTTP, the command line uses them
alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .backends.base import Backend
from .backends.chain import Chain
from .backends.choice import Asked, choose
from .backends.embedded import EmbeddedBackend
from .backends.remote import RemoteBackend
from .backends.remote_client import Remote
from .domain import Bounds
from .errors import NotReady
from .observe import Metrics
from .settings import Settings
from .speech.admission import Admission
from .speech.alerts import Alerts
from .speech.catalogue import Catalogue
from .speech.gate import Gate
from .speech.service import Limits, Qwen3TTSService
from .speech.threads import Threads
from .stores.accounts import Accounts
from .stores.cache import SpeechCache
from .stores.cache_choice import cache_at
from .stores.ledger import Ledger
from .stores.ledger_choice import behind_redis, ledger_at, usage_stream_at
from .stores.limits_choice import limiter_at
from .stores.limits_fallback import FallbackLimiter
from .stores.rates import RateCard

if TYPE_CHECKING:
    from .stores.usage_stream import UsageStream

EMBEDDED_AT_ONCE = 4
REMOTE_AT_ONCE = 16
GPU_SLOTS = 64
CPU_SLOTS = 8
"""On a CPU each slot takes of the others' time; on a GPU they share the reading of the weights."""

IO_THREADS = 4
"""Threads beside one encoder per generation: cache look-ups and reads."""

_log = logging.getLogger(__name__)


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
    metrics.breakers.sources.append(behind.breakers)
    return behind


def build_usage_stream(settings: Settings) -> UsageStream:
    """The stream in Redis in which usage events wait. Raises NotReady where there is none."""
    if settings.redis_url is None:
        raise NotReady("TTS_REDIS_URL is not set: no usage events go through Redis.")
    with _in_a_sentence():
        return usage_stream_at(settings.redis_url.get_secret_value())


def build_accounts(settings: Settings) -> Accounts:
    """Accounts and keys, which are where the ledger is; it is the ledger that makes their tables."""
    with _in_a_sentence():
        return Accounts(settings.ledger_url.get_secret_value())


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
    if isinstance(limiter, FallbackLimiter):
        metrics.breakers.sources.append(limiter.breakers)
    return Gate(limiter, defaults, metrics, alerts)


def build_service(
    settings: Settings,
    backend: Backend,
    metrics: Metrics,
    *,
    at_once: int = EMBEDDED_AT_ONCE,
    end_process: Callable[[], None] = lambda: None,
) -> Qwen3TTSService:
    """The service with everything that it owns, not started yet. `at_once`: unless the settings say how many."""
    concurrent = settings.max_concurrent or at_once
    metrics.breakers.sources.append(lambda: backend.breakers())
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
        end_process=end_process,
    )


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What is wrong with a URL in the settings, of which nothing is quoted."""
    try:
        yield
    except ValueError as error:
        raise NotReady(str(error)) from None
