"""The language model as a whole: loading, prefill of prompts into slots, one frame of codes for a batch of slots.

Owns the weights and the order of a step. State is in `Slots`; which slot does what, and the end, are the caller's.
Shapes: B rows of a step, H talker's hidden, V codec vocabulary, C code groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig
from .forms import Progress, Settler, ignore
from .kernels import PLAIN, Way, chosen
from .layers import use
from .linear import Form, settle
from .native.products import Native
from .passes import LayerPasses, NativePasses, Passes
from .prompt import PromptRows
from .sampling import Sampling, choose, draws, penalise
from .slots import Lengths, PaddedPromptMemory, Slots, StepShape
from .talker import Talker
from .weights import Checkpoint, empty, load

SPECIAL_CODES = 1024
"""The codec vocabulary's upper end, ids that are no sound: never chosen but for the end of speech."""
Entry = tuple[int, PromptRows, Sampling]
"""A slot, and what enters it."""
Store = Callable[[Slots, Sequence[int], Sequence[Tensor]], None]
_PREFIX = "talker."
_TEXT_TABLE = "model.text_embedding.weight"


class LanguageModel:
    """Text and voice to codes."""

    def __init__(
        self, config: ModelConfig, talker: Talker, *, kernels: bool = True, native: Native | None = None
    ) -> None:
        """`talker` is loaded. Its linear maps are brought into their device's form here.

        `kernels`: use fused kernels where the device has them; without, torch's own operations everywhere. `native`:
        the CPU's kernel, which the talker's weights are made for.
        """
        self.config, self.talker, self.native = config, talker, native
        codec = config.talker_config
        self.eos = codec.codec_eos_token_id
        self.weight = talker.model.norm.weight
        settle(talker, native=native)
        talker.code_predictor.fold(talker.model.codec_embedding.weight)
        special = torch.arange(codec.vocab_size) >= codec.vocab_size - SPECIAL_CODES
        special[self.eos] = False
        self.suppressed = special.to(self.weight.device)
        self.is_eos = (torch.arange(codec.vocab_size) == self.eos).to(self.weight.device)
        self.use(chosen(codec, self.weight) if kernels else PLAIN)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        weights: Form = "fp32",
        weights_cache: Sequence[Path] = (),
        progress: Progress = ignore,
        kernels: bool = True,
        native: Native | None = None,
    ) -> LanguageModel:
        """The checkpoint in `folder`.

        The text table, of which single rows are read, keeps the file's dtype. `weights`: their form on a CPU; quantised
        ones are kept in the first folder of `weights_cache` that can be used, and `progress` is told how many there are
        already. `kernels`, `native`: as __init__'s.

        Raises:
            CheckpointError: whatever makes the checkpoint unusable.
        """
        config = ModelConfig.read(folder)
        with Checkpoint(folder) as checkpoint:

            def build() -> Talker:
                talker = Talker(config.talker_config).to(dtype)
                talker.model.text_embedding.to(checkpoint.stored(_PREFIX + _TEXT_TABLE).dtype)
                return talker

            talker = empty(build, device=device)
            with Settler(
                talker, weights, checkpoint=folder, cache=weights_cache, progress=progress, native=native
            ) as settler:
                load(talker, checkpoint, _PREFIX, ready=settler.ready, filled=settler.filled)
        return cls(config, talker, kernels=kernels, native=native)

    def use(self, way: Way) -> None:
        """How steps are computed from now on. Graphs that are captured already keep what they had."""
        self.way = way
        use(self.talker, way.arithmetic)
        config = self.config.talker_config
        ours = NativePasses.of(self.talker, config, self.native)
        self.passes: Passes = ours or LayerPasses(self.talker, config, way)
        self.whole_frame = ours.whole_frame(self.suppressed, self.eos) if ours else None

    def new_slots(self, count: int, positions: int, text_rows: int) -> Slots:
        """Arenas for `count` streams; see Slots."""
        return Slots(self.config.talker_config, self.weight, count=count, positions=positions, text_rows=text_rows)

    @torch.inference_mode()
    def prefill(self, state: Slots, entries: Sequence[Entry], store: Store | None = None) -> None:
        """Take a free slot for each prompt and store its keys and values; prompts may differ in length.

        The last row of each is left to the slot's first frame step. `store`: what computes and stores all others.

        Raises:
            EngineError: a slot that is taken, a prompt or a text that is too long. No slot is taken then.
        """
        for slot, prompt, _ in entries:
            state.check(slot, len(prompt.rows) - 1, len(prompt.trailing))
        (store or self.store)(state, [slot for slot, _, _ in entries], [prompt.rows[:-1] for _, prompt, _ in entries])
        for slot, prompt, sampling in entries:
            state.enter(slot, sampling, len(prompt.rows) - 1, prompt.rows[-1], prompt.trailing, prompt.pad)

    def store(self, state: Slots, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        """Keys and values of prompts, each (L, H) of its own length."""
        self.passes.store(state, slots, prompts)

    def store_padded(self, state: Slots, index: Tensor, x: Tensor) -> None:
        """As `store`, of one shape: index (B,), x (B, L, H), each prompt followed by any rows.

        What those leave in a slot lies behind its prompt: each position is overwritten before it is first attended to.
        """
        rows, length, _ = x.shape
        places = torch.arange(length, device=x.device).repeat(rows)
        memory = PaddedPromptMemory(state.talker, index, length)
        self.talker(x.flatten(0, 1), state.rotation.at(places), memory)

    @torch.inference_mode()
    def frame_step(self, state: Slots, slots: Sequence[int]) -> Tensor:
        """One frame of each of `slots`: codes (B, C).

        A first code that equals `eos` ends a stream: its other codes mean nothing, and the slot should leave.

        Raises:
            EngineError: a slot whose positions are used up.
        """
        shape = state.shape(slots)
        index = torch.tensor(slots, device=self.weight.device)
        codes = self.frame(state, index, shape, state.lengths(slots))
        state.advance(slots)
        return codes

    def frame(self, state: Slots, index: Tensor, shape: StepShape, lengths: Lengths = ()) -> Tensor:
        """The device's part of frame_step: index (B,) -> codes (B, C). `lengths`: as StepMemory."""
        if self.whole_frame is not None:
            return self.whole_frame.run(state, index)
        rows = state.rows(index)
        hidden, logits = self.passes.talk(state, index, rows, shape, lengths)  # (B, H), (B, V)
        uniform = draws(rows.keys, rows.frames, self.config.talker_config.num_code_groups)  # (B, C)

        logits = penalise(logits.float(), state.seen[index], rows.penalty)  # (B, V)
        too_early = (rows.frames < rows.min_new_tokens)[:, None] & self.is_eos
        logits = logits.masked_fill(self.suppressed | too_early, -torch.inf)
        first = choose(logits, rows.talker, uniform[:, 0], shape.width)

        run = self.passes.predict(state, shape.rows)
        rest = self.talker.code_predictor(hidden, first, run, rows.subtalker, uniform[:, 1:], shape.subtalker_width)
        codes = torch.cat((first[:, None], rest), dim=1)
        state.commit(index, rows, first, self.talker.frames(codes))
        return codes
