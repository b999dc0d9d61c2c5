"""HTML and SSML tags: dropped, or turned into the Markdown block that they make.

Owns which `<...>` is a tag. Comparisons, type parameters and placeholders are text and stay.
"""

from __future__ import annotations

import re

from .aligned import AlignedText
from .literal import BREAK

_COMMENT = re.compile(r"<!--(?:(?!-->|<!--).)*+-->", re.DOTALL)
_CODE = re.compile(r"<(script|style|svg)\b(?:(?!</?(?:script|style|svg)\b).)*+</\1\s*>", re.DOTALL | re.IGNORECASE)
_AUTOLINK = re.compile(r"<((?:(?:https?|ftp|mailto|tel):|[^\s<>@]+@)[^\s<>]+)>", re.IGNORECASE)
_TAG = re.compile(
    r"""<(?P<closing>/?)(?P<name>[A-Za-z][A-Za-z0-9:-]*)
        (?P<attributes>(?:[\s/](?:"[^"<]*"|'[^'<]*'|[^<>"'])*+)?)>""",
    re.VERBOSE,
)
_CLOSED = re.compile(r"</([A-Za-z][A-Za-z0-9:-]*)\s*>")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCKS = _names(
    "address article aside blockquote body center dd details div dl dt fieldset figcaption figure footer form head"
    " header html main nav ol p pre section summary table tbody tfoot thead title ul"
)
_INLINE = _names(
    "a abbr acronym audio b bdi bdo big br button canvas caption cite code col colgroup data del dfn em embed font"
    " i iframe img input ins kbd label legend link mark meta object option picture q rp rt ruby s samp select"
    " small source span strike strong sub sup svg textarea time tt u var video wbr"
    " speak break emphasis prosody phoneme voice"
)
_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_KNOWN = _BLOCKS | _INLINE | _HEADINGS | _names("hr li td th tr")


def untagged(text: AlignedText) -> AlignedText:
    """Without comments, scripts and tags; autolinks keep their address."""
    if "<" not in text.text:
        return text
    text = text.sub(_COMMENT, "").sub(_CODE, "").keep(_AUTOLINK)
    closed = frozenset(m[1].lower() for m in _CLOSED.finditer(text.text))
    return text.sub(_TAG, lambda m: _markdown_of(m) if _is_tag(m, closed) else m[0])


def _is_tag(tag: re.Match[str], closed: frozenset[str]) -> bool:
    """Whether it is markup: `a <b and c> d` and `List<T>` are not."""
    name, attributes = tag["name"].lower(), tag["attributes"].strip(" \n/")
    if "=" in attributes:
        return True
    return len(attributes.split()) <= 1 and (name in _KNOWN or name in closed or "-" in name or ":" in name)


def _markdown_of(tag: re.Match[str]) -> str:
    name, closing = tag["name"].lower(), bool(tag["closing"])
    if name in _HEADINGS:
        return "\n\n" if closing else "\n\n# "
    if name == "li":
        return "\n" if closing else "\n- "
    if name == "tr":
        return "|\n\n" if closing else "\n\n|"
    if name in ("td", "th"):
        return "" if closing else "|"
    if name == "br":
        return BREAK
    return "\n\n" if name in _BLOCKS or name == "hr" else ""
