"""Carrying out the scheduler's plans in torch: prompts into slots, frames of codes, sound.

Owns the codes that wait for the codec, and the grouping of work into batches.
Does not own the arenas and the work on them (device_steps.py), nor who is served when (scheduler.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .device import require_working
from .device_steps import Steps
from .lanes import arriving
from .messages import Sound
from .pending import Pending
from .prompt import Prompt, PromptBuilder, PromptRows
from .sampling import Sampling
from .scheduler import Slot, Work


class TorchRunner:
    """Implements steps.Runner. Requests have a Prompt and a Sampling; text that is appended is str."""

    def __init__(self, steps: Steps, builder: PromptBuilder) -> None:
        self.steps = steps
        self._builder, self._slots, self._sounds = builder, steps.slots, steps.sounds
        self._eos = steps.model.eos
        self._codes = steps.codes
        self._pads: dict[int, Tensor] = {}  # of each slot, the row (H,) that follows all text

    @torch.inference_mode()
    def prefill(self, slots: Sequence[Slot]) -> list[int]:
        """As Runner.prefill.

        Raises:
            EngineError: a prompt that the model cannot speak, or that does not fit into a slot.
        """
        prompts = [_prompt(slot) for slot in slots]
        rows = [self._builder.rows(prompt) for prompt in prompts]
        entries = [(slot.index, r, _sampling(slot)) for slot, r in zip(slots, rows, strict=True)]
        self.steps.prefill(entries)
        for slot, prompt, r in zip(slots, prompts, rows, strict=True):
            self._enter(slot, prompt, r)
        return [len(r.trailing) for r in rows]

    def _enter(self, slot: Slot, prompt: Prompt, rows: PromptRows) -> None:
        self._pads[slot.index] = rows.pad
        self._sounds.reset(slot.index)
        if prompt.reference is not None and prompt.reference.codes is not None:
            self.steps.beside.join()
            clip = prompt.reference.codes[None].to(self._sounds.positions)  # (1, F, C)
            self.steps.codec.prime(clip, self.steps.index([slot.index]), self._sounds)
        self._bound(slot)

    @torch.inference_mode()
    def append(self, slot: Slot, text: str | None, last: bool) -> int:
        """As Runner.append."""
        rows = [self._builder.more(text)] if text else []
        rows += [self._builder.end] if last else []
        if not rows:
            return 0
        joined = torch.cat(rows)  # (R, H)
        self._slots.append(slot.index, joined, self._pads[slot.index])
        self._bound(slot)
        return len(joined)

    def _bound(self, slot: Slot) -> None:
        """A slot whose positions are used up ends with "length", as one whose budget is."""
        slot.job.max_frames = min(slot.job.max_frames, slot.frames_done + self._slots.room(slot.index))

    @torch.inference_mode()
    def decode(self, slots: Sequence[Slot]) -> Pending[list[int | None]]:
        """As Runner.decode. Frames wait for the codec in the slot's own place."""
        indices = [slot.index for slot in slots]
        codes = self.steps.frame(indices)  # (B, C)
        self._codes[self.steps.index(indices), self.steps.index([slot.frames_done for slot in slots])] = codes
        self.steps.beside.mark()
        return arriving([codes[:, 0]], self._first_codes)

    def _first_codes(self, codes: Tensor) -> list[int | None]:
        return [None if code == self._eos else code for code in codes.tolist()]

    @torch.inference_mode()
    def codec(self, work: Sequence[Work]) -> Pending[list[Sound]]:
        """As Runner.codec."""
        if all(slot.coded == 0 for slot, _ in work):
            with self.steps.beside.work():
                return self._sound(work, self.steps.first_sound)
        self.steps.beside.join()
        return self._sound(work, self.steps.sound)

    def _sound(self, work: Sequence[Work], sound: Callable[[Sequence[int], Tensor], Tensor]) -> Pending[list[Sound]]:
        """Slots with chunks of one length go together."""
        groups: dict[int, list[int]] = {}
        for place, (slot, frames) in enumerate(work):
            length = self.steps.last_chunk(frames) if slot.ends_with(frames) else frames
            groups.setdefault(length, []).append(place)
        made: list[Tensor] = []
        for length, places in groups.items():
            slots = [work[place][0] for place in places]
            indices = [slot.index for slot in slots]
            codes = self._codes_of(slots, length)
            made += [sound(indices, codes).float(), codes]
        order = [place for places in groups.values() for place in places]
        return arriving(made, partial(_sounds, order, [work[place][1] for place in order]))

    def _codes_of(self, slots: Sequence[Slot], length: int) -> Tensor:
        """The next codes of each slot (B, T, C); where it has no more, its last ones again."""
        first, end = self.steps.index([(slot.coded, slot.frames_done) for slot in slots]).unbind(1)
        columns = torch.minimum(first[:, None] + torch.arange(length, device=first.device), end[:, None] - 1)  # (B, T)
        return self._codes[self.steps.index([slot.index for slot in slots])[:, None], columns]

    def release(self, slot: Slot) -> None:
        """As Runner.release."""
        self._slots.leave(slot.index)
        self._pads.pop(slot.index, None)

    def check(self) -> None:
        """As Runner.check."""
        require_working(self._codes.device)


def _sounds(order: Sequence[int], frames: Sequence[int], *made: Tensor) -> list[Sound]:
    """Samples (B, L) and codes (B, T, C) of one group after the other.

    Row by row, they are of these places of the work, of which so many `frames` are wanted.
    """
    rows = [pair for group in zip(made[::2], made[1::2], strict=True) for pair in zip(*group, strict=True)]
    sounds: dict[int, Sound] = {}
    for place, wanted, (samples, codes) in zip(order, frames, rows, strict=True):
        length = len(samples) // len(codes) * wanted
        sounds[place] = Sound(samples[:length].numpy().copy(), codes[:wanted].numpy().copy())
    return [sounds[place] for place in range(len(sounds))]


def _prompt(slot: Slot) -> Prompt:
    """The request's prompt with the text that has come since."""
    prompt: Prompt = slot.job.request.prompt
    if not slot.job.request.text_open:
        return prompt
    text = prompt.text + "".join(slot.job.text)
    return replace(prompt, text=text, text_at_once=False, text_open=slot.job.open)


def _sampling(slot: Slot) -> Sampling:
    return slot.job.request.sampling or Sampling()
