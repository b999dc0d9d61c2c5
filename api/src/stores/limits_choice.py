"""Which limiter a deployment has."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import NotReady
from .limits import Alert, Limiter
from .limits_fallback import FallbackLimiter
from .limits_memory import MemoryLimiter


def limiter_at(
    redis_url: str | None, *, on_alert: Callable[[Alert], None], on_fallback: Callable[[bool], None]
) -> Limiter:
    """Shared through Redis at `redis_url`, or in memory where there is none; not started yet.

    Raises NotReady where Redis's client is not installed.
    """
    memory = MemoryLimiter(on_alert)
    if redis_url is None:
        return memory
    try:
        from .limits_redis import RedisLimiter  # needs redis, an extra
    except ImportError as error:
        raise NotReady("TTS_REDIS_URL needs Redis's client: pip install 'qwen3-tts-server[redis]'.") from error
    return FallbackLimiter(RedisLimiter(redis_url, on_alert), memory, on_change=on_fallback)
