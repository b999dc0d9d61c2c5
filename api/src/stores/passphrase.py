"""From a passphrase of the operator's, which may be made of words, to bytes that nobody can guess.

Owns what that costs, and that what is begun together is done together. Each purpose has a salt of its own: that of the
cache is its folder's, so that a table of guesses is good for one folder only, and that of digests is the same
everywhere, so that servers agree on them. One stretching for both would be bound to lose one of the two.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future

_N, _R, _P = 1 << 15, 8, 3
"""32 MiB and about half a second: OWASP's equal of its 128 MiB, for small machines."""
_MEMORY = 64 << 20


def stretch(passphrase: str, salt: bytes, length: int) -> bytes:
    """So many bytes by scrypt. Takes half a second, so that guessing does too."""
    return hashlib.scrypt(passphrase.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=_MEMORY, dklen=length)


class Stretching:
    """As `stretch`, begun at once in a thread of its own: scrypt leaves the interpreter to the others."""

    def __init__(self, passphrase: str, salt: bytes, length: int) -> None:
        self._done: Future[bytes] = Future()
        threading.Thread(target=self._run, args=(passphrase, salt, length), name="stretch", daemon=True).start()

    def result(self) -> bytes:
        """Wait for the bytes. Raises what went wrong."""
        return self._done.result()

    def _run(self, passphrase: str, salt: bytes, length: int) -> None:
        try:
            self._done.set_result(stretch(passphrase, salt, length))
        except BaseException as error:
            self._done.set_exception(error)
