"""Settings from the environment, as people write them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from api.src.settings import Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a=1", [("a", "1")]),
        (" a = 1 , b=2=3,", [("a", "1"), ("b", "2=3")]),
        ("a=1,a=2", [("a", "1"), ("a", "2")]),
    ],
)
def test_keys_are_pairs(environment: pytest.MonkeyPatch, text: str, expected: list[tuple[str, str]]) -> None:
    environment.setenv("TTS_API_KEYS", text)
    keys = Settings(_env_file=None).api_keys
    assert [(name, key.get_secret_value()) for name, key in keys] == expected


@pytest.mark.parametrize("text", ["sk-planted", "a=sk-planted,sk-planted", "=sk-planted"])
def test_a_mistyped_secret_is_not_printed(environment: pytest.MonkeyPatch, text: str) -> None:
    environment.setenv("TTS_API_KEYS", text)
    with pytest.raises(ValidationError) as raised:
        Settings(_env_file=None)
    assert "sk-planted" not in str(raised.value)


def test_secrets_stay_out_of_the_representation(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TTS_API_KEYS", "a=sk-planted")
    environment.setenv("TTS_ADMIN_KEY", "sk-planted")
    settings = Settings(_env_file=None)
    assert "sk-planted" not in repr(settings) + str(settings.model_dump())


def test_lists_are_separated_by_commas(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TTS_CORS_ORIGINS", "http://a, http://b,")
    environment.setenv("TTS_MODEL_ALIASES", "tts-1=x,tts-1-hd=y")
    settings = Settings(_env_file=None)
    assert settings.cors_origins == ["http://a", "http://b"]
    assert settings.model_aliases == {"tts-1": "x", "tts-1-hd": "y"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("TTS_PORT", "70000"), ("TTS_MAX_CONCURRENT", "0"), ("TTS_LEDGER_URL", "mysql://x"), ("TTS_BACKEND", "none")],
)
def test_what_cannot_be_is_refused(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings(_env_file=None)
