"""A chain of backends: who is asked, who speaks instead, and what its cached sound is known by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from api.src import patience
from api.src.backends import chain as chain_module
from api.src.backends.chain import Chain
from api.src.domain import AudioChunk, Model, ModelStats, Segment, SpeechRequest, Voice
from api.src.errors import InvalidRequest, NotReady
from api.src.speech.catalogue import OPENAI_MODELS, Catalogue
from tests.fakes import FakeBackend
from tests.speech.asking import StartService, collect, eventually, speech_request
from tests.speech.conftest import start_service

__all__ = ["start_service"]


@dataclass
class Member(FakeBackend):
    """A fake whose tone tells who spoke, with voices and models of its own."""

    level: float = 0.5
    own: Sequence[str] = ()
    ids: Sequence[str] = ("tts-native",)
    down: bool = False
    starts: bool = True
    asked: list[SpeechRequest] = field(default_factory=list)

    @property
    def models(self) -> list[Model]:
        voices = [Voice(name, name, "english", name) for name in ("alloy", *self.own)]
        return [Model(id, voices, {}, ["english"], "1", down=self.down) for id in self.ids]

    async def start(self) -> None:
        if not self.starts:
            self.ready = False
            raise NotReady("It does not start.")
        self.ready = True

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return int(self.level * 1000)

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        self.asked.append(request)
        async for chunk in super().speak(request, voice, segments):
            yield replace(chunk, samples=chunk.samples * 0 + self.level)


@pytest.fixture
def first() -> Member:
    return Member(name="first", level=0.5, own=["ann"], engines={"a": ModelStats(frames=1)})


@pytest.fixture
def second() -> Member:
    return Member(name="second", level=0.25, own=["bob"], engines={"b": ModelStats(frames=2)})


@pytest.fixture
def chain(first: Member, second: Member) -> Chain:
    return Chain([first, second])


def who(chain: Chain, voice: str = "alloy", model: str = "tts-1", **aliases: str) -> str:
    return Catalogue(chain, aliases).resolve(model, voice)[0].backend


def test_the_first_that_can_speaks(chain: Chain, first: Member, second: Member) -> None:
    assert chain.name == "first,second"
    assert who(chain) == "first"
    assert who(chain, "bob") == "second", "the first does not have the voice"
    assert who(chain, model="tts-native") == "first"
    first.down = True
    assert who(chain) == who(chain, model="tts-native") == "second"
    assert who(chain, "ann") == "first", "nobody else has the voice: it says itself what is wrong"
    first.down, first.ready = False, False
    assert who(chain) == "second"
    with pytest.raises(InvalidRequest):
        who(chain, "ann")
    second.ready = False
    with pytest.raises(NotReady):
        who(chain)


def test_a_name_that_a_later_one_serves_does_not_overtake(chain: Chain, first: Member, second: Member) -> None:
    second.ids = ("other", "tts-1")
    assert who(chain) == "first"
    assert Catalogue(chain, {}).resolve("tts-1", "bob")[0].id == "tts-1", "of one server's the one of that name"
    assert who(chain, **{"tts-1": "other"}) == "second", "an alias is the operator's word"
    assert Catalogue(chain, {"tts-1": "other"}).resolve("tts-1", "alloy")[0].id == "other"
    second.down = True
    assert who(chain, **{"tts-1": "other"}) == "first", "which does not help if it is down"
    assert Catalogue(chain, {}).models() == [*OPENAI_MODELS, "tts-native", "other"]


def test_an_id_in_capitals_is_found(chain: Chain, second: Member) -> None:
    second.ids = ("Qwen/Omni",)
    assert Catalogue(chain, {}).resolve("qwen/omni", "alloy")[0].id == "Qwen/Omni"


def test_readiness_is_the_best_of_all(chain: Chain, first: Member, second: Member) -> None:
    assert (chain.readiness().ready, chain.readiness().phase, chain.readiness().reason) == (True, "ready", "")
    first.ready = False
    assert (chain.readiness().ready, chain.readiness().phase) == (True, "degraded")
    assert chain.readiness().reason == "first: still loading"
    second.ready = False
    assert (chain.readiness().ready, chain.readiness().phase) == (False, "loading")
    assert chain.readiness().reason == "first: still loading second: still loading"


async def test_it_starts_if_one_does(chain: Chain, first: Member, second: Member) -> None:
    first.starts, second.ready = False, False
    await chain.start()
    assert second.ready
    await chain.stop()
    assert (first.ready, second.ready) == (False, False)
    nobody = Chain([first, second])
    second.starts = False
    for _ in range(2):
        with pytest.raises(NotReady, match="first: still loading"):
            await nobody.start()
    second.starts = True
    await nobody.start()
    assert second.ready
    await nobody.stop()


async def test_who_did_not_start_is_tried_again(
    chain: Chain, first: Member, second: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    first.starts, first.ready = False, False
    await chain.start()
    assert chain.readiness().phase == "degraded"
    await asyncio.sleep(0.05)
    first.starts = True
    await eventually(lambda: chain.readiness().phase == "ready")
    assert who(chain) == "first"
    await chain.stop()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def test_two_of_one_name_are_refused(first: Member) -> None:
    with pytest.raises(ValueError, match="names"):
        Chain([first, Member(name="first")])


def test_figures_are_all_members(chain: Chain) -> None:
    assert {id: stats.frames for id, stats in chain.stats().items()} == {"a": 1, "b": 2}


async def test_no_sound_is_taken_for_another_s(
    start_service: StartService, chain: Chain, first: Member, second: Member
) -> None:
    service = await start_service(chain)

    async def heard(text: str = "Hello there.") -> tuple[float, Any]:
        data = await collect(service, speech_request(text))
        return int.from_bytes(data[:2], "little") / 32768, service

    assert (await heard())[0] == 0.5
    first.down = True
    assert (await heard())[0] == 0.25
    first.down = False
    assert (await heard())[0] == 0.5
    assert (first.spoken, second.spoken) == (1, 1), "the third answer came from the cache"
    assert [request.backend for request in (*first.asked, *second.asked)] == ["first", "second"]


async def test_who_was_chosen_speaks_even_if_another_could_again(
    start_service: StartService, chain: Chain, first: Member, second: Member
) -> None:
    service = await start_service(chain)
    first.down = True
    listener = service.open(speech_request("Hello there."))
    first.down = False
    assert listener.usage.input_tokens == 250
    await listener.start()
    assert len(await listener.whole()) > 0
    listener.close()
    assert (first.spoken, second.spoken) == (0, 1)
