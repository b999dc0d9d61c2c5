"""What `make serve` installs: Qwen3-TTS where it is asked for or there is a GPU, a driver where a database is. And
which tests run where."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = "echo 'GPU 0: a fast one'"
NO_GPU = "exit 9"


@pytest.mark.parametrize(
    ("nvidia_smi", "environment", "dotenv", "installed"),
    [
        (NO_GPU, {}, "", False),
        (NO_GPU, {"TTS_BACKEND": "qwen3"}, "", True),
        (NO_GPU, {}, "TTS_BACKEND=qwen3\n", True),
        (NO_GPU, {"TTS_BACKEND": "remote,qwen3"}, "", True),
        (NO_GPU, {"TTS_BACKEND": "embedded"}, "TTS_BACKEND=qwen3\n", False),
        (NO_GPU, {"TTS_LEDGER_URL": "postgresql://db/tts"}, "", False),
        (NO_GPU, {}, "TTS_LEDGER_URL=postgresql://db/tts\n", False),
        (GPU, {}, "", True),
        (GPU, {"TTS_BACKEND": "auto"}, "", True),
        (GPU, {"TTS_BACKEND": "embedded"}, "", False),
        (GPU, {}, "TTS_BACKEND=embedded\n", False),
    ],
)
def test_what_serve_installs(
    tmp_path: Path, nvidia_smi: str, environment: dict[str, str], dotenv: str, installed: bool
) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".env").write_text(dotenv)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    tool.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TTS_", "MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", "serve"],
        cwd=tmp_path,
        env=kept | environment | {"PATH": f"{tool.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    base, url = "pico,piper,encryption,lz4", environment.get("TTS_LEDGER_URL", dotenv)
    assert f'".[{base}]"' in done.stdout
    assert (f'".[{base},qwen3]"' in done.stdout) == installed
    assert (f'".[{base},postgres]"' in done.stdout) == ("postgresql" in url)
    assert "qwen3-tts serve" in done.stdout


def test_ci_runs_what_make_test_leaves_out() -> None:
    def commands(target: str) -> str:
        return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert '-m pytest -m "not slow"' in commands("test")
    assert "-m pytest" in commands("test-all")
    assert "slow" not in commands("test-all")
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("TTS_TEST_ALL=1") < script.index("make test-all")
