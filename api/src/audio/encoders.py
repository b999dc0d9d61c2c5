"""Samples to bytes: one persistent encoder per response, chunk -> 24 kHz -> tempo -> codec.

Owns the formats: media types, settings, the revision that keys the cache. Does not own what is done with the
bytes, nor any thread.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import av
import numpy as np

from ..domain import MEDIA_TYPES, SAMPLE_RATE, AudioChunk, AudioFormat, Samples
from ..errors import InvalidRequest
from .codecs import COMMON_OPTIONS, Codec, FFmpegCodec, FFmpegSettings, RawCodec
from .filters import Resampler
from .tempo import Tempo

# Bits per second of mono speech at 24 kHz, chosen for a wide-band PESQ of about 4.5 (the best is 4.64) on nine
# seconds of the embedded voice; the next step up adds about 0.1.
MP3_BIT_RATE = 64_000
"""PESQ 3.82, 4.34, 4.49, 4.60 at 32, 48, 64, 96 kb/s."""
AAC_BIT_RATE = 64_000
"""PESQ 4.42, and 4.15 with ffmpeg's default coder, which takes twice the time."""
OPUS_BIT_RATE = 32_000
"""PESQ 4.45, 4.50, 4.55 at 24, 32, 40 kb/s; 20 ms pages add 11 kb/s."""
LAME_SPEED = 7
"""Of 0 to 9: half the time of LAME's default, the same PESQ."""
FLAC_FRAME = 960
"""Samples, 40 ms: sound leaves with the first chunk, and speech packs no worse than in ffmpeg's 96 ms."""

UNKNOWN_SIZE = 0xFFFFFFFF
"""Both size fields of a WAV file that has no end yet; ffmpeg and libsndfile then read as far as it goes."""

_OGG_OPUS = FFmpegSettings(
    codec="libopus",
    container="ogg",
    sample_format="flt",
    bit_rate=OPUS_BIT_RATE,
    codec_options={"frame_duration": "20", "vbr": "on"},
    container_options={"page_duration": "20000"},
)
_SETTINGS: Mapping[AudioFormat, FFmpegSettings] = {
    "mp3": FFmpegSettings(
        codec="libmp3lame",
        container="mp3",
        sample_format="fltp",
        bit_rate=MP3_BIT_RATE,
        codec_options={"reservoir": "0", "compression_level": str(LAME_SPEED)},
        container_options={"write_xing": "0", "id3v2_version": "0"},
    ),
    "opus": _OGG_OPUS,
    "ogg": _OGG_OPUS,
    "aac": FFmpegSettings(
        codec="aac",
        container="adts",
        sample_format="fltp",
        bit_rate=AAC_BIT_RATE,
        codec_options={"aac_coder": "fast"},
    ),
    "flac": FFmpegSettings(
        codec="flac",
        container="flac",
        sample_format="s16",
        codec_options={"frame_size": str(FLAC_FRAME)},
        container_options={"metadata_header_padding": "0"},
    ),
}


def _revision(code: int) -> str:
    settings = hashlib.sha256(repr((_SETTINGS, COMMON_OPTIONS)).encode()).hexdigest()[:12]
    return f"{code}-av{av.__version__}-ffmpeg{av.ffmpeg_version_info}-{settings}"


ENCODER_REVISION: str = _revision(code=1)
"""Part of the cache key: changes whenever the same samples would give other bytes. Raise `code` when the code
of this room changes them without touching a setting."""


class Encoder:
    """One response's encoder. Its bytes depend on the samples alone, not on how they were cut into chunks.

    `header` is all that the container writes before any sound, known at once and never repeated by `encode`.
    `samples` counts the 24 kHz samples of sound taken so far, after the change of tempo. Calls must come one
    at a time, from any thread.
    """

    def __init__(self, media_type: str, codec: Codec, tempo: Tempo) -> None:
        self.media_type = media_type
        self.header = codec.header
        self.samples = 0
        self._resampler = Resampler()
        self._tempo = tempo
        self._codec = codec

    def encode(self, chunk: AudioChunk) -> bytes:
        """Take a chunk of any sample rate; return the bytes that are ready, possibly none.

        Samples beyond [-1, 1] are clipped and NaN becomes 0.
        """
        at_24k = self._resampler.push(_clean(chunk.samples), chunk.sample_rate)
        return self._encode(self._tempo.push(at_24k))

    def finish(self) -> bytes:
        """Return the rest of the sound and the container's end. Call it once; only `close` may follow."""
        rest = self._encode(self._tempo.push(self._resampler.flush()))
        rest += self._encode(self._tempo.flush())
        return rest + self._codec.finish()

    def close(self) -> None:
        """Free everything. Idempotent; after `finish` or without it."""
        self._resampler.close()
        self._tempo.close()
        self._codec.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, samples: Samples) -> bytes:
        self.samples += len(samples)
        return self._codec.encode(samples) if len(samples) else b""


def open_encoder(format: AudioFormat, speed: float = 1.0) -> Encoder:
    """Open the encoder of one response; close it in the end.

    Raises InvalidRequest for an unknown format or a speed outside 0.25 to 4.
    """
    if format not in MEDIA_TYPES:
        known = ", ".join(MEDIA_TYPES)
        raise InvalidRequest(f"response_format must be one of {known}.", param="response_format")
    tempo = Tempo(speed)
    return Encoder(MEDIA_TYPES[format], _open_codec(format), tempo)


def _open_codec(format: AudioFormat) -> Codec:
    if format == "pcm":
        return RawCodec()
    if format == "wav":
        return RawCodec(_wav_header())
    return FFmpegCodec(_SETTINGS[format])


def _wav_header() -> bytes:
    """RIFF, a 16-byte PCM format chunk (1 channel, 16 bits) and the start of the data chunk: 44 bytes."""
    frame = 2
    layout = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, SAMPLE_RATE * frame, frame, 16)
    unknown = struct.pack("<I", UNKNOWN_SIZE)
    return b"RIFF" + unknown + b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + unknown


def _clean(samples: Samples) -> Samples:
    return np.clip(np.nan_to_num(np.asarray(samples, np.float32)), -1.0, 1.0)
