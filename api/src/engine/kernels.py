"""Fused kernels for the decoder's steps on a GPU, in Triton: what bounds a frame there is the number of kernels.

Owns three kernels (residual add + RMSNorm; SwiGLU; a step's attention from the projected heads to its output) and the
choice between them and torch's own operations, which they are checked against before they are used. Products of
matrices stay torch's. Triton is imported when a GPU is to be used, never before: other installs have none.

The roundings are torch's: intermediate results are fp32 and become the dtype where torch's operations end, but for
attention, where torch's own kernels differ among themselves and everything between query and output is fp32 here.
A row is computed by programs of its own, in blocks of a size that the model and the arena give: neither the rows beside
it nor a step's shape change one bit of it.

Ideas: attention in one pass with a running maximum is the online softmax (Milakov and Gimelshein 2018) of
FlashAttention (Dao et al. 2022). That each lane of a block runs over its own positions and all merge once, at the end,
is Flash-Decoding's split (Dao, Haziza, Massa, Sizov 2023) within one program.
Shapes: N rows, B sequences of T new rows, H hidden, Q query heads, K key-value heads, G queries of each, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .config import TalkerConfig, TransformerConfig
from .errors import EngineError
from .layers import Arithmetic, Heads, Memory, RMSNorm, Rotation, TorchArithmetic, rotations
from .slots import FrameMemory, KeyValues, Lengths, StepMemory

if TYPE_CHECKING:
    from triton import language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
else:
    tl = None  # until `load`

_log = logging.getLogger(__name__)
_TILE = 16_384
"""Of an attention program: queries x positions x head_dim, which fit into the registers of its warps."""
_POSITIONS = (16, 64)
"""The least and the most that an attention program reads at a time."""
_COLUMNS = 1024
"""Of a SwiGLU program."""
_ROWS = 3
"""Of a check."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""How far a kernel may be from torch's operations, of their largest value, to be used. A fault is off by far more, and
torch's attention in float32 may have products of fewer bits; how close they are is for the tests."""


# --- kernels: Triton's language; their parameters are pointers, numbers and, in capitals, constants ---


def _add_norm(  # type: ignore[no-untyped-def]
    x, delta, weight, total, out, x_stride, delta_stride, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """x (N, SIZE), delta the same or None, weight (SIZE,) -> total, which without a delta is left out, and out."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < SIZE
    value = tl.load(x + row * x_stride + places, mask=inside, other=0.0)
    if delta is not None:
        more = tl.load(delta + row * delta_stride + places, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + row * SIZE + places, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + epsilon)
    value = value * scale * tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + places, value.to(out.dtype.element_ty), mask=inside)


def _swiglu(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """gate_up (N, 2 * SIZE) -> out (N, SIZE)."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + places, mask=inside, other=0.0).to(tl.float32)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * SIZE + places, (silu * up).to(out.dtype.element_ty), mask=inside)


def _turned(  # type: ignore[no-untyped-def]
    head, weight, cos, sin, places, inside, epsilon, SIZE: tl.constexpr
):
    """Heads normed and rotated, in their own dtype: head, cos and sin point to heads and to their rotations.

    The other half of each is read again rather than exchanged.
    """
    dtype = head.dtype.element_ty
    others = (places + SIZE // 2) % SIZE
    here = tl.load(head + places, mask=inside, other=0.0).to(tl.float32)
    there = tl.load(head + others, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(here * here, axis=2, keep_dims=True) / SIZE + epsilon)
    here = here * scale * tl.load(weight + places, mask=places < SIZE, other=0.0).to(tl.float32)
    there = there * scale * tl.load(weight + others, mask=places < SIZE, other=0.0).to(tl.float32)
    here = here.to(dtype).to(tl.float32) * tl.load(cos + places, mask=inside, other=0.0).to(tl.float32)
    there = there.to(dtype).to(tl.float32) * tl.load(sin + places, mask=inside, other=0.0).to(tl.float32)
    return (here.to(dtype).to(tl.float32) + there).to(dtype)


def _attend(  # type: ignore[no-untyped-def]
    heads,  # (B * NEW, KEYS * (GROUP + 2), SIZE): queries, keys, values
    q_weight,  # (SIZE,)
    k_weight,
    cos,  # (B * NEW, SIZE) by turn_stride
    sin,
    keys,  # (slots, KEYS, positions, SIZE) by slot_stride and head_stride
    values,
    out,  # (B * NEW, KEYS * GROUP, SIZE)
    slots,  # (B,), or None: sequence b has slot b, and `start` positions before its new ones
    positions,  # (B,) by position_stride: how many positions a slot has before its new ones
    start,
    slot_stride,
    head_stride,
    turn_stride,
    position_stride,
    epsilon,
    scale,
    NEW: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,  # GROUP and SIZE, rounded up to powers of two
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One key-value head of one sequence: norm and rotate, store, attend. R = NEW * QUERIES is its queries."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if slots is None:
        before = start
        arena = sequence * slot_stride + head * head_stride
    else:
        before = tl.load(positions + sequence * position_stride).to(tl.int32)
        arena = tl.load(slots + sequence) * slot_stride + head * head_stride
    dtype = out.dtype.element_ty
    depth: tl.constexpr = KEYS * (GROUP + 2)
    places = tl.arange(0, WIDTH)[None, None, :]
    fits = places < SIZE

    # the new positions: key and value (1, NEW, WIDTH)
    age = tl.arange(0, NEW)[None, :, None]
    row = sequence * NEW + age
    turn = row * turn_stride
    projected = heads + (row * depth + KEYS * GROUP + head) * SIZE
    key = _turned(projected, k_weight, cos + turn, sin + turn, places, fits, epsilon, SIZE)
    value = tl.load(projected + KEYS * SIZE + places, mask=fits, other=0.0)
    spot = arena + (before + age) * SIZE + places
    tl.store(keys + spot, key, mask=fits)
    tl.store(values + spot, value, mask=fits)
    key = key.to(tl.float32)
    value = value.to(tl.float32)

    # the queries (R, 1, WIDTH), and what they attend to among the new positions
    number = tl.arange(0, NEW * QUERIES)[:, None, None]
    asked = fits & (number % QUERIES < GROUP)
    row = sequence * NEW + number // QUERIES
    member = head * GROUP + number % QUERIES
    turn = row * turn_stride
    query = _turned(
        heads + (row * depth + member) * SIZE, q_weight, cos + turn, sin + turn, places, asked, epsilon, SIZE
    ).to(tl.float32)
    score = tl.sum(query * key, axis=2) * scale  # (R, NEW)
    past = tl.arange(0, NEW)[None, :] <= tl.arange(0, NEW * QUERIES)[:, None] // QUERIES
    score = tl.where(past, score, float("-inf"))
    first = tl.max(score, axis=1, keep_dims=True)  # (R, 1): finite, as each query has its own position
    share = tl.exp(score - first)
    mixed = tl.sum(tl.expand_dims(share, 2) * value, axis=1)  # (R, WIDTH)
    total = tl.sum(share, axis=1)

    # the earlier positions: each of BLOCK lanes has a maximum, a sum and a mixture of its own
    lanes = tl.arange(0, BLOCK)
    best = tl.broadcast_to(first, (NEW * QUERIES, BLOCK))
    sums = tl.zeros((NEW * QUERIES, BLOCK), tl.float32)
    mixes = tl.zeros((NEW * QUERIES, BLOCK, WIDTH), tl.float32)
    for begin in range(0, before, BLOCK):
        stored = begin + lanes[None, :, None]
        at = arena + stored * SIZE + places
        old_key = tl.load(keys + at, mask=fits & (stored < before), other=0.0).to(tl.float32)
        old_value = tl.load(values + at, mask=fits & (stored < before), other=0.0).to(tl.float32)
        match = tl.sum(query * old_key, axis=2) * scale  # (R, BLOCK)
        match = tl.where(begin + lanes[None, :] < before, match, float("-inf"))
        higher = tl.maximum(best, match)
        fading = tl.exp(best - higher)
        part = tl.exp(match - higher)
        sums = sums * fading + part
        mixes = mixes * tl.expand_dims(fading, 2) + tl.expand_dims(part, 2) * old_value
        best = higher

    peak = tl.max(best, axis=1, keep_dims=True)
    fade = tl.exp(best - peak)  # (R, BLOCK)
    mine = tl.exp(first - peak)  # (R, 1)
    total = tl.expand_dims(total, 1) * mine + tl.sum(sums * fade, axis=1, keep_dims=True)
    mixed = mixed * mine + tl.sum(mixes * tl.expand_dims(fade, 2), axis=1)
    target = out + (row * (KEYS * GROUP) + member) * SIZE + places
    tl.store(target, tl.expand_dims(tl.div_rn(mixed, tl.broadcast_to(total, mixed.shape)), 1).to(dtype), mask=asked)


def load() -> None:
    """Make the kernels Triton's; that happens once.

    Raises:
        ImportError: there is no Triton.
    """
    global tl
    if tl is not None:
        return
    import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

    for kernel, fixed in ((_turned, []), (_add_norm, []), (_swiglu, []), (_attend, ["start"])):
        globals()[kernel.__name__] = triton.jit(kernel, do_not_specialize=fixed)
    tl = triton.language


# --- their launches; `load` comes first ---


class FusedArithmetic:
    """Implements layers.Arithmetic in a kernel each. Rows may be far apart, but are dense in themselves."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """As layers.Arithmetic."""
        rows, size = x.shape
        out = x.new_empty(rows, size)
        total = x if delta is None else torch.empty_like(out)
        stride = 0 if delta is None else delta.stride(0)
        block = _power(size)
        warps = max(1, min(8, block // 256))  # eight columns a thread, which are one read
        launch: Any = _add_norm
        launch[(rows,)](x, delta, weight, total, out, x.stride(0), stride, epsilon, size, block, num_warps=warps)
        return total, out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """As layers.Arithmetic."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        launch: Any = _swiglu
        launch[(rows, -(-size // _COLUMNS))](gate_up, out, size, _COLUMNS, num_warps=4)
        return out


class FusedStepMemory(Memory):
    """As StepMemory. Keys and values are read in place, each slot's at its true length."""

    def __init__(self, arena: KeyValues, slots: Tensor, positions: Tensor, lengths: Lengths, span: int) -> None:
        self.arena, self.slots, self.positions = arena, slots, positions

    def attend_heads(self, layer: int, heads: Heads) -> Tensor:
        """As Memory."""
        return _launch_attend(heads, self.arena, layer, 1, self.slots, self.positions, 0)


class FusedFrameMemory(FrameMemory):
    """As FrameMemory."""

    def __init__(self, arena: KeyValues, rows: int) -> None:
        self.arena, self.rows, self.filled = arena, rows, 0  # and no mask

    def attend_heads(self, layer: int, heads: Heads) -> Tensor:
        """As Memory."""
        return _launch_attend(heads, self.arena, layer, heads.packed.shape[0] // self.rows, None, None, self.filled)


def _launch_attend(
    heads: Heads, arena: KeyValues, layer: int, new: int, slots: Tensor | None, positions: Tensor | None, start: int
) -> Tensor:
    """`new` positions of each sequence: after `positions` (B,) of `slots` (B,), or after `start` of the first slots."""
    rows, _, size = heads.packed.shape
    rotation, weights = heads.rotation, (heads.q_norm.weight, heads.k_norm.weight)
    keys, values = arena.keys[layer], arena.values[layer]
    count, group = heads.counts[1], heads.counts[0] // heads.counts[1]
    out = heads.packed.new_empty(rows, count * group * size)
    turn_stride = 0 if rotation.cos.numel() == size else size
    strides = (*keys.stride()[:2], turn_stride, 0 if positions is None else positions.stride(0))
    queries, width = _power(group), _power(size)
    tile, (least, most) = new * queries * width, _POSITIONS
    block = max(least, min(most, _power(keys.shape[2]), _TILE // tile))  # a step's shape must not change it
    pointers = (heads.packed, *weights, rotation.cos, rotation.sin, keys, values, out, slots, positions)
    numbers = (start, *strides, heads.q_norm.epsilon, size**-0.5)
    constants = (new, count, group, size, queries, width, block)
    launch: Any = _attend
    launch[(rows // new, count)](*pointers, *numbers, *constants, num_warps=8 if tile * block > _TILE // 2 else 4)
    return out


def _power(size: int) -> int:
    """The power of two that is `size` or more."""
    return 1 << (size - 1).bit_length()


# --- the choice ---


class Way(NamedTuple):
    """How steps are computed: all that can be fused, by kernels or by torch's own operations."""

    name: str
    arithmetic: Arithmetic
    step_memory: Callable[[KeyValues, Tensor, Tensor, Lengths, int], Memory]
    frame_memory: Callable[[KeyValues, int], FrameMemory]


PLAIN = Way("torch's operations", TorchArithmetic(), StepMemory, FrameMemory)
FUSED = Way("fused kernels", FusedArithmetic(), FusedStepMemory, FusedFrameMemory)


def chosen(config: TalkerConfig, weight: Tensor) -> Way:
    """FUSED on a GPU whose kernels compile and agree with torch's operations, else PLAIN; why is logged.

    `weight`: one of the model's, for dtype and device.
    """
    if weight.device.type != "cuda":
        return PLAIN
    try:
        load()
        check(config, weight)
    except Exception as error:  # of a compiler, a driver or ours: speech without kernels is better than none
        _log.warning("no fused kernels, which slows speech down: %s: %s", type(error).__name__, error)
        return PLAIN
    return FUSED


@torch.inference_mode()
def check(config: TalkerConfig, weight: Tensor) -> None:
    """Run each kernel in the model's shapes, beside torch's operations; `weight` as chosen's.

    Raises:
        EngineError: they disagree.
    """
    predictor = config.code_predictor_config
    trials: dict[str, Callable[[Way], Tensor]] = {
        "the talker's arithmetic": lambda way: _arithmetic(way, config, weight),
        "the code predictor's arithmetic": lambda way: _arithmetic(way, predictor, weight),
        "the talker's attention": lambda way: _step(way, config, weight),
        "the code predictor's attention": lambda way: _frame(way, predictor, weight),
    }
    for name, run in trials.items():
        expected, got = (run(way).float() for way in (PLAIN, FUSED))
        off = float((got - expected).abs().max() / expected.abs().max())
        if not off <= TOLERANCES[weight.dtype]:  # nor is NaN
            raise EngineError(f"{name} is off by {off:.1e}")


def _random(like: Tensor, *shape: int) -> Tensor:
    """The same for each shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(like)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _arithmetic(way: Way, config: TransformerConfig, like: Tensor) -> Tensor:
    x, delta, weight = (_random(like, rows, config.hidden_size) for rows in (_ROWS, _ROWS + 1, 1))
    parts = way.arithmetic.add_norm(x, delta[1:], weight[0], config.rms_norm_eps)
    gated = way.arithmetic.swiglu(_random(like, _ROWS, 2 * config.intermediate_size))
    return _joined(*parts, gated)


def _step(way: Way, config: TransformerConfig, like: Tensor) -> Tensor:
    span = 2 * _POSITIONS[1]
    arena = _arena(config, span, like)
    positions = torch.tensor([0, span // 3, span - 1], device=like.device)
    slots = torch.arange(_ROWS, 0, -1, device=like.device)
    memory = way.step_memory(arena, slots, positions, (), span)
    out = memory.attend_heads(0, _heads(config, _ROWS, rotations(config, span, like).at(positions)))
    return _joined(out, arena.keys, arena.values)


def _frame(way: Way, config: TransformerConfig, like: Tensor) -> Tensor:
    arena, table = _arena(config, config.num_code_groups, like), rotations(config, config.num_code_groups, like)
    memory = way.frame_memory(arena, _ROWS)
    both = table.at(torch.arange(2, device=like.device).repeat(_ROWS))
    first = memory.attend_heads(0, _heads(config, 2 * _ROWS, both))
    memory.advance(2)
    second = memory.attend_heads(0, _heads(config, _ROWS, Rotation(table.cos[2], table.sin[2])))
    return _joined(first, second, arena.keys, arena.values)


def _arena(config: TransformerConfig, positions: int, like: Tensor) -> KeyValues:
    arena = KeyValues(replace(config, num_hidden_layers=1), _ROWS + 1, positions, like)
    for part, numbers in zip((arena.keys, arena.values), _random(like, 2, *arena.keys.shape), strict=True):
        part.copy_(numbers)
    return arena


def _heads(config: TransformerConfig, rows: int, rotation: Rotation) -> Heads:
    counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    norms = [RMSNorm(config.head_dim, config.rms_norm_eps).to(rotation.cos) for _ in range(2)]
    for number, norm in enumerate(norms):
        norm.weight.copy_(_random(rotation.cos, number + 1, config.head_dim)[number])
    return Heads(_random(rotation.cos, rows, sum(counts), config.head_dim), counts, norms[0], norms[1], rotation)
