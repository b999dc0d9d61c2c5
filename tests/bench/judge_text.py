"""What was said against what was heard: a fair count of the words and letters that differ.

A recogniser writes as it pleases: "Dr." or "doctor", "$25" or "twenty-five dollars", "can't" or "cannot". So both sides
are brought to one form first, by the normalisers that Whisper's authors published for this purpose (Radford et al.
2022, appendix C), as transformers has them: case, punctuation and fillers go, and English numbers become digits,
abbreviations and contractions whole words. They know no other language's numbers: such sentences have none. Where
a sentence can rightly be written in several ways (names), each counts, and the nearest is taken.

Chinese and Japanese have no spaces: what counts there are characters. Whisper may write Chinese in the traditional
script and Japanese in another one than the sentence: their rates are too high, alike for each candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from tests.bench.sentences import SPACELESS, Sentence


@dataclass(frozen=True)
class Errors:
    """Edits (substitutions, deletions, insertions) that make what was heard of what was said, of so many units."""

    edits: int
    total: int

    @property
    def rate(self) -> float:
        """May exceed 1: more can be heard than was said."""
        return self.edits / self.total

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.edits + other.edits, self.total + other.total)


def word_errors(sentence: Sentence, heard: str, language: str) -> Errors:
    """In words; in characters where a language has no spaces."""
    if language in SPACELESS:
        return character_errors(sentence, heard, language)
    return _nearest([_words(said, normalised(heard, language)) for said in _forms(sentence, language)])


def character_errors(sentence: Sentence, heard: str, language: str) -> Errors:
    """In characters, spaces left out."""
    found = normalised(heard, language).replace(" ", "")
    return _nearest([_characters(said.replace(" ", ""), found) for said in _forms(sentence, language)])


def normalised(text: str, language: str) -> str:
    """The form in which texts are compared."""
    return " ".join(_normaliser(language == "english")(text).split())


def _forms(sentence: Sentence, language: str) -> list[str]:
    return [normalised(text, language) for text in (sentence.text, *sentence.also)]


def _nearest(found: list[Errors]) -> Errors:
    return min(found, key=lambda errors: errors.rate)


def _words(said: str, heard: str) -> Errors:
    return _count(jiwer.process_words(said, heard))


def _characters(said: str, heard: str) -> Errors:
    return _count(jiwer.process_characters(said, heard))


def _count(found: jiwer.WordOutput | jiwer.CharacterOutput) -> Errors:
    missed = found.substitutions + found.deletions
    return Errors(missed + found.insertions, found.hits + missed)


@cache
def _normaliser(english: bool) -> BasicTextNormalizer | EnglishTextNormalizer:
    return EnglishTextNormalizer({}) if english else BasicTextNormalizer()
