"""Hooks for Schemathesis: names that this server knows, so that more than a refusal is tried.

Loaded by the subprocess of test_schemathesis.py.
"""

from __future__ import annotations

import zlib
from typing import Any

import schemathesis

KNOWN = {
    "model": ["tts-1", "TTS-1-HD", "fake-1", "qwen3-tts-12hz-1.7b-base"],
    "voice": ["alloy", "Nova", "hum", {"id": "tone"}],
    "language": ["auto", "en-GB", "german", ""],
}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """In three of four bodies, names become known ones and the texts lose what is refused in them."""
    choice = zlib.crc32(repr(body).encode("utf-8", "surrogatepass")) % 4
    if not isinstance(body, dict) or choice == 0:
        return body
    named = {name: KNOWN[name][choice] for name, value in body.items() if name in KNOWN and isinstance(value, str)}
    texts = {name: _plain(body[name]) for name in ("input", "instructions") if isinstance(body.get(name), str)}
    return {**body, **named, **texts}


def _plain(text: str) -> str:
    return "".join(character for character in text if character.isprintable()) + "a"
