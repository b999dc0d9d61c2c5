"""What of a text is spoken: Markdown as text rather than marks, no emoji, no invisible characters.

Owns the order of the steps; `characters` and `markdown` own the rules, `aligned` the offsets. Nothing here
depends on a language: numbers and symbols are left for the voice to read.
"""

from __future__ import annotations

import re

from .aligned import AlignedText
from .characters import cleaned, tidied
from .markdown import unmarked

__all__ = ["AlignedText", "is_speakable", "spoken"]

_SPEAKABLE = re.compile(r"[^\W_]")


def spoken(text: str) -> AlignedText:
    """The text as it will be spoken, each character with the offset in `text` that it came from.

    White space is single spaces, and a line feed between paragraphs (list items, headings, table rows and
    lines of code too). Takes time linear in the length of the text, whatever is in it.
    """
    return tidied(unmarked(cleaned(AlignedText.of(text))))


def is_speakable(text: str) -> bool:
    """Whether at least one letter or digit, of any script, is in the text."""
    return _SPEAKABLE.search(text) is not None
