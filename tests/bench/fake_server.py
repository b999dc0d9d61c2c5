"""`qwen3-tts serve` around the tests' fake backend: the benchmark's own test, and the server without a voice."""

from __future__ import annotations

from api.src.cli import serve_app
from api.src.main import create_app
from api.src.settings import Settings
from api.src.stores.ledger import Ledger
from tests.fakes import FakeBackend


def serve(ledger: Ledger | None = None) -> None:
    """Until it is stopped; `ledger` replaces the one of the settings."""
    settings = Settings()
    app = create_app(settings, backend=FakeBackend(seconds_per_segment=3.0))
    if ledger is not None:
        app.state.tts_service.ledger = ledger
    serve_app(app, settings)


if __name__ == "__main__":
    serve()
