"""What the documents say is what the code does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

from api.src.main import create_app
from api.src.settings import Settings
from tests.conftest import Server
from tests.fakes import FakeBackend

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def example_settings() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def test_the_example_lists_every_setting() -> None:
    assert set(example_settings()) == {f"TTS_{name.upper()}" for name in Settings.model_fields}


def test_the_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TTS_"):
            monkeypatch.delenv(name)
    defaults = Settings(_env_file=None)
    for name, value in example_settings().items():
        monkeypatch.setenv(name, value)
    assert Settings(_env_file=None) == defaults


def test_the_readme_names_only_settings_that_exist() -> None:
    named = set(re.findall(r"TTS_[A-Z_]+", README))
    assert named <= set(example_settings())


def test_the_readme_lists_every_route(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, cache_dir=tmp_path, ledger_url=f"sqlite:///{tmp_path}/ledger.db")
    app = create_app(settings, backend=FakeBackend())
    documented = set(re.findall(r"^\| `(GET|POST|PATCH|DELETE) (/[^`]+)`", README, re.MULTILINE))
    schema = app.openapi()["paths"]
    served = {(method.upper(), path) for path, methods in schema.items() for method in methods}
    assert documented == served


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(text for text in blocks if containing in text)


def test_the_curl_makes_a_file_that_plays(server: Server, tmp_path: Path) -> None:
    command = block("sh", "curl").replace("http://127.0.0.1:8000", server.url)
    subprocess.run(["sh", "-c", f"set -e; {command}"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with av.open(str(tmp_path / "hello.mp3")) as file:
        assert file.duration
        assert file.streams.audio[0].codec_context.name == "mp3float"


def test_the_python_example_runs(server: Server, tmp_path: Path) -> None:
    program = block("python", "OpenAI").replace("http://127.0.0.1:8000", server.url)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "morning.mp3").stat().st_size > 1000
