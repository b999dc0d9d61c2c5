"""Markup within a paragraph: links, images, addresses and emphasis give way to their text.

Owns what stands within one block; `markdown` owns the blocks, `literal` has shielded what means itself.
Every rule is a single scan: brackets and emphasis keep stacks, and no pattern can backtrack over what it has read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .aligned import AlignedText, Edit
from .characters import without_pictures

_FOOTNOTE_MARK = re.compile(r"\[\^[^\s\[\]]{1,99}\]")
_BRACKET = re.compile(r"!?\[|\]")
_DESTINATION = re.compile(
    r"""\(\ ?(?:<[^<>]*>|[^()\s<>]*+(?:\([^()\s]*+\)[^()\s<>]*+)*+)  # at most one level of parentheses
        (?:\ (?:"[^"]*"|'[^']*'))?\ ?\)""",
    re.VERBOSE,
)
_REFERENCE = re.compile(r"\[([^\[\]]{0,999})\]")
_MAX_LABEL = 999

# The path may hold any letters that are written with spaces between words; Chinese or Japanese text that
# follows an address without a space is not part of it. Escaped punctuation (private characters) is.
_URL = re.compile(
    r"(?:https?|ftp)://(?:[A-Za-z0-9._~:%+-]*+@)?(?:www\.)?(?P<host>[\w.-]*\w(?::\d+)?)(?P<path>[/?#][!#-;=?-_a-{}~¡-\u2dff\ue021-\ue07e]*)?"
    r"|(?<![\w.])www\.(?P<bare>[\w.-]*\w)(?P<more>[/?#][!#-;=?-_a-{}~¡-\u2dff\ue021-\ue07e]*)?",
    re.IGNORECASE,
)
_MAILTO = re.compile(r"\bmailto:(?=\w)", re.IGNORECASE)
_URL_TAIL = ".,;:!?'\"*_~»”’…"

_DELIMITERS = re.compile(r"\*+|_+|~~+")
_LONE_TICKS = re.compile(r"(?<!\w)`+|`+(?!\w)")


def plain(text: AlignedText, labels: frozenset[str]) -> AlignedText:
    """One block's text without marks; `labels` are the folded labels of the document's reference links."""
    text = _links(text.sub(_FOOTNOTE_MARK, ""), labels)
    text = _emphasis(_addresses(text))
    return without_pictures(text.sub(_LONE_TICKS, "")).strip()


def _links(text: AlignedText, labels: frozenset[str]) -> AlignedText:
    """`[text](url)` and `[text][label]` reduced to the text, images to their description."""
    edits: list[Edit] = []
    openers: list[re.Match[str]] = []
    done = 0
    while bracket := _BRACKET.search(text.text, done):
        done = bracket.end()
        if bracket[0] != "]":
            openers.append(bracket)
        elif openers:
            opener = openers.pop()
            end = _link_end(text.text, opener.end(), bracket.start(), labels)
            if end is not None:
                edits += (opener.start(), opener.end(), ""), (bracket.start(), end, "")
                done = end
    return text.replace(sorted(edits))


def _link_end(text: str, start: int, end: int, labels: frozenset[str]) -> int | None:
    """Where the link ends whose text is `text[start:end]`; None if it is none."""
    if destination := _DESTINATION.match(text, end + 1):
        return destination.end()
    if not labels:
        return None
    reference = _REFERENCE.match(text, end + 1)
    own = text[start:end] if end - start <= _MAX_LABEL else ""
    if reference and folded(reference[1] or own) in labels:
        return reference.end()
    return end + 1 if folded(own) in labels else None


def folded(label: str) -> str:
    """A reference label as Markdown compares it."""
    return " ".join(label.casefold().split())


def _addresses(text: AlignedText) -> AlignedText:
    """An address is spoken as its host: what a listener can keep in mind, in any language."""
    edits: list[Edit] = []
    for url in _URL.finditer(text.text):
        name = "host" if url["host"] else "bare"
        path = url["path"] or url["more"] or ""
        edits.append((url.start(), url.start(name), ""))
        edits.append((url.end(name), url.end(name) + len(_path_alone(path)), ""))
    return text.replace(edits).sub(_MAILTO, "")


def _path_alone(path: str) -> str:
    """The path without the punctuation and the closing brackets of the sentence around it."""
    surplus = {")": path.count(")") - path.count("("), "]": path.count("]") - path.count("[")}
    end = len(path)
    while end > 1 and (path[end - 1] in _URL_TAIL or surplus.get(path[end - 1], 0) > 0):
        end -= 1
        if path[end] in surplus:
            surplus[path[end]] -= 1
    return path[:end]


@dataclass(slots=True)
class _Run:
    """What is left of a run of delimiters; `both` if it may open as well as close."""

    start: int
    end: int
    both: bool

    def __len__(self) -> int:
        return self.end - self.start


def _emphasis(text: AlignedText) -> AlignedText:
    """Delimiters that pair are removed, and lone `**` or `~~` at the edge of a word, as in cut-off text.

    Single `*` or `_` without a partner may mean themselves and stay.
    """
    edits: list[Edit] = []
    open_runs: dict[str, list[_Run]] = {"*": [], "_": [], "~": []}
    for match in _DELIMITERS.finditer(text.text):
        opens, closes = _flanks(text.text, match)
        run = _Run(match.start(), match.end(), opens and closes)
        stack = open_runs[match[0][0]]
        if closes:
            edits += _paired(stack, run)
        if run and opens:
            stack.append(run)
        elif closes:
            edits += _lone(run, match[0][0])
    edits += [edit for mark, stack in open_runs.items() for run in stack for edit in _lone(run, mark)]
    return text.replace(sorted(edits))


def _paired(stack: list[_Run], closer: _Run) -> list[Edit]:
    """Take delimiters off the innermost open runs and off the closer, as many from each."""
    edits: list[Edit] = []
    while closer and stack:
        opener = stack[-1]
        used = min(len(opener), len(closer))
        edits += (opener.end - used, opener.end, ""), (closer.start, closer.start + used, "")
        opener.end -= used
        closer.start += used
        if not opener:
            stack.pop()
    return edits


def _lone(run: _Run, mark: str) -> list[Edit]:
    return [(run.start, run.end, "")] if len(run) >= 2 and mark != "_" and not run.both else []


def _flanks(text: str, run: re.Match[str]) -> tuple[bool, bool]:
    """Whether a run of delimiters can open and can close emphasis, from the characters around it."""
    before = text[run.start() - 1 : run.start()] if run.start() else " "
    after = text[run.end() : run.end() + 1] or " "
    opens, closes = not after.isspace(), not before.isspace()
    if run[0][0] == "_":
        return opens and not before.isalnum(), closes and not after.isalnum()
    if run[0][0] == "*" and before.isalnum() and after.isalnum():
        # 2*3, x**2 and a*b are products; **bold**ly and Chinese, which has no spaces, are emphasis.
        product = before.isdigit() or after.isdigit() or (run[0] == "*" and before.isascii() and after.isascii())
        return (False, False) if product else (opens, closes)
    return opens, closes
