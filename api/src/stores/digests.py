"""What is kept of a body beside its Idempotency-Key, to tell a repeat from another request under the same key.

Without encryption: SHA-256. With it a plain hash would let anybody who reads the ledger confirm a text that he has
guessed, so it is an HMAC under a key that is derived from the operator's (scrypt, as for the cache, for it may be made
of words; with a salt that is the same everywhere, as several servers with folders of their own share one ledger). The
digest begins with the name of its key:

    <64 hex digits>                     SHA-256
    <8 hex digits>:<64 hex digits>      HMAC-SHA-256 under the key of that name

A repeat is recognised across rotations by whoever still has the old key. Of a digest under a key that nobody has any
more nothing can be said: `same_body` then takes the request for a repeat, as that charges nothing twice and refuses
nothing that is right.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from .passphrase import Stretching

_SALT = b"qwen3-tts-server: digests of bodies"


class BodyDigests:
    """Makes digests of bodies. Says nothing of its keys when printed."""

    def __init__(self, passphrases: Sequence[str] = ()) -> None:
        """The first passphrase makes what is stored, the others are recognised. Begins with what takes long: `wait`."""
        self._stretching = [Stretching(passphrase, _SALT, 64) for passphrase in passphrases]
        self._keys: list[tuple[str, bytes]] | None = None if passphrases else []

    def wait(self) -> None:
        """Half a second after the beginning at the earliest. Raises what went wrong."""
        self._keys = [_named(stretching.result()) for stretching in self._stretching]

    def of(self, body: bytes) -> tuple[str, ...]:
        """All digests that `body` may be known by; the first is to be stored."""
        if self._keys is None:
            self.wait()
        plain = hashlib.sha256(body).hexdigest()
        keys = self._keys or ()
        return (*(f"{name}:{hmac.digest(key, body, 'sha256').hex()}" for name, key in keys), plain)


def same_body(stored: str, digests: Sequence[str]) -> bool:
    """Whether `stored` is of the body that has these digests, or of one that they cannot be compared with."""
    names = {_name(digest) for digest in digests}
    return stored in digests or _name(stored) not in names


def _name(digest: str) -> str:
    return digest.rpartition(":")[0]


def _named(derived: bytes) -> tuple[str, bytes]:
    """A key, and a name that tells nothing of it."""
    return hashlib.sha256(derived[32:]).hexdigest()[:8], derived[:32]
