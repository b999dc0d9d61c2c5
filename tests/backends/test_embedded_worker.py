"""The laws of the sound's shape, without an engine."""

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from api.src.backends.embedded_worker import leveled, portions, readable, trimmed


@given(st.lists(st.sampled_from("ab ,;"), max_size=200), st.integers(4, 40))
def test_portions_lose_nothing_and_are_bounded(phonemes, longest):
    parts = list(portions(phonemes, longest))
    assert list(chain(*parts)) == phonemes
    assert all(len(part) <= longest for part in parts)
    assert all(len(part) > longest // 2 for part in parts[:-1])


@given(st.text(st.characters(codec=None)))
def test_readable_text_can_be_encoded_and_keeps_latin(text):
    readable(text).encode()
    assert "Grüße, señor Łódź – 5 € 😀" in readable(f"{text} Grüße, señor Łódź – 5 € 😀")


@given(st.lists(st.floats(-1, 1, width=32), max_size=300), st.floats(0.1, 4))
def test_level_and_trim_stay_in_bounds(values, gain):
    loud = leveled(np.array(values, np.float32), gain)
    assert (np.abs(loud) <= 1).all()
    quiet = np.zeros(500, np.float32)
    sound = trimmed(np.concatenate([quiet, loud, quiet]), 1000)
    assert len(sound) <= len(loud) + 80
    assert len(sound) == 0 or np.abs(sound).max() >= 0.005
