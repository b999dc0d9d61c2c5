"""Sentences: where they end, and which of them are spoken in one go.

Owns boundaries and lengths, in any script; `normalize` owns what is spoken. A boundary depends only on the
characters before it and on the first words after it, so that text fed piece by piece can be cut by the same
`sentence_ends`: all its boundaries stand but those within `LOOKAHEAD` characters of the end of what is known.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..domain import Segment
from .abbreviations import keeps_sentence_open
from .normalize import AlignedText, is_speakable, spoken

FIRST_LIMIT = 60
"""Characters that the first segment should not exceed, so that sound starts early."""

LIMIT = 250
"""Characters that no segment exceeds; a Chinese, Japanese or Korean one counts as `WIDE_WEIGHT`."""

WIDE_WEIGHT = 3
"""How many Latin letters take as long to say as one ideograph, kana or Hangul syllable, roughly."""

LOOKAHEAD = 64
"""Characters after a full stop within which it is decided what the stop means."""

_SHORT = 40  # two sentences up to this long are spoken together,
_TINY = 15  # one up to this long together with any neighbour,
_COMFORTABLE = 100  # as long as both have no more characters than this
_FEW_WORDS = 3
_VIRAMA = 9  # the canonical combining class of signs that join two consonants
_CONTEXT = 32  # characters looked at on either side of a full stop

Span = tuple[int, int]

_WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff01-\uff60\U0001b000-\U0001b2ff\U00020000-\U0003ffff"
_DENSE = "。！？｡؟۔।॥።၊။។՞՜"  # sentences may end here without a space
_CLOSERS = "\"'”’“)\\]}»«›‹」』】）〉》"
_OPENERS = "\"'“‘„«‹([{「『（¿¡–—- "

_SENTENCE_MARK = re.compile(rf"\n|(?P<signs>[.!?…{_DENSE}]++)(?P<closers>[{_CLOSERS}]*+(?: »(?![^\s.,;!?]))?)")
_QUOTED_ON = re.compile("[」』](?=[とっなはがをもの])")
_CLAUSE_END = re.compile(rf"[,;:][{_CLOSERS}]*+\s+|[，、；：،؛][{_CLOSERS}]*+\s*|\s[–—-]\s+|—\s*")
_WORD_END = re.compile(rf"\s+|(?<=[{_WIDE}])(?=[{_WIDE}])(?![。！？｡，、；：）」』】〉》ーっゃゅょッャュョ])")
_WORD = re.compile(rf"[{_WIDE}]|[^\W_]+")
_WIDE_CHARACTER = re.compile(rf"[{_WIDE}]")


def segment(text: str, *, first_limit: int = FIRST_LIMIT, limit: int = LIMIT) -> list[Segment]:
    """Normalise the text and cut it into segments that tile it; none if nothing in it can be spoken.

    A sentence is a segment; short ones are gathered, over-long ones cut at clauses, else between words, else
    anywhere. Lengths are in characters (wide ones count `WIDE_WEIGHT`) and at least 1: `limit` holds for every
    segment, save punctuation that clings to it. A first sentence above `first_limit` is cut at a clause if it
    has one; without one it is left whole up to twice the limit, and cut between words beyond.
    """
    aligned = spoken(text)
    ruler = _Ruler(aligned.text)
    spans = _speakable(aligned.text, sentences(aligned.text))
    spans = _speakable(aligned.text, [part for span in spans for part in ruler.shortened(span, limit)])
    spans = ruler.gathered(spans, min(first_limit, limit), min(_COMFORTABLE, limit))
    if spans:
        spans = _speakable(aligned.text, [*ruler.headed(spans[0], min(first_limit, limit)), *spans[1:]])
    return list(_tiles(aligned, spans, len(text)))


def sentence_ends(text: str) -> Iterator[int]:
    """The offsets in spoken text at which a sentence has ended, closing quotes and brackets included."""
    for mark in _SENTENCE_MARK.finditer(text):
        if mark[0] == "\n" or _ends_sentence(mark):
            yield mark.end()


def sentences(text: str) -> list[Span]:
    """Spans that tile the spoken text; the white space after a sentence belongs to it."""
    starts = [0, *(_visible(text, end) for end in sentence_ends(text)), len(text)]
    return [(start, end) for start, end in pairwise(starts) if start < end]


def _visible(text: str, index: int) -> int:
    while index < len(text) and text[index].isspace():
        index += 1
    return index


def _ends_sentence(mark: re.Match[str]) -> bool:
    text, signs = mark.string, mark["signs"]
    if signs.strip(".!?…"):
        return _QUOTED_ON.match(text, mark.end() - 1) is None
    following = _visible(text, mark.end())
    if following == len(text):
        return True
    if following == mark.end():
        return False
    after = text[following : following + _CONTEXT].lstrip(_OPENERS)
    if after[:1].islower() and (mark["closers"] or signs.endswith(("...", "…"))):
        return False
    before = text[max(0, mark.start() - _CONTEXT) : mark.start()]
    return signs != "." or not keeps_sentence_open(before, after)


def _speakable(text: str, spans: Iterable[Span]) -> list[Span]:
    """The spans, those without letter or digit merged into the one before or, at the beginning, after."""
    out: list[Span] = []
    silent_from: int | None = None
    for start, end in spans:
        if is_speakable(text[start:end]):
            out.append((start if silent_from is None else silent_from, end))
            silent_from = None
        elif out:
            out[-1] = (out[-1][0], end)
        elif silent_from is None:
            silent_from = start
    return out


def _tiles(aligned: AlignedText, spans: list[Span], length: int) -> Iterator[Segment]:
    """Segments from spans of the spoken text: each begins in the original where its first character does."""
    starts = [0, *(aligned.origins[start] for start, _ in spans[1:]), length]
    for index, (start, end) in enumerate(spans):
        words = aligned.text[start:end].strip().replace("\n", " ")
        yield Segment(words, starts[index], starts[index + 1], final=index == len(spans) - 1)


def _within_letter(text: str, index: int) -> bool:
    """Whether a combining mark, a joiner or a virama holds the characters around the index together."""
    before, after = text[index - 1], text[index]
    held = after in "\u200c\u200d" or unicodedata.category(after).startswith("M")
    return held or before == "\u200d" or unicodedata.combining(before) == _VIRAMA


@dataclass(frozen=True, slots=True)
class _Stops:
    """Offsets, ascending, at which text may be cut."""

    offsets: list[int]

    def between(self, low: int, high: int) -> list[int]:
        """Those above `low`, up to `high`."""
        return self.offsets[bisect_right(self.offsets, low) : bisect_right(self.offsets, high)]

    def nearest(self, target: int, low: int, high: int) -> int | None:
        """The one nearest to `target` among those above `low`, up to `high`."""
        index = bisect_left(self.offsets, target)
        around = [stop for stop in self.offsets[max(0, index - 1) : index + 1] if low < stop <= high]
        return min(around, key=lambda stop: abs(stop - target), default=None)


class _Ruler:
    """Measures one spoken text, and cuts and gathers spans of it by length."""

    def __init__(self, text: str) -> None:
        self._text = text
        weights = (WIDE_WEIGHT if _WIDE_CHARACTER.match(character) else 1 for character in text)
        self._weights = [0, *accumulate(weights)]
        self._clauses = _Stops([match.end() for match in _CLAUSE_END.finditer(text)])
        self._words = _Stops([match.end() for match in _WORD_END.finditer(text)])

    def weight(self, start: int, end: int) -> int:
        return self._weights[end] - self._weights[start]

    def reach(self, start: int, weight: int) -> int:
        """The furthest end of a span from `start` that weighs no more, yet holds a character."""
        return max(start + 1, bisect_right(self._weights, self._weights[start] + weight) - 1)

    def shortened(self, span: Span, limit: int) -> Iterator[Span]:
        """The span in parts of about the same length, none heavier than the limit."""
        start, end = span
        while (weight := self.weight(start, end)) > limit:
            parts = -(-weight // limit)
            target, high = self.reach(start, weight // parts), self.reach(start, limit)
            cut = self._clauses.nearest(target, (start + target) // 2, high)
            cut = cut or self._words.nearest(target, start, high) or self._unbroken(start, high)
            yield start, cut
            start = cut
        yield start, end

    def _unbroken(self, start: int, high: int) -> int:
        """Where to cut a run without spaces: not within a letter, however it is composed."""
        cut = high
        while cut > start + 1 and cut < len(self._text) and _within_letter(self._text, cut):
            cut -= 1
        return cut if cut > start + 1 else high

    def gathered(self, spans: list[Span], first_limit: int, limit: int) -> list[Span]:
        """The spans, short neighbours joined; what the first one may grow to is limited apart."""
        out = spans[:1]
        for span in spans[1:]:
            if self._belong(out[-1], span, first_limit if len(out) == 1 else limit):
                out[-1] = (out[-1][0], span[1])
            else:
                out.append(span)
        return out

    def _belong(self, left: Span, right: Span, limit: int) -> bool:
        last = self._text[left[0] : left[1]].rstrip()[-1]
        lighter, heavier = sorted((self.weight(*left), self.weight(*right)))
        alike = heavier <= _SHORT or lighter <= _TINY
        return alike and lighter + heavier <= limit and unicodedata.category(last).startswith("P")

    def headed(self, span: Span, limit: int) -> list[Span]:
        """The span, its beginning cut off if it is too long to be spoken first."""
        start, end = span
        cut = self._head_end(start, end, limit) if self.weight(start, end) > limit else None
        return [span] if cut is None else [(start, cut), (cut, end)]

    def _head_end(self, start: int, end: int, limit: int) -> int | None:
        near, far = self.reach(start, limit), self.reach(start, 2 * limit)
        clauses = [
            stop for stop in self._clauses.between(start, min(far, end - 1)) if self._parts_well(start, stop, end)
        ]
        early = [stop for stop in clauses if stop <= near]
        if early or clauses:
            return early[-1] if early else clauses[0]
        words = self._words.between(start, near)
        return words[-1] if words and far < end else None

    def _parts_well(self, start: int, cut: int, end: int) -> bool:
        tail = self._text[cut : min(end, cut + _CONTEXT)]
        return all(len(_WORD.findall(part)) >= _FEW_WORDS for part in (self._text[start:cut], tail))
