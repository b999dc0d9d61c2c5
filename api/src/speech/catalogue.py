"""What can be asked for: models, voices and languages, by every name that clients use for them.

Resolves names to what the backend serves; knows nothing of requests or sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from ..backends.base import Backend
from ..domain import Model, Voice
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

    `model_aliases` maps OpenAI model names to native ids. With such a name, a request goes to that model if it is
    loaded and has the voice, else to the best one that has it; a native id is taken at its word. Of the backends of a
    chain the first one goes before the next, and models that are down come last.
    """

    def __init__(self, backend: Backend, model_aliases: Mapping[str, str]) -> None:
        self._backend = backend
        self._model_aliases = model_aliases

    def models(self) -> list[str]:
        """Every model id that is served now: OpenAI's names, then native ids."""
        return list(dict.fromkeys([*OPENAI_MODELS, *(model.id for model in self._loaded())]))

    def resolve(self, model: str, voice: str, without: Set[str] = frozenset()) -> tuple[Model, Voice]:
        """Who answers to these two names together, of all backends of a chain but those `without`.

        Raises InvalidRequest if either is unknown, or the pair is not served.
        """
        candidates = [known for known in self._candidates(model) if known.backend not in without]
        for candidate in candidates:
            if found := _voice_of(candidate, voice):
                return candidate, found
        names = ", ".join(listed.id for listed in _listed(candidates)) or "none, this model only clones"
        raise InvalidRequest(f"Unknown voice. Available: {names}.", param="voice", code="voice_not_found")

    def voices(self) -> list[ListedVoice]:
        """The models' own voices, then the aliases, named after the voice that answers."""
        return _listed(self._loaded())

    def listed_voice(self, voice_id: str) -> ListedVoice:
        """One entry of `voices`, whatever the case; NotFound if there is none."""
        lowered = voice_id.lower()
        for listed in self.voices():
            if listed.id.lower() == lowered:
                return listed
        raise NotFound("There is no such voice.", param="voice_id", code="voice_not_found")

    def _loaded(self) -> Sequence[Model]:
        """What the backend can serve; NotReady until it can."""
        readiness = self._backend.readiness()
        if not readiness.ready:
            raise NotReady(f"The server is not ready: {readiness.reason or readiness.phase}", retry_after=2)
        return self._backend.models

    def _candidates(self, name: str) -> Sequence[Model]:
        """The models that may answer to `name`, best first."""
        loaded = sorted(self._loaded(), key=lambda model: model.down)
        lowered = name.lower()
        if lowered in OPENAI_MODELS:
            return sorted(loaded, key=self._preference(lowered, loaded))
        if named := [model for model in loaded if model.id.lower() == lowered]:
            return named
        if lowered in QWEN3_TTS_MODELS:
            ids = ", ".join(dict.fromkeys(model.id for model in loaded))
            raise InvalidRequest(
                f"The model '{lowered}' is not loaded on this server. Loaded: {ids}.",
                param="model",
                code="model_not_loaded",
            )
        raise InvalidRequest(
            f"Unknown model. Available: {', '.join(self.models())}.", param="model", code="model_not_found"
        )

    def _preference(self, name: str, loaded: Sequence[Model]) -> Callable[[Model], tuple[bool, bool, int, bool]]:
        """Which models an OpenAI name means, as a sorting key: a remote server may serve one under that very name."""
        alias = self._model_aliases.get(name)
        backends = list(dict.fromkeys(model.backend for model in loaded))
        return lambda model: (model.down, model.id != alias, backends.index(model.backend), model.id.lower() != name)


def language(name: str, model: Model) -> str:
    """The English name in lower case, or "auto", behind a name or a BCP 47 tag; InvalidRequest if `model` lacks it."""
    lowered = name.strip().lower()
    if lowered in ("", "auto"):
        return "auto"
    primary = lowered.replace("_", "-").split("-")[0]
    found = _LANGUAGE_CODES.get(primary, lowered)
    if found in model.languages:
        return found
    raise InvalidRequest(
        f"Unsupported language. Available: auto, {', '.join(model.languages)}.",
        param="language",
        code="language_not_supported",
    )


def _voice_of(model: Model, name: str) -> Voice | None:
    lowered = name.lower()
    own = {voice.id.lower(): voice for voice in model.voices}
    return own.get(lowered) or own.get(model.aliases.get(lowered, "").lower())


def _listed(models: Sequence[Model]) -> list[ListedVoice]:
    """Of voices and aliases that several models have, the best model's."""
    own: dict[str, ListedVoice] = {}
    aliases: dict[str, ListedVoice] = {}
    for model in models:
        voices = {voice.id: voice for voice in model.voices}
        for voice in voices.values():
            own.setdefault(voice.id, ListedVoice(voice.id, voice.name, voice))
        for alias, voice_id in model.aliases.items():
            name = f"{alias.capitalize()}: {voices[voice_id].name}"
            aliases.setdefault(alias, ListedVoice(alias, name, voices[voice_id]))
    return [*own.values(), *(aliases[alias] for alias in sorted(aliases))]
