"""Prompts: what is to be said and by whom, as the talker's input rows.

Owns the layout of the rows of every checkpoint kind (text side plus codec side) and what may be asked of which kind.
Does not own the tokenizer, the reference's encoding, nor the slots that rows go to.
Shapes: T prompt rows, R text rows to come, F reference frames, H talker's hidden, C code groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import EngineError
from .talker import Talker
from .tokenizer import TextTokenizer

AUTO = "auto"
_ROLE, _TAIL, _REFERENCE_TAIL = 3, 5, 2
"""Tokens before and after the text in the templates; the official package cuts by these numbers."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A voice to clone: its speaker embedding (H,), and for in-context cloning a clip's codes (F, C) with its text."""

    embedding: Tensor | None = None
    codes: Tensor | None = None
    text: str = ""


@dataclass(frozen=True)
class Prompt:
    """One utterance. `text_at_once` puts the whole text before the speech, else it goes along with it, a token a frame.

    `text_open`: more text will follow by `Slots.append`, closed by `PromptBuilder.end`; needs text_at_once False.
    """

    text: str
    language: str = AUTO
    speaker: str | None = None
    instruct: str | None = None
    reference: Reference | None = None
    text_at_once: bool = True
    text_open: bool = False


class PromptRows(NamedTuple):
    """Input rows (T, H), the text rows that frames 0 .. R - 1 add (R, H), and the row that all later ones add (H,)."""

    rows: Tensor
    trailing: Tensor
    pad: Tensor


class PromptBuilder:
    """Rows of prompts for one loaded checkpoint."""

    def __init__(self, config: ModelConfig, tokenizer: TextTokenizer, talker: Talker) -> None:
        self._config, self._codec, self._tokenizer, self._talker = config, config.talker_config, tokenizer, talker
        self._device = talker.model.norm.weight.device
        with torch.inference_mode():
            special = (config.tts_bos_token_id, config.tts_eos_token_id, config.tts_pad_token_id)
            self._bos, self.end, self._pad = torch.split(self._text(special), 1)  # (1, H) each

    @torch.inference_mode()
    def rows(self, prompt: Prompt) -> PromptRows:
        """The prompt as the talker's input.

        Raises:
            EngineError: an unknown language or speaker, no reference where the checkpoint only clones, no text.
        """
        ids = self._tokenizer.ids(f"<|im_start|>assistant\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n")
        role, text = ids[:_ROLE], ids[_ROLE:-_TAIL]
        if not text:
            raise EngineError("there is no text to speak")
        reference = prompt.reference
        head = [*self._instruct(prompt), self._text(role), self._voice(prompt)]
        if reference is not None and reference.codes is not None:
            body, trailing = self._continued(prompt, text, reference.codes, reference.text)
        else:
            body, trailing = self._plain(prompt, text)
        return PromptRows(torch.cat((*head, body)), trailing, self._pad[0])

    @torch.inference_mode()
    def more(self, text: str) -> Tensor:
        """Text rows (R, H) for a prompt whose text is open."""
        return self._text(self._tokenizer.ids(text))

    def _instruct(self, prompt: Prompt) -> list[Tensor]:
        small = self._config.tts_model_type == "custom_voice" and self._config.tts_model_size == "0b6"
        if not prompt.instruct or small:  # the official package drops it there, as the model was not trained for it
            return []
        return [self._text(self._tokenizer.ids(f"<|im_start|>user\n{prompt.instruct}<|im_end|>\n"))]

    def _voice(self, prompt: Prompt) -> Tensor:
        """The rows of language and speaker, up to and with tts_bos."""
        codec = self._codec
        language = self._language(prompt)
        if language is None:
            think = [codec.codec_nothink_id, codec.codec_think_bos_id, codec.codec_think_eos_id]
        else:
            think = [codec.codec_think_id, codec.codec_think_bos_id, language, codec.codec_think_eos_id]
        sound = torch.cat((self._sound(think), *self._speaker(prompt), self._sound([codec.codec_pad_id])))
        return sound + torch.cat((self._pad.expand(sound.shape[0] - 1, -1), self._bos))

    def _language(self, prompt: Prompt) -> int | None:
        known, name = self._codec.codec_language_id, prompt.language.lower()
        dialect = self._codec.spk_is_dialect.get((prompt.speaker or "").lower())
        if dialect and name in (AUTO, "chinese"):
            return known[str(dialect)]
        if name == AUTO:
            return None
        if name not in known:
            raise EngineError(f"the model does not speak {prompt.language}; it speaks {', '.join(sorted(known))}")
        return known[name]

    def _speaker(self, prompt: Prompt) -> list[Tensor]:
        """The speaker's row (1, H), if there is one."""
        if prompt.reference is not None and prompt.reference.embedding is not None:
            return [prompt.reference.embedding.to(self._pad).view(1, -1)]
        if self._config.tts_model_type == "base" and prompt.reference is None:
            raise EngineError("this checkpoint clones voices: it needs a reference")
        if not prompt.speaker:
            return []
        number = self._codec.spk_id.get(prompt.speaker.lower())
        if number is None:
            raise EngineError(
                f"the model has no speaker {prompt.speaker}; it has {', '.join(sorted(self._codec.spk_id))}"
            )
        return [self._sound([number])]

    def _plain(self, prompt: Prompt, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The text's rows, and those to come."""
        begin = self._sound([self._codec.codec_bos_id])
        if prompt.text_at_once:
            spoken = torch.cat((self._text(text), self.end)) + self._sound([self._codec.codec_pad_id])
            return torch.cat((spoken, self._pad + begin)), self._pad[:0]
        rows = self._to_come(prompt, text)
        return rows[:1] + begin, rows[1:]

    def _continued(self, prompt: Prompt, text: Sequence[int], codes: Tensor, spoken: str) -> tuple[Tensor, Tensor]:
        """As _plain, going on from a reference clip: codes (F, C) of the text `spoken`."""
        before = self._tokenizer.ids(f"<|im_start|>assistant\n{spoken}<|im_end|>\n")[_ROLE:-_REFERENCE_TAIL]
        clip = self._talker.frames(codes.to(self._device))
        sound = torch.cat((self._sound([self._codec.codec_bos_id]), clip))  # (F + 1, H)
        rows = self._to_come(prompt, [*before, *text])
        if prompt.text_at_once:
            return torch.cat((rows + self._sound([self._codec.codec_pad_id]), sound + self._pad)), self._pad[:0]
        missing = sound.shape[0] - rows.shape[0]
        if missing > 0:
            rows = torch.cat((rows, self._pad.expand(missing, -1)))
        return rows[: sound.shape[0]] + sound, rows[sound.shape[0] :]

    def _to_come(self, prompt: Prompt, text: Sequence[int]) -> Tensor:
        rows = self._text(text)
        return rows if prompt.text_open else torch.cat((rows, self.end))

    def _text(self, ids: Sequence[int]) -> Tensor:
        return self._talker.text(torch.tensor(ids, device=self._device))

    def _sound(self, ids: Sequence[int]) -> Tensor:
        return self._talker.codec(torch.tensor(ids, device=self._device))
