"""A checkpoint folder made ready to speak: weights, tokenizer, arenas and the engine around them.

Owns the putting together, and what a request costs in rows. A codec decoder that is there already can be shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .codec import CodecDecoder
from .codec_encoder import CodecEncoder
from .config import CodecConfig, ModelConfig
from .engine import Engine
from .errors import EngineError
from .language_model import LanguageModel
from .messages import Limits, Request
from .prompt import Prompt, PromptBuilder, Reference
from .reference import SpeakerEncoder
from .runner import TorchRunner
from .sampling import Sampling
from .tokenizer import TextTokenizer

_TEMPLATE_ROWS = 12
"""At most: role, language, speaker, and the rows around the text."""


@dataclass(frozen=True)
class SpeechModel:
    """A loaded checkpoint, its `engine` not started yet. Whoever has another one can share `codec`."""

    config: ModelConfig
    tokenizer: TextTokenizer
    codec: CodecDecoder
    codec_config: CodecConfig
    engine: Engine
    arena_bytes: int
    speaker_encoder: SpeakerEncoder | None = None
    codec_encoder: CodecEncoder | None = None

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

    def continuing(self, codes: NDArray[np.int64], text: str) -> Reference:
        """The voice of what was spoken before: the codes (F, C) that were delivered for `text`."""
        return Reference(None, torch.from_numpy(codes), text)


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
) -> SpeechModel:
    """The checkpoint in `folder`, with arenas for `slots` streams of `positions` prompt rows and frames each.

    `codec`: a decoder loaded before, for all checkpoints have the same. `limits.slots` must equal `slots`.

    Raises:
        CheckpointError: whatever makes the checkpoint unusable.
    """
    ModelConfig.read(folder)  # first, as what is wrong with the folder as a whole shows there
    tokenizer = TextTokenizer(folder)
    codec_config = CodecConfig.read(folder)
    model = LanguageModel.load(folder, dtype, device)
    codec = codec or CodecDecoder.load(folder, codec_dtype, device)
    builder = PromptBuilder(model.config, tokenizer, model.talker)
    runner = TorchRunner(model, builder, codec, slots=slots, positions=positions, text_rows=text_rows)
    clones = model.config.tts_model_type == "base"
    return SpeechModel(
        model.config,
        tokenizer,
        codec,
        codec_config,
        Engine(runner, limits or Limits(slots=slots, codec_frames=max(64, slots))),
        runner.nbytes,
        SpeakerEncoder.load(folder, device) if clones else None,
        CodecEncoder.load(folder, device) if clones else None,
    )
