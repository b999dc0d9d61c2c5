"""What a step of the runner costs a device: prompts, frames and sound, for the slots of one model.

Owns the model's arenas and the three kinds of work on them: as they come (`Steps`), or in shapes that were captured
before the first request (`GraphedSteps`). What is computed is language_model.py's and codec.py's; what a graph is,
graphs.py's. Neither knows requests.
Shapes: B rows of a step, L rows of a prompt, H talker's hidden, T frames, C code groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .codec import CodecDecoder, CodecState
from .graphs import (
    CODEC_FRAMES,
    LONG_PROMPT,
    PROMPT_BATCH,
    PROMPT_LENGTHS,
    ROWS,
    SPANS,
    Capture,
    Graphs,
    Index,
    eagerly,
    fitting,
    parts,
    up_to,
)
from .kernels import FUSED
from .lanes import Lane
from .language_model import Entry, LanguageModel
from .sampling import Sampling
from .slots import Slots, StepShape


class Steps:
    """Arenas for `slots` streams of `positions` prompt rows and frames each, and `text_rows` of text to come."""

    def __init__(
        self, model: LanguageModel, codec: CodecDecoder, *, slots: int, positions: int, text_rows: int
    ) -> None:
        self.model, self.codec = model, codec
        self.beside = Lane(eagerly)
        self.slots = model.new_slots(slots, positions, text_rows)
        self.sounds = CodecState(codec, slots)
        groups, device = model.config.talker_config.num_code_groups, self.sounds.positions.device
        self.codes = torch.zeros(slots, positions, groups, dtype=torch.int64, device=device)  # by slot and frame

    @property
    def nbytes(self) -> int:
        """Memory of all that slots can ever hold."""
        return self.slots.bytes() + self.sounds.nbytes + self.codes.nbytes

    @property
    def missed(self) -> int:
        """Steps whose shape was not captured, where shapes are."""
        return 0

    def describe(self) -> str:
        """For people: how the work is done."""
        return "no graphs"

    def prepare(self) -> None:
        """Whatever is to be done before the first request, in the thread that will serve it."""

    def prefill(self, entries: Sequence[Entry]) -> None:
        """As LanguageModel.prefill."""
        self.model.prefill(self.slots, entries)

    def frame(self, slots: Sequence[int]) -> Tensor:
        """As LanguageModel.frame_step."""
        return self.model.frame_step(self.slots, slots)

    def sound(self, slots: Sequence[int], codes: Tensor) -> Tensor:
        """codes (B, T, C) of the slots' next frames -> samples (B, T * samples per frame)."""
        return self.codec.decode(codes, self.index(slots), self.sounds)

    def last_chunk(self, frames: int) -> int:
        """How many frames are best made where `frames` are left: more than a stream has do no harm at its end."""
        return frames

    def first_sound(self, slots: Sequence[int], codes: Tensor) -> Tensor:
        """As `sound`, of first frames, in the lane `beside`: codes (B, 1, C)."""
        return self.sound(slots, codes)

    def index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Numbers (B,) or (B, N), of slots or others, where the arenas are."""
        return torch.tensor(numbers, device=self.sounds.positions.device)


class CodecInput(NamedTuple):
    """What the codec's graphs of one lane read: the slots, by the number of rows, and codes (B, T, C)."""

    slots: dict[int, Index]
    codes: Tensor


class GraphedSteps(Steps):
    """The same in captured shapes. `codec_frames`: the most frames that the slots of one call have together.

    `sampling`: the checkpoint's own, for whose widths frames are captured. `beside`: the lane of first chunks; without
    one, they go with all other work.
    """

    def __init__(
        self,
        model: LanguageModel,
        codec: CodecDecoder,
        *,
        slots: int,
        positions: int,
        text_rows: int,
        codec_frames: int,
        sampling: Sampling,
        capture: Capture,
        beside: Lane | None = None,
    ) -> None:
        super().__init__(model, codec, slots=slots + 1, positions=positions, text_rows=text_rows)
        self.beside = beside or Lane(capture)
        self.graphs = Graphs(capture)
        self._graph_bytes = 0
        self._widths = self.slots.widths(sampling)
        self._spare = slots
        self._rows = up_to(ROWS, slots)
        # fused kernels read each row at its true length, whatever the span
        self._spans = [positions] if model.way is FUSED else up_to(SPANS, positions)
        self._lengths = up_to(PROMPT_LENGTHS, min(positions, PROMPT_LENGTHS[-1]))
        self._batches = up_to(PROMPT_BATCH, min(slots, PROMPT_BATCH[-1]))
        self._codec_rows = {
            frames: up_to(ROWS, min(slots, fitting(ROWS, max(1, codec_frames // frames)) or slots))
            for frames in CODEC_FRAMES
        } | {1: self._rows}
        device, width = model.weight.device, model.weight.shape[0]
        self._index = {rows: Index(rows, self._spare, device) for rows in {*self._rows, *self._batches}}
        self._prompts = model.weight.new_zeros(self._batches[-1], self._lengths[-1], width)
        codes = self.codes.new_zeros(slots, max(CODEC_FRAMES), self.codes.shape[2])
        own_index = {rows: Index(rows, self._spare, device) for rows in self._rows}
        self._codec_inputs = {
            "sound": CodecInput(self._index, codes),
            "first": CodecInput(own_index, codes[:, :1].clone()),
        }

    @property
    def missed(self) -> int:
        return self.graphs.missed

    def describe(self) -> str:
        """As Steps.describe."""
        memory = f" in {self._graph_bytes / 1e9:.2f} GB" if self._graph_bytes else ""
        return f"{len(self.graphs)} graphs{memory}, {self.model.way.name}"

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture every shape, once; the largest first, as smaller ones fit into the memory that it takes."""
        if len(self.graphs):
            return
        before = _reserved(self.codes.device)
        self._capture()
        self._graph_bytes = _reserved(self.codes.device) - before

    def _capture(self) -> None:
        for length in reversed(self._lengths):
            for batch in reversed(self._batches if length <= LONG_PROMPT else self._batches[:1]):
                self._capture_prompts(batch, length)
        for frames in CODEC_FRAMES:
            for rows in reversed(self._codec_rows[frames]):
                self._capture_sound("sound", rows, frames)
        for rows in reversed(self._rows):
            self._capture_sound("first", rows, 1)
        for span in reversed(self._spans):
            for rows in reversed(self._rows):
                self._capture_frame(StepShape(rows, span, *self._widths))

    # --- prompts ---

    def prefill(self, entries: Sequence[Entry]) -> None:
        """As Steps.prefill, a graph's batch at a time."""
        most = self._batches[-1]
        short = [entry for entry in entries if len(entry[1].rows) <= LONG_PROMPT]
        groups = [short[start : start + most] for start in range(0, len(short), most)]
        groups += [[entry] for entry in entries if len(entry[1].rows) > LONG_PROMPT]
        for group in groups:
            self.model.prefill(self.slots, group, self._store)

    def _store(self, state: Slots, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        batch, length = fitting(self._batches, len(slots)), fitting(self._lengths, max(map(len, prompts)))
        run = self.graphs.find(("prompts", batch, length))
        if run is None or batch is None:
            self.model.store(state, slots, prompts)
            return
        self._index[batch].set(slots)
        for row, prompt in enumerate(prompts):
            self._prompts[row, : len(prompt)] = prompt
        run()

    def _capture_prompts(self, batch: int, length: int) -> None:
        index, x = self._index[batch], self._prompts[:batch, :length]

        def run() -> Tensor:
            self.model.store_padded(self.slots, index.tensor, x)
            return index.tensor  # of no interest: what counts is in the arenas

        self.graphs.add(("prompts", batch, length), run)

    # --- frames ---

    @torch.inference_mode()
    def frame(self, slots: Sequence[int]) -> Tensor:
        """As Steps.frame."""
        shape = self.slots.shape(slots)
        rows, span = fitting(self._rows, shape.rows), fitting(self._spans, shape.span)
        run = self.graphs.find(("frame", rows, span, shape.width, shape.subtalker_width))
        if run is None or rows is None:
            return self.model.frame_step(self.slots, slots)
        self._index[rows].set(slots)
        codes = run()[: len(slots)].clone()  # the next replay writes there
        self.slots.advance(slots)
        return codes

    def _capture_frame(self, shape: StepShape) -> None:
        index = self._index[shape.rows]

        def run() -> Tensor:
            codes = self.model.frame(self.slots, index.tensor, shape)
            self.slots.progress[self._spare] = 0  # nobody resets it, and its positions must not run out
            return codes

        self.graphs.add(("frame", *shape), run)

    # --- sound ---

    def sound(self, slots: Sequence[int], codes: Tensor) -> Tensor:
        """As Steps.sound, in as many graphs as the frames need."""
        pieces = torch.split(codes, parts(codes.shape[1]), dim=1)
        return torch.cat([self._sound("sound", slots, piece) for piece in pieces], dim=1)

    def last_chunk(self, frames: int) -> int:
        """As Steps.last_chunk: one graph, which other slots may share, instead of several."""
        return fitting(CODEC_FRAMES[::-1], frames) or frames

    def first_sound(self, slots: Sequence[int], codes: Tensor) -> Tensor:
        """As Steps.first_sound."""
        return self._sound("first", slots, codes)

    @torch.inference_mode()
    def _sound(self, kind: str, slots: Sequence[int], codes: Tensor) -> Tensor:
        frames = codes.shape[1]
        rows = fitting(self._codec_rows[frames], len(slots))
        run = self.graphs.find((kind, rows, frames))
        if run is None or rows is None:
            return super().sound(slots, codes)
        given = self._codec_inputs[kind]
        given.slots[rows].set(slots)
        given.codes[: len(slots), :frames] = codes
        return run()[: len(slots)].clone()

    def _capture_sound(self, kind: str, rows: int, frames: int) -> None:
        given = self._codec_inputs[kind]
        index, codes = given.slots[rows].tensor, given.codes[:rows, :frames]
        capture = self.beside.capture if kind == "first" else None
        self.graphs.add((kind, rows, frames), lambda: self.codec.decode(codes, index, self.sounds), capture)


def _reserved(device: torch.device) -> int:
    """Memory that torch has taken on a GPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
