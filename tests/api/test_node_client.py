"""The official OpenAI client for Node against a real server. Skipped only where there is no Node."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.api.wire import FAILS_LATE, STORY, events
from tests.conftest import run_server
from tests.decoding import decoded
from tests.fakes import FakeBackend

NODE = Path(__file__).parent / "node"

pytestmark = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Node is not installed")


@pytest.fixture(scope="module")
def installed(pytestconfig: pytest.Config) -> Path:
    """A folder, kept between runs, with the script and the exact version of the client that package.json names."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("openai-npm-client")
    for file in NODE.iterdir():
        shutil.copy(file, folder)
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]["openai"]
    found = folder / "node_modules" / "openai" / "package.json"
    if not found.exists() or json.loads(found.read_text())["version"] != wanted:
        options = ["--omit=dev", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(["npm", "install", *options], cwd=folder, check=True, capture_output=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def results(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the script saw."""
    folder = tmp_path_factory.mktemp("node")
    with contextmanager(run_server)(folder, FakeBackend(delay_s=0.1), api_keys=[("alice", "right")]) as server:
        run = subprocess.run(
            ["node", "check.mjs", f"{server.url}/v1"],
            cwd=installed,
            env={**os.environ, "STORY": STORY, "FAILS_LATE": FAILS_LATE},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        yield json.loads(run.stdout)
        server.wait_idle()


def sound(format: Any, result: dict[str, Any]) -> float:
    """Seconds."""
    return len(decoded(format, base64.b64decode(result["base64"]))) / 24_000


def test_create(results: dict[str, Any]) -> None:
    assert results["mp3"]["type"] == "audio/mpeg"
    assert sound("mp3", results["mp3"]) == pytest.approx(1.6, abs=0.13)
    assert results["wav"]["type"] == "audio/wav"
    assert sound("wav", results["wav"]) == pytest.approx(1.6)
    assert (results["wav"]["cache"], results["again"]["cache"]) == ("miss", "hit")
    assert results["again"]["base64"] == results["wav"]["base64"]


def test_a_voice_object(results: dict[str, Any]) -> None:
    assert results["voiceObject"]["voice"] == "hum"
    assert sound("pcm", results["voiceObject"]) == pytest.approx(0.8, abs=0.1)


def test_streaming(results: dict[str, Any]) -> None:
    streamed = results["streamed"]
    assert streamed["chunks"] >= 4
    assert streamed["firstMs"] < streamed["totalMs"] / 2
    assert sound("mp3", streamed) == pytest.approx(1.6, abs=0.13)


def test_events(results: dict[str, Any]) -> None:
    assert results["events"]["type"].startswith("text/event-stream")
    *deltas, done = events(results["events"]["text"])
    audio = b"".join(base64.b64decode(event["audio"]) for event in deltas)
    assert len(decoded("mp3", audio)) / 24_000 == pytest.approx(1.6, abs=0.13)
    assert done["type"] == "speech.audio.done"
    *_, last = events(results["failedEvents"]["text"])
    assert (last["type"], last["error"]["code"]) == ("error", "synthesis_failed")


def test_models(results: dict[str, Any]) -> None:
    assert {"tts-1", "gpt-4o-mini-tts", "fake-1"} <= set(results["models"])
    assert results["model"] == "tts-1"


@pytest.mark.parametrize(
    ("case", "name", "status", "code", "param"),
    [
        ("badRequest", "BadRequestError", 400, "voice_not_found", "voice"),
        ("tooFast", "BadRequestError", 400, "invalid_value", "speed"),
        ("notFound", "NotFoundError", 404, "model_not_found", "model"),
        ("authentication", "AuthenticationError", 401, "invalid_api_key", None),
        ("failed", "InternalServerError", 500, "synthesis_failed", None),
    ],
)
def test_errors(results: dict[str, Any], case: str, name: str, status: int, code: str, param: str | None) -> None:
    error = results["errors"][case]
    assert (error["name"], error["status"], error["code"], error["param"]) == (name, status, code, param)
    assert error["requestID"].startswith("req_")


def test_a_cut_answer_is_an_error(results: dict[str, Any]) -> None:
    assert results["errors"]["cut"] is not None
