"""Amounts of money as English says them: espeak, which spells for Piper, reads "$45" as "dollar forty-five".

Owns the rewriting of `$`, `£` and `€` before a number; numbers themselves are espeak's.
"""

from __future__ import annotations

import re

_UNITS = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent")}
_PLURALS = {"penny": "pence"}
_AMOUNT = re.compile(
    r"(?<![\w$£€])(?P<sign>[$£€]) ?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<part>\d+))?(?![\w$£€])(?!,\d)"
    r"(?: (?P<scale>thousand|million|billion|trillion)\b)?"
)


def spoken_amounts(text: str) -> str:
    """The text with every plain amount in the order in which it is said: "$4.50" becomes "4 dollars and 50 cents"."""
    return _AMOUNT.sub(_spoken, text)


def _spoken(found: re.Match[str]) -> str:
    unit, small = _UNITS[found["sign"]]
    whole, part, scale = found["whole"].replace(",", ""), found["part"], found["scale"]
    if scale or (part is not None and len(part) != 2):
        number = f"{whole}.{part}" if part else whole
        return f"{number} {scale} {unit}s" if scale else f"{number} {unit}s"
    cents = int(part or 0)
    if not cents:
        return _counted(int(whole), unit)
    return _counted(cents, small) if not int(whole) else f"{_counted(int(whole), unit)} and {_counted(cents, small)}"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit if number == 1 else _PLURALS.get(unit, unit + 's')}"
