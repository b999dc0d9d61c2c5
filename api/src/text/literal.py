"""Characters of Markdown that mean themselves: code, escapes and entities.

Owns their protection: they become private characters that no later rule takes for markup, one for one, until
`unshielded` turns them back. `characters.cleaned` has removed private characters from the text itself.
"""

from __future__ import annotations

import html
import re
import string

from .aligned import AlignedText, Edit, joined
from .characters import cleaned

_SHIELDED = {ord(c): 0xE000 + ord(c) for c in string.punctuation + "\n"}
_UNSHIELDED = {private: plain for plain, private in _SHIELDED.items()}

BREAK = "\n".translate(_SHIELDED)
"""A line feed that stays one: it parts lines of code and verse without ending the block they stand in."""

_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})[^~]*$")
_ESCAPE_OR_TICKS = re.compile(r"\\(?P<escaped>[!-/:-@\[-`{-~])|`+")
_TICKS_OR_PARAGRAPH = re.compile(r"`+|\n\n")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def shielded(text: AlignedText) -> AlignedText:
    return text.translate(_SHIELDED)


def unshielded(text: AlignedText) -> AlignedText:
    return text.translate(_UNSHIELDED)


def fences_shielded(lines: list[AlignedText]) -> list[AlignedText]:
    """The lines with each fenced block as one shielded paragraph, without its fences and language tag.

    A fence that is never closed holds to the end, as Markdown has it.
    """
    out: list[AlignedText] = []
    code: list[AlignedText] = []
    fence = ""
    for line in lines:
        marker = _FENCE.match(line.text)
        if not fence and not marker:
            out.append(line)
        elif not fence and marker:
            fence = marker[1] or marker[2]
        elif line.text.startswith(fence) and not line.text.strip(fence[0] + BREAK):
            out += _code_paragraph(code, line)
            code, fence = [], ""
        else:
            code.append(line)
    return [*out, *_code_paragraph(code, code[-1])] if code else out


def _code_paragraph(code: list[AlignedText], fence: AlignedText) -> list[AlignedText]:
    blank_before = code[0][:0] if code else fence[:0]
    return [blank_before, shielded(joined(code, "\n")), fence[:0]]


def spans_shielded(text: AlignedText) -> AlignedText:
    """Inline code without its backticks and escaped punctuation without its backslash, both shielded."""
    closers = _closing_ticks(text.text)
    edits: list[Edit] = []
    done = 0
    while mark := _ESCAPE_OR_TICKS.search(text.text, done):
        start, done = mark.span()
        if escaped := mark["escaped"]:
            edits += (start, start + 1, ""), (start + 1, done, escaped.translate(_SHIELDED))
        elif closer := closers.get(start):
            code = text.text[done : closer[0]].replace("\n", " ")
            edits += (start, done, ""), (done, closer[0], code.translate(_SHIELDED)), (*closer, "")
            done = closer[1]
    return text.replace(edits)


def _closing_ticks(text: str) -> dict[int, tuple[int, int]]:
    """For the start of each run of backticks, the next run as long as it in the same paragraph."""
    closers: dict[int, tuple[int, int]] = {}
    open_runs: dict[int, int] = {}
    for run in _TICKS_OR_PARAGRAPH.finditer(text):
        if run[0] == "\n\n":
            open_runs.clear()
            continue
        length = run.end() - run.start()
        if length in open_runs:
            closers[open_runs[length]] = run.span()
        open_runs[length] = run.start()
    return closers


def entities_decoded(text: AlignedText) -> AlignedText:
    """HTML entities as the characters they stand for, shielded, as they are never markup."""

    def decoded(match: re.Match[str]) -> str:
        character = html.unescape(match[0])
        return cleaned(AlignedText.of(character)).text.translate(_SHIELDED) if character != match[0] else character

    return text.sub(_ENTITY, decoded)
