"""Several Qwen3-TTS checkpoints at once: who answers, what they share, and when one leaves memory."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from api.src.backends import qwen3_memory, qwen3_model  # noqa: E402
from api.src.backends.qwen3_speech import WARM_UP_FRAMES  # noqa: E402
from api.src.backends.qwen3_tts import Qwen3TTSBackend  # noqa: E402
from api.src.domain import Segment, SpeechRequest  # noqa: E402
from api.src.engine.config import ModelConfig  # noqa: E402
from api.src.errors import NotReady  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402

CUSTOM = "qwen3-tts-12hz-1.7b-custom-voice"
DESIGN = "qwen3-tts-12hz-1.7b-voice-design"
BASE = "qwen3-tts-12hz-1.7b-base"
KINDS = ("custom_voice", "voice_design", "base")


@asynccontextmanager
async def started(*folders: Path, **options: Any) -> AsyncIterator[Qwen3TTSBackend]:
    backend = Qwen3TTSBackend(models=[str(folder) for folder in folders], slots=2, **options)
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()
        assert engine_threads() == 0


def engine_threads() -> int:
    return sum(thread.name == "engine" for thread in threading.enumerate())


async def say(backend: Qwen3TTSBackend, model: str) -> np.ndarray:
    served = next(served for served in backend.models if served.id == model)

    async def text() -> AsyncIterator[Segment]:
        yield Segment("Hello world.", 0, 12, final=True)

    asked = SpeechRequest("req_1", "anonymous", model, "Hello world.", served.voices[0].id, seed=3)
    chunks = [chunk.samples async for chunk in backend.speak(asked, served.voices[0], text())]
    return np.concatenate(chunks)


async def until_threads(count: int) -> None:
    async with asyncio.timeout(20):
        while engine_threads() != count:  # noqa: ASYNC110 (a thread's doing)
            await asyncio.sleep(0.01)


async def test_each_request_goes_to_the_checkpoint_that_it_names() -> None:
    async with started(*map(tiny, KINDS)) as backend:
        assert [model.id for model in backend.models] == [CUSTOM, DESIGN, BASE]
        assert [bool(model.voices) for model in backend.models] == [True, True, False]
        assert len({model.revision for model in backend.models}) == 3
        assert engine_threads() == 3
        before = backend.stats()
        await say(backend, DESIGN)
        after = backend.stats()
        assert after[DESIGN].frames > before[DESIGN].frames
        assert {id: after[id] for id in (CUSTOM, BASE)} == {id: before[id] for id in (CUSTOM, BASE)}


async def test_checkpoints_share_one_codec_decoder_but_only_if_it_is_the_same(tmp_path: Path) -> None:
    other = shutil.copytree(tiny("base"), tmp_path / "base")
    weights = other / "speech_tokenizer" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    async with started(tiny("custom_voice"), tiny("voice_design"), other) as backend:
        codecs = [model._loaded().codec for model in backend._models.values()]
    assert codecs[0] is codecs[1]
    assert codecs[2] is not codecs[0]


async def test_quantised_weights_are_another_sound_kept_on_the_disk(tmp_path: Path) -> None:
    """Speech from the file is that of the weights that it was made of."""
    folder = shutil.copytree(tiny("custom_voice"), tmp_path / "custom")
    models, sounds = [], []
    for form in ("fp32", "int8", "int8"):
        async with started(folder, cpu_weights=form) as backend:
            models += backend.models
            sounds.append(await say(backend, CUSTOM))
        files = [path.name for path in (folder / ".qwen3-tts").glob("*")]
        assert [name.startswith("int8-") for name in files] == ([] if form == "fp32" else [True])
    forms = [model.weights.partition(";")[0] for model in models]
    assert forms == ["fp32: asked for", "int8: asked for", "int8: asked for"]
    assert models[0].revision != models[1].revision == models[2].revision
    assert np.abs(sounds[1] - sounds[2]).max() < 1e-3
    assert sounds[0].shape != sounds[1].shape or np.abs(sounds[0] - sounds[1]).max() > 0.01


async def test_the_form_that_is_chosen_is_told_with_its_reason(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("custom_voice"), tmp_path / "custom")
    async with started(folder, cpu_weights="auto") as backend:
        [model] = backend.models
    assert model.weights.split(":")[0] in ("fp32", "bf16", "int8")
    assert "ms of one core" in model.weights
    [noted] = (folder / ".qwen3-tts").glob("*.choice")
    before = noted.stat().st_mtime_ns
    async with started(folder, cpu_weights="auto") as backend:
        assert backend.models[0].weights == model.weights
    assert noted.stat().st_mtime_ns == before, "measured again"


async def test_two_of_a_kind_are_refused() -> None:
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))] * 2, slots=2)
    with pytest.raises(NotReady, match="Two of the checkpoints"):
        await backend.start()
    assert backend.readiness().phase == "failed"
    await backend.stop()


async def test_an_idle_checkpoint_leaves_memory_and_comes_back() -> None:
    async with started(tiny("custom_voice"), tiny("voice_design"), unload_after_s=0.2) as backend:
        first = await say(backend, CUSTOM)
        await until_threads(0)
        counted, others = backend.stats()[CUSTOM], backend.stats()[DESIGN]
        assert counted.frames >= len(first) // 1920 + WARM_UP_FRAMES
        assert backend.readiness().ready
        again = await say(backend, CUSTOM)
        assert np.abs(first - again).max() < 1e-4
        assert backend.stats()[DESIGN] == others, "the other one stays away"
        assert backend.stats()[CUSTOM].frames == counted.frames + len(first) // 1920 + WARM_UP_FRAMES


async def test_the_counts_never_fall_while_a_checkpoint_leaves() -> None:
    async with started(tiny("custom_voice")) as backend:
        await say(backend, CUSTOM)
        (model,) = backend._models.values()
        before = model.stats()
        leaving = asyncio.create_task(model.unload())
        while not leaving.done():
            assert model.stats().frames >= before.frames
            assert model.stats().finished == before.finished
            await asyncio.sleep(0)
        assert model.stats() == replace(before, active=0, step_seconds=0.0)


async def test_who_speaks_is_not_idle() -> None:
    async with started(tiny("custom_voice"), unload_after_s=0.05) as backend:
        (model,) = backend._models.values()
        async with model.borrow() as borrowed:
            await asyncio.sleep(0.2)
            assert borrowed.engine.running
            async with model.borrow() as same:
                assert same.engine is borrowed.engine
            await asyncio.sleep(0.2)
            assert borrowed.engine.running
        await until_threads(0)


async def test_a_borrower_at_the_moment_of_unloading_gets_a_model_that_runs() -> None:
    async with started(tiny("custom_voice"), unload_after_s=0.01) as backend:
        (model,) = backend._models.values()
        for delay in np.linspace(0, 0.03, 12):
            await asyncio.sleep(delay)
            async with model.borrow() as borrowed:
                await asyncio.sleep(0.02)
                assert borrowed.engine.running


async def test_what_changed_on_disk_while_it_was_unloaded_is_not_spoken_with(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("custom_voice"), tmp_path / "model")
    async with started(folder, unload_after_s=0.05) as backend:
        await until_threads(0)
        os.utime(folder / "model.safetensors")
        with pytest.raises(NotReady, match="changed"):
            await say(backend, CUSTOM)


async def test_a_borrower_who_leaves_does_not_stop_the_loading() -> None:
    async with started(tiny("custom_voice"), unload_after_s=0.05) as backend:
        await until_threads(0)
        first = asyncio.create_task(say(backend, CUSTOM))
        second = asyncio.create_task(say(backend, CUSTOM))
        await asyncio.sleep(0)
        first.cancel()
        assert len(await second)


# --- memory ---


async def test_too_little_memory_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3_memory, "free_bytes", lambda device: 50_000_000)
    monkeypatch.setattr(qwen3_model, "load_model", lambda *rest, **options: pytest.fail("it was loaded"))
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))], slots=2)
    with pytest.raises(NotReady, match=r"needs about 0\.\d GB on cpu, and 0\.1 GB are free"):
        await backend.start()
    assert "TTS_SLOTS" in backend.readiness().reason
    await backend.stop()


async def test_slots_that_nobody_asked_for_give_way_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("custom_voice")
    config = ModelConfig.read(folder)
    needed = qwen3_memory.needed_bytes(folder, config, slots=5, positions=1024, dtype=torch.float32, device="cpu")
    monkeypatch.setattr(qwen3_memory, "free_bytes", lambda device: needed)
    backend = Qwen3TTSBackend(models=[str(folder)], slots=16, fewer_slots=True)
    await backend.start()
    (model,) = backend._models.values()
    assert model._loaded().engine.slots == 4
    await backend.stop()


def test_what_is_needed_grows_with_slots_and_width() -> None:
    folder = tiny("custom_voice")

    def needed(slots: int, dtype: Any) -> int:
        config = ModelConfig.read(folder)
        return qwen3_memory.needed_bytes(folder, config, slots=slots, positions=1024, dtype=dtype, device="cuda")

    config = ModelConfig.read(folder).talker_config
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 1024
    more = needed(9, torch.float32) - needed(8, torch.float32)
    assert more == keys * 4 + qwen3_memory.CODEC_SLOT_BYTES
    assert needed(8, torch.float32) > needed(8, torch.bfloat16)


def test_the_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(qwen3_memory, "_CGROUP", tmp_path)
    alone = qwen3_memory.free_bytes("cpu")
    assert alone is not None
    assert alone > 100_000_000
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 200000\n")
    assert qwen3_memory.free_bytes("cpu") == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert qwen3_memory.free_bytes("cpu") > 100_000_000


def test_the_estimate_covers_what_is_allocated() -> None:
    backend_slots = 4
    folder = tiny("custom_voice")
    config = replace(ModelConfig.read(folder))
    needed = qwen3_memory.needed_bytes(
        folder, config, slots=backend_slots, positions=1024, dtype=torch.float32, device="cpu"
    )
    model = qwen3_model.load_model(folder, slots=backend_slots, positions=1024)
    assert model.steps.nbytes < needed - qwen3_memory.WORKING_BYTES + 10_000_000
