"""What may be asked of which checkpoint; the rows themselves are held to the official ones in test_parity.py."""

from __future__ import annotations

import pytest
import torch

from api.src.engine.errors import EngineError
from api.src.engine.prompt import Prompt, Reference
from tests.engine.checkpoints import reference
from tests.engine.streams import loaded


def rows(checkpoint: str, *args, **given):
    return loaded(checkpoint)[1].rows(Prompt(*args, **given))


@pytest.mark.parametrize(
    ("checkpoint", "given", "message"),
    [
        ("custom_voice", {"text": "One.", "language": "Klingon"}, "does not speak Klingon; it speaks .*english"),
        ("custom_voice", {"text": "One.", "speaker": "Bob"}, "no speaker Bob; it has aiden, .*vivian"),
        ("voice_design", {"text": "One.", "speaker": "Ryan"}, "no speaker Ryan"),
        ("base", {"text": "One."}, "needs a reference"),
        ("custom_voice", {"text": ""}, "no text"),
    ],
)
def test_what_cannot_be_spoken_is_refused(checkpoint, given, message):
    with pytest.raises(EngineError, match=message):
        rows(checkpoint, **given)


def test_names_are_known_in_any_case():
    same = [rows("custom_voice", "One.", "english", "VIVIAN"), rows("custom_voice", "One.", "ENGLISH", "vivian")]
    assert torch.equal(same[0].rows, same[1].rows)


def test_a_dialect_is_spoken_unless_another_language_is_asked_for():
    names = ("auto", "Chinese", "sichuan_dialect")
    auto, chinese, sichuan = (rows("custom_voice", "One.", name, "Eric").rows for name in names)
    english = rows("custom_voice", "One.", "English", "Eric").rows
    assert torch.equal(auto, chinese)
    assert torch.equal(auto, sichuan)
    assert not torch.equal(auto, english)


def test_the_small_custom_voice_ignores_instructions_and_others_do_not():
    for checkpoint, longer in (("small", False), ("custom", True), ("voice_design", True)):
        speaker = None if checkpoint == "voice_design" else "Ryan"
        without = rows(checkpoint, "One.", speaker=speaker, instruct="").rows
        instructed = rows(checkpoint, "One.", speaker=speaker, instruct="Slowly.").rows
        assert (len(instructed) > len(without)) == longer
        assert torch.equal(instructed[-len(without) :], without)


def test_a_designed_voice_goes_on_from_its_own_codes_without_an_embedding():
    """Later segments of a designed voice: its instruction, the first segment's codes and text, and the new text."""
    codes, _ = reference(1, 12, 32)
    prompt = {"instruct": "A warm voice.", "reference": Reference(codes=codes, text="One two.")}
    once = rows("voice_design", "Three.", **prompt)
    alone = rows("voice_design", "Three.", instruct="A warm voice.")
    spoken = len(loaded("voice_design")[1]._tokenizer.ids("One two."))
    assert len(once.rows) == len(alone.rows) + spoken + 12
    streamed = rows("voice_design", "Three.", text_at_once=False, **prompt)
    assert len(streamed.rows) < len(once.rows)


def test_an_embedding_is_the_speakers_row():
    _, embedding = reference(1, 0, 32)
    cloned = rows("base", "One.", reference=Reference(embedding))
    other = rows("base", "One.", reference=Reference(embedding + 1))
    changed = (cloned.rows != other.rows).any(dim=1)
    assert changed.sum() == 1
    assert torch.allclose((other.rows - cloned.rows)[changed], torch.ones(1, 32), atol=1e-5)


def test_open_text_lacks_only_its_end():
    closed = rows("custom_voice", "One two.", text_at_once=False)
    begun = rows("custom_voice", "One two.", text_at_once=False, text_open=True)
    assert torch.equal(closed.rows, begun.rows)
    assert torch.allclose(closed.trailing, torch.cat((begun.trailing, loaded("custom_voice")[1].end)))
