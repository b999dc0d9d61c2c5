"""The one path that every spoken request takes: names -> text -> cache -> permit -> hold -> sound -> bytes.

Owns the running generations and the listeners, and every task that gives back what they borrowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import lru_cache, partial
from typing import Any

from ..audio.encoders import ENCODER_REVISION
from ..backends.base import Backend
from ..domain import Account, Readiness, Segment, SpeechChunk, SpeechRequest, Voice
from ..errors import InvalidRequest, NotReady, ShuttingDown
from ..observe import Metrics, detail
from ..stores.cache import SpeechCache, StoredEntry, cache_key
from ..stores.ledger import Ledger
from ..stores.rates import RateCard
from ..text.segment import segment
from .admission import Admission
from .catalogue import PREVIEW_TEXTS, Catalogue, language
from .gate import Gate
from .generation import Generation
from .listener import CacheStatus, Listener
from .source import Replay, Script, Source
from .startup import Startup
from .threads import Threads

DRAIN_RETRY_AFTER = 5
"""Seconds after which a client of a stopping server is told to try again."""

PREVIEW_ACCOUNT = "preview"

REMEMBERED = 256
"""Recent texts whose segments, and requests whose keys, are kept: else most of the work of a cache hit."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the service; times in seconds."""

    max_input_characters: int = 4096
    request_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0


class Qwen3TTSService:
    """Speaks requests: joins identical ones, replays finished ones, admits, bills and streams the rest.

    `end_process` is called when the backend can speak no more in this process.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        catalogue: Catalogue,
        cache: SpeechCache,
        ledger: Ledger,
        rates: RateCard,
        gate: Gate,
        admission: Admission,
        threads: Threads,
        metrics: Metrics,
        limits: Limits,
        end_process: Callable[[], None] = lambda: None,
    ) -> None:
        self.backend = backend
        self.catalogue = catalogue
        self.ledger = ledger
        self.admission = admission
        self._gate = gate
        self._cache = cache
        self._rates = rates
        self._threads = threads
        self._metrics = metrics
        self._limits = limits
        self._segments = lru_cache(REMEMBERED)(_segments)
        self._key = lru_cache(REMEMBERED)(self._make_key)
        self._generations: dict[str, Generation] = {}
        self._running: set[Generation] = set()
        self._listeners: set[Listener] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._startup = Startup(ledger, backend, end_process)
        self._ended = 0
        self._draining = False
        self._silent = asyncio.Event()
        self._silent.set()

    # --- speaking ---

    async def generate_speech(self, request: SpeechRequest) -> AsyncGenerator[SpeechChunk, None]:
        """Speak `request` and yield its encoded bytes while they are made; raises SpeechError."""
        with contextlib.closing(self.open(request)) as listener:
            await listener.start()
            async for chunk in listener.chunks():
                yield chunk

    def open(self, request: SpeechRequest, *, caller: Account | None = None, billed: bool = True) -> Listener:
        """Resolve and check `request`; who calls this starts the listener, and closes it whatever happens.

        `caller` is whose bounds hold; without one nothing is bounded.
        Raises InvalidRequest, NotReady, ShuttingDown.
        """
        self._require_ready()
        script = self._script(request)
        listener = Listener(
            script,
            turn=self._gate.turn(caller, len(request.text)),
            find_source=self._find_source,
            find_other=partial(self._script_of_another, request),
            ledger=self.ledger,
            price=self._price if billed else _free,
            spawn=self._spawn,
            metrics=self._metrics,
            input_tokens=self._input_tokens,
            timeout_s=self._limits.request_timeout_s,
            on_close=self._let_go,
        )
        self._listeners.add(listener)
        self._silent.clear()
        return listener

    def open_preview(self, voice_id: str, request_id: str) -> Listener:
        """A short free sample of a built-in voice; NotFound if there is no such voice."""
        listed = self.catalogue.listed_voice(voice_id)
        text = PREVIEW_TEXTS.get(listed.voice.language, PREVIEW_TEXTS["english"])
        request = SpeechRequest(id=request_id, account=PREVIEW_ACCOUNT, model="tts-1", text=text, voice=listed.voice.id)
        return self.open(request, billed=False)

    # --- living and dying ---

    async def start(self) -> None:
        """Begin to open the ledger and to start the backend, and to tidy the cache; `readiness` says how far."""
        await self._gate.start()
        self._startup.begin()
        self._spawn(self._threads.run(self._cache.sweep))

    def readiness(self) -> Readiness:
        """Whether speech can be had now."""
        if self._draining:
            return Readiness(False, "draining", "The server is shutting down.")
        return self._startup.readiness()

    @property
    def retry_after(self) -> int:
        """Whole seconds after which a server that is not ready may be."""
        return DRAIN_RETRY_AFTER if self._draining else self._startup.retry_after

    async def wait_ready(self) -> None:
        """Wait until the server can speak; raises NotReady with what keeps it from it, though it is tried again."""
        await self._startup.first_outcome()

    def begin_drain(self) -> None:
        """Refuse what is new; what runs goes on."""
        self._draining = True

    async def drain(self) -> None:
        """Wait for the running responses, at most the drain time-out or until cancelled; then cut them."""
        self.begin_drain()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.drain_timeout_s):
                    await self._silent.wait()
        finally:
            self._cut()

    async def close(self) -> None:
        """Stop what still runs, wait until everything borrowed has been given back, then close the rest."""
        self.begin_drain()
        self._cut()
        self._cache.stop_sweeping()
        await self._silent.wait()
        while work := [*(generation.ended() for generation in self._running), *self._tasks]:
            await asyncio.gather(*work, return_exceptions=True)
        await self._startup.cancel()
        await self.backend.stop()
        await self._gate.close()
        await self.ledger.close()
        self._threads.close()

    # --- the way of one request ---

    def _require_ready(self) -> None:
        if self._draining:
            raise ShuttingDown("The server is shutting down.", retry_after=self.retry_after)
        readiness = self.readiness()
        if not readiness.ready:
            reason = readiness.reason or readiness.phase
            raise NotReady(f"The server is not ready: {reason}", retry_after=self.retry_after)

    def _input_tokens(self, script: Script) -> int:
        return self.backend.text_tokens(script.request) or len(script.request.text)

    def _script_of_another(self, request: SpeechRequest, tried: frozenset[str]) -> Script | None:
        """The same request for the next member of a chain; None where there is none that can speak it."""
        try:
            script = self._script(request, tried)
        except (InvalidRequest, NotReady):
            return None
        return None if script.request.backend in tried else script

    def _script(self, request: SpeechRequest, without: frozenset[str] = frozenset()) -> Script:
        """Resolve every name, segment the text, compute the cache key; `without`: members of a chain to pass over."""
        if not request.text.strip():
            raise InvalidRequest("The input is blank.", param="input")
        if len(request.text) > self._limits.max_input_characters:
            raise InvalidRequest(
                f"The input is longer than {self._limits.max_input_characters} characters.",
                param="input",
                code="string_above_max_length",
            )
        model, voice = self.catalogue.resolve(request.model, request.voice, without)
        resolved = dataclasses.replace(
            request,
            model=model.id,
            language=language(request.language, model),
            backend=model.backend or self.backend.name,
        )
        key = self._key(model.revision, voice, _sound(resolved)) if request.store else None
        return Script(resolved, request.model.lower(), voice, self._segments(request.text), key)

    def _make_key(self, revision: str, voice: Voice, request: SpeechRequest) -> str:
        """Everything that changes the bytes, or the marks that are kept beside them."""
        return cache_key(
            {
                "backend": request.backend,
                "revision": revision,
                "model": request.model,
                "voice": voice.fingerprint,
                "segments": [[part.text, part.end] for part in self._segments(request.text)],
                "language": request.language,
                "instructions": request.instructions,
                "seed": request.seed,
                "speed": float(request.speed),
                "format": request.format,
                "encoder": ENCODER_REVISION,
            }
        )

    async def _find_source(self, script: Script) -> tuple[Source, CacheStatus]:
        """What to listen to, already attached: a running generation, a cache entry, or a new generation."""
        source, status = await self._choose_source(script)
        source.attach()
        request = script.request
        detail(
            _log,
            "source found",
            cache=status,
            spoken_for=source.spoken_for,
            characters=len(request.text),
            segments=len(script.segments),
            format=request.format,
        )
        return source, status

    async def _choose_source(self, script: Script) -> tuple[Source, CacheStatus]:
        if script.key is None:
            return self._new_generation(script), "bypass"
        while True:
            if running := self._generations.get(script.key):
                return running, "join"
            ended = self._ended
            find = partial(self._cache.find, script.key, script.request.format)
            if entry := await self._threads.run(find, undo=_close_entry):
                return Replay(entry, self._threads), "hit"
            # A generation that ended during the look-up may just have committed this very entry.
            if ended == self._ended and script.key not in self._generations:
                return self._new_generation(script), "miss"

    def _new_generation(self, script: Script) -> Generation:
        generation = Generation(
            script,
            backend=self.backend,
            cache=self._cache,
            permit=self.admission.enter(),
            threads=self._threads,
            metrics=self._metrics,
            progress_timeout_s=self._limits.request_timeout_s,
            on_leave=self._close_to_joins,
            on_end=self._forget,
        )
        self._running.add(generation)
        if script.key is not None:
            self._generations[script.key] = generation
        return generation

    def _close_to_joins(self, generation: Generation) -> None:
        key = generation.script.key
        if key is not None and self._generations.get(key) is generation:
            del self._generations[key]

    def _cut(self) -> None:
        for listener in list(self._listeners):
            listener.close()

    def _let_go(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        if not self._listeners:
            self._silent.set()

    def _forget(self, generation: Generation) -> None:
        self._close_to_joins(generation)
        self._running.discard(generation)
        self._ended += 1

    def _price(self, script: Script, characters: int, cached: bool) -> int:
        """By the model's name as asked for, where it has a price of its own; else by what answers to it."""
        asked = script.asked_model
        model = asked if asked in self._rates.models else script.request.model
        return self._rates.price(model, characters, cached=cached)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` to its end in a task of the service, whatever happens to the request."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task


def _segments(text: str) -> tuple[Segment, ...]:
    return tuple(segment(text))


def _sound(request: SpeechRequest) -> SpeechRequest:
    """The request without what no sound depends on: who asks, and under which name."""
    return dataclasses.replace(
        request, id="", account="", user="", idempotency_key=None, body_digest="", older_digests=()
    )


def _free(script: Script, characters: int, cached: bool) -> int:
    return 0


def _close_entry(entry: StoredEntry | None) -> None:
    if entry is not None:
        entry.close()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task of the service failed", exc_info=error)
