"""Names: models, voices and languages, by every name that clients use for them."""

from __future__ import annotations

import pytest

from api.src.domain import Model, Voice
from api.src.errors import InvalidRequest, NotFound, NotReady
from api.src.speech.catalogue import OPENAI_MODELS, PREVIEW_TEXTS, QWEN3_TTS_MODELS, Catalogue, language
from tests.fakes import OPENAI_VOICES, FakeBackend

NATIVE = "qwen3-tts-12hz-0.6b-custom-voice"
BETTER = "qwen3-tts-12hz-1.7b-custom-voice"


DESIGN = "qwen3-tts-12hz-1.7b-voice-design"
BASE = "qwen3-tts-12hz-1.7b-base"
LANGUAGES = ["chinese", "english", "german", "portuguese"]


class Speaker(FakeBackend):
    """A backend with three models that speak and one that only clones; voices in mixed case as Qwen3-TTS has them."""

    ids = (BETTER, NATIVE, DESIGN, BASE)

    @property
    def models(self) -> list[Model]:
        return [model(id) for id in self.ids]


def model(id: str) -> Model:
    if id == BASE:
        return Model(id, (), {}, LANGUAGES, "1")
    if id == DESIGN:
        return Model(
            id, [Voice("designed", "As described", "english", "d-1", "designed")], {"alloy": "designed"}, [], "1"
        )
    voices = [Voice(name, name.replace("_", " "), "chinese", f"{id} {name}") for name in ("Vivian", "Uncle_Fu")]
    return Model(
        id, voices, {name: ("Uncle_Fu" if name == "coral" else "Vivian") for name in OPENAI_VOICES}, LANGUAGES, "1"
    )


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(Speaker(), {"tts-1": NATIVE, "tts-1-hd": "qwen3-tts-12hz-0.6b-base", "gpt-4o-mini-tts": DESIGN})


# --- models ---


def test_openai_models_come_first_and_what_is_not_loaded_is_not_listed(catalogue: Catalogue) -> None:
    assert catalogue.models() == [*OPENAI_MODELS, BETTER, NATIVE, DESIGN, BASE]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("tts-1", NATIVE),  # as the settings say
        ("TTS-1", NATIVE),
        ("tts-1-hd", BETTER),  # the settings name one that is not loaded: the best
        ("gpt-4o-mini-tts-2025-12-15", BETTER),  # the settings say nothing: the best
        ("gpt-4o-mini-tts", BETTER),  # the settings name one that lacks the voice: the best that has it
        (NATIVE, NATIVE),
        (BETTER.upper(), BETTER),
    ],
)
def test_a_model_by_each_of_its_names(catalogue: Catalogue, asked: str, meant: str) -> None:
    found, voice = catalogue.resolve(asked, "coral")
    assert (found.id, voice.fingerprint) == (meant, f"{meant} Uncle_Fu")


def test_the_voice_chooses_among_the_models(catalogue: Catalogue) -> None:
    assert catalogue.resolve("tts-1", "designed")[0].id == DESIGN
    assert catalogue.resolve("gpt-4o-mini-tts", "alloy")[0].id == DESIGN
    assert catalogue.resolve(DESIGN, "alloy")[1].kind == "designed"


def test_every_listed_model_that_has_voices_can_be_asked_for(catalogue: Catalogue) -> None:
    found = {catalogue.resolve(name, "alloy")[0].id for name in catalogue.models() if name != BASE}
    assert found == {BETTER, NATIVE, DESIGN}


@pytest.mark.parametrize(("asked", "voice"), [(DESIGN, "Vivian"), (DESIGN, "coral"), (NATIVE, "designed")])
def test_a_native_id_is_taken_at_its_word(catalogue: Catalogue, asked: str, voice: str) -> None:
    with pytest.raises(InvalidRequest, match="alloy") as refusal:
        catalogue.resolve(asked, voice)
    assert refusal.value.param == "voice"


def test_a_model_that_only_clones_says_so(catalogue: Catalogue) -> None:
    with pytest.raises(InvalidRequest, match="only clones"):
        catalogue.resolve(BASE, "alloy")


@pytest.mark.parametrize("name", [name for name in QWEN3_TTS_MODELS if name not in Speaker.ids])
def test_a_known_model_that_is_not_loaded_says_so(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest, match="not loaded") as refusal:
        catalogue.resolve(name, "alloy")
    assert (refusal.value.status, refusal.value.param, refusal.value.code) == (400, "model", "model_not_loaded")


@pytest.mark.parametrize("name", ["", "whisper-1", "tts-1 ", "\ud800"])
def test_an_unknown_model_is_refused_without_an_echo(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        catalogue.resolve(name, "alloy")
    assert (refusal.value.param, refusal.value.code) == ("model", "model_not_found")
    assert "whisper" not in refusal.value.message


# --- voices ---


def test_own_voices_and_aliases_are_listed_honestly_and_once(catalogue: Catalogue) -> None:
    voices = catalogue.voices()
    listed = {voice.id: voice for voice in voices}
    assert len(listed) == len(voices)
    assert list(listed)[:3] == ["Vivian", "Uncle_Fu", "designed"]
    assert set(OPENAI_VOICES) < set(listed)
    assert len(OPENAI_VOICES) == 13
    assert listed["coral"].name == "Coral: Uncle Fu"
    assert listed["coral"].voice == listed["Uncle_Fu"].voice
    assert listed["alloy"].voice.fingerprint == f"{BETTER} Vivian"


@pytest.mark.parametrize("asked", ["coral", "Coral", "CORAL", "Uncle_Fu", "uncle_fu", "UNCLE_FU"])
def test_a_voice_by_each_of_its_names(catalogue: Catalogue, asked: str) -> None:
    assert catalogue.resolve("tts-1", asked)[1].id == "Uncle_Fu"
    assert catalogue.listed_voice(asked).voice.id == "Uncle_Fu"


def test_every_listed_voice_can_be_asked_for(catalogue: Catalogue) -> None:
    for listed in catalogue.voices():
        assert catalogue.resolve("tts-1-hd", listed.id)[1] == listed.voice
        assert catalogue.listed_voice(listed.id) == listed


@pytest.mark.parametrize("name", ["", "nobody", "coral ", "uncle fu", "Coral: Uncle Fu", "\ud800"])
def test_an_unknown_voice_is_refused_with_those_there_are(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"Uncle_Fu.*alloy") as refusal:
        catalogue.resolve("tts-1", name)
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
def test_a_language_by_name_or_tag(asked: str, meant: str) -> None:
    assert language(asked, model(NATIVE)) == meant


@pytest.mark.parametrize("asked", ["fr", "French", "klingon", "tlh", "germanic", "d", "-", "x-german"])
def test_a_language_that_is_not_spoken_is_refused(asked: str) -> None:
    with pytest.raises(InvalidRequest, match="auto, chinese, english, german, portuguese") as refusal:
        language(asked, model(NATIVE))
    assert (refusal.value.param, refusal.value.code) == ("language", "language_not_supported")


# --- readiness ---


def test_nothing_is_served_before_the_backend_is_ready() -> None:
    backend = Speaker(ready=False)
    catalogue = Catalogue(backend, {})
    for ask in (catalogue.models, catalogue.voices, lambda: catalogue.resolve("tts-1", "alloy")):
        with pytest.raises(NotReady, match="still loading") as refusal:
            ask()
        assert refusal.value.retry_after >= 1
    backend.ready = True
    assert catalogue.models()


def test_what_the_backend_gains_is_served_at_once() -> None:
    backend = Speaker()
    backend.ids = (NATIVE,)
    catalogue = Catalogue(backend, {})
    assert catalogue.resolve("tts-1", "alloy")[0].id == NATIVE
    backend.ids = (BETTER, NATIVE)
    assert catalogue.resolve("tts-1", "alloy")[0].id == BETTER


def test_there_is_a_preview_for_every_language_of_qwen3_tts() -> None:
    languages = "chinese english japanese korean german french russian portuguese spanish italian"
    assert set(PREVIEW_TEXTS) == set(languages.split())
    assert all(text.strip() for text in PREVIEW_TEXTS.values())
