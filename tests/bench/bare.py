"""What a cache hit is compared with: one file, served by nothing but Starlette and uvicorn.

    python -m tests.bench.bare file PORT PATH      Starlette's FileResponse
    python -m tests.bench.bare memory PORT PATH    the same bytes from memory: the load client's own ceiling

uvicorn runs with the settings of `qwen3-tts serve`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send


def file_app(path: Path) -> ASGIApp:
    async def serve(request: Request) -> FileResponse:
        return FileResponse(path, media_type="audio/mpeg")

    return Starlette(routes=[Route("/", serve)])


def memory_app(path: Path) -> ASGIApp:
    data = path.read_bytes()
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"audio/mpeg"), (b"content-length", str(len(data)).encode())],
    }

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send(dict(start))
            await send({"type": "http.response.body", "body": data})

    return serve


def main() -> None:
    kind, port, path = sys.argv[1:]
    app = {"file": file_app, "memory": memory_app}[kind](Path(path))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_config=None, access_log=False, lifespan="off")


if __name__ == "__main__":
    main()
