"""A chain of backends: who is asked, who speaks instead, and what its cached sound is known by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from api.src import patience
from api.src.backends import chain as chain_module
from api.src.backends.chain import Chain
from api.src.domain import AudioChunk, Model, ModelStats, Segment, SpeechRequest, Voice
from api.src.errors import (
    InvalidRequest,
    NeedsNewProcess,
    NotReady,
    Overloaded,
    SpeechError,
    SynthesisFailed,
    UpstreamFailed,
    UpstreamUnavailable,
)
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
    away: Exception | None = None
    away_after: int = 0
    deaths: asyncio.Queue[NotReady] = field(default_factory=asyncio.Queue)

    async def died(self) -> NotReady:
        return await self.deaths.get()

    def die(self, error: NotReady) -> None:
        self.ready = False
        self.deaths.put_nowait(error)

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
        made = 0
        async for chunk in super().speak(request, voice, segments):
            if self.away is not None and made == self.away_after:
                raise self.away
            made += 1
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


async def test_who_dies_is_started_again_while_the_others_speak(
    chain: Chain, first: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.02)
    await chain.start()
    for _ in range(2):
        first.die(NotReady("The engine has ended."))
        assert who(chain) == "second"
        await eventually(lambda: first.ready)
        assert who(chain) == "first"
    await chain.stop()


async def test_a_member_that_has_spoken_and_needs_a_new_process_gets_one(
    chain: Chain, first: Member, second: Member
) -> None:
    await chain.start()
    first.die(NeedsNewProcess("The device is lost."))
    assert (await asyncio.wait_for(chain.died(), 5)).message == "The device is lost."
    await chain.stop()


async def test_one_that_never_spoke_does_not_take_the_others_down(
    chain: Chain, first: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "FIRST_PAUSE_S", 0.01)
    tries = 0

    async def start() -> None:
        nonlocal tries
        tries += 1
        raise NeedsNewProcess("The device is lost.")

    first.start, first.ready = start, False  # type: ignore[method-assign]
    await chain.start()
    await eventually(lambda: tries == 2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(chain.died(), 0.1)
    assert who(chain) == "second"
    await chain.stop()


async def test_where_nobody_speaks_a_new_process_is_worth_it(chain: Chain, first: Member, second: Member) -> None:
    async def start() -> None:
        raise NeedsNewProcess("The device is lost.")

    first.start, second.starts = start, False  # type: ignore[method-assign]
    with pytest.raises(NeedsNewProcess):
        await chain.start()
    await chain.stop()


# --- who turns out to be away ---

AWAY = UpstreamUnavailable("The remote server cannot be reached.")
PRICES = "[default]\nper_1000_characters = 1000000\n[models.second-native]\nper_1000_characters = 2000000\n"


def level(data: bytes) -> float:
    return int.from_bytes(data[:2], "little") / 32768


@pytest.mark.parametrize("error", [AWAY, NotReady("The engine has ended.")])
async def test_the_next_is_asked_where_the_first_turns_out_to_be_away(
    start_service: StartService, chain: Chain, first: Member, second: Member, error: Exception, tmp_path: Path
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    second.ids = ("second-native",)
    service = await start_service(chain, prices_file=tmp_path / "prices.toml")
    await service.ledger.credit("anonymous", 24_000, "just enough for the second, once nothing is held for the first")
    first.away = error
    asked = speech_request("Hello there.", idempotency_key="k", body_digest="d")
    listener = service.open(asked)
    assert listener.usage.input_tokens == 500
    await listener.start()
    assert (listener.script.request.backend, listener.script.request.model) == ("second", "second-native")
    assert listener.usage.input_tokens == 250
    assert listener.cache_status == "miss"
    assert level(await listener.whole()) == 0.25
    listener.close()
    assert await service.ledger.balance("anonymous") == 0, "as who spoke costs, and once"
    (event,) = await service.ledger.usage("anonymous", 10)
    assert (event.outcome, event.price_micros) == ("completed", 24_000)

    await service.ledger.credit("anonymous", 12_000, "for the first")
    first.away = None
    assert level(await collect(service, speech_request("Hello there."))) == 0.5, "the entry is the other one's"
    first.away = error
    await collect(service, replace(asked, id="again"))
    assert (first.spoken, second.spoken) == (2, 1), "each has an entry of its own, and the first one's is found first"
    await eventually(lambda: not service._tasks)
    assert await service.ledger.check() == []


async def test_where_everybody_is_away_the_last_says_so_and_nothing_is_kept(
    start_service: StartService, chain: Chain, first: Member, second: Member, tmp_path: Path
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    service = await start_service(chain, prices_file=tmp_path / "prices.toml")
    await service.ledger.credit("anonymous", 1_000_000, "gift")
    first.away, second.away = AWAY, NotReady("The second is away too.")
    with pytest.raises(NotReady, match="The second"):
        await collect(service, speech_request("Hello there."))
    assert (first.spoken, second.spoken) == (1, 1)
    await eventually(lambda: not service._tasks and not service._running)
    assert (service.admission.running, service.admission.waiting) == (0, 0)
    assert await service.ledger.balance("anonymous") == 1_000_000
    assert await service.ledger.check() == []


@pytest.mark.parametrize("error", [SynthesisFailed("no"), UpstreamFailed("no"), Overloaded("no"), InvalidRequest("no")])
async def test_other_failures_are_the_answer(
    start_service: StartService, chain: Chain, first: Member, second: Member, error: SpeechError
) -> None:
    service = await start_service(chain)
    first.away = error
    with pytest.raises(type(error)):
        await collect(service, speech_request("Hello there."))
    assert (first.spoken, second.spoken) == (1, 0)


async def test_nobody_takes_over_once_there_is_sound(
    start_service: StartService, chain: Chain, first: Member, second: Member
) -> None:
    service = await start_service(chain)
    first.away, first.away_after = AWAY, 1
    text = "The first sentence is long enough to be spoken alone. So is the second sentence, which ends here."
    with pytest.raises(UpstreamUnavailable):
        await collect(service, speech_request(text))
    assert (first.spoken, second.spoken) == (1, 0)
    with pytest.raises(UpstreamUnavailable):
        await collect(service, speech_request(text))
    assert first.spoken == 2, "nothing of it was kept"


async def test_only_one_that_has_the_voice_is_asked(
    start_service: StartService, chain: Chain, first: Member, second: Member
) -> None:
    service = await start_service(chain)
    first.away = AWAY
    with pytest.raises(UpstreamUnavailable):
        await collect(service, speech_request("Hello there.", voice="ann"))
    assert second.spoken == 0


async def test_without_a_chain_nobody_is_asked_twice(start_service: StartService, first: Member) -> None:
    service = await start_service(first)
    first.away = AWAY
    with pytest.raises(UpstreamUnavailable):
        await collect(service, speech_request("Hello there."))
    assert first.spoken == 1


async def test_who_joined_turns_to_the_next_together(
    start_service: StartService, chain: Chain, first: Member, second: Member
) -> None:
    service = await start_service(chain)
    first.away, first.delay_s, second.delay_s = AWAY, 0.05, 0.05
    answers = await asyncio.gather(*(collect(service, speech_request("Hello there.")) for _ in range(3)))
    assert {level(answer) for answer in answers} == {0.25}
    assert (first.spoken, second.spoken) == (1, 1)


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.06, 0.09])
async def test_who_hangs_up_meanwhile_leaves_nothing_behind(
    start_service: StartService, chain: Chain, first: Member, second: Member, tmp_path: Path, delay_s: float
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    service = await start_service(chain, prices_file=tmp_path / "prices.toml")
    await service.ledger.credit("anonymous", 1_000_000, "gift")
    first.away, first.delay_s, second.delay_s = AWAY, 0.05, 0.05
    listener = service.open(speech_request("Hello there."))
    starting = asyncio.create_task(listener.start())
    await asyncio.sleep(delay_s)
    listener.close()
    with pytest.raises(SpeechError):
        await starting
    await eventually(lambda: not service._tasks and not service._running)
    assert (service.admission.running, first.open, second.open) == (0, 0, 0)
    assert await service.ledger.balance("anonymous") == 1_000_000
    assert await service.ledger.check() == []
