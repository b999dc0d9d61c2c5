"""How a frame's passes through the two stacks of layers are computed: the talker's, and the code predictor's 15.

Owns the choice between torch's operations (or a GPU's fused kernels, see kernels.py) and the CPU's kernel (native/), by
which a pass is one call. What goes in and what is made of the logits is language_model.py's and predictor.py's.
Shapes: B rows of a step, T new rows of each, H talker's hidden, h the predictor's, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from .config import TalkerConfig
from .kernels import Way
from .layers import rotations
from .linear import Linear
from .native.frame import NativeFrame
from .native.products import Native, NativeProduct
from .native.stack import NativeStack
from .predictor import LayerPass, PredictorPass
from .slots import Lengths, PromptMemory, Rows, Slots, StepShape
from .talker import Talker

_PROMPT_ROWS = 64
"""Of a call of the kernel: more are not faster, and take more scratch."""


class Passes(Protocol):
    """A prompt's pass and a frame's."""

    def store(self, state: Slots, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """Keys and values of prompts, each (L, H) of its own length."""
        ...

    def talk(
        self, state: Slots, index: Tensor, rows: Rows, shape: StepShape, lengths: Lengths
    ) -> tuple[Tensor, Tensor]:
        """One position more of the slots index (B,): hidden (B, H), normed, and the first code's logits (B, V)."""
        ...

    def predict(self, state: Slots, sequences: int) -> PredictorPass:
        """The code predictor's passes of one frame."""
        ...


class LayerPasses:
    """Implements Passes layer by layer. `way`: how, and can be changed."""

    def __init__(self, talker: Talker, config: TalkerConfig, way: Way) -> None:
        self.way, self._talker = way, talker
        weight = talker.model.norm.weight
        self._rotation = rotations(config.code_predictor_config, config.num_code_groups, weight)

    def store(self, state: Slots, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """As Passes: one after the other in one pass."""
        lengths = [len(rows) for rows in prompts]
        places = torch.cat([torch.arange(length) for length in lengths]).to(prompts[0].device)
        self._talker(torch.cat(list(prompts)), state.rotation.at(places), PromptMemory(state.talker, slots, lengths))

    def talk(
        self, state: Slots, index: Tensor, rows: Rows, shape: StepShape, lengths: Lengths
    ) -> tuple[Tensor, Tensor]:
        """As Passes."""
        memory = self.way.step_memory(state.talker, index, rows.positions, lengths, shape.span)
        x, delta = self._talker(state.next_input[index], state.rotation.at(rows.positions), memory)
        _, hidden = self._talker.model.norm.add(x, delta)
        return hidden, self._talker.codec_head(hidden)

    def predict(self, state: Slots, sequences: int) -> PredictorPass:
        """As Passes."""
        memory = self.way.frame_memory(state.predictor, sequences)
        return LayerPass(self._talker.code_predictor, self._rotation, memory)


class NativePasses:
    """Implements Passes by the CPU's kernel."""

    def __init__(self, talker: Talker, config: TalkerConfig, native: Native) -> None:
        predictor = talker.code_predictor
        self._native, self._talker, self._heads = native, talker, [_head(head) for head in predictor.lm_head]
        self._layers = NativeStack(native, talker.model.layers, talker.model.norm, config)
        self._predictor = NativeStack(
            native, predictor.model.layers, predictor.model.norm, config.code_predictor_config
        )
        weight = talker.model.norm.weight
        self._rotation = rotations(config.code_predictor_config, config.num_code_groups, weight)

    @classmethod
    def of(cls, talker: Talker, config: TalkerConfig, native: Native | None) -> Self | None:
        """None where a weight of the layers is in a form that the kernel does not have."""
        parts = (talker.model.layers, talker.code_predictor.model.layers)
        if native is None or not all(map(NativeStack.able, parts)):
            return None
        return cls(talker, config, native)

    def whole_frame(self, suppressed: Tensor, end: int) -> NativeFrame | None:
        """All of a frame in one call, with its choices: as NativeFrame. None where a head is not the kernel's."""
        if not NativeFrame.able(self._talker):
            return None
        stacks = (self._layers, self._predictor)
        return NativeFrame(self._native, self._talker, stacks, self._rotation, suppressed, end)

    def store(self, state: Slots, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """As Passes, a part of a prompt at a time."""
        for slot, prompt in zip(slots, prompts, strict=True):
            for begin in range(0, len(prompt), _PROMPT_ROWS):
                x = prompt[begin : begin + _PROMPT_ROWS].clone()
                places = torch.arange(begin, begin + len(x))
                index = torch.full_like(places, slot)
                span = begin + len(x)
                self._layers.run(x, index, places, state.talker, state.rotation, fresh=len(x), span=span)

    def talk(
        self, state: Slots, index: Tensor, rows: Rows, shape: StepShape, lengths: Lengths
    ) -> tuple[Tensor, Tensor]:
        """As Passes."""
        x, head = state.next_input[index], _head(self._talker.codec_head)
        hidden, logits = self._layers.run(
            x, index, rows.positions, state.talker, state.rotation, span=shape.span, head=head
        )
        return hidden, self._talker.codec_head(hidden) if logits is None else logits

    def predict(self, state: Slots, sequences: int) -> PredictorPass:
        """As Passes."""
        places = torch.arange(sequences)

        def run(group: int, x: Tensor) -> Tensor:
            slots, positions = places, torch.full_like(places, group + 1)
            if group == 0:
                slots, positions = places.repeat_interleave(2), torch.arange(2).repeat(sequences)
            span, fresh = len(self._heads) + 1, len(positions) // sequences
            hidden, logits = self._predictor.run(
                x, slots, positions, state.predictor, self._rotation, fresh=fresh, span=span, head=self._heads[group]
            )
            if logits is None:
                logits = self._talker.code_predictor.lm_head[group](hidden)
            return logits

        return run


def _head(linear: nn.Module) -> NativeProduct | None:
    """If it is the kernel's."""
    product = linear.product if isinstance(linear, Linear) else None
    return product if isinstance(product, NativeProduct) else None
