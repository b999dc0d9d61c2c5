"""Speech that cannot be transcribed is not speech: the server's own answers, heard by a recogniser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faster_whisper import WhisperModel

from api.src.backends.embedded import EmbeddedBackend
from api.src.domain import AudioFormat
from tests.conftest import Server, run_server
from tests.recogniser import load_recogniser, transcribe, word_error_rate

SENTENCES = [
    "The train to the city leaves at noon from the second platform.",
    "Please close the window before you go to bed tonight.",
    "She bought fresh bread and a bottle of milk at the market.",
    "The weather will be warm and sunny for the rest of the week.",
    "My brother plays the guitar in a small band on weekends.",
    "We should call the doctor if the fever does not go down.",
    "The children built a castle of sand close to the water.",
    "He forgot his umbrella and came home completely wet.",
    "The library opens early in the morning and closes late.",
    "There is a good restaurant around the corner from my house.",
]


@pytest.fixture(scope="module")
def speaking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from run_server(tmp_path_factory.mktemp("server"), EmbeddedBackend(workers=1))


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> WhisperModel:
    return load_recogniser(tmp_path_factory.mktemp("whisper"))


def spoken(server: Server, text: str, **fields: str) -> bytes:
    answer = server.client.post("/v1/audio/speech", json={"input": text, "model": "tts-1", **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.slow
@pytest.mark.parametrize(("voice", "format"), [("onyx", "mp3"), ("onyx", "opus"), ("onyx", "wav"), ("nova", "mp3")])
def test_the_voice_is_understood(
    speaking_server: Server, recogniser: WhisperModel, voice: str, format: AudioFormat
) -> None:
    heard = [
        transcribe(recogniser, format, spoken(speaking_server, text, voice=voice, response_format=format))
        for text in SENTENCES
    ]
    rate = word_error_rate(SENTENCES, heard)
    print(f"word error rate of {voice} as {format}: {rate:.3f}")
    assert rate <= 0.05


def test_markdown_is_spoken_as_text(speaking_server: Server, recogniser: WhisperModel) -> None:
    text = "## The plan\n\n- **Wash** the dishes\n- Read [the book](https://example.com/book)\n\n😀 `Good night`"
    heard = transcribe(recogniser, "mp3", spoken(speaking_server, text, voice="onyx"))
    assert word_error_rate(["The plan. Wash the dishes. Read the book. Good night."], [heard]) <= 0.1


@pytest.mark.parametrize(
    ("language", "code", "text"),
    [
        ("german", "de", "Heute Morgen scheint die Sonne, und wir gehen zusammen in den Park."),
        ("french", "fr", "Ce matin, nous allons acheter du pain et du fromage au marché."),
        ("spanish", "es", "Mañana por la tarde vamos a visitar a nuestros amigos en la ciudad."),
        ("italian", "it", "Domani mattina andiamo al mercato a comprare il pane e la frutta."),
    ],
)
def test_other_languages_are_understood(
    speaking_server: Server, recogniser: WhisperModel, language: str, code: str, text: str
) -> None:
    sound = spoken(speaking_server, text, voice="alloy", language=language)
    assert word_error_rate([text], [transcribe(recogniser, "mp3", sound, code)]) <= 0.25
