"""Characters: what is invisible, decorative or written in an odd form before it can be spoken.

Owns the rules that hold in any text, marked up or not; markup itself is `markdown`'s.
"""

from __future__ import annotations

import re
import unicodedata

from .aligned import AlignedText

# Ranges as they stand inside a character class. A noncharacter, a private one or a lone surrogate has no sound;
# Hangul fillers count as letters in Unicode though nothing is to be seen or heard of them.
_UNSPOKEN = (
    "\\x00-\\x08\\x0e-\\x1f\\x7f-\\x84\\x86-\\x9f"
    "\\u00ad\\u034f\\u061c\\u115f\\u1160\\u180e\\u200b\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f\\u3164"
    "\\ud800-\\uf8ff\\ufdd0-\\ufdef\\ufeff\\uffa0\\ufff0-\\uffff"
    "\\U0001d173-\\U0001d17a\\U000e0000-\\U0010ffff"
)
# Scripts from Hebrew to Vedic, with their later blocks: there a (non-)joiner changes how a word is read.
_JOINING = "\\u0590-\\u1cff\\ua800-\\uabff\\U00010a00-\\U00011fff"
_DROPPED = re.compile(
    rf"[{_UNSPOKEN}]+|(?<![{_JOINING}])[\u200c\u200d]|[#*]\ufe0f?\u20e3",
)
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028]")
_PARAGRAPH_END = re.compile("\u2029")

# Pictographs, symbols and shapes: Misc Technical, Box Drawing to Dingbats (but for the circled digits), stars and
# blocks, Mahjong tiles to Symbols and Pictographs Extended-A, which holds flags and skin tones too.
_PICTURE = "[\u2300-\u23ff\u2500-\u2775\u2794-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]"
_PICTURE_UNIT = rf"(?:{_PICTURE}[\ufe0e\ufe0f]?|[^\w\s]\ufe0f|\u2139\ufe0f)"
_PICTURES = re.compile(rf" ?{_PICTURE_UNIT}(?: ?{_PICTURE_UNIT})*+ ?")
_VARIATION = re.compile("[\ufe00-\ufe0f\u20e3]+")
PICTURE_LED = re.compile(rf"{_PICTURE_UNIT}|[0-9]\ufe0f?\u20e3")
"""Matches where a line begins with a pictograph or a keycap, as the points of many lists do."""

_CLOSING = ".,!?;:)]}…»”’。，、！？；：）」』】"

_DECOMPOSED = re.compile("[^\\W\\d_][\u0300-\u036f\u3099\u309a]+|[\ufb00-\ufb06]")
_APOSTROPHE = re.compile(r"(?<=\w)[’ʼ‛`´](?=\w)")
_SPACED_DASH = re.compile(r"(?<= )-{2,3}(?= )")
_CLOSE_DASH = re.compile(r"(?<=[^\W\d_])-{2,3}(?=[^\W\d_])")
_SAME_MARK = re.compile(r"([!?,、，。！？;؟।॥…])\1+")
_MIXED_MARKS = re.compile(r"([!?！？]{2})[!?！？]+")
_LONG_ELLIPSIS = re.compile(r"\.{4,}")
_LONG_RULE = re.compile(r"([^\w\s.])\1{3,}")
_LONG_BLANK = re.compile(r"_{3,}")
_SPACE = re.compile(r"\s+")
_SPACE_BEFORE_STOP = re.compile(r" (?=[.,](?:\s|$))")


def _one_to_one() -> dict[int, int]:
    """Odd forms of single characters: spaces, hyphens, double marks, full-width and mathematical letters."""
    spaces = [0x09, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000]
    table = dict.fromkeys(spaces, ord(" ")) | dict.fromkeys([0x2010, 0x2011, 0x2212], ord("-"))
    table |= {0x203C: ord("!"), 0x2047: ord("?"), 0x2048: ord("?"), 0x2049: ord("?")}
    styled = [*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B), *range(0x1D400, 0x1D800)]
    plain = {code: unicodedata.normalize("NFKC", chr(code)) for code in styled}
    return table | {code: ord(form) for code, form in plain.items() if len(form) == 1}


_TABLE = _one_to_one()


def cleaned(text: AlignedText) -> AlignedText:
    """Without invisible and private characters; lines end in a line feed, every other space is a plain one."""
    text = text.sub(_DROPPED, "").sub(_LINE_END, "\n").sub(_PARAGRAPH_END, "\n\n")
    return text.translate(_TABLE)


def without_pictures(text: AlignedText) -> AlignedText:
    """Without emoji, pictographs and shapes, however they are composed; a keycap leaves its digit."""

    def gap(match: re.Match[str]) -> str:
        after = match.string[match.end() : match.end() + 1]
        return " " if match.start() and after and after not in _CLOSING else ""

    return text.sub(_PICTURES, gap).sub(_VARIATION, "")


def tidied(text: AlignedText) -> AlignedText:
    """Letters composed, punctuation not repeated, white space collapsed to one space or, between paragraphs,
    one line feed."""
    text = text.sub(_DECOMPOSED, lambda m: unicodedata.normalize("NFKC", m[0]))
    text = text.sub(_APOSTROPHE, "'").sub(_SPACED_DASH, "–").sub(_CLOSE_DASH, "—")
    text = text.keep(_SAME_MARK).keep(_MIXED_MARKS).sub(_LONG_ELLIPSIS, "...")
    text = text.keep(_LONG_RULE).sub(_LONG_BLANK, " ")
    text = text.sub(_SPACE, lambda m: "\n" if "\n" in m[0] else " ")
    return text.sub(_SPACE_BEFORE_STOP, "").strip()
