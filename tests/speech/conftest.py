"""The service itself on the test's own event loop, without HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from api.src.building import build_service
from api.src.observe import Metrics
from api.src.settings import Settings
from api.src.speech.service import Qwen3TTSService
from tests.speech.asking import StartService
from tests.speech.launching import Process, launching


@pytest_asyncio.fixture
async def start_service(tmp_path: Path) -> AsyncIterator[StartService]:
    """Start services with settings of the test's own: `await start_service(backend, max_concurrent=1)`."""
    async with AsyncExitStack() as stack:

        async def start(backend: Any, **settings: Any) -> Qwen3TTSService:
            configured = Settings(
                _env_file=None,
                cache_dir=tmp_path / "cache",
                ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}",
                **settings,
            )
            service = build_service(configured, backend, Metrics())
            await service.start()
            stack.push_async_callback(service.close)
            await service.wait_ready()
            return service

        yield start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start a server process: the backend's delay per segment, and TTS_ settings as keyword arguments."""
    yield from launching(tmp_path)
