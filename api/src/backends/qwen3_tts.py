"""Qwen3-TTS behind the `Backend` protocol: which checkpoint answers, from the start of them all to their stop.

How a request is spoken is `qwen3_speech`'s, when a checkpoint is in memory `qwen3_model`'s, where its files come from
`qwen3_hub`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing

from ..domain import AudioChunk, Model, ModelStats, Readiness, Segment, SpeechRequest, Voice
from ..engine.errors import EngineError
from ..engine.tokenizer import TextTokenizer
from ..errors import NotReady
from . import qwen3_hub
from .qwen3_model import AskedForm, Codecs, Qwen3Model
from .qwen3_speech import speak

logger = logging.getLogger(__name__)


class Qwen3TTSBackend:
    """Implements `Backend` with Qwen3-TTS 12 Hz checkpoints, best first.

    `models`: folders or names of the hub's. `slots`: segments that each speaks at once, fewer with `fewer_slots` where
    memory is short. `dtype`: of the language models, "float32" or "bfloat16"; None for float32 on a CPU and bfloat16
    elsewhere. `cpu_weights`: their form on a CPU; "auto" for the fastest that is safe. `unload_after_s`: as Qwen3Model.
    """

    name = "qwen3"

    def __init__(
        self,
        *,
        models: Sequence[str],
        slots: int,
        fewer_slots: bool = False,
        device: str = "cpu",
        dtype: str | None = None,
        cpu_weights: AskedForm = "fp32",
        unload_after_s: float = 0.0,
    ) -> None:
        self._names, self._device = models, device
        self._slots, self._fewer_slots = slots, fewer_slots
        self._dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        self._cpu_weights: AskedForm = cpu_weights
        self._unload_after_s = unload_after_s
        self._phase = Readiness(False, "starting")
        self._models: dict[str, Qwen3Model] = {}
        self._tokenizer: TextTokenizer | None = None
        self._look = asyncio.Event()  # whether a checkpoint has a fault

    @property
    def models(self) -> Sequence[Model]:
        return [model.served for model in self._models.values()]

    def readiness(self) -> Readiness:
        if self._phase.ready and (fault := self._fault()):
            return Readiness(False, "failed", fault.message)
        return self._phase

    def stats(self) -> Mapping[str, ModelStats]:
        """By native model id."""
        return {id: model.stats() for id, model in self._models.items()}

    def breakers(self) -> Mapping[str, str]:
        return {}

    async def start(self) -> None:
        """Fetch and load every checkpoint, and speak once with each; raises NotReady when one cannot be used.

        After a death, only those whose engine has ended are loaded again, and the others speak on.
        """
        try:
            await (self._revive() if self._models else self._start())
        except Exception as error:
            reason = error.message if isinstance(error, NotReady) else "It cannot be started. See the log."
            self._phase = Readiness(False, "failed", reason)
            await self._unload()  # the memory of what was loaded already, which another try needs
            raise
        self._phase = Readiness(True, "ready")

    async def died(self) -> NotReady:
        """Wait until an engine has ended by itself, or its device is lost."""
        while (fault := self._fault()) is None:
            self._look.clear()
            await self._look.wait()
        return fault

    async def stop(self) -> None:
        """End the engines' threads; running `speak` calls raise ShuttingDown."""
        self._phase = Readiness(False, "stopped")
        await self._unload()

    def text_tokens(self, request: SpeechRequest) -> int | None:
        return len(self._tokenizer.ids(request.text)) if self._tokenizer else None

    async def speak(
        self, request: SpeechRequest, voice: Voice, segments: AsyncIterator[Segment]
    ) -> AsyncGenerator[AudioChunk, None]:
        """As Backend.speak. The next segment is spoken while the last is consumed.

        Raises SynthesisFailed, NotReady, ShuttingDown, InvalidRequest.
        """
        if request.model not in self._models:
            raise NotReady("The server is not ready.")
        async with (
            self._models[request.model].borrow() as model,
            aclosing(speak(model, request, voice, segments)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def _start(self) -> None:
        codecs = Codecs()
        for name in self._names:
            model = await self._open(name, codecs)
            if model.served.id in self._models:
                raise NotReady(f"Two of the checkpoints are a {model.served.id}.")
            self._models[model.served.id] = model
        if not any(model.served.voices for model in self._models.values()):
            raise NotReady(f"{', '.join(self._models)} only clones voices, and has none of its own to speak with.")
        for model in self._models.values():
            self._phase = Readiness(False, "loading", model.served.id)
            async with model.borrow() as loaded:
                self._tokenizer = self._tokenizer or loaded.tokenizer  # all have the same vocabulary

    async def _revive(self) -> None:
        for model in self._models.values():
            if fault := model.fault:
                self._phase = Readiness(False, "loading", f"{model.served.id}: {fault.message}")
                await model.unload()  # first: there may not be memory for two
                async with model.borrow():
                    pass

    def _fault(self) -> NotReady | None:
        return next((fault for model in self._models.values() if (fault := model.fault)), None)

    async def _unload(self) -> None:
        await asyncio.gather(*(model.unload() for model in self._models.values()))
        self._models, self._tokenizer = {}, None

    async def _open(self, name: str, codecs: Codecs) -> Qwen3Model:
        """The checkpoint behind a name, downloaded if need be, not loaded yet."""
        folder = await asyncio.to_thread(qwen3_hub.find, name)
        if folder is None:
            self._phase = Readiness(False, "downloading", name)
            logger.info("downloading %s", name)
            folder = await qwen3_hub.download_apart(name)
        try:
            return await asyncio.to_thread(
                Qwen3Model,
                folder,
                slots=self._slots,
                fewer_slots=self._fewer_slots,
                device=self._device,
                dtype=self._dtype,
                cpu_weights=self._cpu_weights,
                codecs=codecs,
                unload_after_s=self._unload_after_s,
                on_fault=self._look.set,
            )
        except EngineError as error:
            raise NotReady(str(error)) from error
