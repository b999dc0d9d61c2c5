"""What the engine raises for its callers. Owns the two classes; the server maps them to its own errors."""

from __future__ import annotations


class EngineError(Exception):
    """A request that the model cannot serve: an unknown language or speaker, a prompt over the limit."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be used: a missing file, another architecture, a missing or damaged tensor."""
