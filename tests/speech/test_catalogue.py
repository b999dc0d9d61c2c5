"""Names: models, voices and languages, by every name that clients use for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from api.src.domain import Capabilities, Voice
from api.src.errors import InvalidRequest, NotFound, NotReady
from api.src.speech.catalogue import OPENAI_MODELS, PREVIEW_TEXTS, QWEN3_TTS_MODELS, Catalogue
from tests.fakes import OPENAI_VOICES, FakeBackend

NATIVE = "qwen3-tts-12hz-0.6b-custom-voice"
BETTER = "qwen3-tts-12hz-1.7b-custom-voice"


class Speaker(FakeBackend):
    """A backend with two models, and voices written in mixed case as Qwen3-TTS has them."""

    @property
    def capabilities(self) -> Capabilities:
        voices = [Voice("Vivian", "Vivian", "chinese", "v-1"), Voice("Uncle_Fu", "Uncle Fu", "chinese", "u-1")]
        aliases = {name: ("Uncle_Fu" if name == "coral" else "Vivian") for name in OPENAI_VOICES}
        return Capabilities([BETTER, NATIVE], voices, aliases, ["chinese", "english", "german", "portuguese"], "1")


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(Speaker(), {"tts-1": NATIVE, "tts-1-hd": "qwen3-tts-12hz-1.7b-base"})


# --- models ---


def test_openai_models_come_first_and_what_is_not_loaded_is_not_listed(catalogue: Catalogue) -> None:
    assert catalogue.models() == [*OPENAI_MODELS, BETTER, NATIVE]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("tts-1", NATIVE),  # as the settings say
        ("TTS-1", NATIVE),
        ("tts-1-hd", BETTER),  # the settings name one that is not loaded: the best
        ("gpt-4o-mini-tts", BETTER),  # the settings say nothing: the best
        ("gpt-4o-mini-tts-2025-12-15", BETTER),
        (NATIVE, NATIVE),
        (BETTER.upper(), BETTER),
    ],
)
def test_a_model_by_each_of_its_names(catalogue: Catalogue, asked: str, meant: str) -> None:
    assert catalogue.model(asked) == meant


def test_every_listed_model_can_be_asked_for(catalogue: Catalogue) -> None:
    assert {catalogue.model(name) for name in catalogue.models()} == {BETTER, NATIVE}


@pytest.mark.parametrize("name", [name for name in QWEN3_TTS_MODELS if name not in (NATIVE, BETTER)])
def test_a_known_model_that_is_not_loaded_says_so(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest, match="not loaded") as refusal:
        catalogue.model(name)
    assert (refusal.value.status, refusal.value.param, refusal.value.code) == (400, "model", "model_not_loaded")


@pytest.mark.parametrize("name", ["", "whisper-1", "tts-1 ", "\ud800"])
def test_an_unknown_model_is_refused_without_an_echo(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        catalogue.model(name)
    assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")
    assert "whisper" not in refusal.value.message


# --- voices ---


def test_own_voices_and_aliases_are_listed_honestly(catalogue: Catalogue) -> None:
    listed = {voice.id: voice for voice in catalogue.voices()}
    assert list(listed)[:2] == ["Vivian", "Uncle_Fu"]
    assert set(OPENAI_VOICES) < set(listed)
    assert len(OPENAI_VOICES) == 13
    assert listed["coral"].name == "Coral: Uncle Fu"
    assert listed["coral"].voice == listed["Uncle_Fu"].voice


@pytest.mark.parametrize("asked", ["coral", "Coral", "CORAL", "Uncle_Fu", "uncle_fu", "UNCLE_FU"])
def test_a_voice_by_each_of_its_names(catalogue: Catalogue, asked: str) -> None:
    assert catalogue.voice(asked).id == "Uncle_Fu"
    assert catalogue.listed_voice(asked).voice.id == "Uncle_Fu"


def test_every_listed_voice_can_be_asked_for(catalogue: Catalogue) -> None:
    for listed in catalogue.voices():
        assert catalogue.voice(listed.id) == listed.voice
        assert catalogue.listed_voice(listed.id) == listed


@pytest.mark.parametrize("name", ["", "nobody", "coral ", "uncle fu", "Coral: Uncle Fu", "\ud800"])
def test_an_unknown_voice_is_refused_with_those_there_are(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"Uncle_Fu.*alloy") as refusal:
        catalogue.voice(name)
    assert (refusal.value.param, refusal.value.code) == ("voice", "voice_not_found")
    with pytest.raises(NotFound) as missing:
        catalogue.listed_voice(name)
    assert missing.value.status == 404


# --- languages ---


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("", "auto"),
        ("auto", "auto"),
        ("AUTO", "auto"),
        ("German", "german"),
        (" german ", "german"),
        ("de", "german"),
        ("de-AT", "german"),
        ("de_CH", "german"),
        ("DE-Latn-DE-1996", "german"),
        ("en-US", "english"),
        ("zh", "chinese"),
        ("zh-Hant-TW", "chinese"),
        ("cmn", "chinese"),
        ("pt-BR", "portuguese"),
    ],
)
def test_a_language_by_name_or_tag(catalogue: Catalogue, asked: str, meant: str) -> None:
    assert catalogue.language(asked) == meant


@pytest.mark.parametrize("asked", ["fr", "French", "klingon", "tlh", "germanic", "d", "-", "x-german"])
def test_a_language_that_is_not_spoken_is_refused(catalogue: Catalogue, asked: str) -> None:
    with pytest.raises(InvalidRequest, match="auto, chinese, english, german, portuguese") as refusal:
        catalogue.language(asked)
    assert (refusal.value.param, refusal.value.code) == ("language", "language_not_supported")


# --- readiness ---


def test_nothing_is_served_before_the_backend_is_ready() -> None:
    backend = Speaker(ready=False)
    catalogue = Catalogue(backend, {})
    for ask in (catalogue.models, lambda: list(catalogue.voices()), lambda: catalogue.voice("alloy")):
        with pytest.raises(NotReady, match="still loading") as refusal:
            ask()
        assert refusal.value.retry_after >= 1
    backend.ready = True
    assert catalogue.models()


def test_what_the_backend_gains_is_served_at_once() -> None:
    class Growing(Speaker):
        models = (NATIVE,)

        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, models=self.models)

    backend = Growing()
    catalogue = Catalogue(backend, {})
    assert catalogue.model("tts-1") == NATIVE
    backend.models = (BETTER, NATIVE)
    assert catalogue.model("tts-1") == BETTER


def test_there_is_a_preview_for_every_language_of_qwen3_tts() -> None:
    languages = "chinese english japanese korean german french russian portuguese spanish italian"
    assert set(PREVIEW_TEXTS) == set(languages.split())
    assert all(text.strip() for text in PREVIEW_TEXTS.values())
