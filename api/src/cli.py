"""The console script: serve, say something, look after the ledger."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from .backends.choice import GPU_MODEL
from .building import build_service, build_speaker
from .cli_accounts import ACTOR, add_accounts, with_stores
from .cli_codes import add_codes
from .cli_usage import add_usage
from .domain import MEDIA_TYPES, SpeechRequest
from .errors import InvalidRequest, NotReady, SpeechError
from .logs import configure_logging
from .main import create_app
from .observe import Metrics
from .settings import Settings
from .stores.accounts import Accounts
from .stores.ledger import MAX_MICROS, Ledger

GRACE_S = 5
"""Seconds that uvicorn gives open connections after the drain."""

COLLECT_AFTER = 5_000
"""Objects that may come and stay before the garbage collector looks at them: those of some fifty requests at once."""

IDLE_S = 75
"""Seconds that a connection may idle between requests: longer than clients (5 s in httpx, hence in the openai package)
and proxies (60 s) keep theirs. They must be the first to close: else a request now and then meets the end of its
connection."""

UNSENT_BYTES = 128 * 1024
"""Bytes that the kernel holds unsent for one connection before it makes the server wait."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(Settings(), options))
    except (SpeechError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen3-tts", description="Speech server for Qwen3-TTS.")
    commands = parser.add_subparsers(required=True)
    serve = commands.add_parser("serve", help="serve on TTS_HOST:TTS_PORT")
    serve.set_defaults(run=_serve)
    say = commands.add_parser("say", help="speak a text into a file, without a server")
    say.add_argument("text")
    say.add_argument("-o", "--output", type=Path, default=Path("speech.mp3"), help="its suffix is the format")
    say.add_argument("--voice", default="alloy")
    say.add_argument("--language", default="auto")
    say.add_argument("--speed", type=float, default=1.0)
    say.set_defaults(run=_say)
    download = commands.add_parser("download", help="fetch a Qwen3-TTS checkpoint from the hub")
    download.add_argument("model", nargs="*", help=f"as in TTS_MODEL; default: that, else {GPU_MODEL}")
    download.set_defaults(run=_download)
    credit = commands.add_parser("credit", help="add micro-units to an account's wallet")
    credit.add_argument("account")
    credit.add_argument("micros", type=int)
    credit.add_argument("--reference", required=True, help="the same reference is credited once")
    credit.set_defaults(run=_credit)
    check = commands.add_parser("check-ledger", help="prove that every balance equals the sum of its entries")
    check.set_defaults(run=_check_ledger)
    add_accounts(commands)
    add_usage(commands)
    add_codes(commands)
    return parser


def _serve(settings: Settings, options: argparse.Namespace) -> int:
    app = create_app(settings)
    serve_app(app, settings)
    return int(app.state.end_of_process.status)


def serve_app(app: FastAPI, settings: Settings) -> None:
    """Serve until the process is told to end. The process is taken to be there for nothing else."""
    # uvicorn raises the signal again once all is closed, so this is what a clean end looks like.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(app.state.end_of_process.status))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # the app leaves its own line per request, without client data
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=IDLE_S,
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised again like SIGTERM above
        _Server(config, settings.stall_timeout_s).run()


class _Server(uvicorn.Server):
    """uvicorn, with bounds for each connection that it will accept, and little for the garbage collector to do."""

    def __init__(self, config: uvicorn.Config, stall_timeout_s: float) -> None:
        super().__init__(config)
        self._stall_timeout_s = stall_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _spare_the_collector()
        for server in self.servers:
            for listening in server.sockets:
                _bound_buffers(listening, self._stall_timeout_s)


def _spare_the_collector() -> None:
    """Let the garbage collector look neither at what was loaded, nor often.

    Cache hits leave no reference cycles, but many at once make it look for some, now and then among all that was ever
    loaded: a tenth of a second and more, in the middle of somebody's request, and a fifth of what hits cost.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])


def _bound_buffers(listening: socket.socket, stall_timeout_s: float) -> None:
    """Let every accepted connection show how fast its client reads, and end with a client that reads nothing.

    By default the kernel takes megabytes before it makes anyone wait, and then reports room in steps of nearly
    one: a client that reads slowly would look as if it read nothing. And a connection whose listener was let go
    would stay until its last bytes are read. Where the system has no such options, both stay as they are.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_timeout_s * 1000))


def _say(settings: Settings, options: argparse.Namespace) -> int:
    audio_format = options.output.suffix.removeprefix(".").lower()
    if audio_format not in MEDIA_TYPES:
        raise InvalidRequest(f"The output's suffix must be one of: {', '.join(MEDIA_TYPES)}.")
    request = SpeechRequest(
        id=f"cli_{uuid.uuid4().hex}",
        account="cli",
        model="tts-1",
        text=options.text,
        voice=options.voice,
        format=audio_format,
        speed=options.speed,
        language=options.language,
    )
    configure_logging("warning")
    asyncio.run(_speak(settings, request, options.output))
    return 0


async def _speak(settings: Settings, request: SpeechRequest, output: Path) -> None:
    service = build_service(settings, build_speaker(settings).backend, Metrics())
    await service.start()
    try:
        await service.wait_ready()
        audio = b"".join([chunk.data async for chunk in service.generate_speech(request)])
        await asyncio.to_thread(output.write_bytes, audio)
    finally:
        await service.close()


def _download(settings: Settings, options: argparse.Namespace) -> int:
    if find_spec("huggingface_hub") is None:
        raise NotReady("Downloads need huggingface_hub: make setup-qwen3 installs it.")
    from .backends import qwen3_hub  # needs the extra

    for name in options.model or settings.model or [GPU_MODEL]:
        print(qwen3_hub.download(name) if qwen3_hub.is_hub_id(name) else qwen3_hub.find(name))
    return 0


def _credit(settings: Settings, options: argparse.Namespace) -> int:
    if not 0 < options.micros <= MAX_MICROS:
        raise InvalidRequest(f"A credit is from 1 to {MAX_MICROS} micro-units.")

    async def credit(ledger: Ledger, accounts: Accounts) -> int:
        # The audit first, as in the route: no credit is without its line.
        detail = {"micros": options.micros, "reference": options.reference}
        await accounts.note(ACTOR, "credit", options.account, detail)
        return await ledger.credit(options.account, options.micros, options.reference)

    balance = asyncio.run(with_stores(settings, credit))
    print(f"{options.account}: {balance} micro-units")
    return 0


def _check_ledger(settings: Settings, options: argparse.Namespace) -> int:
    faults = asyncio.run(with_stores(settings, lambda ledger, _: ledger.check()))
    print("\n".join(faults) if faults else "The ledger is sound.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
