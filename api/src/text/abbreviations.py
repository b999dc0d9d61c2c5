"""Full stops that do not end a sentence: abbreviations, initials, ordinals.

Owns the word lists. They hold what is common in print in English, German, French, Spanish, Italian,
Portuguese and Dutch; a missing one costs a pause, no more.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_LAST = _words(
    # titles and names
    "mr mrs ms mx dr prof rev hon capt cpt lt sgt maj gov sen messrs st mt fr hr hrn dipl ing"
    " mme mlle mgr sr sra srta dra ud uds exmo sig sigg dott avv egr dhr mevr drs"
    # within a sentence
    " vs cf al approx dept univ eg ie bzw ca evtl ggf inkl exkl zzgl vgl sog bspw tel abb str hrsg geb verh"
    " env ej pag pág núm bijv resp incl excl"
)
_BEFORE_NUMBER = _words(
    "no nr nos nrs fig figs vol vols art abs bd ch chap sec p pp pg par eq ref op aufl kap"
    " jan feb mar apr jun jul aug sep sept oct okt nov dec dez"
)
_OFTEN_LAST = _words("etc usw ecc enz inc ltd co corp llc gmbh jr ff a.m p.m u.s.w")
_ORDINAL_NOUN = re.compile(
    r"(?:Januar|Jänner|Februar|März|April|Mai|Juni|Juli|August|September|Oktober|November|Dezember"
    r"|Jahrhundert|Jahrtausend|Geburtstag|Stock|Klasse|Auflage|Kapitel|Platz|Tag)"
)
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_PARTS = re.compile(r"[-/’'.]")
_LONG_WORD = 4


def keeps_sentence_open(before: str, after: str) -> bool:
    """Whether a full stop is part of the word before it; both arguments may be cut off at their far ends.

    `after` begins with the first visible character of what follows.
    """
    line = before.rpartition("\n")[2]
    word = line.split(" ")[-1].lstrip("\"'“‘„«([{¿¡*")
    if not word:
        return after[:1] in (".", "")
    if word.isdecimal():
        return _is_ordinal(word, line, after)
    if _is_letter(word):
        return word != "I" or after[:1].islower()
    return _is_abbreviation(word.lower(), after)


def _is_letter(word: str) -> bool:
    """An initial; scripts without upper and lower case have words of one letter."""
    return len(word) == 1 and word.upper() != word.lower()


def _is_ordinal(number: str, line: str, after: str) -> bool:
    numbers_item = line == number and len(number) <= 3
    return numbers_item or after[:1].islower() or _ORDINAL_NOUN.match(after) is not None


def _is_abbreviation(word: str, after: str) -> bool:
    last = _PARTS.split(word)[-1]
    if word in _OFTEN_LAST or last in _OFTEN_LAST:
        return after[:1].islower()
    if _DOTTED.fullmatch(word) or last in _NEVER_LAST:
        return True
    if last in _BEFORE_NUMBER:
        return after[:1].isdigit()
    return after[:1].islower() and len(last) < _LONG_WORD
