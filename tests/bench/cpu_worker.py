"""One engine in a process of its own, commanded line by line: the side of `tests.bench.cpu` that is measured.

    python -m tests.bench.cpu_worker official|auto|fp32|bf16|int8|int4 FOLDER THREADS

Answers "ready" and then each command with one line of JSON. All but one speak by `load_model` and `Engine.submit`, as
the server does, with weights in that form; `official` by the public method of qwen-tts 0.1.1, in whose virtual
environment it runs then.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

SLOTS = 8
SPEAKER, LANGUAGE = "Ryan", "English"
_SAMPLE_S = 0.02


class Speaker(Protocol):
    """What is measured. `facts` go into the line that says ready."""

    facts: dict[str, Any]

    def speak(self, texts: list[str], frames: int, seed: int, together: bool) -> dict[str, Any]:
        """Speak each text for `frames` frames. Seconds in all, to each first sound, and by part; samples made."""
        ...


class Parts:
    """Seconds spent in calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: Callable[[], str]) -> None:
        """Replace `owner.method` by one that is timed."""
        inner = getattr(owner, method)

        def timed(*args: Any, **given: Any) -> Any:
            part, begun = name(), time.perf_counter()
            try:
                return inner(*args, **given)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Ours:
    """The engine with its thread, its scheduler and the streaming codec."""

    def __init__(self, form: str, folder: Path, threads: int) -> None:
        import torch

        from api.src.engine.config import ModelConfig
        from api.src.engine.form_choice import choose_form
        from api.src.engine.forms import cache_folders
        from api.src.engine.loading import load_model
        from api.src.engine.native.check import find
        from tests.engine.bench_frames import narrow_flop, reads_per_frame

        torch.set_num_threads(threads)
        cache = cache_folders(folder)
        native, kernel = find(cache[0])
        config = ModelConfig.read(folder).talker_config
        weights: Any = form if form != "auto" else choose_form(config, cache, native).form
        self.model = load_model(
            folder, slots=SLOTS, threads=threads, weights=weights, weights_cache=cache, native=native
        )
        runner = self.model.engine._stepper._runner
        self.facts = dict(zip(("frame_bytes", "frame_weights"), reads_per_frame(self.model.steps.model), strict=True))
        with ThreadPoolExecutor(1) as passing:  # a living thread that has calculated would slow the engine's down
            self.facts |= {
                "form": weights,
                "kernel": kernel,
                "narrow_flop": passing.submit(narrow_flop, self.model.codec).result(),
            }
        self.parts = Parts()
        for name in ("prefill", "decode", "codec"):
            self.parts.watch(runner, name, lambda name=name: name)
        self.model.engine.start()

    def speak(self, texts: list[str], frames: int, seed: int, together: bool) -> dict[str, Any]:
        groups = [texts] if together else [[text] for text in texts]
        begun, first, samples = time.perf_counter(), [], []
        for number, group in enumerate(groups):
            for heard in self._group(group, frames, seed + number):
                first.append(heard.first_at - begun)
                samples.append(heard.samples)
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "first_s": first, "samples": samples, "parts": self.parts.take()}

    def _group(self, texts: list[str], frames: int, seed: int) -> list[Heard]:
        from dataclasses import replace

        from api.src.engine.prompt import Prompt

        requests = []
        for number, text in enumerate(texts):
            # so long that not even a checkpoint whose weights want to stop does
            sampling = replace(self.model.sampling(1000 * seed + number), min_new_tokens=frames + 1)
            requests.append(self.model.request(Prompt(text, speaker=SPEAKER, language=LANGUAGE), sampling, frames))
        listeners = [Heard() for _ in requests]
        for request, heard in zip(requests, listeners, strict=True):
            heard.ticket = self.model.engine.submit(request, heard)
        for heard in listeners:
            heard.wait()
        return listeners


class Heard:
    """Receives one request's sound."""

    def __init__(self) -> None:
        self.first_at, self.samples = 0.0, 0
        self.ticket: Any = None
        self.last: Any = None
        self.ended = threading.Event()

    def __call__(self, delivery: Any) -> None:
        if delivery.sound is not None:
            self.first_at = self.first_at or time.perf_counter()
            self.samples += len(delivery.sound.samples)
            if self.ticket is not None:
                self.ticket.taken(delivery.frames)
        if delivery.finish_reason is not None:
            self.last = delivery
            self.ended.set()

    def wait(self) -> None:
        self.ended.wait()
        if self.last.error is not None:
            raise self.last.error


class Official:
    """qwen-tts 0.1.1 as its README calls it, in fp32."""

    def __init__(self, folder: Path, threads: int) -> None:
        from tests.engine.make_golden_codec import stub_torchaudio

        stub_torchaudio()
        import torch
        import transformers
        from qwen_tts import Qwen3TTSModel

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        self.model = Qwen3TTSModel.from_pretrained(str(folder), device_map="cpu", dtype=torch.float32)
        self.seed: Callable[[int], Any] = torch.manual_seed
        self.facts: dict[str, Any] = {}
        self.parts = Parts()
        talker, inner = self.model.model.talker, self.model.model
        self.parts.watch(talker.model, "forward", self._pass)
        self.parts.watch(talker.code_predictor, "generate", lambda: "predictor")
        self.parts.watch(inner.speech_tokenizer, "decode", lambda: "codec")
        self.parts.watch(inner, "generate", lambda: "codes")
        self._passes = 0

    def _pass(self) -> str:
        self._passes += 1
        return "prefill" if self._passes == 1 else "talker"

    def speak(self, texts: list[str], frames: int, seed: int, together: bool) -> dict[str, Any]:
        groups = [texts] if together else [[text] for text in texts]
        begun, first, samples = time.perf_counter(), [], []
        for number, group in enumerate(groups):
            self._passes = 0
            self.seed(seed + number)
            sounds, _ = self.model.generate_custom_voice(
                text=group,
                speaker=[SPEAKER] * len(group),
                language=[LANGUAGE] * len(group),
                max_new_tokens=frames + 1,  # the last token has no frame
            )
            first += [time.perf_counter() - begun] * len(group)  # it delivers whole sounds
            samples += [len(sound) for sound in sounds]
        seconds, parts = time.perf_counter() - begun, self.parts.take()
        parts["decode"] = parts.pop("codes") - parts["prefill"]  # with the package's own steps around its passes
        return {"seconds": seconds, "first_s": first, "samples": samples, "parts": parts}


class Memory(threading.Thread):
    """Watches how much memory of the process is no file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = 0

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(_SAMPLE_S)

    def look(self) -> None:
        _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
        self.anonymous = max(self.anonymous, (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE"))

    def figures(self) -> dict[str, float]:
        self.look()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_mb": peak / 1024, "anonymous_mb": self.anonymous / 1024**2}


def main() -> None:
    kind, folder, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    memory = Memory()
    memory.start()
    speaker: Speaker = (
        Official(Path(folder), int(threads)) if kind == "official" else Ours(kind, Path(folder), int(threads))
    )
    answer({"ready": True, **speaker.facts, **memory.figures()})
    for line in sys.stdin:
        command = json.loads(line)
        answer(speaker.speak(**command) | memory.figures())


if __name__ == "__main__":
    main()
