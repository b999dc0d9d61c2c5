"""The whole engine on tiny checkpoints: the official package's codes and sound, batch mates, cancellations."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from api.src.engine.engine import Ticket
from api.src.engine.errors import EngineError
from api.src.engine.loading import SpeechModel, load_model
from api.src.engine.messages import Delivery, Limits
from api.src.engine.prompt import Prompt
from api.src.engine.sampling import Sampling
from tests.engine.checkpoints import tiny
from tests.engine.streams import GREEDY, cases, golden

CASES = {name: case for name, case in cases().items() if name in golden("golden")[1]["cases"]}
SLOTS = 8
torch.set_num_threads(1)


class Listener:
    """Collects one request's sound."""

    def __init__(self) -> None:
        self.got: list[Delivery] = []
        self.ended = threading.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        if delivery.finish_reason:
            self.ended.set()

    def wait(self) -> Listener:
        assert self.ended.wait(60)
        return self

    @property
    def reason(self) -> str | None:
        return self.got[-1].finish_reason

    @property
    def codes(self) -> np.ndarray:
        return np.concatenate([np.zeros((0, 16), int), *(d.sound.codes for d in self.got if d.sound)])

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *(d.sound.samples for d in self.got if d.sound)])


@contextmanager
def speaking(kind: str, **options: object) -> Iterator[SpeechModel]:
    """A tiny checkpoint with its engine running; at the end nothing may be left in it."""
    options = {"positions": 160, "text_rows": 64, "slots": SLOTS} | options
    model = load_model(tiny(kind), **options)
    model.engine.start()
    try:
        yield model
        stats = model.engine.stats()
        assert (stats.waiting, stats.active) == (0, 0)
        runner = model.engine._stepper._runner
        assert not runner._pads
        assert not runner._slots.streams
    finally:
        assert model.engine.stop(10)


def ask(model: SpeechModel, prompt: Prompt, frames: int = 48, sampling: Sampling = GREEDY, **options: object) -> Ticket:
    listener = Listener()
    ticket = model.engine.submit(model.request(prompt, sampling, frames, **options), listener)
    ticket.listener = listener
    return ticket


def answers(model: SpeechModel, prompts: list[Prompt], **options: object) -> list[Listener]:
    return [ticket.listener.wait() for ticket in [ask(model, prompt, **options) for prompt in prompts]]


def check(name: str, listener: Listener, within: float = 2e-4) -> None:
    """`within` for fp32: the recorded sound and ours are each up to 7e-5 from what float64 gives."""
    case = CASES[name]
    assert np.array_equal(listener.codes, case.codes)
    wav = golden("golden")[0][f"{name}/wav"]
    assert listener.samples.shape == wav.shape
    assert np.abs(listener.samples - wav).max() < within
    assert listener.reason == ("length" if len(case.codes) == case.limit else "stop")


@pytest.mark.parametrize("kind", ["custom_voice", "voice_design", "base"])
def test_codes_and_sound_are_the_official_ones(kind: str) -> None:
    """All cases of a checkpoint at once: built-in voice, description, clone in context and by embedding."""
    names = [name for name, case in CASES.items() if case.checkpoint == kind]
    assert names
    with speaking(kind, codec_dtype=torch.float64) as model:
        for name, listener in zip(names, answers(model, [CASES[name].prompt for name in names]), strict=True):
            check(name, listener, within=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_stream")])
def test_text_that_arrives_in_pieces_is_the_same_as_text_that_is_there(name: str) -> None:
    """Pieces are words: what is tokenized apart must be separate tokens anyway."""
    prompt = CASES[name].prompt
    words = prompt.text.split(" ")
    pieces = [words[0], *(f" {word}" for word in words[1:])]
    with speaking("custom_voice") as model:
        ticket = ask(model, replace(prompt, text=""), text_open=True, starts_empty=True)
        for piece in pieces:
            ticket.append(piece)
            time.sleep(0.02)  # some come before, some after the prompt is in
        ticket.finish()
        check(name, ticket.listener.wait())


def test_a_stream_of_text_waits_for_its_text() -> None:
    with speaking("custom_voice") as model:
        ticket = ask(model, Prompt("One", speaker="Ryan", text_at_once=False), text_open=True)
        time.sleep(0.2)
        before = len(ticket.listener.codes)
        ticket.append(" two three", frames=5)
        ticket.finish()
        assert len(ticket.listener.wait().codes) > before
        assert before <= 4


def test_a_clip_becomes_a_voice() -> None:
    arrays, meta = golden("golden")
    with speaking("base") as model:
        clone = model.clone(arrays["ref_audio"], meta["cases"]["clone_icl"]["ref_text"])
        [listener] = answers(model, [replace(CASES["clone_icl"].prompt, reference=clone)])
        check("clone_icl", listener)
        assert model.clone(arrays["ref_audio"]).codes is None
    with speaking("custom_voice") as model, pytest.raises(EngineError, match="does not clone"):
        model.clone(arrays["ref_audio"])


def prompts(count: int) -> list[Prompt]:
    speakers, texts = ["Vivian", "Ryan", "Eric"], ["Hello world.", "One two three four.", "She said she would."]
    instructs = [None, "Speak in a calm, warm voice."]
    return [
        Prompt(f"{texts[i % 3]} {i}", speaker=speakers[i % 3], instruct=instructs[i % 2], text_at_once=i % 4 != 1)
        for i in range(count)
    ]


@pytest.mark.parametrize("greedy", [True, False])
def test_eight_at_once_get_what_they_get_alone(greedy: bool) -> None:
    samplings = [GREEDY if greedy else Sampling(seed=i) for i in range(SLOTS)]
    with speaking("custom_voice") as model:
        asking = [partial(ask, model, prompt, sampling=s) for prompt, s in zip(prompts(SLOTS), samplings, strict=True)]
        alone = [each().listener.wait() for each in asking]
        together = [ticket.listener.wait() for ticket in [each() for each in asking]]
    assert len({one.codes.tobytes() for one in alone}) == SLOTS
    for one, among in zip(alone, together, strict=True):
        assert np.array_equal(one.codes, among.codes)
        assert np.abs(one.samples - among.samples).max() < 1e-4
        assert one.reason == among.reason


def test_codecs_are_shared() -> None:
    with speaking("custom_voice", slots=2) as first, speaking("voice_design", slots=2, codec=first.codec) as second:
        assert second.codec is first.codec
        check("design", answers(second, [CASES["design"].prompt])[0])


def test_a_slot_whose_positions_are_used_up_ends_and_hurts_nobody() -> None:
    with speaking("custom_voice", positions=40) as model:
        short, full = answers(model, [CASES["custom_1_stream"].prompt, CASES["custom_2_nonstream"].prompt], frames=100)
    assert full.reason == "length"
    assert len(full.codes) == 40 - (CASES["custom_2_nonstream"].rows.shape[0] - 1)
    expected = CASES["custom_1_stream"].codes[: len(short.codes)]
    assert np.array_equal(short.codes, expected)


def test_a_bad_prompt_fails_alone() -> None:
    good = CASES["custom_0_nonstream"].prompt
    bad = [replace(good, speaker="Nobody"), replace(good, language="Klingon"), replace(good, text="word " * 300)]
    with speaking("custom_voice") as model:
        fine, *failed, also_fine = answers(model, [good, *bad, good])
    for listener in failed:
        assert listener.reason == "error"
        assert isinstance(listener.got[-1].error, EngineError)
    check("custom_0_nonstream", fine)
    check("custom_0_nonstream", also_fine)


@pytest.mark.slow
def test_random_cancellations_lose_no_slot() -> None:
    rng = random.Random(5)
    limits = Limits(slots=4, outbox_frames=1000)
    names = threading.active_count()
    with speaking("custom_voice", slots=4, limits=limits) as model:
        tickets: list[Ticket] = []
        for i in range(300):
            budget = rng.randint(1, 12)
            tickets.append(ask(model, prompts(12)[i % 12], frames=budget, sampling=Sampling(seed=i)))
            if rng.random() < 0.6:
                rng.choice(tickets[-6:]).cancel()
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.01)
            if i % 20 == 0:
                tickets[-1].listener.wait()
        reasons = [ticket.listener.wait().reason for ticket in tickets]
        for ticket in tickets:
            assert len(ticket.listener.samples) == len(ticket.listener.codes) * 1920
        assert sorted(model.engine._stepper.scheduler._free) == [0, 1, 2, 3]
        check("custom_1_stream", answers(model, [CASES["custom_1_stream"].prompt])[0])
    assert {"cancelled", "length"} <= set(reasons) <= {"cancelled", "length", "stop"}
    assert threading.active_count() == names


def test_arenas_are_known_before_anything_speaks() -> None:
    with speaking("custom_voice", slots=2) as small, speaking("custom_voice", slots=4) as large:
        before = small.steps.nbytes
        answers(small, [CASES["custom_0_stream"].prompt])
        assert small.steps.nbytes == before
        assert large.steps.nbytes == 2 * before
