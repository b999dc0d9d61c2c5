"""The graph path without a GPU: each shape is traced once into a list of tensor operations, and only that is replayed.

As with a CUDA graph, what Python decided at the capture is frozen then: lengths, slots or values that were not read
from the arenas would show as wrong codes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from api.src.engine import codec_check
from api.src.engine.graphs import CODEC_FRAMES, LONG_PROMPT, Run, eagerly, fitting, parts, up_to
from api.src.engine.linear import Linear
from api.src.engine.loading import load_model
from api.src.engine.messages import Delivery, Request
from api.src.engine.prompt import Prompt
from api.src.engine.sampling import Sampling
from tests.engine.checkpoints import tiny
from tests.engine.step_pairs import GREEDY, POSITIONS, SLOTS, StepPair, spoken_greedily
from tests.engine.streams import Case, cases

TEXTS = ["Hello world.", "One two three four.", "She said she would be here by noon."]


def traced(run: Run) -> Run:
    """A capture for the CPU: the operations of the first run, with the tensors that they worked on."""
    programs: list[Any] = []

    def replay() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if programs:
                out: Tensor = programs[0]()
                return out
            outs: list[Tensor] = []
            programs.append(make_fx(lambda: outs.append(run()) or outs[0])())
            return outs[0]

    return replay


# --- sizes ---


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 20])])
def test_sizes_end_at_the_limit(limit: int, sizes: list[int]) -> None:
    assert up_to((1, 2, 4, 8), limit) == sizes
    for wanted in range(1, limit + 1):
        found = fitting(sizes, wanted)
        assert found is not None
        assert found >= wanted
        assert all(size < wanted for size in sizes if size < found)
    assert fitting(sizes, limit + 1) is None


@pytest.mark.parametrize("frames", range(1, 60))
def test_chunks_are_taken_apart_into_few_pieces_in_order(frames: int) -> None:
    found = parts(frames)
    assert sum(found) == frames
    assert set(found) <= set(CODEC_FRAMES)
    assert found == sorted(found, reverse=True)
    assert len(found) <= frames // 16 + 4


# --- the same as without graphs ---


@pytest.fixture(scope="module")
def plain_linears() -> Iterator[None]:
    """Weights as they are on a GPU: a CPU's packed forms are no tensors, and cannot be traced; nor can C code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "settle", lambda self, *given, **named: None)
        patch.setattr(codec_check, "load", lambda **given: None)
        yield


@pytest.fixture(scope="module")
def greedy(plain_linears: None) -> dict[str, StepPair]:
    return {kind: StepPair(kind, eagerly, GREEDY) for kind in ("custom_voice", "voice_design", "base")}


@pytest.mark.parametrize(
    "name", [name for name, case in cases().items() if "_" in case.checkpoint or case.checkpoint == "base"]
)
def test_golden_cases_are_spoken_as_without_graphs(greedy: dict[str, StepPair], name: str) -> None:
    case: Case = cases()[name]
    loaded = greedy[case.checkpoint]
    assert np.array_equal(spoken_greedily(loaded, case), case.codes)
    assert loaded.graphed.missed == 0


@pytest.mark.parametrize(
    ("capture", "steps", "chunks"),
    [(eagerly, 120, (1, 3, 7)), pytest.param(traced, 30, (1,), marks=pytest.mark.slow)],
)
def test_streams_that_come_and_go_are_as_without_graphs(
    plain_linears: None, capture: Callable[[Run], Run], steps: int, chunks: tuple[int, ...]
) -> None:
    """Random joins, leaves, batches and chunks: codes equal, sound within rounding, and no shape that was missed.

    Tracing takes seconds for a shape: few shapes then.
    """
    loaded = StepPair("custom_voice", capture, Sampling(), slots=3 if capture is eagerly else 2)
    rng = random.Random(7)
    streams: dict[int, list[Tensor]] = {}
    for number in range(steps):
        _join(loaded, rng, streams, number)
        if streams:
            batch = rng.sample(sorted(streams), rng.randint(1, len(streams)))
            one, other = loaded.plain.frame(batch), loaded.graphed.frame(batch)
            assert torch.equal(one, other), number
            for slot, codes in zip(batch, one, strict=True):
                streams[slot].append(codes.clamp(max=2047))
        _sound(loaded, streams, rng.choice(chunks))
        for slot in [slot for slot in streams if rng.random() < 0.1]:
            loaded.plain.slots.leave(slot)
            loaded.graphed.slots.leave(slot)
            del streams[slot]
    assert loaded.graphed.missed == 0


def _join(loaded: StepPair, rng: random.Random, streams: dict[int, list[Tensor]], number: int) -> None:
    free = [slot for slot in range(loaded.graphed.slots.count - 1) if slot not in streams]
    if not free or rng.random() < 0.5:
        return
    chosen = rng.sample(free, rng.randint(1, len(free)))
    prompts = [loaded.builder.rows(Prompt(rng.choice(TEXTS), "english", "Vivian")) for _ in chosen]
    entries = [(slot, p, Sampling(seed=number * 10 + slot)) for slot, p in zip(chosen, prompts, strict=True)]
    for steps in (loaded.plain, loaded.graphed):
        steps.prefill(entries)
        for slot in chosen:
            steps.sounds.reset(slot)
    streams |= {slot: [] for slot in chosen}


def _sound(loaded: StepPair, streams: dict[int, list[Tensor]], frames: int) -> None:
    ready = [slot for slot, codes in streams.items() if len(codes) >= frames]
    if not ready:
        return
    codes = torch.stack([torch.stack(streams[slot][:frames]) for slot in ready])
    sound = "first_sound" if frames == 1 else "sound"
    one, other = (getattr(steps, sound)(ready, codes) for steps in (loaded.plain, loaded.graphed))
    assert (one - other).abs().max() < 1e-4
    for slot in ready:
        del streams[slot][:frames]


def test_prompts_of_any_length_enter_together(plain_linears: None) -> None:
    """Short ones in one batch, long ones alone, and none by a shape that was missed."""
    pair = StepPair("custom_voice", eagerly, GREEDY, slots=4, positions=400)
    lengths = (3, 100, 20, 50)
    texts = [" ".join(["one"] * length) for length in lengths]
    prompts = [pair.builder.rows(Prompt(text, "english", "Vivian")) for text in texts]
    assert [len(prompt.rows) > LONG_PROMPT for prompt in prompts] == [False, True, False, True]
    entries = [(slot, prompt, GREEDY) for slot, prompt in enumerate(prompts)]
    for steps in (pair.plain, pair.graphed):
        steps.prefill(entries)
    for _ in range(4):
        assert torch.equal(pair.plain.frame([0, 1, 2, 3]), pair.graphed.frame([0, 1, 2, 3]))
    assert pair.graphed.missed == 0


def test_a_shape_that_was_not_foreseen_runs_and_is_counted(plain_linears: None) -> None:
    loaded = StepPair("custom_voice", eagerly, GREEDY)
    entry = (0, loaded.builder.rows(Prompt("Hello world.", "english", "Vivian")), Sampling(seed=1))
    for steps in (loaded.plain, loaded.graphed):
        steps.prefill([entry])
    assert torch.equal(loaded.plain.frame([0]), loaded.graphed.frame([0]))
    assert loaded.graphed.missed == 1


def test_a_device_that_refuses_graphs_speaks_without(plain_linears: None, caplog: pytest.LogCaptureFixture) -> None:
    captured: list[Run] = []

    def soon_exhausted(run: Run) -> Run:
        if len(captured) == 3:
            raise torch.OutOfMemoryError("no room for a graph")
        captured.append(run)
        return run

    loaded = StepPair("custom_voice", soon_exhausted, GREEDY)
    assert len(loaded.graphed.graphs) == 3
    entry = (0, loaded.builder.rows(Prompt("Hello world.", "english", "Vivian")), GREEDY)
    for steps in (loaded.plain, loaded.graphed):
        steps.prefill([entry])
        steps.sounds.reset(0)
    for _ in range(3):
        one, other = loaded.plain.frame([0]), loaded.graphed.frame([0])
        assert torch.equal(one, other)
        sounds = [steps.sound([0], one[:, None]) for steps in (loaded.plain, loaded.graphed)]
        assert (sounds[0] - sounds[1]).abs().max() < 1e-4
    assert loaded.graphed.missed == 7
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_the_spare_slot_s_positions_never_run_out(plain_linears: None) -> None:
    loaded = StepPair("custom_voice", eagerly, GREEDY)
    for _ in range(3):
        entry = (0, loaded.builder.rows(Prompt("Hello world.", "english", "Vivian")), GREEDY)
        loaded.graphed.prefill([entry])
        for _ in range(POSITIONS // 2):
            loaded.graphed.frame([0])
        loaded.graphed.slots.leave(0)
    assert int(loaded.graphed.slots.progress[SLOTS, 0]) == 0


def test_the_engine_speaks_by_graphs(plain_linears: None) -> None:
    spoken = []
    for capture in (None, eagerly):
        model = load_model(tiny("custom_voice"), slots=2, positions=POSITIONS, capture=capture)
        model.steps.prepare()
        samples: list[np.ndarray] = []

        def deliver(delivery: Delivery, into: list[np.ndarray] = samples) -> None:
            if delivery.sound is not None:
                into.append(delivery.sound.samples)

        prompt = Prompt("She said she would be here by noon.", "english", "Ryan")
        asked: Request = model.request(prompt, model.sampling(3), 42)  # the last chunk fills no graph
        ticket = model.engine.submit(asked, deliver)
        while ticket.finish_reason is None:
            model.engine.step()
        assert model.steps.missed == 0
        spoken.append(np.concatenate(samples))
    assert np.abs(spoken[0] - spoken[1]).max() < 1e-4
