"""The rate card: what it charges, and what it says about a bad file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.src.stores.rates import Rate, RateCard

CARD = """
[default]
per_1000_characters = 15000
cached_per_1000_characters = 1500

[models.tts-1-hd]
per_1000_characters = 30000

[models."qwen3-tts-12hz-0.6b-base"]
per_1000_characters = 0
cached_per_1000_characters = 1
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rates.toml"
    path.write_text(text)
    return path


def test_without_a_file_everything_is_free():
    card = RateCard.load(None)
    assert card.price("tts-1", 4096, cached=False) == 0
    assert card.price("tts-1", 4096, cached=True) == 0


def test_prices_by_model_with_defaults(tmp_path: Path):
    card = RateCard.load(write(tmp_path, CARD))
    assert card.price("tts-1", 100, cached=False) == 1500
    assert card.price("tts-1", 100, cached=True) == 150
    assert card.price("tts-1-hd", 100, cached=False) == 3000
    assert card.price("tts-1-hd", 100, cached=True) == 150  # left out: the default's
    assert card.price("qwen3-tts-12hz-0.6b-base", 100, cached=False) == 0
    assert card.price("qwen3-tts-12hz-0.6b-base", 1, cached=True) == 1  # rounded up


@given(st.integers(0, 10**12), st.integers(0, 10**6))
def test_prices_round_up_and_never_more_than_that(rate: int, characters: int):
    price = RateCard(Rate(rate)).price("any", characters, cached=False)
    assert price * 1000 >= characters * rate > (price - 1) * 1000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[default]\nper_1000_characters = -1", "default.per_1000_characters"),
        ("[default]\nper_1000_characters = 0.5", "default.per_1000_characters"),
        ("[default]\nper_1000_characters = true", "default.per_1000_characters"),
        ("[default]\nper_1000_characters = '1'", "default.per_1000_characters"),
        ("[default]\nper_1000_characters = 1000000000001", "default.per_1000_characters"),
        ("[default]\nper_character = 1", "default.per_character is unknown"),
        ("[models.tts-1]\nprice = 1", "models.tts-1.price is unknown"),
        ("[models.tts-1]\ncached_per_1000_characters = -5", "models.tts-1.cached_per_1000_characters"),
        ("[rates]\n", "rates is unknown"),
        ("default = 3", "default must be a table"),
        ("models = []", "models must be a table"),
        ("[models]\ntts-1 = 3", "models.tts-1 must be a table"),
        ("[default", "Expected"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, text: str, complaint: str):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="Rate file") as caught:
        RateCard.load(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"missing\.toml"):
        RateCard.load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ValueError, match=r"latin\.toml"):
        RateCard.load(tmp_path / "latin.toml")
