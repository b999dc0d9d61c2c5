"""What can be asked for: models, voices and languages, by every name that clients use for them.

Resolves names to what the backend serves; knows nothing of requests or sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..backends.base import Backend
from ..domain import Capabilities, Voice
from ..errors import InvalidRequest, NotFound, NotReady

OPENAI_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-tts-2025-12-15")
"""Always accepted, whatever the backend."""

QWEN3_TTS_MODELS = (
    "qwen3-tts-12hz-0.6b-custom-voice",
    "qwen3-tts-12hz-0.6b-base",
    "qwen3-tts-12hz-1.7b-custom-voice",
    "qwen3-tts-12hz-1.7b-voice-design",
    "qwen3-tts-12hz-1.7b-base",
)
"""The published checkpoints: known by name even where they are not loaded."""

PREVIEW_TEXTS = {
    "english": "Hello! This is how I sound. I hope you like it.",
    "german": "Hallo! So klinge ich. Ich hoffe, es gefällt dir.",
    "french": "Bonjour ! Voici ma voix. J'espère qu'elle vous plaît.",
    "spanish": "¡Hola! Así sueno yo. Espero que te guste.",
    "italian": "Ciao! Questa è la mia voce. Spero che ti piaccia.",
    "portuguese": "Olá! É assim que eu falo. Espero que você goste.",
    "chinese": "你好！这就是我的声音，希望你喜欢。",
    "japanese": "こんにちは！これが私の声です。気に入っていただけるとうれしいです。",
    "korean": "안녕하세요! 제 목소리는 이렇습니다. 마음에 드셨으면 좋겠어요.",
    "russian": "Здравствуйте! Вот как я звучу. Надеюсь, вам понравится.",
}
"""What a voice says of itself, by its language; English where a language is missing."""

# ISO 639 codes (the primary subtag of a BCP 47 tag) of the languages that a backend may name.
_LANGUAGE_CODES = {
    "ar": "arabic",
    "cmn": "chinese",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fr": "french",
    "hi": "hindi",
    "it": "italian",
    "ja": "japanese",
    "ko": "korean",
    "nl": "dutch",
    "pl": "polish",
    "pt": "portuguese",
    "ru": "russian",
    "tr": "turkish",
    "zh": "chinese",
}


@dataclass(frozen=True, slots=True)
class ListedVoice:
    """A name that a client may ask for, and the voice that answers to it."""

    id: str
    name: str
    voice: Voice


class Catalogue:
    """Resolves names against what the backend can serve now.

    `model_aliases` maps OpenAI model names to native ids; a name that is absent, or whose checkpoint is not
    loaded, means the best model loaded.
    """

    def __init__(self, backend: Backend, model_aliases: Mapping[str, str]) -> None:
        self._backend = backend
        self._model_aliases = model_aliases

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can serve; NotReady until it can."""
        readiness = self._backend.readiness()
        if not readiness.ready:
            raise NotReady(f"The server is not ready: {readiness.reason or readiness.phase}", retry_after=2)
        return self._backend.capabilities

    def models(self) -> list[str]:
        """Every model id that is served now: OpenAI's names, then native ids."""
        return [*OPENAI_MODELS, *self.capabilities.models]

    def model(self, name: str) -> str:
        """The native id behind `name`; InvalidRequest if unknown or not loaded."""
        lowered = name.lower()
        loaded = self.capabilities.models
        if lowered in OPENAI_MODELS:
            alias = self._model_aliases.get(lowered, "")
            return alias if alias in loaded else loaded[0]
        if lowered in loaded:
            return lowered
        if lowered in QWEN3_TTS_MODELS:
            raise InvalidRequest(
                f"The model '{lowered}' is not loaded on this server. Loaded: {', '.join(loaded)}.",
                param="model",
                code="model_not_loaded",
            )
        raise InvalidRequest(
            f"Unknown model. Available: {', '.join(self.models())}.", param="model", code="model_not_found"
        )

    def voices(self) -> Iterator[ListedVoice]:
        """The backend's own voices, then the aliases, named after the voice that answers."""
        own = {voice.id: voice for voice in self.capabilities.voices}
        for voice in own.values():
            yield ListedVoice(voice.id, voice.name, voice)
        for alias, voice_id in sorted(self.capabilities.aliases.items()):
            yield ListedVoice(alias, f"{alias.capitalize()}: {own[voice_id].name}", own[voice_id])

    def listed_voice(self, voice_id: str) -> ListedVoice:
        """One entry of `voices`, whatever the case; NotFound if there is none."""
        lowered = voice_id.lower()
        for listed in self.voices():
            if listed.id.lower() == lowered:
                return listed
        raise NotFound("There is no such voice.", param="voice_id", code="voice_not_found")

    def voice(self, name: str) -> Voice:
        """The voice behind `name` as a speech request uses it; InvalidRequest if unknown."""
        lowered = name.lower()
        own = {voice.id.lower(): voice for voice in self.capabilities.voices}
        voice = own.get(lowered) or own.get(self.capabilities.aliases.get(lowered, "").lower())
        if voice is None:
            names = ", ".join(listed.id for listed in self.voices())
            raise InvalidRequest(f"Unknown voice. Available: {names}.", param="voice", code="voice_not_found")
        return voice

    def language(self, name: str) -> str:
        """The English name in lower case, or "auto", behind a name or a BCP 47 tag; else InvalidRequest."""
        lowered = name.strip().lower()
        if lowered in ("", "auto"):
            return "auto"
        primary = lowered.replace("_", "-").split("-")[0]
        language = _LANGUAGE_CODES.get(primary, lowered)
        if language in self.capabilities.languages:
            return language
        raise InvalidRequest(
            f"Unsupported language. Available: auto, {', '.join(self.capabilities.languages)}.",
            param="language",
            code="language_not_supported",
        )
