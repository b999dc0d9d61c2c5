"""The words that all rooms share. Plain values: no HTTP, no settings, no behaviour beyond arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 24_000
"""Hz of everything that leaves the server, on every backend."""

FRAME_SECONDS = Fraction(2, 25)
"""Length of one codec frame of Qwen3-TTS 12 Hz (80 ms); the unit of output tokens on every backend."""

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

_NAME = r"[A-Za-z0-9._@-]{1,128}"
ACCOUNT_NAME = f"^{_NAME}$"
"""What the name of an account may be, and of an end user; as both Python and JSON Schema read it."""

STORED_NAME = rf"^{_NAME}(:({_NAME}|\*))?$"
"""`NAME`, `NAME:USER` for an end user of it, `NAME:*` for all that have no account of their own."""

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much an account may ask for. None: as much as the deployment lets everyone; 0: without a bound.

    `alert_characters_per_day` refuses nothing: beyond it the operator is told.
    """

    requests_per_minute: int | None = None
    concurrent: int | None = None
    characters_per_day: int | None = None
    alert_characters_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks and who pays. Its keys come and go; the name stays.

    `user`: the end user for whom a trusted account asks, empty for none. The account pays and its `bounds` hold for all
    its users together; `user_bounds` hold for this one. `log_level` is the least level of its log lines, empty for the
    server's.
    """

    name: str
    admin: bool = False
    user: str = ""
    bounds: Bounds = Bounds()
    user_bounds: Bounds = Bounds()
    log_level: str = ""


@dataclass(frozen=True, slots=True)
class StoredAccount:
    """What is stored of an account, or of end users: `NAME:USER` is one of NAME's, `NAME:*` all that have no row.

    `trusted`: it may say for which end user it asks. Times here and below are Unix seconds.
    """

    name: str
    bounds: Bounds
    trusted: bool
    log_level: str
    disabled: bool
    created_at: float


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is stored of an API key; the key itself is not. `hint` is its first characters, to recognise it by."""

    id: str
    account: str
    hint: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def opens(self, now: float) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to which account. `detail` depends on the act and holds no secret."""

    id: int
    at: float
    actor: str
    act: str
    account: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """One spoken request, free of HTTP.

    `voice`, `model` and `language` are as the client wrote them until the service has resolved them: a backend
    gets a native model id, and the language as its English name in lower case or "auto". `backend`, empty until then,
    is the name of the one that speaks. `user` is the end user for whom the account asks, empty for none. `store` false
    means: neither read from the cache nor write to it.
    `idempotency_key` and `body_digest` tell a repeat from a new request that reuses the key by mistake; under
    `older_digests` the same body may have been known before.
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
    older_digests: tuple[str, ...] = ()
    backend: str = ""
    user: str = ""


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
    """What one request used and what was charged for it. `at` is Unix time in seconds.

    `user`: the end user for whom the account asked, empty for none.
    """

    request_id: str
    account: str
    model: str
    voice: str
    characters: int
    audio_ms: int
    outcome: Outcome
    price_micros: int
    at: float
    user: str = ""


@dataclass(frozen=True, slots=True)
class UsageBacklog:
    """Usage events on their way to the ledger, where they go there through Redis.

    `stream` of them are in Redis, the oldest for `oldest_s` seconds; `memory` wait in this process. `dead_letters` are
    entries that no ledger takes. `dropped`, a count that never falls, are those that this process had no room for.
    """

    stream: int = 0
    oldest_s: float = 0.0
    memory: int = 0
    dead_letters: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a part can do its work now; if not, in which phase it is and why."""

    ready: bool
    phase: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a backend serves now.

    `id` is its native id. `aliases` maps lower-case voice names (the OpenAI ones among them) to ids of `voices`.
    `languages` are English names in lower case. `revision` changes whenever the same request would sound different.
    `backend` is the name of the member of a chain that serves it, empty without a chain. `down`: nothing new can be had
    of it now, so that others are asked first. `weights` says how they are held, and why, where that can be chosen.
    """

    id: str
    voices: Sequence[Voice]
    aliases: Mapping[str, str]
    languages: Sequence[str]
    revision: str
    backend: str = ""
    down: bool = False
    weights: str = ""


@dataclass(frozen=True, slots=True)
class ModelStats:
    """The engine of one model at a glance.

    Requests are the engine's own: one for each segment of a text, and the warm-up. `waiting` ones have no slot yet;
    of those with a slot, `paused` ones are too far ahead of their listener, `active` are the others. `step_seconds`
    is the running mean of a step that made frames, 0 before the first. `frames`, and the requests `finished` by their
    finish_reason, count from the start of the backend: they never fall.
    """

    waiting: int = 0
    active: int = 0
    paused: int = 0
    step_seconds: float = 0.0
    frames: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    uncaptured: int = 0

    def after(self, earlier: ModelStats) -> ModelStats:
        """These figures, with the counts of an engine that ran before and is gone."""
        reasons = {**earlier.finished, **self.finished}
        finished = {reason: earlier.finished.get(reason, 0) + self.finished.get(reason, 0) for reason in reasons}
        uncaptured = earlier.uncaptured + self.uncaptured
        return replace(self, frames=earlier.frames + self.frames, finished=finished, uncaptured=uncaptured)
