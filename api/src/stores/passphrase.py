"""From a passphrase of the operator's, which may be made of words, to bytes that nobody can guess.

Owns what that costs.
"""

from __future__ import annotations

import hashlib

_N, _R, _P = 1 << 15, 8, 3
"""32 MiB and about half a second: OWASP's equal of its 128 MiB, for small machines."""
_MEMORY = 64 << 20


def stretch(passphrase: str, salt: bytes, length: int) -> bytes:
    """So many bytes by scrypt. Takes half a second, so that guessing does too."""
    return hashlib.scrypt(passphrase.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=_MEMORY, dklen=length)
