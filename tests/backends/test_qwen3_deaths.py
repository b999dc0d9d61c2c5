"""An engine that dies under its listeners: what they hear, what is given back, and how it comes to speak again."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from api.src import patience  # noqa: E402
from api.src.backends import qwen3_model  # noqa: E402
from api.src.backends.qwen3_tts import Qwen3TTSBackend  # noqa: E402
from api.src.domain import Segment, SpeechRequest  # noqa: E402
from api.src.engine import device, runner  # noqa: E402
from api.src.engine.errors import DeviceLost  # noqa: E402
from api.src.engine.loading import SpeechModel  # noqa: E402
from api.src.errors import NeedsNewProcess, NotReady, SynthesisFailed  # noqa: E402
from api.src.stores.ledger_check import broken_laws  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402
from tests.speech.asking import StartService, collect, eventually, speech_request  # noqa: E402
from tests.speech.conftest import start_service  # noqa: E402

__all__ = ["start_service"]

CUSTOM = "qwen3-tts-12hz-1.7b-custom-voice"
DESIGN = "qwen3-tts-12hz-1.7b-voice-design"
TEXT = "Two boats lie at the old bank and nobody seems to own them."
torch.set_num_threads(1)


def backend_of(*kinds: str) -> Qwen3TTSBackend:
    return Qwen3TTSBackend(models=[str(tiny(kind)) for kind in kinds], slots=2)


def loaded(backend: Qwen3TTSBackend, id: str = CUSTOM) -> SpeechModel:
    found = backend._models[id]._loaded()
    assert found is not None
    return found


def kill(backend: Qwen3TTSBackend, id: str = CUSTOM) -> None:
    """End the engine's thread in its next step."""

    def die(_: object) -> None:
        raise SystemExit("planted")

    loaded(backend, id).engine._post(die)


def fail_steps(backend: Qwen3TTSBackend, monkeypatch: pytest.MonkeyPatch, *, lost: bool) -> None:
    """Every frame fails as on a GPU, which is lost or not."""

    def decode(slots: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def require_working(device: object) -> None:
        if lost:
            raise DeviceLost(f"{device} takes no more work from this process")

    monkeypatch.setattr(loaded(backend).engine._stepper._runner, "decode", decode)
    monkeypatch.setattr(runner, "require_working", require_working)
    monkeypatch.setattr(qwen3_model, "require_working", require_working)


def speaking(backend: Qwen3TTSBackend, id: str = CUSTOM) -> Any:
    """A listener on its way."""
    served = next(served for served in backend.models if served.id == id)

    async def text() -> AsyncIterator[Segment]:
        yield Segment(TEXT, 0, len(TEXT), final=True)

    asked = SpeechRequest("req_1", "anonymous", id, TEXT, served.voices[0].id, seed=5)
    return backend.speak(asked, served.voices[0], text())


def engines() -> int:
    return sum(thread.name == "engine" for thread in threading.enumerate())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.3)


@pytest.mark.usefixtures("impatient")
async def test_who_listens_gets_503_and_the_money_back_and_who_comes_later_is_spoken_to(
    start_service: StartService, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[default]\nper_1000_characters = 1000000\n")
    backend = backend_of("custom_voice")
    service = await start_service(backend, prices_file=prices)
    await service.ledger.credit("anonymous", 10_000_000, "test")

    listener = service.open(speech_request(TEXT, seed=5))
    await listener.start()
    hearing = asyncio.create_task(listener.whole())
    waiting = asyncio.create_task(collect(service, speech_request("Hello world.", seed=1)))
    await eventually(lambda: loaded(backend).engine.stats().frames > 12)
    kill(backend)
    for task in (hearing, waiting):
        with pytest.raises(NotReady, match="The engine has ended"):
            await task
    listener.close()
    assert (service.readiness().phase, service.readiness().reason) == (
        "failed", "The engine has ended, and is started again.",
    )  # fmt: skip
    with pytest.raises(NotReady, match="The engine has ended"):
        service.open(speech_request("Hello."))
    await eventually(lambda: service.readiness().ready, 20)
    assert engines() == 1
    await eventually(lambda: not service._tasks)
    assert await service.ledger.balance("anonymous") == 10_000_000
    assert await collect(service, speech_request("Hello world.", seed=1))
    await eventually(lambda: not service._tasks)
    assert await service.ledger.balance("anonymous") == 10_000_000 - 12_000
    assert broken_laws(tmp_path / "ledger.db") == []


async def test_the_dead_ones_memory_goes_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody who listened to it takes their time to leave."""
    backend = backend_of("custom_voice")
    await backend.start()
    held = [weakref.ref(each) for each in (loaded(backend).steps, loaded(backend).steps.model)]
    slow = speaking(backend)
    await anext(slow)
    kill(backend)
    assert isinstance(await asyncio.wait_for(backend.died(), 10), NotReady)
    load: Callable[..., SpeechModel] = qwen3_model.load_model
    left: list[object] = []

    def watched(*rest: Any, **options: Any) -> SpeechModel:
        left.extend(ref() for ref in held)
        return load(*rest, **options)

    monkeypatch.setattr(qwen3_model, "load_model", watched)
    await backend.start()
    assert left == [None, None]
    assert backend.readiness().ready
    with pytest.raises(NotReady):
        [chunk async for chunk in slow]
    async with aclosing(speaking(backend)) as chunks:
        assert len((await anext(chunks)).samples)
    await backend.stop()


async def test_only_the_dead_one_is_loaded_again() -> None:
    backend = backend_of("custom_voice", "voice_design")
    await backend.start()
    other = loaded(backend, DESIGN).engine
    before = backend.stats()[CUSTOM].frames
    async with aclosing(speaking(backend, DESIGN)) as chunks:
        await anext(chunks)
        kill(backend)
        await asyncio.wait_for(backend.died(), 10)
        await backend.start()
        assert len([chunk async for chunk in chunks]), "who listens to the other hears it to its end"
    assert loaded(backend, DESIGN).engine is other
    assert backend.stats()[CUSTOM].frames > before
    await backend.stop()
    assert engines() == 0


async def test_a_failed_step_is_no_death_while_the_device_works(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of("custom_voice")
    await backend.start()
    with monkeypatch.context() as patch:
        fail_steps(backend, patch, lost=False)
        with pytest.raises(SynthesisFailed):
            [chunk async for chunk in speaking(backend)]
    assert backend.readiness().ready
    async with aclosing(speaking(backend)) as chunks:
        await anext(chunks)
    await backend.stop()


async def test_a_lost_device_asks_for_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of("custom_voice")
    await backend.start()
    fail_steps(backend, monkeypatch, lost=True)
    with pytest.raises(NeedsNewProcess):
        [chunk async for chunk in speaking(backend)]
    death = await asyncio.wait_for(backend.died(), 10)
    assert isinstance(death, NeedsNewProcess)
    assert backend.readiness() == replace(backend.readiness(), ready=False, phase="failed", reason=death.message)
    await backend.stop()
    assert engines() == 0


async def test_so_does_one_that_is_lost_while_a_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))], slots=2, unload_after_s=0.05)
    await backend.start()
    await eventually(lambda: engines() == 0)

    def load(*rest: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def require_working(device: object) -> None:
        raise DeviceLost("it is lost")

    monkeypatch.setattr(qwen3_model, "load_model", load)
    with pytest.raises(NotReady, match="cannot be used"):
        await anext(speaking(backend))
    assert backend.readiness().ready
    monkeypatch.setattr(qwen3_model, "require_working", require_working)
    with pytest.raises(NeedsNewProcess):
        await anext(speaking(backend))
    assert isinstance(await asyncio.wait_for(backend.died(), 10), NeedsNewProcess)
    await backend.stop()


class Cuda:
    """torch's part of the question, on a machine without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.asked: list[object] = []
        self._error = error
        monkeypatch.setattr(device.torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(device.torch, "ones", lambda *rest, **options: torch.tensor(1.0))

    def synchronize(self, device: object) -> None:
        self.asked.append(device)
        if self._error is not None:
            raise self._error


def test_a_device_is_lost_when_it_takes_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (None, torch.OutOfMemoryError("full")):
        cuda = Cuda(monkeypatch, error)
        device.require_working("cuda:0")
        assert cuda.asked == ["cuda:0"]
    sticky = Cuda(monkeypatch, torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with ..."))
    with pytest.raises(DeviceLost, match=r"unspecified launch failure$"):
        device.require_working("cuda:0")
    device.require_working("cpu")
    assert sticky.asked == ["cuda:0"]
