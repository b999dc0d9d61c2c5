"""Text that remembers where each of its characters came from.

Owns the bookkeeping of offsets while text is rewritten, and nothing about what is rewritten or why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Edit = tuple[int, int, str]
"""`(start, end, new)`: the characters from `start` up to `end` give way to `new`."""


@dataclass(frozen=True, slots=True)
class AlignedText:
    """A text and, for each of its characters, the offset in the original that it came from.

    `origins` is as long as `text` and never descends. All methods return a new value.
    """

    text: str
    origins: Sequence[int]

    @classmethod
    def of(cls, original: str) -> AlignedText:
        """The original itself: every character comes from its own place."""
        return cls(original, range(len(original)))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, part: slice) -> AlignedText:
        return AlignedText(self.text[part], self.origins[part])

    def replace(self, edits: Iterable[Edit]) -> AlignedText:
        """Make edits that ascend and do not overlap.

        A replacement as long as what it replaces maps character by character; any other one comes, whole,
        from the place where it begins.
        """
        text: list[str] = []
        origins: list[int] = []
        done = 0
        for start, end, new in edits:
            text += self.text[done:start], new
            origins += self.origins[done:start]
            origins += self.origins[start:end] if len(new) == end - start else [self._origin(start)] * len(new)
            done = end
        return AlignedText("".join(text) + self.text[done:], [*origins, *self.origins[done:]])

    def sub(self, pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str]) -> AlignedText:
        """Replace every match; a string is taken literally, without group references."""
        if pattern.search(self.text) is None:
            return self
        matches = pattern.finditer(self.text)
        if isinstance(replacement, str):
            return self.replace((m.start(), m.end(), replacement) for m in matches)
        return self.replace((m.start(), m.end(), replacement(m)) for m in matches)

    def keep(self, pattern: re.Pattern[str], group: int = 1) -> AlignedText:
        """Reduce every match to one of its groups."""
        edits: list[Edit] = []
        for m in pattern.finditer(self.text):
            edits += (m.start(), m.start(group), ""), (m.end(group), m.end(), "")
        return self.replace(edits)

    def translate(self, table: Mapping[int, int]) -> AlignedText:
        """Exchange single characters for single characters."""
        return AlignedText(self.text.translate(table), self.origins)

    def strip(self, characters: str | None = None) -> AlignedText:
        """Without the given characters (white space by default) at both ends."""
        if self.text.strip(characters) == self.text:
            return self
        start = len(self.text) - len(self.text.lstrip(characters))
        return self[start : start + len(self.text.strip(characters))]

    def split(self, separator: str) -> list[AlignedText]:
        """The parts between separators, as `str.split`."""
        parts: list[AlignedText] = []
        start = 0
        for part in self.text.split(separator):
            parts.append(self[start : start + len(part)])
            start += len(part) + len(separator)
        return parts

    def then(self, literal: str) -> AlignedText:
        """Followed by characters that the original does not have: they come from where this text,
        which must not be empty, ends."""
        return AlignedText(self.text + literal, [*self.origins, *[self.origins[-1]] * len(literal)])

    def _origin(self, index: int) -> int:
        if not self.origins:
            return 0
        return self.origins[min(index, len(self.origins) - 1)]


def joined(parts: Iterable[AlignedText], separator: str) -> AlignedText:
    """The parts with a separator between; each separator comes from where the text before it ends."""
    text: list[str] = []
    origins: list[int] = []
    for part in parts:
        if text:
            text.append(separator)
            origins += [origins[-1] if origins else 0] * len(separator)
        text.append(part.text)
        origins += part.origins
    return AlignedText("".join(text), origins)
