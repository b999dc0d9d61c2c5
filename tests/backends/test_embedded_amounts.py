"""How the embedded English voice reads amounts of money."""

import pytest

from api.src.backends.embedded_amounts import spoken_amounts


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("For $45 they send it.", "For 45 dollars they send it."),
        ("$1", "1 dollar"),
        ("$1.00, €1 or £1.01.", "1 dollar, 1 euro or 1 pound and 1 penny."),
        ("£0.50", "50 pence"),
        ("It was $4.99!", "It was 4 dollars and 99 cents!"),
        ("$1,234,567 in all", "1234567 dollars in all"),
        ("$3.5 million, $2 billion", "3.5 million dollars, 2 billion dollars"),
        ("€ 20", "20 euros"),
        ("$2.5", "2.5 dollars"),
        ("$1 million", "1 million dollars"),
        ("($7)", "(7 dollars)"),
    ],
)
def test_an_amount_is_said_after_its_number(written: str, spoken: str) -> None:
    assert spoken_amounts(written) == spoken


@pytest.mark.parametrize("text", ["$", "US$45", "$5M", "$x", "$12,34", "a$1", "$$$", "45$", "$1_000", "50 cents", ""])
def test_what_is_no_plain_amount_is_left_alone(text: str) -> None:
    assert spoken_amounts(text) == text
