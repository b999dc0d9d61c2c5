"""Choosing codes: penalties, temperature, top-k, top-p, and random numbers by counter.

Owns the order of Hugging Face's processors, by which the official package goes (repetition penalty, suppression,
minimum, temperature, top-k, top-p), and the generator: SplitMix64 (Steele, Lea, Flood 2014), whose n-th output is a
hash of the key and n.
A draw depends on a row's own key, frame and code group alone, never on its batch mates.
Shapes: B rows, V vocabulary, W the width that is sorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ChoiceConfig
from .errors import EngineError

MIN_NEW_TOKENS = 2
"""The official package's: neither of the first two tokens may end the speech."""
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MIN_WIDTH = 64
_TIES = 8
"""Places kept beyond top_k, as bf16 logits often tie and all that equal the k-th stay in."""


@dataclass(frozen=True)
class Sampling(ChoiceConfig):
    """How one request chooses its codes. `seed` is any integer; top_k 0 keeps all.

    Raises:
        EngineError: a value that no distribution can be made of.
    """

    seed: int = 0
    min_new_tokens: int = MIN_NEW_TOKENS

    def __post_init__(self) -> None:
        for name in ("temperature", "subtalker_temperature", "repetition_penalty", "top_p", "subtalker_top_p"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise EngineError(f"{name} must be positive, not {value}")
        if min(self.top_k, self.subtalker_top_k, self.min_new_tokens) < 0:
            raise EngineError("top_k and min_new_tokens must not be negative")

    @classmethod
    def default(cls, config: ChoiceConfig, seed: int = 0) -> Sampling:
        """The checkpoint's own choice."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(ChoiceConfig)}, seed=seed)


class Rule(NamedTuple):
    """One choice's parameters, a row each: (B,)."""

    do_sample: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def width(do_sample: bool, top_k: int, vocabulary: int) -> int:
    """How many of the best must be sorted for a row: 0 for none (greedy). A few sizes only, as each is a graph."""
    if not do_sample:
        return 0
    if top_k == 0:
        return vocabulary
    return min(vocabulary, max(_MIN_WIDTH, 1 << (top_k + _TIES - 1).bit_length()))


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Repetition penalty: logits (B, V), seen (B, V) bool, penalty (B,) -> (B, V)."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * factor, logits / factor), logits)


def choose(logits: Tensor, rule: Rule, uniform: Tensor, width: int) -> Tensor:
    """A code per row: logits (B, V) in fp32, uniform (B,) in [0, 1) -> (B,).

    `width` must be the largest of the rows' `width()`.
    """
    best = logits.argmax(dim=-1)
    if width == 0:
        return best
    scores, ids = logits.topk(width, dim=-1)  # (B, W), best first
    scores = scores / rule.temperature[:, None]
    last = torch.where(rule.top_k == 0, width, rule.top_k).clamp(max=width) - 1
    scores = scores.masked_fill(scores < scores.gather(1, last[:, None]), -torch.inf)
    kept = scores.softmax(dim=-1)
    kept = torch.where(kept.cumsum(dim=-1) - kept < rule.top_p[:, None], kept, 0.0)
    reach = kept.cumsum(dim=-1)
    place = (reach < uniform[:, None] * reach[:, -1:]).sum(dim=-1)
    place = torch.minimum(place, (kept > 0).sum(dim=-1) - 1)  # a cumulative sum's rounding must not pick what was cut
    drawn = ids.gather(1, place[:, None])[:, 0]
    return torch.where(rule.do_sample, drawn, best)


def key(seed: int) -> int:
    """The generator's start for a seed, as a signed 64-bit integer: near seeds give unrelated streams."""
    mixed = (seed + _GAMMA) & _MASK
    for shift, factor in zip((30, 27), _MIX, strict=True):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
    return _signed(mixed ^ (mixed >> 31))


def draws(keys: Tensor, frames: Tensor, groups: int) -> Tensor:
    """Uniform numbers in [0, 1) of `groups` code groups: keys (B,), frames (B,) -> (B, groups) fp32."""
    counter = frames[:, None] * groups + torch.arange(1, groups + 1, device=keys.device)
    mixed = keys[:, None] + counter * _signed(_GAMMA)  # int64 wraps, which is what the generator wants
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(_MIX[0])
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(_MIX[1])
    mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 40).float() * 2.0**-24


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch's own keeps the sign


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
