"""How an operator asks for a remote server or a chain, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from api.src.backends.chain import Chain
from api.src.backends.remote import RemoteBackend
from api.src.backends.remote_client import Remote
from api.src.building import EMBEDDED_AT_ONCE, REMOTE_AT_ONCE, build_speaker
from api.src.settings import Settings

URL = "https://speech.example/v1"


def settings(monkeypatch: pytest.MonkeyPatch, **fields: str) -> Settings:
    for name, value in fields.items():
        monkeypatch.setenv(f"TTS_{name.upper()}", value)
    return Settings(_env_file=None)


def test_one_remote_server(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = build_speaker(settings(monkeypatch, backend="remote", remote_url=URL, remote_api_key="sk-planted"))
    assert isinstance(speaker.backend, RemoteBackend)
    assert speaker.backend._remote == Remote(URL, "sk-planted")
    assert (speaker.reason, speaker.at_once) == ("A remote server is asked for.", REMOTE_AT_ONCE)


def test_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = build_speaker(settings(monkeypatch, backend="embedded, remote", remote_url=URL))
    assert isinstance(speaker.backend, Chain)
    assert speaker.backend.name == "embedded,remote"
    assert speaker.reason == "The embedded voice is asked for. A remote server is asked for."
    assert speaker.at_once == max(EMBEDDED_AT_ONCE, REMOTE_AT_ONCE)


def test_every_setting_reaches_the_remote_server(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {
        "remote_sample_rate": "16000",
        "remote_connect_timeout_s": "1",
        "remote_first_byte_timeout_s": "2",
        "remote_total_timeout_s": "3",
        "remote_retries": "4",
        "remote_model": "a, b",
        "remote_revision": "May",
    }
    backend: Any = build_speaker(settings(monkeypatch, backend="remote", remote_url=URL, **fields)).backend
    assert backend._remote == Remote(URL, sample_rate=16_000, connect_s=1, first_byte_s=2, total_s=3, retries=4)
    assert (backend._asked_models, backend._revision) == (["a", "b"], "May")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:1234", "http://host:1234/v1"),
        ("http://host/", "http://host/v1"),
        ("https://host/v1", "https://host/v1"),
        ("https://host/openai/v1/", "https://host/openai/v1"),
    ],
)
def test_the_base_url_is_written_as_for_openai_s_clients(url: str, base: str) -> None:
    assert Remote(url).base == base


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": "remote"},
        {"backend": "qwen3,remote"},
        {"backend": "embedded,embedded"},
        {"backend": "auto,embedded"},
        {"backend": "embedded,none"},
        {"backend": ","},
        {"remote_url": "speech.example"},
        {"remote_url": "ftp://speech.example"},
        {"remote_url": "https://user:sk-planted@speech.example"},
        {"remote_url": "https://speech.example?key=sk-planted"},
        {"remote_url": "https://"},
        {"remote_url": "http://user:80/sk-planted@speech.example"},
        {"remote_url": "http://user:sk-planted/v1"},
        {"remote_api_key": "sk-planted\nX-Evil: 1"},
        {"remote_api_key": "sk-plantéd"},
        {"remote_sample_rate": "100"},
        {"remote_first_byte_timeout_s": "0"},
    ],
)
def test_what_cannot_be_is_refused_without_a_word_of_secrets(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str]
) -> None:
    with pytest.raises(ValidationError) as raised:
        settings(monkeypatch, **fields)
    assert "sk-plant" not in str(raised.value)


def test_the_key_stays_out_of_the_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(monkeypatch, remote_url=URL, remote_api_key="sk-planted", backend="remote")
    speaker = build_speaker(asked)
    assert "sk-planted" not in repr(asked) + str(asked.model_dump()) + repr(speaker) + repr(Remote(URL, "sk-planted"))
