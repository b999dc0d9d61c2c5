"""A checkpoint folder made ready to speak: weights, tokenizer, arenas and the engine around them.

Owns the putting together, and what a request costs in rows. A codec decoder that is there already can be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .codec import CodecDecoder
from .codec_encoder import CodecEncoder
from .config import CodecConfig, ModelConfig
from .cores import usable_cores
from .device_steps import GraphedSteps, Steps
from .engine import Engine
from .errors import EngineError
from .forms import Progress, ignore
from .graphs import Capture, CudaCapture
from .lanes import CudaLane
from .language_model import LanguageModel
from .linear import Form
from .messages import Limits, Request
from .native.products import Native
from .products import multiplies_bf16
from .prompt import Prompt, PromptBuilder, Reference
from .reference import SpeakerEncoder
from .runner import TorchRunner
from .sampling import Sampling
from .tokenizer import TextTokenizer

_TEMPLATE_ROWS = 12
"""At most: role, language, speaker, and the rows around the text."""
_CPU_PROMPT_TOKENS = 64
"""Of a step on a CPU: more rows at once are not faster there, and who comes first would wait for them."""


@dataclass(frozen=True)
class Asking:
    """What it takes to ask a loaded checkpoint for speech. It holds no weights once the `engine` has ended, so that who
    is slow to leave keeps no memory from those that are loaded next."""

    config: ModelConfig
    tokenizer: TextTokenizer
    codec_config: CodecConfig
    engine: Engine

    @property
    def sample_rate(self) -> int:
        """Hz of all sound that the engine delivers."""
        return self.codec_config.output_sample_rate

    def sampling(self, seed: int) -> Sampling:
        """The checkpoint's own way to choose."""
        return Sampling.default(self.config.generation, seed)

    def request(self, prompt: Prompt, sampling: Sampling, max_frames: int, **options: Any) -> Request:
        """The prompt as the engine takes it; `options` as Request's."""
        reference = prompt.reference
        texts = [prompt.text, prompt.instruct or "", reference.text if reference else ""]
        clip = 0 if reference is None or reference.codes is None else len(reference.codes)
        rows = _TEMPLATE_ROWS + clip + sum(len(self.tokenizer.ids(text)) for text in texts)
        return Request(prompt=prompt, sampling=sampling, prompt_tokens=rows, max_frames=max_frames, **options)

    def continuing(self, codes: NDArray[np.int64], text: str) -> Reference:
        """The voice of what was spoken before: the codes (F, C) that were delivered for `text`."""
        return Reference(None, torch.from_numpy(codes), text)


@dataclass(frozen=True)
class SpeechModel(Asking):
    """A loaded checkpoint, its `engine` not started yet. Whoever has another one can share `codec`."""

    codec: CodecDecoder
    steps: Steps
    speaker_encoder: SpeakerEncoder | None = None
    codec_encoder: CodecEncoder | None = None

    @property
    def asking(self) -> Asking:
        """For those who only ask."""
        return Asking(self.config, self.tokenizer, self.codec_config, self.engine)

    def clone(self, samples: NDArray[np.float32], text: str = "") -> Reference:
        """The voice of a clip: samples (L,) at speaker_encoder_config.sample_rate. With its `text`, in context.

        Raises:
            EngineError: a checkpoint that does not clone, a clip that is too short.
        """
        if self.speaker_encoder is None or self.codec_encoder is None:
            raise EngineError(f"a {self.config.tts_model_type} checkpoint does not clone voices")
        clip = torch.from_numpy(samples)
        embedding = self.speaker_encoder.embed(clip)
        return Reference(embedding, self.codec_encoder.encode(clip) if text else None, text)


P = ParamSpec("P")
T = TypeVar("T")


def _in_a_passing_thread(call: Callable[P, T]) -> Callable[P, T]:
    """OpenMP keeps threads for each thread that has calculated, as long as that lives.

    With more of them than cores it no longer spins where they meet, which made the engine's frames half as slow again.
    """

    @wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1, "loading") as thread:
            return thread.submit(call, *args, **kwargs).result()

    return run


@_in_a_passing_thread
def load_model(
    folder: Path,
    *,
    slots: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    codec: CodecDecoder | None = None,
    codec_dtype: torch.dtype = torch.float32,
    positions: int = 1024,
    text_rows: int = 512,
    limits: Limits | None = None,
    threads: int | None = None,
    capture: Capture | None = None,
    kernels: bool = True,
    weights: Form = "fp32",
    weights_cache: Sequence[Path] = (),
    progress: Progress = ignore,
    native: Native | None = None,
) -> SpeechModel:
    """The checkpoint in `folder`, with arenas for `slots` streams of `positions` prompt rows and frames each.

    `codec`: a decoder loaded before, for all checkpoints have the same. `limits.slots` must equal `slots`.
    On a CPU, no more prompts go into one step than pay off. `threads`: torch's, of the whole process; None: as many as
    cores that it may use. `capture`: makes graphs of all work; None: CUDA's on a GPU, none on a CPU. `kernels`: fused
    ones on a GPU, where they work. `weights`, `weights_cache`, `progress`, `native`: as LanguageModel.load's; the
    threads of `native` are there while the engine runs.

    Raises:
        CheckpointError: whatever makes the checkpoint unusable.
    """
    ModelConfig.read(folder)  # first, as what is wrong with the folder as a whole shows there
    torch.set_num_threads(threads or usable_cores())
    tokenizer = TextTokenizer(folder)
    codec_config = CodecConfig.read(folder)
    model = LanguageModel.load(
        folder,
        dtype,
        device,
        weights=weights,
        weights_cache=weights_cache,
        progress=progress,
        kernels=kernels,
        native=native,
    )
    if codec is None:
        pool = native.pool if native else None
        codec = CodecDecoder.load(folder, codec_dtype, device, narrow=narrow_codec(weights, device), pool=pool)
    builder = PromptBuilder(model.config, tokenizer, model.talker)
    limits = limits or Limits(slots=slots, codec_frames=max(64, slots))
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        limits = replace(limits, prompt_tokens=min(limits.prompt_tokens, _CPU_PROMPT_TOKENS))
    arenas = {"slots": slots, "positions": positions, "text_rows": text_rows}
    if capture is None and on_cpu:
        steps = Steps(model, codec, **arenas)
    else:
        steps = _graphed(model, codec, arenas, limits.codec_frames, capture, torch.device(device))
    _finish(codec, native)  # threads are of the engine's own thread
    clones = model.config.tts_model_type == "base"
    return SpeechModel(
        model.config,
        tokenizer,
        codec_config,
        Engine(
            TorchRunner(steps, builder),
            limits,
            prepare=partial(_prepare, steps, torch.get_num_threads()),
            finish=partial(_finish, codec, native),
        ),
        codec,
        steps,
        SpeakerEncoder.load(folder, device) if clones else None,
        CodecEncoder.load(folder, device) if clones else None,
    )


def _graphed(
    model: LanguageModel,
    codec: CodecDecoder,
    arenas: dict[str, int],
    codec_frames: int,
    capture: Capture | None,
    device: torch.device,
) -> GraphedSteps:
    """With `capture` for all work; None: CUDA's, and a stream of their own for first chunks."""
    return GraphedSteps(
        model,
        codec,
        **arenas,
        codec_frames=codec_frames,
        sampling=Sampling.default(model.config.generation),
        capture=capture or CudaCapture(device),
        beside=None if capture else CudaLane(device),
    )


def narrow_codec(weights: Form, device: torch.device | str) -> bool:
    """Whether the codec's wide products are in bf16: where the weights' form need not be exact, and it is faster."""
    return weights != "fp32" and torch.device(device).type == "cpu" and multiplies_bf16()


def _finish(codec: CodecDecoder, native: Native | None) -> None:
    """End all threads of the C code, but for what others who share the codec start again."""
    codec.close()
    if native is not None:
        native.close()


def _prepare(steps: Steps, threads: int) -> None:
    """In the engine's thread: what torch keeps by thread, and what must not be done while requests wait."""
    torch.set_num_threads(threads)
    device = steps.sounds.positions.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    steps.prepare()
