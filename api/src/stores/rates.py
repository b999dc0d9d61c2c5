"""What speech costs. Owns the rate card and its file; knows no accounts and moves no money.

The file is TOML. Prices are integer micro-units per 1000 characters; what a table leaves out is taken from
[default], and what that leaves out is 0:

    [default]
    per_1000_characters = 15000
    cached_per_1000_characters = 1500

    [models.tts-1-hd]
    per_1000_characters = 30000
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_UNIT = 1000
_MAX_RATE = 10**12
_FULL = "per_1000_characters"
_CACHED = "cached_per_1000_characters"


@dataclass(frozen=True, slots=True)
class Rate:
    """Micro-units per 1000 characters, of new speech and of speech from the cache."""

    full: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class RateCard:
    """The rates by model; `default` is for models that are not listed."""

    default: Rate = field(default_factory=Rate)
    models: Mapping[str, Rate] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path | None) -> RateCard:
        """Read a rate file; None is the card on which everything is free.

        Raises ValueError, naming file and key, if the file cannot be read or says something unknown.
        """
        if path is None:
            return cls()
        try:
            with Path(path).open("rb") as file:
                return _card(tomllib.load(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"Rate file {path}: {error}") from error

    def price(self, model: str, characters: int, *, cached: bool) -> int:
        """Micro-units for so many characters, rounded up to a whole one."""
        rate = self.models.get(model, self.default)
        return -(-characters * (rate.cached if cached else rate.full) // _UNIT)


def _card(content: dict[str, object]) -> RateCard:
    _refuse_unknown(content, {"default", "models"}, "")
    default = _rate(content.get("default", {}), "default", Rate())
    models = _table(content.get("models", {}), "models")
    return RateCard(default, {name: _rate(entry, f"models.{name}", default) for name, entry in models.items()})


def _rate(entry: object, name: str, default: Rate) -> Rate:
    table = _table(entry, name)
    _refuse_unknown(table, {_FULL, _CACHED}, f"{name}.")
    for key, value in table.items():
        # A TOML boolean is an int to Python.
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_RATE:
            raise ValueError(f"{name}.{key} must be a whole number from 0 to {_MAX_RATE}, not {value!r}")
    return Rate(table.get(_FULL, default.full), table.get(_CACHED, default.cached))


def _table(entry: object, name: str) -> dict[str, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} must be a table, not {entry!r}")
    return entry


def _refuse_unknown(table: Mapping[str, object], known: set[str], prefix: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{prefix}{key} is unknown; known are {', '.join(sorted(known))}")
