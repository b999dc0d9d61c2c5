"""Fused kernels beside torch's operations: on a GPU (tests/gpu), or on a CPU in Triton's interpreter (test_kernels.py).

The interpreter must be chosen before Triton is imported, hence in a process of its own: TRITON_INTERPRET=1.
Sizes are tiny, as it is slow. In float32 the two may differ by the order of sums and by an exponential's last bits; in
16 bits what is no sum must be equal, which shows every rounding to be where torch has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from api.src.engine import kernels
from api.src.engine.config import ModelConfig, TransformerConfig
from api.src.engine.errors import EngineError
from api.src.engine.kernels import FUSED, PLAIN, Way
from api.src.engine.layers import Heads, Memory, RMSNorm, Rotation, rotations
from api.src.engine.prompt import Prompt
from api.src.engine.slots import KeyValues
from tests.engine.checkpoints import tiny
from tests.engine.streams import GREEDY, loaded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Of attention, in parts of the largest value. torch's in 16 bits rounds the shares of the positions, ours do not."""
GPU_CLOSE = {**CLOSE, torch.float32: 2e-5}
HEADS = [(4, 2, 16), (3, 1, 8), (4, 4, 16)]
"""Queries, key-value heads, head_dim."""
SPAN = 200
ROWS = 24
"""At most. Fewer are the first of them."""


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Triton's kernels, and where they are interpreted, devices' rounding to bfloat16: the interpreter's cuts off."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        if INTERPRETED:
            from triton.runtime import interpreter

            patch.setattr(interpreter, "_convert_float", _converted)
        kernels.load()
        yield


def _converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    if str(target) == "bf16":
        return torch.from_numpy(numbers.astype(np.float32)).bfloat16().view(torch.uint16).numpy()
    assert (str(source), str(target)) == ("bf16", "fp32")
    return torch.from_numpy(numbers.view(np.uint16)).view(torch.bfloat16).float().numpy().view(np.uint32)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def closeness(dtype: torch.dtype) -> float:
    return (CLOSE if INTERPRETED else GPU_CLOSE)[dtype]


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


# --- norm and SwiGLU ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 24), (7, 1000), (2, 2048)])
@pytest.mark.parametrize("with_delta", [True, False], ids=["add", "norm alone"])
def test_add_and_norm(dtype: torch.dtype, rows: int, size: int, with_delta: bool) -> None:
    x, weight = random(rows, 2, size, dtype=dtype)[:, 1], 1 + random(size, dtype=dtype, seed=1) / 4
    delta = random(rows, 3, size, dtype=dtype, seed=2)[:, 2] if with_delta else None
    (total, normed), (expected, expected_normed) = (
        way.arithmetic.add_norm(x, delta, weight, 1e-6) for way in (FUSED, PLAIN)
    )
    assert torch.equal(total, expected)
    if dtype == torch.float32:
        assert off(normed, expected_normed) < 1e-6
    else:  # a sum in another order may change a last bit, rarely
        assert (normed != expected_normed).float().mean() < 0.01
        assert off(normed, expected_normed) < 2 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 24), (5, 1100)])
def test_swiglu(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = 4 * random(rows, 2 * size, dtype=dtype)
    gate_up[0, :3] = torch.tensor([-200.0, 0.0, 200.0])
    got, expected = (way.arithmetic.swiglu(gate_up) for way in (FUSED, PLAIN))
    if dtype == torch.float32:
        assert off(got, expected) < 1e-6
    else:  # an exponential's last bit may change one of the result's, rarely
        assert (got != expected).float().mean() < 0.01
        assert off(got, expected) < 2 * torch.finfo(dtype).eps


# --- attention ---


class Case:
    """One layer's attention over an arena of random numbers, that each way starts anew."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, slots: int, positions: int) -> None:
        queries, self.keys, self.size = shape
        self.counts, self.dtype = [queries, self.keys, self.keys], dtype
        self.config = TransformerConfig(8, 8, 8, 2, queries, self.keys, self.size, rope_theta=1e4)
        self.like = torch.empty(0, dtype=dtype, device=DEVICE)
        self.slots, self.positions = slots, positions
        self.table = rotations(self.config, positions, self.like)
        self.norms = [RMSNorm(self.size, 1e-6).to(self.like) for _ in range(2)]
        for seed, norm in enumerate(self.norms):
            norm.weight.copy_(1 + random(self.size, dtype=dtype, seed=seed) / 4)

    def arena(self) -> KeyValues:
        arena = KeyValues(self.config, self.slots, self.positions, self.like)
        for seed, part in enumerate((arena.keys, arena.values)):
            part.copy_(random(*part.shape, dtype=self.dtype, seed=seed))
        return arena

    def heads(self, rows: int, rotation: Rotation, seed: int = 5) -> Heads:
        packed = random(ROWS, sum(self.counts), self.size, dtype=self.dtype, seed=seed)[:rows]
        return Heads(packed, self.counts, self.norms[0], self.norms[1], rotation)

    def step(self, way: Way, slots: list[int], lengths: list[int]) -> tuple[Tensor, KeyValues]:
        """One position more, after `lengths`: the output, and what is in the arena then."""
        arena = self.arena()
        index = torch.tensor(slots, device=DEVICE)
        progress = torch.tensor([[length, -1] for length in lengths], device=DEVICE)  # positions lie apart, as in Slots
        memory = way.step_memory(arena, index, progress[:, 0], (), self.positions)
        heads = self.heads(len(slots), self.table.at(progress[:, 0]))
        return memory.attend_heads(1, heads), arena

    def frame(self, way: Way, rows: int, passes: int) -> tuple[list[Tensor], KeyValues]:
        """Two positions, then one by one."""
        arena = self.arena()
        memory: Any = way.frame_memory(arena, rows)
        pair = self.table.at(torch.arange(2, device=DEVICE).repeat(rows))
        outs = []
        for number in range(passes):
            new = 1 if number else 2
            turn = pair if new == 2 else Rotation(self.table.cos[number + 1], self.table.sin[number + 1])
            outs.append(self._passed(memory, self.heads(new * rows, turn, seed=number)))
            memory.advance(new)
        return outs, arena

    @staticmethod
    def _passed(memory: Memory, heads: Heads) -> Tensor:
        return memory.attend_heads(1, heads)


def assert_same_arena(got: KeyValues, expected: KeyValues, dtype: torch.dtype) -> None:
    assert torch.equal(got.values, expected.values)
    if dtype != torch.float32:
        assert (got.keys != expected.keys).float().mean() < 0.005
    assert off(got.keys, expected.keys) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_a_step_s_attention(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Any order of slots, and lengths of nothing, of a block's ends, and of all positions."""
    case = Case(shape, dtype, slots=9, positions=SPAN)
    slots, lengths = [8, 0, 3, 6, 5, 1, 2], [0, 1, SPAN - 1, 63, 64, 65, 127]
    (got, arena), (expected, expected_arena) = (case.step(way, slots, lengths) for way in (FUSED, PLAIN))
    assert off(got, expected) < closeness(dtype)
    assert_same_arena(arena, expected_arena, dtype)


def test_every_length() -> None:
    case = Case((2, 1, 8), torch.float32, slots=20, positions=20)
    slots = list(range(20))
    (got, _), (expected, _) = (case.step(way, slots, slots) for way in (FUSED, PLAIN))
    assert off(got, expected) < closeness(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_a_frame_s_attention(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(shape, dtype, slots=4, positions=16)
    (got, arena), (expected, expected_arena) = (case.frame(way, 3, 6) for way in (FUSED, PLAIN))
    for one, other in zip(got, expected, strict=True):
        assert off(one, other) < closeness(dtype)
    assert_same_arena(arena, expected_arena, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_is_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    """Alone, among others, and beside rows that pad a batch: all of those in one slot."""
    case = Case((4, 2, 16), dtype, slots=6, positions=SPAN)
    alone, _ = case.step(FUSED, [2], [150])
    for slots, lengths in (([2, 0], [150, 199]), ([2, 4, 1], [150, 3, 64]), ([2, 5, 5, 5], [150, 0, 0, 0])):
        among, _ = case.step(FUSED, slots, lengths)
        assert torch.equal(among[0], alone[0])
    frame, _ = case.frame(FUSED, 1, 4)
    several, _ = case.frame(FUSED, 4, 4)
    for one, many in zip(frame, several, strict=True):
        assert torch.equal(one, many[: len(one)])
    x = random(5, 64, dtype=dtype)
    for row in range(5):
        one, all_ = (FUSED.arithmetic.add_norm(part, part, x[0], 1e-6)[1] for part in (x[row : row + 1], x))
        assert torch.equal(one[0], all_[row])


# --- the whole ---


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_check_passes(dtype: torch.dtype) -> None:
    kernels.check(ModelConfig.read(tiny("custom_voice")).talker_config, torch.empty(0, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    ("place", "name", "told"),
    [
        (kernels.FusedArithmetic, "swiglu", "the talker's arithmetic"),
        (kernels.FusedStepMemory, "attend_heads", "the talker's attention"),
        (kernels.FusedFrameMemory, "attend_heads", "the code predictor's attention"),
    ],
)
@pytest.mark.parametrize("factor", [1.01, torch.nan])
def test_the_check_finds_faults(
    place: type, name: str, told: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args: right(*args) * factor)
    with pytest.raises(EngineError, match=told):
        kernels.check(ModelConfig.read(tiny("custom_voice")).talker_config, torch.empty(0, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the graphs are compared")
def test_greedy_codes_of_streams_in_one_batch() -> None:
    model, builder = loaded("custom_voice")
    made = []
    for way in (PLAIN, FUSED):
        model.use(way)
        slots = model.new_slots(3, 64, 32)
        prompts = [builder.rows(Prompt(text, "english", "Vivian")) for text in ("Hello world.", "One two three four.")]
        model.prefill(slots, [(2 - row, prompt, GREEDY) for row, prompt in enumerate(prompts)])
        made.append(torch.stack([model.frame_step(slots, [2, 1]) for _ in range(3)]))
    model.use(PLAIN)
    assert torch.equal(*made)
