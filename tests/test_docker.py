"""The compose files, the images and the unit: read as their tools would, and compared with what they name.

Nothing is started here: see the README for that. Owns what can be told from the files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.src.settings import Settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
FOREIGN = "open-webui"
"""Its image runs as root and writes to its own folders."""


def services(file: Path) -> dict[str, dict[str, Any]]:
    """The services of a compose file, each with what it extends."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text())["services"]
    return {name: _extended(file, service) for name, service in found.items()}


def _extended(file: Path, service: dict[str, Any]) -> dict[str, Any]:
    if "extends" not in service:
        return service
    base = services(file.parent / service["extends"]["file"])[service["extends"]["service"]]
    return {**base, **service, "build": {**base["build"], **service["build"]}}


CASES = [pytest.param(file, name, id=f"{file.stem} {name}") for file in COMPOSE for name in services(file)]


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile."""
    parts = re.split(r"^FROM \S+ AS (\w+)$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("file", "name"), CASES)
def test_a_service_is_bounded_and_starts_again(file: Path, name: str) -> None:
    service = services(file)[name]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize(("file", "name"), [case for case in CASES if case.values[1] != FOREIGN])
def test_a_service_can_write_to_its_volumes_alone_and_is_not_root(file: Path, name: str) -> None:
    service = services(file)[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if "build" in service:
        stage = stages()[service["build"]["target"]]
        assert "USER tts" in stage
        assert "HEALTHCHECK" in stage
    else:
        assert service["user"] not in ("root", "0")
        assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.stem)
def test_all_that_a_file_names_exists(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    for service in services(file).values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (file.parent / source).exists() if source.startswith(".") else source in content["volumes"]
        for other in service.get("depends_on", []):
            assert other in content["services"]
        names = {name for name in service.get("environment", {}) if name.startswith("TTS_")}
        assert names <= {f"TTS_{name.upper()}" for name in Settings.model_fields}


def test_no_secret_has_a_default() -> None:
    secrets = re.findall(r"\$\{(\w*(?:PASSWORD|_KEY|TOKEN)\w*)(:.)([^}]*)\}", "".join(f.read_text() for f in COMPOSE))
    assert secrets
    assert [name for name, how, default in secrets if how == ":-" and default] == []


def test_the_images_install_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'"\.\[([\w,]+)\]"', (DOCKER / "Dockerfile").read_text())
    assert len(named) == 2
    assert {extra for names in named for extra in names.split(",")} <= set(extras) - {"test", "dev"}


def test_the_unit_starts_again_as_the_containers_do() -> None:
    unit = (ROOT / "systemd" / "qwen3-tts.service").read_text().splitlines()
    assert "Restart=always" in unit
    assert "StartLimitIntervalSec=0" in unit


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    unit = (ROOT / "systemd" / "qwen3-tts.service").read_text()
    program = tmp_path / "qwen3-tts"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "qwen3-tts.service"
    copy.write_text(unit.replace("/opt/qwen3-tts/.venv/bin/qwen3-tts", str(program)))
    found = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
