"""What a Qwen3-TTS checkpoint can serve, read off its configuration and files: voices, names, languages, revision.

Owns the facts about the published speakers and the names of the models. Touches no tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ..domain import Model, Voice
from ..engine.config import ModelConfig

SOUND_REVISION = 1
"""To be raised when a change of the engine makes the same request sound different."""

ALIASES = {
    "alloy": "Vivian",
    "ash": "Serena",
    "ballad": "Ryan",
    "cedar": "Uncle_Fu",
    "coral": "Uncle_Fu",
    "echo": "Dylan",
    "fable": "Eric",
    "marin": "Serena",
    "nova": "Aiden",
    "onyx": "Ryan",
    "sage": "Ono_Anna",
    "shimmer": "Sohee",
    "verse": "Aiden",
}
"""OpenAI's names and who answers to them; a speaker that the checkpoint lacks is replaced by its first."""

NATIVE_LANGUAGES = {"Ryan": "english", "Aiden": "english", "Ono_Anna": "japanese", "Sohee": "korean"}
"""What the published speakers speak by nature (from the model card); all others, dialects included, Chinese."""

DESIGNED = "designed"
"""The one voice of a VoiceDesign checkpoint: the request's instructions describe it."""

_HASHED_WHOLE = {".json", ".txt"}


def model_id(config: ModelConfig) -> str:
    """The native id, such as qwen3-tts-12hz-0.6b-custom-voice."""
    size = config.tts_model_size.replace("b", ".") + "b"  # 0b6 -> 0.6b
    return f"qwen3-tts-12hz-{size}-{config.tts_model_type.replace('_', '-')}"


def served(config: ModelConfig, revision: str, weights: str = "") -> Model:
    """What the checkpoint serves; no voices if it only clones. `weights`: as Model's."""
    voices = tuple(_voices(config, revision))
    ids = {voice.id for voice in voices}
    return Model(
        id=model_id(config),
        voices=voices,
        aliases={alias: name if name in ids else voices[0].id for alias, name in ALIASES.items() if voices},
        languages=tuple(name for name in config.talker_config.codec_language_id if "dialect" not in name),
        revision=revision,
        weights=weights,
    )


def identity(folder: Path, *parts: str) -> str:
    """Changes with the checkpoint's files, with `parts` and with SOUND_REVISION.

    Of weights the names, sizes and times of change count: reading gigabytes would delay each start. So a copy with
    times of its own counts as another one, which costs cache entries but never gives a wrong one.
    """
    digest = hashlib.sha256("\0".join((str(SOUND_REVISION), *parts)).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            stat = path.stat()
            digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\0".encode())
        elif path.suffix in _HASHED_WHOLE:
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _voices(config: ModelConfig, revision: str) -> Iterator[Voice]:
    if config.tts_model_type == "voice_design":
        yield Voice(DESIGNED, "As described in the instructions", "english", f"{revision}-{DESIGNED}", "designed")
    for speaker in config.talker_config.spk_id:
        id_ = "_".join(word.capitalize() for word in speaker.split("_"))
        language = NATIVE_LANGUAGES.get(id_, "chinese")
        yield Voice(id_, id_.replace("_", " "), language, f"{revision}-{speaker}")
