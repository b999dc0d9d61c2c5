"""What crosses the engine's border: requests, limits, sound and its end. Plain data, without tensors.

Owns the words alone; what becomes of a request is the scheduler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length", "stuck", "cancelled", "deadline", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


class EngineStopped(RuntimeError):
    """The engine takes no requests: it was stopped, or its thread has died."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the engine's work and its patience.

    prompt_tokens: of all prompts of one step, though a longer one goes alone. codec_frames: of one step, besides first
    chunks. chunk_frames: of one slot's chunk. outbox_frames: made and not yet taken by the listener; a slot that has as
    many is paused. frame_s: what a frame sounds. little_lead_s: less than this much sound ahead makes a chunk urgent.
    aging_s: how much later a request is served for each level of its priority. patience_s: a slot that waits as long
    for text or for its listener ends with "deadline"; None for ever. repeat_frames: of first codes going around in a
    circle of repeat_period or less, and silence_frames, until a run counts as stuck; 0 for never.

    Raises:
        ValueError: bounds under which a slot could wait for ever.
    """

    slots: int = 8
    prompt_tokens: int = 1024
    codec_frames: int = 64
    chunk_frames: int = 16
    outbox_frames: int = 250
    frame_s: float = 0.08
    little_lead_s: float = 0.12
    aging_s: float = 2.0
    patience_s: float | None = 60.0
    repeat_frames: int = 50
    repeat_period: int = 4
    silence_frames: int = 75

    def __post_init__(self) -> None:
        if min(self.slots, self.prompt_tokens, self.chunk_frames, self.repeat_period) < 1:
            raise ValueError("slots, prompt_tokens, chunk_frames and repeat_period must be 1 or more")
        if self.codec_frames < max(self.slots, self.chunk_frames):
            raise ValueError("codec_frames must be enough for a frame of each slot, and for a chunk")
        if self.outbox_frames < self.chunk_frames:
            raise ValueError("outbox_frames must be enough for a chunk")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the engine. `prompt` and `sampling` are for the runner alone.

    prompt_tokens: rows that the prefill costs. max_frames: the budget, from the text's length. priority: 0 goes first.
    deadline_s: from the submission to the first sound. text_open: more text will come, by append, up to finish.
    starts_empty: the prompt has no text of its own yet, and waits for the first append.
    """

    prompt: Any
    sampling: Any = None
    prompt_tokens: int
    max_frames: int
    priority: int = 0
    deadline_s: float | None = None
    text_open: bool = False
    starts_empty: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_frames < 1:
            raise ValueError("prompt_tokens and max_frames must be 1 or more")
        if self.starts_empty and not self.text_open:
            raise ValueError("a prompt without text needs open text")


class Sound(NamedTuple):
    """A slot's next frames: samples (frames * samples per frame,) float32 mono, codes (frames, code groups)."""

    samples: NDArray[np.float32]
    codes: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Delivery:
    """Sound for one request: frames `first_frame` up to `first_frame + frames`. The last one has the `finish_reason`.

    `sound` is None where there are no frames, as in an end without sound. `error` goes with the reason "error".
    """

    first_frame: int
    frames: int
    sound: Sound | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Stats:
    """The engine at a glance: requests by what they do, the running mean of what a step takes, frames made so far."""

    waiting: int
    active: int
    paused: int
    step_s: float
    frames: int
    finished: dict[FinishReason, int]
