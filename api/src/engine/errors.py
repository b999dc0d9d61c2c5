"""What the engine raises for its callers. Owns the classes; the server maps them to its own errors."""

from __future__ import annotations


class EngineError(Exception):
    """A request that the model cannot serve: an unknown language or speaker, a prompt over the limit."""


class PromptTooLong(EngineError):
    """A text, instruction or reference clip that is too long for a slot."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be used: a missing file, another architecture, a missing or damaged tensor."""


class DeviceLost(Exception):
    """The device takes no more work from this process, whoever asks: only a process of its own can go on."""
