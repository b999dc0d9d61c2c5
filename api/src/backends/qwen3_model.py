"""One Qwen3-TTS checkpoint through its life: known by its files, loaded when it is wanted, unloaded when it is idle.

Owns when weights, the CPU's kernel and the engine's thread come and go. What is spoken with them is qwen3_speech's.
"""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import gc
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import torch

from ..domain import ModelStats
from ..engine.codec import CodecDecoder
from ..engine.config import ModelConfig
from ..engine.device import require_working
from ..engine.errors import DeviceLost, EngineError
from ..engine.form_choice import choose_form
from ..engine.forms import cache_folders
from ..engine.linear import Form
from ..engine.loading import Asking, SpeechModel, load_model, narrow_codec
from ..engine.messages import Limits
from ..engine.native.check import find
from ..engine.native.library import user_folder
from ..engine.native.products import Native
from ..errors import NeedsNewProcess, NotReady, SynthesisFailed
from . import qwen3_checkpoint, qwen3_memory
from .qwen3_progress import WeightsProgress
from .qwen3_speech import POSITIONS, told_of, warm_up

logger = logging.getLogger(__name__)

CODEC = "speech_tokenizer"
CODEC_FILES = (".json", ".safetensors")
STOP_S = 30.0
USER_FOLDER = user_folder()
"""For quantised weights where a checkpoint's own folder cannot be written to, and for the CPU's kernel, which is code
and so lies where this user alone writes."""
AskedForm = Literal["auto", Form]


class Codecs:
    """The codec's decoders that are loaded: all published checkpoints have the same one, and share it.

    `narrow`: whether its wide products are in bf16.
    """

    def __init__(self) -> None:
        self._loaded: list[tuple[Path, bool, CodecDecoder]] = []

    def of(self, folder: Path, narrow: bool) -> CodecDecoder | None:
        """The decoder, if a checkpoint with the very same files was loaded before."""
        for known, form, codec in self._loaded:
            if form == narrow and (known == folder or _same_files(known, folder)):
                return codec
        return None

    def keep(self, folder: Path, narrow: bool, codec: CodecDecoder) -> None:
        """Remember it for the checkpoints to come."""
        if all(codec is not known for _, _, known in self._loaded):
            self._loaded.append((folder, narrow, codec))


class Qwen3Model:
    """A checkpoint that can be borrowed. Used on one event loop.

    `cpu_weights`: the form of the weights on a CPU, where "auto" takes a second's measurement the first time.
    `unload_after_s`: seconds without a borrower after which its memory is given back; 0 for never.
    `on_fault` is called when there may be a `fault`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        fewer_slots: bool = False,
        device: str,
        dtype: str,
        cpu_weights: AskedForm,
        codecs: Codecs,
        unload_after_s: float = 0.0,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises EngineError if the folder is no checkpoint."""
        self.folder = folder
        self.config = ModelConfig.read(folder)
        self._weights_cache = cache_folders(folder, USER_FOLDER)
        self._native: Native | None = None
        self._weights, why = self._form(cpu_weights, device, dtype)
        self._narrow_codec = narrow_codec(self._weights, device)
        self._sounding = (dtype, self._weights, f"narrow codec: {self._narrow_codec}", f"kernel: {bool(self._native)}")
        self.served = qwen3_checkpoint.served(self.config, qwen3_checkpoint.identity(folder, *self._sounding), why)
        self._slots, self._fewest_slots = slots, 1 if fewer_slots else slots
        self._device, self._dtype = device, dtype
        self._codecs, self._unload_after_s = codecs, unload_after_s
        self._borrowers = 0
        self._loading: asyncio.Task[SpeechModel] | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ending: SpeechModel | None = None
        self._before = ModelStats()  # of engines that have ended
        self._on_fault = on_fault
        self._lost: NeedsNewProcess | None = None

    @contextlib.asynccontextmanager
    async def borrow(self) -> AsyncIterator[Asking]:
        """The loaded model, which stays while it is borrowed, unless its engine dies.

        Raises:
            NotReady: it cannot be loaded. The next borrower tries again.
        """
        self._borrowers += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield (await self._load()).asking
        finally:
            self._borrowers -= 1
            if not self._borrowers and self._unload_after_s:
                self._timer = asyncio.get_running_loop().call_later(self._unload_after_s, self._start_unloading)

    @property
    def fault(self) -> NotReady | None:
        """What keeps it from speaking until it is unloaded: its engine has died. Or its device is lost, for good."""
        loaded = self._loaded()
        if loaded is not None and loaded.engine.death is not None:
            return told_of(loaded.engine.death)
        return self._lost

    def stats(self) -> ModelStats:
        """What the engine does now, and what it and those before it have done."""
        loaded = self._loaded()
        total = self._before
        for model in (self._ending, loaded):
            if model is not None:
                total = _stats(model).after(total)
        return total

    async def unload(self) -> None:
        """End the engine's thread and give the memory back. Who still speaks is cut off with ShuttingDown."""
        self._start_unloading()
        if self._unloading is not None:
            await asyncio.wait([self._unloading])

    def _loaded(self) -> SpeechModel | None:
        task = self._loading
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return task.result()

    async def _load(self) -> SpeechModel:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load_and_try(), name=f"load {self.served.id}")
        task = self._loading
        try:
            return await asyncio.shield(task)  # a borrower who leaves does not stop it: others may wait for it
        except NotReady as error:
            if self._loading is task:
                self._loading = None
            if isinstance(error, NeedsNewProcess):
                self._lost = NeedsNewProcess(error.message)
                self._on_fault()
            raise

    async def _load_and_try(self) -> SpeechModel:
        if self._unloading is not None:  # the memory of both at once might not be there
            await asyncio.wait([self._unloading])
        try:
            model = await asyncio.to_thread(self._read)
            model.engine.start(_on_loop(self._on_fault))
            await self._speak_once(model)
        except (EngineError, SynthesisFailed) as error:
            raise NotReady(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise NotReady(f"There is not enough memory for {self.folder.name}.") from error
        except (OSError, RuntimeError) as error:  # a disk's, a driver's
            await self._require_device()
            raise NotReady(f"{self.folder.name} cannot be used on {self._device}: {error}") from error
        arenas = f"{model.steps.nbytes / 1e9:.2f} GB for {model.engine.slots} slots"
        how = [arenas, model.steps.describe(), *([f"weights in {self.served.weights}"] if self.served.weights else [])]
        logger.info("%s is loaded on %s: %s", self.served.id, self._device, ", ".join(how))
        return model

    async def _require_device(self) -> None:
        try:
            await asyncio.to_thread(require_working, self._device)
        except DeviceLost as error:
            raise told_of(error) from error

    def _form(self, asked: AskedForm, device: str, dtype: str) -> tuple[Form, str]:
        """The form of the weights and, where there is a choice, what it is and why."""
        if device != "cpu" or dtype != "float32":
            return "fp32", ""
        self._native, kernel = find(USER_FOLDER)
        if asked != "auto":
            return asked, f"{asked}: asked for; by {kernel}"
        choice = choose_form(self.config.talker_config, self._weights_cache, self._native)
        return choice.form, f"{choice.reason}; by {kernel}"

    def _read(self) -> SpeechModel:
        if qwen3_checkpoint.identity(self.folder, *self._sounding) != self.served.revision:
            raise NotReady(f"The files of {self.folder.name} have changed: the server must be started anew.")
        dtype: torch.dtype = getattr(torch, self._dtype)
        slots = self._fitting_slots(dtype)
        limits = Limits(
            slots=slots,
            codec_frames=max(64, slots),
            outbox_frames=POSITIONS,  # a slow reader costs 8 MB at most, but never holds a slot
        )
        with WeightsProgress(self.served.id) as progress:
            model = load_model(
                self.folder,
                slots=slots,
                device=self._device,
                dtype=dtype,
                codec=self._codecs.of(self.folder, self._narrow_codec),
                weights=self._weights,
                weights_cache=self._weights_cache,
                progress=progress,
                native=self._native,
                positions=POSITIONS,
                limits=limits,
            )
        self._codecs.keep(self.folder, self._narrow_codec, model.codec)
        return model

    def _fitting_slots(self, dtype: torch.dtype) -> int:
        """As many as wanted, halved until they fit into memory; NotReady if the fewest do not."""
        slots = self._slots
        while True:
            needed = qwen3_memory.needed_bytes(
                self.folder,
                self.config,
                slots=slots,
                positions=POSITIONS,
                dtype=dtype,
                device=self._device,
                weights=self._weights,
            )
            try:
                qwen3_memory.require(self.folder.name, needed, self._device)
            except NotReady:
                if slots == self._fewest_slots:
                    raise
                slots = max(self._fewest_slots, slots // 2)
            else:
                return slots

    async def _speak_once(self, model: SpeechModel) -> None:
        """What is slow the first time shall not be a listener's first sound."""
        if not self.served.voices:
            return
        try:
            await warm_up(model, self.served.voices[0])
        except BaseException:
            await asyncio.to_thread(model.engine.stop, STOP_S)
            raise

    def _start_unloading(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if loaded := self._loaded():
            self._ending = loaded  # its counts are still shown
        task, self._loading = self._loading, None  # whoever borrows from now on loads anew
        if task is not None:
            self._unloading = asyncio.create_task(self._unload(task), name=f"unload {self.served.id}")

    async def _unload(self, loading: asyncio.Task[SpeechModel]) -> None:
        await asyncio.wait([loading])
        if loading.cancelled() or loading.exception() is not None:
            return
        self._ending = model = loading.result()
        if not await asyncio.to_thread(model.engine.stop, STOP_S):
            logger.error("the engine's thread did not end within %s s", STOP_S)
        self._before, self._ending = ModelStats().after(_stats(model).after(self._before)), None
        del model, loading
        await asyncio.to_thread(_collect)
        logger.info("%s is unloaded", self.served.id)


def _stats(model: SpeechModel) -> ModelStats:
    now = model.engine.stats()
    return ModelStats(
        waiting=now.waiting,
        active=now.active - now.paused,
        paused=now.paused,
        step_seconds=now.step_s,
        frames=now.frames,
        finished={str(reason): count for reason, count in now.finished.items()},
        uncaptured=model.steps.missed,
    )


def _on_loop(call: Callable[[], None]) -> Callable[[], None]:
    """For other threads: `call` on this event loop, if that still runs."""
    loop = asyncio.get_running_loop()

    def post() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call)

    return post


def _collect() -> None:
    """Give back what nobody holds any more: torch keeps a GPU's memory for itself, where it does not count as free."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with contextlib.suppress(RuntimeError):  # a device that is lost
            torch.cuda.empty_cache()


def _same_files(one: Path, other: Path) -> bool:
    names = {path.name for folder in (one, other) for path in (folder / CODEC).glob("*") if path.suffix in CODEC_FILES}
    _, different, missing = filecmp.cmpfiles(one / CODEC, other / CODEC, names, shallow=False)
    return not (different or missing)
