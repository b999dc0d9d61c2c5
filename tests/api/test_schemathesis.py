"""Fuzzing from the app's own OpenAPI document: no 500, no status and no body that it does not name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.src.routers import openai_compatible
from tests.conftest import Server
from tests.fakes import FakeBackend

ROOT = Path(__file__).parents[2]
KEYS = {"api_keys": [("alice", "alices-key")], "admin_key": "the-admin-key"}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


def fuzz(server: Server, folder: Path, *arguments: str) -> str:
    """Run Schemathesis as its users do; returns what it printed. Deterministic, except for our own timing."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    options = ["--generation-deterministic", "--no-shrink", "--warnings=off"]
    options += [f"--checks={','.join(CHECKS)}", "--request-timeout=20"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.api.fuzz_hooks", "COLUMNS": "120"}
    run = subprocess.run([*command, *options, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def answered(server: Server, route: str) -> set[str]:
    """The statuses that a route has answered so far."""
    prefix = f'tts_http_requests_total{{route="{route}",status="'
    lines = server.client.get("/metrics").text.splitlines()
    return {line.removeprefix(prefix)[:3] for line in lines if line.startswith(prefix)}


@pytest.mark.parametrize(
    ("settings", "key", "options"),
    [
        pytest.param(
            KEYS,
            "the-admin-key",
            ["--phases=coverage,fuzzing", "--max-examples=40"],
            id="as the admin",
            marks=pytest.mark.slow,
        ),
        pytest.param({}, None, ["--phases=fuzzing", "--max-examples=15"], id="open"),
    ],
)
def test_the_app_keeps_to_its_own_document(
    start_server: Callable[..., Server],
    tmp_path: Path,
    settings: dict[str, Any],
    key: str | None,
    options: list[str],
) -> None:
    server = start_server(FakeBackend(seconds_per_segment=0.02), **settings)
    header = [] if key is None else [f"--header=Authorization: Bearer {key}"]
    printed = fuzz(server, tmp_path, *options, *header)
    assert "Tested: 23" in printed
    for path in ("/v1/audio/speech", "/v1/audio/speech/base64"):
        assert answered(server, path) >= {"200", "400"}
    server.wait_idle()
    assert server.call(server.service.ledger.check) == []


def test_the_fuzzer_would_notice(
    start_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it(*_: Any, **__: Any) -> None:
        raise KeyError

    server = start_server(FakeBackend())
    monkeypatch.setattr(openai_compatible.VoiceInfo, "of", break_it)
    with pytest.raises(AssertionError, match="GET /v1/audio/voices"):
        fuzz(server, tmp_path, "--phases=fuzzing", "--max-examples=1", "--include-path-regex=voices")
