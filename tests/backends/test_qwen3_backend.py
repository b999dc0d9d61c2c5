"""The Qwen3-TTS backend on tiny checkpoints: names, order of sound, ends, and the way through the service."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
import wave
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from api.src.backends import qwen3_checkpoint  # noqa: E402
from api.src.backends.qwen3_speech import Utterance, frame_budget, mixed_seed  # noqa: E402
from api.src.backends.qwen3_tts import Qwen3TTSBackend  # noqa: E402
from api.src.building import build_service  # noqa: E402
from api.src.domain import Segment, SpeechRequest, Voice  # noqa: E402
from api.src.engine.config import ModelConfig  # noqa: E402
from api.src.engine.loading import Asking, SpeechModel  # noqa: E402
from api.src.engine.prompt import Prompt, PromptBuilder  # noqa: E402
from api.src.errors import InvalidRequest, NotReady, ShuttingDown, SynthesisFailed  # noqa: E402
from api.src.observe import Metrics  # noqa: E402
from api.src.settings import Settings  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402
from tests.speech.asking import collect  # noqa: E402

FRAME = 1920
CUSTOM = "qwen3-tts-12hz-1.7b-custom-voice"
DESIGN = "qwen3-tts-12hz-1.7b-voice-design"
BASE = "qwen3-tts-12hz-1.7b-base"
TEXTS = ("Hello world.", "One two three four.", "She said she would be here by noon.")
torch.set_num_threads(1)


@asynccontextmanager
async def started(kind: str = "custom_voice", slots: int = 8) -> AsyncIterator[Qwen3TTSBackend]:
    backend = Qwen3TTSBackend(models=[str(tiny(kind))], slots=slots)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()
        assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def loaded(backend: Qwen3TTSBackend) -> SpeechModel:
    """The engine's side of the one model."""
    (model,) = backend._models.values()
    found = model._loaded()
    assert found is not None
    return found


def request(**fields: Any) -> SpeechRequest:
    return replace(SpeechRequest("req_1", "anonymous", CUSTOM, "", "Vivian", seed=3), **fields)


def voice(backend: Qwen3TTSBackend, name: str = "Vivian") -> Voice:
    return next(voice for voice in backend.models[0].voices if voice.id == name)


def segments(texts: Sequence[str]) -> list[Segment]:
    return [Segment(text, i, i + 1, i == len(texts) - 1) for i, text in enumerate(texts)]


async def stream(texts: Sequence[str]) -> AsyncIterator[Segment]:
    for each in segments(texts):
        yield each


async def speak(backend: Qwen3TTSBackend, texts: Sequence[str], name: str = "Vivian", **fields: Any) -> list[Any]:
    return [chunk async for chunk in backend.speak(request(**fields), voice(backend, name), stream(texts))]


def joined(chunks: list[Any]) -> np.ndarray:
    return np.concatenate([chunk.samples for chunk in chunks])


async def idle(backend: Qwen3TTSBackend) -> None:
    async with asyncio.timeout(30):
        while (stats := loaded(backend).engine.stats()).active or stats.waiting:  # noqa: ASYNC110 (a thread's doing)
            await asyncio.sleep(0.005)


async def test_it_says_what_the_checkpoint_serves() -> None:
    async with started() as backend:
        (served,) = backend.models
        assert backend.readiness().ready
        assert served.id == CUSTOM
        assert {v.id for v in served.voices} == {
            "Vivian", "Serena", "Uncle_Fu", "Dylan", "Eric", "Ryan", "Aiden", "Ono_Anna", "Sohee",
        }  # fmt: skip
        assert served.aliases["alloy"] == "Vivian"
        assert served.aliases["sage"] == "Ono_Anna"
        assert len(served.aliases) == 13
        assert set(served.aliases.values()) <= {v.id for v in served.voices}
        assert set(served.languages) >= {"english", "german", "chinese"}
        assert not [name for name in served.languages if "dialect" in name]
        assert {v.language for v in served.voices} <= set(served.languages)
        asked = request(text="Hello world.")
        assert backend.text_tokens(asked) == len(loaded(backend).tokenizer.ids("Hello world.")) > 1
    assert not backend.readiness().ready
    assert backend.text_tokens(asked) is None


def test_a_speaker_that_is_missing_is_replaced_by_the_first() -> None:
    config = ModelConfig.read(tiny("custom_voice"))
    small = replace(config, tts_model_size="0b6", talker_config=replace(config.talker_config, spk_id={"sohee": 1}))
    served = qwen3_checkpoint.served(small, "r")
    assert served.id == "qwen3-tts-12hz-0.6b-custom-voice"
    assert set(served.aliases.values()) == {"Sohee"}


def test_the_revision_follows_the_files(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("custom_voice"), tmp_path / "model")
    first = qwen3_checkpoint.identity(folder, "float32")
    assert qwen3_checkpoint.identity(shutil.copytree(folder, tmp_path / "elsewhere"), "float32") == first
    seen = {first, qwen3_checkpoint.identity(folder, "bfloat16")}
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    seen.add(qwen3_checkpoint.identity(folder, "float32"))
    shutil.copy(tiny("base") / "speech_tokenizer" / "model.safetensors", folder / "more.safetensors")
    seen.add(qwen3_checkpoint.identity(folder, "float32"))
    assert len(seen) == 4


async def test_segments_come_in_order_and_each_is_the_engines_own_sound() -> None:
    async with started() as backend:
        chunks = await speak(backend, TEXTS, instructions="Speak in a calm, warm voice.", language="english")
        order = [chunk.segment.start for chunk in chunks]
        assert order == sorted(order)
        assert set(order) == {0, 1, 2}
        for number, text in enumerate(TEXTS):
            own = joined([chunk for chunk in chunks if chunk.segment.start == number])
            prompt = Prompt(text, "english", "Vivian", "Speak in a calm, warm voice.")
            model = loaded(backend)
            asked = model.request(prompt, model.sampling(mixed_seed(3, number)), frame_budget(text))
            direct = Utterance(model, asked, segments(TEXTS)[number])
            expected = []
            while (chunk := await direct.chunk()) is not None:
                expected.append(chunk)
            assert np.abs(own - joined(expected)).max() < 1e-4
            assert len(own) % FRAME == 0
            assert 0 < len(own) <= frame_budget(text) * FRAME


async def test_requests_at_once_get_what_they_get_alone() -> None:
    names = ("Vivian", "Ryan", "Eric", "Sohee")
    asked = [(TEXTS[i % 3 : i % 3 + 1], names[i % 4], i) for i in range(8)]
    async with started() as backend:
        alone = [joined(await speak(backend, texts, name, seed=seed)) for texts, name, seed in asked]
        together = await asyncio.gather(*(speak(backend, texts, name, seed=seed) for texts, name, seed in asked))
    for one, among in zip(alone, map(joined, together), strict=True):
        assert one.shape == among.shape
        assert np.abs(one - among).max() < 1e-4
    assert len({one.tobytes() for one in alone}) == 8


async def test_the_seed_decides() -> None:
    async with started() as backend:
        first, again, other = [joined(await speak(backend, TEXTS[:1], seed=seed)) for seed in (1, 1, 2)]
    assert np.abs(first - again).max() < 1e-4
    assert first.tobytes() != other.tobytes()


async def test_the_next_segment_is_spoken_while_the_last_is_consumed_but_no_more() -> None:
    taken = []

    async def watched() -> AsyncIterator[Segment]:
        for each in segments(TEXTS):
            taken.append(each.start)
            yield each

    async with started() as backend:
        async with aclosing(backend.speak(request(), voice(backend), watched())) as chunks:
            await anext(chunks)
            await idle(backend)  # nobody takes more, and yet both are done
            assert taken == [0, 1]
            assert sum(loaded(backend).engine.stats().finished.values()) == 3  # with the warm-up
            rest = [chunk async for chunk in chunks]
        assert {chunk.segment.start for chunk in rest} >= {1, 2}


async def test_who_leaves_frees_the_slots() -> None:
    async with started(slots=2) as backend:
        for _ in range(20):
            async with aclosing(backend.speak(request(), voice(backend), stream(TEXTS))) as chunks:
                await anext(chunks)
        task = asyncio.create_task(speak(backend, TEXTS))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(backend)
        finished = loaded(backend).engine.stats().finished
        assert finished["cancelled"] >= 20
        assert finished["error"] == 0
        assert await speak(backend, TEXTS[:1])


async def test_a_stop_ends_what_is_spoken() -> None:
    async with started() as backend:
        known = voice(backend)
        chunks = backend.speak(request(), known, stream(TEXTS))
        await anext(chunks)
        await backend.stop()
        with pytest.raises(ShuttingDown):
            [chunk async for chunk in chunks]
        with pytest.raises(NotReady):
            [chunk async for chunk in backend.speak(request(), known, stream(TEXTS))]


async def test_instructions_that_fill_the_slot_are_the_caller_s_mistake() -> None:
    async with started() as backend:
        with pytest.raises(InvalidRequest) as refused:
            await speak(backend, TEXTS[:1], instructions="secret " * 500)
        assert (refused.value.status, refused.value.param) == (400, "instructions")
        assert "secret" not in str(refused.value)
        assert await speak(backend, TEXTS[:1])


async def test_what_cannot_be_spoken_fails_without_quoting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as backend:

        def broken(*rest: Any) -> Any:
            raise RuntimeError("secret")

        with monkeypatch.context() as patched:
            patched.setattr(PromptBuilder, "rows", broken)
            with pytest.raises(SynthesisFailed) as failed:
                await speak(backend, TEXTS[:1])
        assert "secret" not in str(failed.value)
        assert await speak(backend, TEXTS[:1])


async def test_a_designed_voice_goes_on_from_its_first_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started("voice_design") as backend:
        prompts = []
        build = loaded(backend).request

        def watched(self: Any, prompt: Prompt, *rest: Any, **options: Any) -> Any:
            prompts.append(prompt)
            return build(prompt, *rest, **options)

        monkeypatch.setattr(Asking, "request", watched)
        assert {v.id for v in backend.models[0].voices} == set(backend.models[0].aliases.values()) == {"designed"}
        chunks = await speak(backend, TEXTS, "designed", model=DESIGN, instructions="A calm, warm voice.")
    first, *others = prompts
    assert first.reference is None
    spoken = sum(len(chunk.samples) for chunk in chunks if chunk.segment.start == 0) // FRAME
    assert [(len(p.reference.codes), p.reference.text) for p in others] == [(spoken, TEXTS[0])] * 2
    assert {p.instruct for p in prompts} == {"A calm, warm voice."}
    assert {chunk.segment.start for chunk in chunks} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["nothing", "truncated", "base"])
async def test_what_cannot_be_loaded_says_why(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if kind == "base":
        folder = tiny("base")
    elif kind == "truncated":
        shutil.copytree(tiny("custom_voice"), folder)
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-100])
    backend = Qwen3TTSBackend(models=[str(folder)], slots=2)
    with pytest.raises(NotReady):
        await backend.start()
    readiness = backend.readiness()
    assert (readiness.ready, readiness.phase) == (False, "failed")
    words = {"nothing": "neither a folder", "truncated": "truncated", "base": "only clones"}
    assert words[kind] in readiness.reason
    await backend.stop()


async def test_a_start_that_failed_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    late = tmp_path / "late"
    shutil.copytree(tiny("voice_design"), late)
    weights = late / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice")), str(late)], slots=2)
    for _ in range(2):
        with pytest.raises(NotReady, match="truncated"):
            await backend.start()
        assert backend.models == []
        assert not [thread for thread in threading.enumerate() if thread.name == "engine"], "its memory is free again"
    weights.write_bytes(whole)
    await backend.start()
    assert backend.readiness().ready
    assert len(backend.models) == 2
    await backend.stop()


def test_the_budget_grows_with_what_is_long_to_say() -> None:
    assert frame_budget("Yes.") == 60
    assert frame_budget("a" * 250) < 1024 - 250
    assert frame_budget("你好") > frame_budget("ab")
    assert frame_budget("12") > frame_budget("ab")


async def test_the_service_speaks_wav(tmp_path: Path) -> None:
    configured = Settings(_env_file=None, cache_dir=tmp_path, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))], slots=4)
    service = build_service(configured, backend, Metrics())
    await service.start()
    try:
        await service.wait_ready()
        asked = request(text=f"{TEXTS[2]} {TEXTS[1]}", model="tts-1", voice="nova", format="wav")
        answers = [await collect(service, asked) for _ in range(2)]  # made, then from the cache
        with wave.open(io.BytesIO(answers[0])) as file:
            assert (file.getframerate(), file.getnchannels()) == (24_000, 1)
        samples = np.frombuffer(answers[0][44:], np.int16)
        frames = len(samples) / FRAME
        assert frames == int(frames) > 0
        assert np.abs(samples).max() > 1000
        assert answers[0] == answers[1]
        assert service.open(asked)._input_tokens == backend.text_tokens(asked)
    finally:
        await service.close()
