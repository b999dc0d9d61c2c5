"""What a remote server can be asked for: its lists of models and voices, as this server's own words.

Owns the reading of the lists, in the shapes in which servers write them. When they are asked for is `remote`'s.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

from ..domain import Model, Voice
from .remote_client import Client, Remote
from .remote_faults import Fault, invalid

OPENAI_VOICES = (
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable"),
    *("marin", "nova", "onyx", "sage", "shimmer", "verse"),
)
"""What OpenAI's own API speaks with. It has no list of them to ask for."""

ANY_LANGUAGE = "multilingual"
"""Language of a voice of which the server says none: it goes by the text, and is not told a language."""

LANGUAGES = (
    *("arabic", "chinese", "dutch", "english", "french", "german", "hindi", "italian"),
    *("japanese", "korean", "polish", "portuguese", "russian", "spanish", "turkish"),
)
"""What may be asked of such a voice."""

NO_LIST = (404, 405, 501)
"""How servers say that they have no such list."""

MOST = 1000
"""Entries of a list that are taken."""

_NAME = re.compile(r"[!-~]([ -~]{0,126}[!-~])?")
"""An id that may stand in a header."""


async def fetch(client: Client, remote: Remote, models: Sequence[str], revision: str) -> tuple[Model, ...]:
    """What the remote server serves now. `models`, where there are any, are not asked for. Raises Fault."""
    ids = models or _speaking([entry["id"] for entry in _entries(await client.document("/models"), "data")])
    if not ids:
        raise invalid("to GET /models lists no model")
    voices = await _voices(client)
    return tuple(_model(remote, id, voices, revision) for id in ids)


async def _voices(client: Client) -> list[dict[str, str]]:
    try:
        document = await client.document("/audio/voices")
    except Fault as fault:
        if fault.status not in NO_LIST:
            raise
        return [{"id": name} for name in OPENAI_VOICES]
    entries = list(_entries(document, "voices"))
    if not entries:
        raise invalid("to GET /audio/voices lists no voice")
    return entries


def _speaking(ids: Sequence[str]) -> Sequence[str]:
    """Those that are named after speech (OpenAI lists all its models), or all where none is."""
    return [id for id in ids if "tts" in id.lower()] or ids


def _entries(document: Any, key: str) -> Iterator[dict[str, str]]:
    """The list under `key`, of objects or of plain names, each once; what has no usable id is left out."""
    listed = document.get(key) if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise invalid("is no list of models or voices")
    seen = set()
    for item in listed[:MOST]:
        entry = item if isinstance(item, dict) else {"id": item}
        fields = {name: text for name, text in entry.items() if isinstance(text, str) and text.isprintable()}
        id = next((fields[name] for name in ("id", "voice_id", "name") if name in fields), "")
        if _NAME.fullmatch(id) and id.lower() not in seen:
            seen.add(id.lower())
            yield {**fields, "id": id}


def _model(remote: Remote, id: str, voices: Sequence[dict[str, str]], revision: str) -> Model:
    identity = _digest(remote.base, id, str(remote.sample_rate), revision)
    known = {entry["id"].lower() for entry in voices}
    spare = cycle(entry["id"] for entry in voices)
    return Model(
        id=id,
        voices=tuple(_voice(entry, identity) for entry in voices),
        aliases={name: next(spare) for name in OPENAI_VOICES if name not in known},
        languages=tuple(dict.fromkeys(_language(entry) for entry in voices if entry.get("language"))) or LANGUAGES,
        revision=identity,
    )


def _voice(entry: dict[str, str], identity: str) -> Voice:
    return Voice(
        id=entry["id"],
        name=entry.get("name") or entry["id"],
        language=_language(entry),
        fingerprint=_digest(identity, entry["id"]),
    )


def _language(entry: dict[str, str]) -> str:
    return entry.get("language", "").lower() or ANY_LANGUAGE


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
