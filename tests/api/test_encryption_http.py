"""The whole server with encryption at rest: nothing of a request can be read in the cache's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from api.src.settings import Settings
from tests.conftest import Server, run_server
from tests.fakes import FakeBackend

PASSPHRASE = "the kettle is on again"
TEXT = "The planted merger is off. Nobody may know."
ACCOUNT, KEY = "planted-account", "planted-api-key"


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Server]:
    yield from run_server(
        tmp_path,
        FakeBackend(),
        encryption_key=PASSPHRASE,
        cache_compression="lz4",
        api_keys=f"{ACCOUNT}={KEY}",
    )


@pytest.mark.parametrize("audio_format", ["mp3", "wav"])
def test_the_folder_tells_nothing_of_a_request(encrypted: Server, audio_format: str) -> None:
    body = {"model": "tts-1", "voice": "alloy", "input": TEXT, "response_format": audio_format}
    headers = {"Authorization": f"Bearer {KEY}"}
    spoken = [encrypted.client.post("/v1/audio/speech", json=body, headers=headers) for _ in range(2)]
    assert [answer.headers["X-Cache"] for answer in spoken] == ["miss", "hit"]
    assert spoken[0].content == spoken[1].content
    files = [path for path in (encrypted.folder / "cache").rglob("*") if path.is_file()]
    said = [str(path.relative_to(encrypted.folder)).encode() + path.read_bytes() for path in files]
    assert len(said) == 4, "the salt, the audio, the record and their lock"
    answer = spoken[0].content
    digest = hashlib.sha256(TEXT.encode())
    secrets = [
        TEXT,
        "planted",
        "alloy",
        spoken[0].headers["X-Voice"],
        "tts-1",
        PASSPHRASE,
        audio_format,
        digest.hexdigest(),
    ]
    for secret in [*(text.encode() for text in secrets), digest.digest(), answer[:16], answer[2000:2016]]:
        assert not any(secret in place for place in said), secret


@pytest.mark.parametrize("value", ["fifteen letters", ",", " ", "sixteen letters!,", "sixteen letters!,short"])
def test_a_key_that_is_none_stops_the_server(value: str) -> None:
    with pytest.raises(ValidationError, match="at least 16 characters") as caught:
        Settings(_env_file=None, encryption_key=value)
    assert "letters" not in str(caught.value)
    assert "letters" not in repr(Settings(_env_file=None, encryption_key="sixteen letters!"))
