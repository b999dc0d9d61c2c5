"""The words that all rooms share. Plain values: no HTTP, no settings, no behaviour beyond arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 24_000
"""Hz of everything that leaves the server, on every backend."""

FRAME_SECONDS = 0.08
"""Length of one codec frame of Qwen3-TTS 12 Hz; the unit of output tokens where a backend has none."""

AudioFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm", "ogg"]
MEDIA_TYPES: Mapping[AudioFormat, str] = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "ogg": "audio/ogg",
}
"""The Content-Type of each format, as OpenAI's API names them."""

VoiceKind = Literal["built_in", "cloned", "designed"]
Outcome = Literal["completed", "cancelled", "cached", "failed"]

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks and who pays. Its keys come and go; the name stays."""

    name: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """One spoken request, free of HTTP.

    `voice`, `model` and `language` are as the client wrote them until the service has resolved them: a backend
    gets a native model id, and the language as its English name in lower case or "auto". `store` false means:
    neither read from the cache nor write to it. `idempotency_key` and `body_digest` tell a repeat from a new
    request that reuses the key by mistake.
    """

    id: str
    account: str
    model: str
    text: str
    voice: str
    format: AudioFormat = "mp3"
    speed: float = 1.0
    language: str = "auto"
    instructions: str = ""
    seed: int = 0
    store: bool = True
    idempotency_key: str | None = None
    body_digest: str = ""


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice that a backend can speak with. `fingerprint` changes whenever its sound would."""

    id: str
    name: str
    language: str
    fingerprint: str
    kind: VoiceKind = "built_in"
    owner: str | None = None
    reference_text: str | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text spoken in one go.

    `text` is what is spoken; `start` and `end` are offsets into the request's own text. The segments of a
    request tile it: the first starts at 0, each starts where the one before ended, the final one ends at
    the text's length.
    """

    text: str
    start: int
    end: int
    final: bool = False


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Sound of one segment: float32 mono samples in [-1, 1] at `sample_rate` Hz."""

    samples: Samples
    sample_rate: int
    segment: Segment

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, slots=True)
class SpeechChunk:
    """Encoded bytes on their way to the client."""

    data: bytes
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """What one request used and what was charged for it. `at` is Unix time in seconds."""

    request_id: str
    account: str
    model: str
    voice: str
    characters: int
    audio_ms: int
    outcome: Outcome
    price_micros: int
    at: float


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a part can do its work now; if not, in which phase it is and why."""

    ready: bool
    phase: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can serve now.

    `models` are native ids, best first. `aliases` maps lower-case voice names (the OpenAI ones among them)
    to ids of `voices`. `languages` are English names in lower case. `revision` changes whenever the same
    request would sound different.
    """

    models: Sequence[str]
    voices: Sequence[Voice]
    aliases: Mapping[str, str]
    languages: Sequence[str]
    revision: str
    features: frozenset[str] = field(default_factory=frozenset)
