"""Which form the speech cache has: what the settings ask for, or a refusal, never less than that."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotReady
from .cache import SpeechCache
from .cache_form import Form, FramedForm, PlainForm
from .packing import can_pack

_log = logging.getLogger(__name__)


def cache_at(root: Path, max_bytes: int, *, keys: Sequence[str] = (), compress: bool = False) -> SpeechCache:
    """The speech cache in the folder `root`.

    `keys`: none leaves it unsealed; otherwise the first seals, all open. `compress` packs wav and pcm with LZ4.
    Takes half a second, and more for many keys. Raises ValueError for a key that is too short or a damaged salt,
    NotReady where a package is missing that this needs.
    """
    if compress and not can_pack():
        raise NotReady("A compressed cache needs lz4: pip install 'qwen3-tts-server[lz4]'.")
    return SpeechCache(root, max_bytes, _sealed(root, keys, compress) if keys else _unsealed(compress))


def _unsealed(compress: bool) -> list[Form]:
    return [FramedForm(compress=True), PlainForm()] if compress else [PlainForm()]


def _sealed(root: Path, keys: Sequence[str], compress: bool) -> list[Form]:
    try:
        from .sealed import SealingKey, folder_salt  # needs cryptography, an extra
    except ImportError as error:
        raise NotReady("An encrypted cache needs cryptography: pip install 'qwen3-tts-server[encryption]'.") from error
    salt = folder_salt(root / ".salt")
    forms: list[Form] = [FramedForm(key, compress=compress) for key in SealingKey.from_passphrases(keys, salt)]
    _log.info("the speech cache is encrypted, %d key(s) can read it", len(forms))
    return forms
