"""Encryption at rest: files that only the holder of a key can read, change or name.

Owns the way from a passphrase to keys, and what a sealed frame is. Knows neither files nor what is in them.

    passphrase, salt of the folder   -> scrypt -> secret             once, at start
    secret                           -> HKDF   -> a key for names, a key for files
    key for files, salt of the file, -> HKDF   -> key of the file    AES-256-GCM
      what it is the file of
    number of the frame, is it last  ->           nonce

The frames are those of frames.py. As each file has a key of its own, a number is a nonce that never comes
again; as the number and the end are in it, no frame can be moved, repeated, left out or cut off (the STREAM
construction: Hoang, Reyhanitabar, Rogaway and Vizar, "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", 2015). As `context` is in the key, a file is worth nothing in another's place. Not hidden:
how long a file is, how long its frames are, when it was written and read. Not prevented: putting back, whole,
what stood under the same name before.

scrypt rather than HKDF alone: 16 characters may be words that somebody thought of. Its salt (`folder_salt`) is
no secret; it makes a table of guesses good for one folder only.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from .frames import BrokenFrames
from .passphrase import Stretching

MIN_CHARACTERS = 16

_MAGIC = b"TTSSEAL1"
_SALT_BYTES = 32
_KEY_BYTES = 32
_COUNTER_BYTES = 11  # and one that says whether the frame is the last: 12 make a nonce


class FileSeal:
    """Seals and opens the frames of one file. Frame `index` is sealed once only."""

    def __init__(self, header: bytes, key: bytes) -> None:
        self.header = header
        self._aead = AESGCM(key)

    def seal(self, index: int, last: bool, data: bytes) -> bytes:
        return self._aead.encrypt(_nonce(index, last), data, None)

    def open(self, index: int, last: bool, data: bytes) -> bytes:
        """Raises BrokenFrames if this is not frame `index` of this file."""
        try:
            return self._aead.decrypt(_nonce(index, last), data, None)
        except InvalidTag:
            raise BrokenFrames("a sealed frame is not what was written") from None


class SealingKey:
    """One secret: names what it seals, and seals files. Says nothing of itself when printed."""

    header_bytes = len(_MAGIC) + _SALT_BYTES

    def __init__(self, secret: bytes) -> None:
        """From 32 bytes that nobody can guess."""
        if len(secret) != _KEY_BYTES:
            raise ValueError(f"a secret has {_KEY_BYTES} bytes")
        self._names = HKDFExpand(SHA256(), _KEY_BYTES, b"names").derive(secret)
        self._files = HKDFExpand(SHA256(), _KEY_BYTES, b"files").derive(secret)

    @classmethod
    def from_passphrase(cls, passphrase: str, salt: bytes) -> SealingKey:
        """As `from_passphrases`, of one."""
        return cls.from_passphrases([passphrase], salt)[0]

    @classmethod
    def from_passphrases(cls, passphrases: Sequence[str], salt: bytes) -> list[SealingKey]:
        """Takes half a second, so that guessing does too, and for several as the processors allow.

        Raises ValueError for less than MIN_CHARACTERS.
        """
        if any(len(passphrase) < MIN_CHARACTERS for passphrase in passphrases):
            raise ValueError(f"an encryption key has at least {MIN_CHARACTERS} characters")
        begun = [Stretching(passphrase, salt, _KEY_BYTES) for passphrase in passphrases]
        return [cls(stretching.result()) for stretching in begun]

    def name(self, plain: str) -> str:
        """64 hex digits that stand for `plain` and, without the key, tell nothing of it."""
        return hmac.digest(self._names, plain.encode(), "sha256").hex()

    def new(self, context: str) -> FileSeal:
        """For a new file. `context` says what it is the file of."""
        return self._seal(_MAGIC + secrets.token_bytes(_SALT_BYTES), context)

    def existing(self, context: str, header: bytes) -> FileSeal:
        """For a file that begins with `header`. Raises BrokenFrames if no sealed file does."""
        if len(header) != self.header_bytes or not header.startswith(_MAGIC):
            raise BrokenFrames("not a sealed file")
        return self._seal(header, context)

    def _seal(self, header: bytes, context: str) -> FileSeal:
        key = HKDF(SHA256(), _KEY_BYTES, salt=header[len(_MAGIC) :], info=_MAGIC + context.encode())
        return FileSeal(header, key.derive(self._files))


def folder_salt(path: Path) -> bytes:
    """The salt in the file `path`, made if there is none; all processes get the same one.

    Raises ValueError if the file holds something else: a new salt would make all that is sealed unreadable.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        salt = os.pread(number, _SALT_BYTES + 1, 0)
        if not salt:
            salt = secrets.token_bytes(_SALT_BYTES)
            os.pwrite(number, salt, 0)
            os.fsync(number)
            _sync_folder(path.parent)
    finally:
        os.close(number)
    if len(salt) != _SALT_BYTES:
        raise ValueError(f"{path} is damaged: restore it, or remove it together with what is sealed beside it")
    return salt


def _sync_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _nonce(index: int, last: bool) -> bytes:
    return index.to_bytes(_COUNTER_BYTES) + bytes([last])
