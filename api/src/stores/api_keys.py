"""What an API key is: how one is made, recognised and digested. Owns no storage; that is accounts.py's.

A key is 256 random bits. Its SHA-256 digest is stored, unsalted and fast: slow hashes and salts protect what people
can guess, and nobody guesses 256 bits; a slow one would only make every request dear. Equal digests mean equal keys, so
that a digest can be looked up; how long that takes tells nothing, for nobody can choose what a digest begins with.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from string import ascii_letters, digits

PREFIX = "sk-tts-"
"""Lets people and scanners of repositories see what they have found."""

_ALPHABET = digits + ascii_letters
_LENGTH = 43
"""Base-62 digits that hold 256 bits."""

_HINT_LENGTH = len(PREFIX) + 4
_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{_LENGTH}}}")


def new_key() -> str:
    """A key that nobody has."""
    number = secrets.randbits(256)
    characters = []
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[digit])
    return PREFIX + "".join(characters)


def has_form(key: str) -> bool:
    """Whether `new_key` could have made it: anything else need not be looked up."""
    return _FORM.fullmatch(key) is not None


def digest_of(key: str) -> bytes:
    """SHA-256 of any text, 32 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def hint_of(key: str) -> str:
    """The first characters, which may be shown: 24 of the 256 bits."""
    return key[:_HINT_LENGTH]
