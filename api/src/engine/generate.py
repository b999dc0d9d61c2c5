"""One utterance after the other, without slots' mates, scheduler or thread: for comparisons and bug reports.

Owns the plain loop from a prompt to codes and samples. What differs between this and the engine is the engine's fault,
what differs between this and the official package the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .codec import CodecDecoder, CodecState
from .codec_encoder import CodecEncoder
from .config import ModelConfig
from .language_model import LanguageModel
from .prompt import Prompt, PromptBuilder, Reference
from .reference import SpeakerEncoder
from .sampling import Sampling
from .tokenizer import TextTokenizer


class Utterance(NamedTuple):
    """codes (T, C); samples (T * samples per frame,) float32 mono; whether the model ended it, and not the limit."""

    codes: NDArray[np.int64]
    samples: NDArray[np.float32]
    ended: bool


class Generator:
    """The checkpoint in `folder`, ready to speak.

    Raises:
        CheckpointError: whatever makes the checkpoint unusable.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config = ModelConfig.read(folder)
        tokenizer = TextTokenizer(folder)
        self._folder, self._device = folder, device
        self._model = LanguageModel.load(folder, dtype, device)
        self._builder = PromptBuilder(self.config, tokenizer, self._model.talker)
        self._codec = CodecDecoder.load(folder, device=device)

    def clone(self, samples: NDArray[np.float32], text: str = "") -> Reference:
        """As SpeechModel.clone."""
        clip = torch.from_numpy(samples)
        embedding = SpeakerEncoder.load(self._folder, self._device).embed(clip)
        codes = CodecEncoder.load(self._folder, self._device).encode(clip) if text else None
        return Reference(embedding, codes, text)

    @torch.inference_mode()
    def speak(self, prompt: Prompt, sampling: Sampling, max_frames: int) -> Utterance:
        """The prompt spoken, in `max_frames` frames at most.

        Raises:
            EngineError: what the checkpoint cannot speak, as PromptBuilder.rows.
        """
        rows = self._builder.rows(prompt)
        slots = self._model.new_slots(1, len(rows.rows) + max_frames, len(rows.trailing))
        self._model.prefill(slots, [(0, rows, sampling)])
        frames: list[torch.Tensor] = []
        ended = False
        while len(frames) < max_frames and not ended:
            [codes] = self._model.frame_step(slots, [0])  # (C,)
            ended = int(codes[0]) == self._model.eos
            frames += [] if ended else [codes]
        groups = self.config.talker_config.num_code_groups
        stacked = torch.stack(frames) if frames else torch.zeros(0, groups, dtype=torch.long)
        return Utterance(stacked.cpu().numpy(), self._sound(stacked, prompt.reference), ended)

    def _sound(self, codes: torch.Tensor, reference: Reference | None) -> NDArray[np.float32]:
        """codes (T, C) as they sound after the reference's, if it has any."""
        state = CodecState(self._codec, 1)
        slot = torch.zeros(1, dtype=torch.long, device=state.positions.device)
        if reference is not None and reference.codes is not None:
            self._codec.prime(reference.codes[None].to(slot), slot, state)
        samples: NDArray[np.float32] = self._codec.decode(codes[None].to(slot), slot, state)[0].float().cpu().numpy()
        return samples
