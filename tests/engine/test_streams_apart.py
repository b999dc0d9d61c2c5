"""A stream's codes are its own: whoever shares the batch, whenever they come and go, whatever the slot held before."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from api.src.engine import language_model, predictor
from api.src.engine.errors import EngineError
from api.src.engine.prompt import Prompt
from api.src.engine.sampling import Sampling, choose, draws, key
from api.src.engine.slots import StepMemory
from tests.engine.streams import GREEDY, POSITIONS, Stream, loaded, run

TEXTS = [
    "One.",
    "Hello world, it is noon.",
    "你好",
    "She said she would be here.",
    "Привет, мир.",
    "ab " * 12,
    "?",
    "Good",
]
STYLES = [
    Sampling(seed=1),
    Sampling(seed=2, temperature=1.5, top_k=0, top_p=0.7),
    GREEDY,
    Sampling(seed=3, top_k=5, repetition_penalty=1.5),
    Sampling(seed=4, subtalker_dosample=False),
    Sampling(seed=5, do_sample=False),
    Sampling(seed=6, subtalker_top_k=0, subtalker_top_p=0.5),
    Sampling(seed=1, top_k=200),
]


def streams(frames: int = 12) -> list[Stream]:
    """Eight requests that differ in text, layout, speaker and sampling."""
    _, builder = loaded("custom_voice")
    speakers = list(builder._codec.spk_id)
    prompts = [
        Prompt(text, speaker=speakers[i], instruct="Calm." if i % 3 == 0 else None, text_at_once=i % 2 == 0)
        for i, text in enumerate(TEXTS)
    ]
    rows = [builder.rows(prompt) for prompt in prompts]
    return [Stream(row, style, frames) for row, style in zip(rows, STYLES, strict=True)]


@pytest.fixture(scope="module")
def alone() -> list[np.ndarray]:
    model, _ = loaded("custom_voice")
    return [run(model, [stream])[0] for stream in streams()]


def test_a_request_alone_and_among_seven_others_speaks_the_same(alone):
    model, _ = loaded("custom_voice")
    together = run(model, streams())
    assert [codes.tolist() for codes in together] == [codes.tolist() for codes in alone]


@pytest.mark.parametrize("seed", range(4))
def test_streams_join_and_leave_at_any_step(alone, seed):
    model, _ = loaded("custom_voice")
    chance = random.Random(seed)
    some = [replace(stream, joins=chance.randrange(20), frames=chance.randrange(1, 13)) for stream in streams()]
    slots = model.new_slots(8, POSITIONS, 64)
    for mine, stream, whole in zip(run(model, some, slots), some, alone, strict=True):
        assert mine.tolist() == whole[: stream.frames].tolist()
    assert slots.streams == {}


def test_a_slot_keeps_nothing_of_the_one_before(alone):
    model, _ = loaded("custom_voice")
    slots = model.new_slots(1, POSITIONS, 64)
    for stream, whole in zip(streams(), alone, strict=True):
        assert run(model, [stream], slots)[0].tolist() == whole.tolist()


def test_a_seed_repeats_itself_and_another_does_not():
    model, _ = loaded("custom_voice")
    rows = streams()[0].rows
    seeds = [7, 7, 8, -7, 2**70]
    codes = run(model, [Stream(rows, Sampling(seed=seed), frames=5) for seed in seeds])
    assert codes[0].tolist() == codes[1].tolist()
    assert len({str(each.tolist()) for each in codes}) == 4


def test_sampling_varies_the_talker_and_the_predictor_apart():
    model, _ = loaded("custom_voice")
    rows = streams()[0].rows
    greedy, talker, predictor = run(
        model,
        [Stream(rows, style, 1) for style in (GREEDY, Sampling(seed=3, subtalker_dosample=False), STYLES[5])],
    )
    assert talker[0, 0] != greedy[0, 0]
    assert predictor[0, 0] == greedy[0, 0]
    assert predictor[0].tolist() != greedy[0].tolist()


def test_text_that_comes_later_is_text_that_was_there():
    model, builder = loaded("custom_voice")
    whole = builder.rows(Prompt("One two three four.", speaker="Ryan", text_at_once=False))
    [expected] = run(model, [Stream(whole, frames=16)])
    begun = builder.rows(Prompt("One", speaker="Ryan", text_at_once=False, text_open=True))
    slots = model.new_slots(1, POSITIONS, 64)
    model.prefill(slots, [(0, begun, GREEDY)])
    more = [builder.more(" two three"), torch.cat((builder.more(" four."), builder.end))]
    codes = []
    while len(codes) < 16:
        if slots.starved(0) and more:
            slots.append(0, more.pop(0), begun.pad)
        codes.append(model.frame_step(slots, [0])[0])
        if codes[-1][0] == model.eos:
            codes.pop()
            break
    assert more == []
    assert torch.stack(codes).tolist() == expected.tolist()


def test_the_talker_reads_gathered_keys_as_keys_in_place():
    """What a device without true lengths does gives what a CPU does, rubbish beyond the lengths notwithstanding."""
    model, _ = loaded("custom_voice")
    slots = model.new_slots(5, 64, 8)
    torch.manual_seed(0)
    slots.talker.keys.normal_()
    slots.talker.values.normal_()
    lengths, index = [(3, 5), (0, 17), (4, 1)], torch.tensor([3, 0, 4])
    positions = torch.tensor([length - 1 for _, length in lengths])
    config = model.config.talker_config
    query = torch.randn(3, config.num_attention_heads, config.head_dim)
    keys, values = torch.randn(2, 3, config.num_key_value_heads, config.head_dim)
    outs = [
        StepMemory(slots.talker, index, positions, given, span=32).attend(1, query, keys, values)
        for given in (lengths, [])
    ]
    assert torch.allclose(*outs, atol=1e-6)


def test_a_full_slot_is_refused_and_a_long_prompt_never_enters():
    model, builder = loaded("custom_voice")
    rows = builder.rows(Prompt("One two three four.", speaker="Ryan", text_at_once=False))
    length = rows.rows.shape[0]
    slots = model.new_slots(2, length + 2, 8)
    model.prefill(slots, [(1, rows, replace(GREEDY, min_new_tokens=9))])
    assert slots.room(1) == 3
    for left in (2, 1, 0):
        model.frame_step(slots, [1])
        assert slots.room(1) == left
    with pytest.raises(EngineError, match="positions"):
        model.frame_step(slots, [1])
    with pytest.raises(EngineError, match="not free"):
        model.prefill(slots, [(0, rows, GREEDY), (1, rows, GREEDY)])
    assert list(slots.streams) == [1]
    slots.leave(1)
    for small in (model.new_slots(1, length - 1, 8), model.new_slots(1, 64, 1)):
        with pytest.raises(EngineError, match=r"more than|does not fit"):
            model.prefill(small, [(0, rows, GREEDY)])
        assert small.streams == {}
    with pytest.raises(EngineError, match="not free"):
        model.prefill(slots, [(2, rows, GREEDY)])


def test_no_speech_ends_in_its_first_two_tokens():
    model, builder = loaded("custom_voice")
    rows = builder.rows(Prompt("One.", speaker="Ryan"))
    head = model.talker.codec_head
    always_eos = torch.full((1, model.config.talker_config.vocab_size), -1.0)
    always_eos[0, model.eos] = 100.0
    product, head._product = head._product, lambda x: always_eos.expand(x.shape[0], -1).clone()
    try:
        assert [len(codes) for codes in run(model, [Stream(rows), Stream(rows, Sampling(seed=5))])] == [2, 2]
        assert len(run(model, [Stream(rows, replace(GREEDY, min_new_tokens=5))])[0]) == 5
    finally:
        head._product = product


def test_memory_is_known_at_the_start():
    model, _ = loaded("custom_voice")
    config = model.config.talker_config
    one, two = (model.new_slots(count, 100, 10).bytes() for count in (1, 2))
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 100 * 4
    assert two == 2 * one
    assert keys < one < keys * 1.5


def test_each_code_has_a_random_number_of_its_own(monkeypatch):
    """All 16 choices of two frames of two streams, in order."""
    used: list[torch.Tensor] = []

    def noted(logits, rule, uniform, width):
        used.append(uniform.clone())
        return choose(logits, rule, uniform, width)

    monkeypatch.setattr(language_model, "choose", noted)
    monkeypatch.setattr(predictor, "choose", noted)
    model, _ = loaded("custom_voice")
    run(model, [replace(stream, frames=2) for stream in streams()[:2]])
    keys = torch.tensor([key(2), key(1)])  # `run` steps the slots in reverse
    expected = [draws(keys, torch.tensor([frame, frame]), 16) for frame in (0, 1)]
    assert torch.equal(torch.stack(used, dim=1), torch.cat(expected, dim=1))
