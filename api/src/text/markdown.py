"""Markdown and HTML as the text that is in them, one line feed between blocks.

Owns blocks: headings, lists, quotes, tables, rules, definitions, tags. What has no punctuation of its own to
pause at (a heading, a list item, a table row) is ended like a sentence. `inline` owns what stands in a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from .aligned import AlignedText, joined
from .characters import PICTURE_LED
from .inline import folded, plain
from .literal import BREAK, entities_decoded, fences_shielded, spans_shielded, unshielded
from .tags import untagged

_HARD_BREAK = re.compile(r"(?:(?<=[^ \n]) {2,}|(?<!\\)\\ *)\n")
_SPACES = re.compile(r" {2,}")
_LINE_END = re.compile(r" \n ?|\n ")
_QUOTE = re.compile(r">(?: ?>)*+ ?")

_HEADING = re.compile(r"#{1,6}(?: |$)(?P<body>.*?)(?: #+)?$")
_RULE = re.compile(r"([-*_=])(?: ?\1)+$")
_TABLE_RULE = re.compile(r"(?=[^|]*\|)\|? ?:?-+:? ?(?:\| ?:?-+:? ?)*+\|?$")
_TABLE_ROW = re.compile(r"\|.*\|$")
_BULLET = re.compile(r"[-*+•‣◦·▪▫●○■□–—] (?:\[[ xX]\] )?(?P<body>.*)$")
_NUMBER = re.compile(r"(?P<number>\d{1,9})(?P<mark>[.)]) ")
_DEFINITION = re.compile(
    r"\[(?P<label>[^\[\]]{1,999})\]: ?(?:<|[a-zA-Z][a-zA-Z0-9+.-]*:|\.{0,2}/|#|www\.)\S*(?: [\"'(].*)?$"
)
_FOOTNOTE = re.compile(r"\[\^[^\s\[\]]{1,99}\]: ")
_BOLD_LINE = re.compile(r"(\*\*|__)(?=\S)[^*_]+\1$")

_PIPES = re.compile(r"(?P<before>[^\s|]?) ?(?:\| ?)++")
_PAUSES = ".!?…,;:。！？，、；：؟،؛۔।॥"
_CLOSERS = " \"'”’“»«)]}」』】）*_~"
_WIDE = re.compile("[\u2e80-\ua4cf\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff]")


class _Kind(Enum):
    PARAGRAPH = "paragraph"
    HEADING = "heading"
    ITEM = "item"
    ROW = "row"


@dataclass(slots=True)
class _Block:
    kind: _Kind
    lines: list[AlignedText]


@dataclass(slots=True)
class _Document:
    """The blocks read so far; `open` takes the lines that follow until something ends it."""

    blocks: list[_Block] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    open: _Block | None = None
    in_table: bool = False

    def begin(self, kind: _Kind, line: AlignedText) -> None:
        self.open = _Block(kind, [line])
        self.blocks.append(self.open)

    def alone(self, kind: _Kind, line: AlignedText) -> None:
        self.begin(kind, line)
        self.open = None

    def read(self, line: AlignedText) -> None:
        text = line.text.rstrip(BREAK)
        if not text:
            self.open, self.in_table = None, False
        elif _TABLE_RULE.match(text):
            self._head_table()
        elif rule := _RULE.match(text):
            self._underline(rule)
        elif heading := _HEADING.match(text):
            self.alone(_Kind.HEADING, line[heading.start("body") : heading.end("body")])
        elif definition := _DEFINITION.match(text):
            self.labels.add(folded(definition["label"]))
            self.open = None
        elif _TABLE_ROW.match(text) or (self.in_table and "|" in text):
            self.alone(_Kind.ROW, line.strip(BREAK))
        elif not self._begins_item(line):
            self._read_prose(line)

    def _head_table(self) -> None:
        """The line above a separator row is a row too, even without pipes at its ends."""
        if self.open and "|" in self.open.lines[-1].text:
            self.alone(_Kind.ROW, self.open.lines.pop())
        self.open, self.in_table = None, True

    def _underline(self, rule: re.Match[str]) -> None:
        """A line of marks makes the paragraph right above a heading, and is nothing else."""
        if self.open and rule[1] in "-=" and self.open.kind is _Kind.PARAGRAPH:
            self.open.kind = _Kind.HEADING
        self.open = None

    def _begins_item(self, line: AlignedText) -> bool:
        in_list = self.open is None or self.open.kind is _Kind.ITEM
        number = _NUMBER.match(line.text)
        if bullet := _BULLET.match(line.text):
            self.begin(_Kind.ITEM, line[bullet.start("body") :])
        elif number and (in_list or number["number"] == "1"):
            self.begin(_Kind.ITEM, line.replace([(*number.span("mark"), ".")]))
        else:
            return False
        return True

    def _read_prose(self, line: AlignedText) -> None:
        if footnote := _FOOTNOTE.match(line.text):
            self.begin(_Kind.PARAGRAPH, line[footnote.end() :])
        elif self.open is None or PICTURE_LED.match(line.text):
            self.begin(_Kind.PARAGRAPH, line)
        elif len(self.open.lines) == 1 and _BOLD_LINE.match(self.open.lines[0].text.rstrip(BREAK)):
            self.open.kind = _Kind.HEADING
            self.begin(_Kind.PARAGRAPH, line)
        else:
            self.open.lines.append(line)


def unmarked(text: AlignedText) -> AlignedText:
    """The text without marks; `characters.cleaned` must have prepared it, `tidied` finishes it."""
    text = text.sub(_HARD_BREAK, BREAK + "\n").sub(_SPACES, " ").sub(_LINE_END, "\n").strip(" ")
    lines = fences_shielded(list(_unquoted(text.split("\n"))))
    text = entities_decoded(untagged(spans_shielded(joined(lines, "\n"))))
    document = _Document()
    for line in text.sub(_SPACES, " ").sub(_LINE_END, "\n").split("\n"):
        document.read(line)
    labels = frozenset(document.labels)
    blocks = (_block_text(block, labels) for block in document.blocks)
    return unshielded(joined([block for block in blocks if block.text], "\n"))


def _unquoted(lines: Iterable[AlignedText]) -> Iterator[AlignedText]:
    """The lines without quote marks, and a blank one where a quote begins or ends."""
    was_quoted = False
    for line in lines:
        quote = _QUOTE.match(line.text)
        if bool(quote) is not was_quoted:
            yield line[:0]
        was_quoted = quote is not None
        yield line[quote.end() :] if quote else line


def _block_text(block: _Block, labels: frozenset[str]) -> AlignedText:
    text = plain(_unwrapped(block.lines), labels)
    if block.kind is _Kind.ROW:
        text = _cells(text)
    text = text.strip(BREAK + " ")
    return text if block.kind is _Kind.PARAGRAPH else _ended(text)


def _unwrapped(lines: list[AlignedText]) -> AlignedText:
    """Lines of a paragraph as one: a space takes the place of the line end, nothing in Chinese or Japanese."""
    out: list[AlignedText] = []
    for line in lines:
        out_wide = out and line.text and _WIDE.match(out[-1].text[-1:]) and _WIDE.match(line.text)
        if out and not out_wide:
            out.append(out.pop().then(" "))
        out.append(line)
    return joined(out, "")


def _cells(row: AlignedText) -> AlignedText:
    def comma(match: re.Match[str]) -> str:
        before, last = match["before"], match.end() == len(match.string)
        if last or (not match.start("before") and not before):
            return before
        return before + (" " if before in _PAUSES else ", ")

    return row.sub(_PIPES, comma)


def _ended(text: AlignedText) -> AlignedText:
    """With a full stop of its script, unless it ends in punctuation already or says nothing."""
    bare = text.text.rstrip(_CLOSERS)
    if not bare or bare[-1] in _PAUSES:
        return text
    if _WIDE.match(bare[-1]):
        return text.then("。")
    return text.then("।" if "\u0900" <= bare[-1] <= "\u097f" else ".")
