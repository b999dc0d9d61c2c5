"""One utterance by the plain loop, beside the engine that serves many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from api.src.engine.errors import PromptTooLong
from api.src.engine.generate import Generator
from api.src.engine.loading import load_model
from api.src.engine.messages import Delivery
from api.src.engine.prompt import Prompt
from api.src.engine.sampling import Sampling
from tests.engine.checkpoints import tiny
from tests.engine.streams import golden, loaded

PROMPT = Prompt("One two three.", "English", "Ryan")


def test_the_engine_speaks_what_the_plain_loop_speaks():
    """Drawn codes, not greedy ones: the settings and the seed count too."""
    generator, model = Generator(tiny("custom_voice")), load_model(tiny("custom_voice"), slots=1)
    torch.set_num_threads(1)  # loading has set it
    sampling = Sampling.default(generator.config.generation, seed=7)
    alone = generator.speak(PROMPT, sampling, 30)
    got: list[Delivery] = []
    ticket = model.engine.submit(model.request(PROMPT, sampling, 30), got.append)
    while ticket.finish_reason is None:
        model.engine.step()
    sounds = [delivery.sound for delivery in got if delivery.sound]
    assert np.array_equal(np.concatenate([sound.codes for sound in sounds]), alone.codes)
    assert np.abs(np.concatenate([sound.samples for sound in sounds]) - alone.samples).max() < 1e-4
    assert alone.ended == (ticket.finish_reason == "stop")


def test_a_clone_is_the_recorded_one():
    arrays, _ = golden("golden")
    clone = Generator(tiny("base")).clone(arrays["ref_audio"], "One two three.")
    assert np.array_equal(clone.codes.numpy(), arrays["ref_code"])
    assert np.abs(clone.embedding.numpy() - arrays["ref_spk_embedding"]).max() < 1e-4
    assert Generator(tiny("base")).clone(arrays["ref_audio"]).codes is None


@pytest.mark.parametrize(("positions", "text_rows", "at_once"), [(8, 64, True), (64, 2, False)])
def test_a_prompt_that_fits_into_no_slot_has_an_error_of_its_own(positions, text_rows, at_once):
    model, builder = loaded("custom_voice")
    rows = builder.rows(Prompt("One two three four five.", "English", "Ryan", text_at_once=at_once))
    slots = model.new_slots(1, positions, text_rows)
    with pytest.raises(PromptTooLong):
        model.prefill(slots, [(0, rows, Sampling())])
    assert not slots.streams
