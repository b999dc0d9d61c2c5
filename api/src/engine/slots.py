"""What the model remembers of each stream, in arenas of fixed size: a slot is an index into all of them.

Owns keys and values, the code predictor's scratch, the next input, the text still to come, the codes already used and
the sampling rows; entering and leaving a slot. Holds no weights and decides nothing.
The numbers that shape a step (lengths, frames) are kept on the host too, so that no step waits for a device.
Shapes: S slots, B rows of a step, P positions, K key-value heads, G query heads of each, D head_dim, H talker's hidden.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TalkerConfig, TransformerConfig
from .errors import EngineError, PromptTooLong
from .layers import Memory, rotations
from .sampling import Rule, Sampling, key, width


class KeyValues:
    """One arena for keys and one for values: (layers, S, K, P, D). On a CPU, memory is used from when it is written."""

    def __init__(self, config: TransformerConfig, slots: int, positions: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, positions, config.head_dim)
        self.keys, self.values = _zeros(shape, like), _zeros(shape, like)  # what is masked must not be NaN


class PromptMemory(Memory):
    """Prefill of whole prompts: rows of several prompts one after the other, each from position 0 of its slot."""

    def __init__(self, arena: KeyValues, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.arena, self.slots, self.lengths = arena, slots, list(lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As Memory."""
        pieces = zip(*(torch.split(x, self.lengths) for x in (query, key, value)), strict=True)
        outs = []
        for slot, (q, k, v) in zip(self.slots, pieces, strict=True):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, D)
            self.arena.keys[layer, slot, :, : k.shape[1]] = k
            self.arena.values[layer, slot, :, : v.shape[1]] = v
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            outs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)


class PaddedPromptMemory(Memory):
    """Prefill of B prompts that were all padded to `length` rows: nothing but that shapes it."""

    def __init__(self, arena: KeyValues, slots: Tensor, length: int) -> None:
        self.arena, self.slots, self.length = arena, slots, length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As Memory: B * length rows."""
        query, key, value = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        self.arena.keys[layer, :, :, : self.length][self.slots] = key  # (B, heads, length, D)
        self.arena.values[layer, :, :, : self.length][self.slots] = value
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


Lengths = Sequence[tuple[int, int]]
"""Slots, and how many positions of each are filled with those of this step."""


class StepMemory(Memory):
    """One position more in each of B slots. With `lengths`, each slot's keys are read in place, at their true length.

    Without (no length may shape a graph) the first `span` positions of all rows are gathered, and masked.
    """

    def __init__(self, arena: KeyValues, slots: Tensor, positions: Tensor, lengths: Lengths, span: int) -> None:
        self.arena, self.slots, self.positions, self.lengths, self.span = arena, slots, positions, lengths, span
        places = torch.arange(span, device=slots.device)
        self.mask = None if lengths else (places <= positions[:, None])[:, None, None]  # (B, 1, 1, span)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As Memory."""
        keys, values = self.arena.keys[layer], self.arena.values[layer]
        keys[self.slots, :, self.positions] = key
        values[self.slots, :, self.positions] = value
        query = query.reshape(*key.shape[:2], -1, key.shape[2])  # (B, K, G, D): a key's queries as its rows
        if self.mask is None:
            outs = [
                F.scaled_dot_product_attention(
                    query[row, None], keys[slot, None, :, :length], values[slot, None, :, :length]
                )
                for row, (slot, length) in enumerate(self.lengths)
            ]
            return torch.cat(outs).flatten(1)
        keys, values = keys[:, :, : self.span][self.slots], values[:, :, : self.span][self.slots]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).flatten(1)


class FrameMemory(Memory):
    """The code predictor's: restarted each frame, so rows need no slots. Positions 0 and 1 come together."""

    def __init__(self, arena: KeyValues, rows: int) -> None:
        self.arena, self.rows, self.filled = arena, rows, 0
        self.causal = torch.ones(2, 2, dtype=torch.bool, device=arena.keys.device).tril()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As Memory, for T new positions of each row: N = B * T."""
        new = key.shape[0] // self.rows
        end = self.filled + new
        keys, values = self.arena.keys[layer, : self.rows], self.arena.values[layer, : self.rows]
        keys[:, :, self.filled : end] = key.view(self.rows, new, *key.shape[1:]).transpose(1, 2)
        values[:, :, self.filled : end] = value.view(self.rows, new, *value.shape[1:]).transpose(1, 2)
        group = query.shape[1] // key.shape[1]
        query = query.reshape(self.rows, new, key.shape[1], group, -1).permute(0, 2, 3, 1, 4)  # (B, K, G, T, D)
        mask = self.causal.repeat(group, 1) if new > 1 else None  # (G * T, L)
        out = F.scaled_dot_product_attention(query.flatten(2, 3), keys[:, :, :end], values[:, :, :end], attn_mask=mask)
        return out.view(query.shape).permute(0, 3, 1, 2, 4).reshape(self.rows * new, -1)

    def advance(self, positions: int) -> None:
        """All layers have stored `positions` more."""
        self.filled += positions


class Rows(NamedTuple):
    """What a step needs of its slots, gathered: each (B,)."""

    penalty: Tensor
    talker: Rule
    subtalker: Rule
    min_new_tokens: Tensor
    keys: Tensor
    positions: Tensor
    frames: Tensor
    text_rows: Tensor


class StepShape(NamedTuple):
    """All that may shape a step: the key of a captured graph."""

    rows: int
    span: int
    width: int
    subtalker_width: int


class Stream:
    """The host's copy of one slot's counters."""

    def __init__(self, length: int, text_rows: int, widths: tuple[int, int]) -> None:
        self.length, self.text_rows, self.widths = length, text_rows, widths
        self.frame = 0


class Slots:
    """All arenas. `count` slots of `positions` prompt rows and frames together, and `text_rows` rows of text to come.

    `like`: a weight of the talker, for dtype and device.
    """

    def __init__(self, config: TalkerConfig, like: Tensor, *, count: int, positions: int, text_rows: int) -> None:
        predictor = config.code_predictor_config
        self.count, self.positions, self.text_capacity = count, positions, text_rows
        self.vocabularies = (config.vocab_size, predictor.vocab_size)
        self.talker = KeyValues(config, count, positions, like)
        self.predictor = KeyValues(predictor, count, config.num_code_groups, like)
        self.next_input = like.new_zeros(count, config.hidden_size)
        self.text = like.new_zeros(count, text_rows + 1, config.hidden_size)
        self.seen = torch.zeros(count, config.vocab_size, dtype=torch.bool, device=like.device)
        # native/decoder.c knows these columns too
        self.reals = torch.ones(count, 5, device=like.device)
        self.settings = torch.zeros(count, 6, dtype=torch.int64, device=like.device)
        self.progress = torch.zeros(count, 3, dtype=torch.int64, device=like.device)  # position, frame, text rows
        self.rotation = rotations(config, positions, like)
        self.streams: dict[int, Stream] = {}

    def bytes(self) -> int:
        """Memory of all arenas."""
        arenas = (self.talker.keys, self.talker.values, self.predictor.keys, self.predictor.values)
        rest = (self.next_input, self.text, self.seen, self.reals, self.settings, self.progress)
        return sum(x.nbytes for x in (*arenas, *rest))

    def check(self, slot: int, length: int, text_rows: int) -> None:
        """Refuse what `enter` could not hold: a prompt of `length` stored positions needs one more for a frame.

        Raises:
            EngineError: a slot that is taken.
            PromptTooLong: a prompt or a text that is too long.
        """
        if slot in self.streams or not 0 <= slot < self.count:
            raise EngineError(f"slot {slot} is not free")
        if length >= self.positions:
            raise PromptTooLong(f"a prompt of {length + 1} rows does not fit into {self.positions} positions")
        if text_rows > self.text_capacity:
            raise PromptTooLong(f"{text_rows} tokens of text to come are more than {self.text_capacity}")

    def enter(self, slot: int, sampling: Sampling, length: int, last: Tensor, trailing: Tensor, pad: Tensor) -> None:
        """Take `slot` for a prompt: `length` positions are stored, `last` (H,) is the row after them.

        trailing (T, H): the text rows of the first T frames; after them every frame adds `pad` (H,).
        """
        s = sampling
        penalties = (s.repetition_penalty, s.temperature, s.top_p, s.subtalker_temperature, s.subtalker_top_p)
        counts = (s.do_sample, s.top_k, s.subtalker_dosample, s.subtalker_top_k, s.min_new_tokens, key(s.seed))
        self.reals[slot] = torch.tensor(penalties)
        self.settings[slot] = torch.tensor(counts)
        self.progress[slot] = torch.tensor((length, 0, 0))
        self.seen[slot] = False
        self.next_input[slot] = last
        self.streams[slot] = Stream(length, 0, self.widths(s))
        self.append(slot, trailing, pad)

    def widths(self, sampling: Sampling) -> tuple[int, int]:
        """How much of the talker's and of the subtalker's logits must be sorted for it."""
        s = sampling
        return (
            width(s.do_sample, s.top_k, self.vocabularies[0]),
            width(s.subtalker_dosample, s.subtalker_top_k, self.vocabularies[1]),
        )

    def append(self, slot: int, rows: Tensor, pad: Tensor) -> None:
        """More text for a stream: rows (T, H) follow those that it has. A frame that finds none adds `pad`."""
        stream = self.streams[slot]
        end = stream.text_rows + rows.shape[0]
        if end > self.text_capacity:
            raise PromptTooLong(f"{end} tokens of text to come are more than {self.text_capacity}")
        self.text[slot, stream.text_rows : end] = rows
        self.text[slot, end] = pad
        self.progress[slot, 2] = end
        stream.text_rows = end

    def leave(self, slot: int) -> None:
        """Free the slot. What it held is overwritten by the next to enter."""
        self.streams.pop(slot, None)

    def room(self, slot: int) -> int:
        """Frames that the slot's positions still have room for."""
        return self.positions - self.streams[slot].length

    def starved(self, slot: int) -> bool:
        """Whether the next frame would run ahead of the text that has come, for text that is still arriving."""
        stream = self.streams[slot]
        return stream.frame >= stream.text_rows

    def shape(self, slots: Sequence[int]) -> StepShape:
        """The shape of a step of `slots`."""
        streams = [self.streams[slot] for slot in slots]
        if any(stream.length >= self.positions for stream in streams):
            raise EngineError(f"a slot has used all of its {self.positions} positions")
        longest = max(stream.length for stream in streams) + 1
        span = min(self.positions, 1 << (longest - 1).bit_length())
        return StepShape(len(slots), span, *(max(s.widths[i] for s in streams) for i in (0, 1)))

    def rows(self, index: Tensor) -> Rows:
        """The step's rows: index (B,)."""
        penalty, temperature, top_p, sub_temperature, sub_top_p = self.reals[index].unbind(1)
        do_sample, top_k, sub_do_sample, sub_top_k, minimum, keys = self.settings[index].unbind(1)
        talker = Rule(do_sample != 0, temperature, top_k, top_p)
        subtalker = Rule(sub_do_sample != 0, sub_temperature, sub_top_k, sub_top_p)
        return Rows(penalty, talker, subtalker, minimum, keys, *self.progress[index].unbind(1))

    def lengths(self, slots: Sequence[int]) -> Lengths:
        """For a step of `slots` on a CPU; none elsewhere, where gathering is faster."""
        on_cpu = self.progress.device.type == "cpu"
        return [(slot, self.streams[slot].length + 1) for slot in slots] if on_cpu else ()

    def commit(self, index: Tensor, rows: Rows, first: Tensor, next_input: Tensor) -> None:
        """Write back what a step has made: first codes (B,), next_input (B, H) without its text row."""
        places = torch.minimum(rows.frames, rows.text_rows)
        self.next_input[index] = next_input + self.text[index, places]
        self.seen[index, first] = True
        self.progress[index, :2] = torch.stack((rows.positions, rows.frames), dim=1) + 1

    def advance(self, slots: Sequence[int]) -> None:
        """The host's part of a commit."""
        for slot in slots:
            stream = self.streams[slot]
            stream.length += 1
            stream.frame += 1


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """On a CPU from the system's own zero pages, small ones, so that only what is written to takes memory."""
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, math.prod(shape) * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
