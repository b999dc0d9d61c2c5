"""Alive, ready, version, metrics; a server that is not ready or is going; CORS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from api.src.main import create_app
from api.src.settings import Settings
from tests.api.wire import assert_error, speak
from tests.conftest import Server
from tests.fakes import FakeBackend

CHOSEN = {"backend": "fake", "backend_reason": "It was given."}


def test_alive_ready_and_version(house: Server) -> None:
    assert house.client.get("/healthz").json() == {"status": "ok"}
    assert house.client.get("/ready").json() == {"ready": True, "phase": "ready", "reason": "", **CHOSEN}
    version = house.client.get("/version").json()
    assert version == {"version": version["version"], **CHOSEN, "weights": {}}
    assert version["version"][0].isdigit()


def test_metrics_count_requests_by_route_and_status(server: Server) -> None:
    for path in ["/v1/audio/voices", "/v1//audio/voices", "/v1/models/x", "/no/such/<path>"]:
        server.client.get(path)
    speak(server.client)
    speak(server.client)
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    assert 'tts_http_requests_total{route="/v1/audio/voices",status="200"} 2.0' in lines
    assert 'tts_http_requests_total{route="/v1/models/{model_id}",status="404"} 1.0' in lines
    assert 'tts_http_requests_total{route="unmatched",status="404"} 1.0' in lines
    assert 'tts_speech_requests_total{cache="miss"} 1.0' in lines
    assert 'tts_speech_requests_total{cache="hit"} 1.0' in lines
    assert "tts_generated_audio_seconds_total 0.4" in lines
    assert "such" not in answer.text


class NeverReady(FakeBackend):
    """Stays as it is when started."""

    async def start(self) -> None:
        pass


def test_not_ready_yet(start_server: Callable[..., Server]) -> None:
    server = start_server(NeverReady(ready=False))
    answer = server.client.get("/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "phase": "loading", "reason": "still loading", **CHOSEN}
    assert answer.headers["retry-after"].isdigit()
    assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/version").status_code == 200
    for path in ["/v1/models", "/v1/models/tts-1", "/v1/audio/models", "/v1/audio/voices", "/v1/audio/voices/alloy"]:
        refused = server.client.get(path)
        assert_error(refused, 503, code="not_ready")
        assert refused.headers["retry-after"].isdigit()
    server.backend.ready = True
    assert server.client.get("/ready").status_code == 200
    assert server.client.get("/v1/models").status_code == 200


def test_ready_turns_503_when_the_server_drains(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend())
    server.loop.call_soon_threadsafe(server.service.begin_drain)
    answer = server.client.get("/ready")
    assert (answer.status_code, answer.json()["phase"]) == (503, "draining")
    refused = speak(server.client)
    assert_error(refused, 503, code="shutting_down")
    assert refused.headers["retry-after"].isdigit()


async def test_without_a_service_it_is_a_503(tmp_path: Any) -> None:
    settings = Settings(
        _env_file=None,
        cache_dir=tmp_path,
        ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}",
        log_level="error",
        admin_key="the-admin-key",  # whom no database is asked about
    )
    app = create_app(settings, backend=FakeBackend())
    del app.state.tts_service
    transport, headers = httpx.ASGITransport(app), {"Authorization": "Bearer the-admin-key"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        for path in ["/ready", "/version", "/metrics", "/v1/models", "/v1/audio/voices", "/v1/usage"]:
            assert_error(await client.get(path), 503, code="not_ready")
        assert_error(await client.post("/v1/audio/speech", json={"input": "a"}), 503, code="not_ready")


# --- CORS ---


def test_cors_is_off_by_default(house: Server) -> None:
    answer = house.client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_lets_the_listed_origin_read_our_headers(start_server: Callable[..., Server]) -> None:
    server = start_server(FakeBackend(), cors_origins=["https://app.example"], api_keys=[("alice", "key")])
    origin = {"Origin": "https://app.example"}
    preflight = server.client.options(
        "/v1/audio/speech",
        headers={
            **origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert {"authorization", "content-type", "idempotency-key"} <= set(allowed.replace(" ", "").split(","))

    answer = speak(server.client, headers={**origin, "Authorization": "Bearer key"})
    exposed = answer.headers["access-control-expose-headers"].lower().replace(" ", "").split(",")
    ours = {"content-disposition", "x-model", "x-voice", "x-request-id", "x-cache", "retry-after"}
    assert ours <= set(exposed)
    refused = speak(server.client, headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"

    stranger = server.client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers
