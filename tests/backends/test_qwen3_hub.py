"""Finding and downloading checkpoints, against a small hub of the tests' own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from api.src.backends import qwen3_hub
from api.src.backends.qwen3_tts import Qwen3TTSBackend
from api.src.errors import NotReady
from tests.engine.checkpoints import tiny

NAME = "Qwen/Qwen3-TTS-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[2]


@dataclass
class Hub:
    """Serves one repository as the hub does: what there is, and each file under its commit."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    stuck: threading.Event | None = None

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(path)
        if path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)} for name, data in self._all()
            ]
            _send(handler, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif path in (
            f"/api/models/{NAME}",
            f"/api/models/{NAME}/revision/main",
            f"/api/models/{NAME}/revision/{COMMIT}",
        ):
            info = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in self._all()]}
            _send(handler, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif (name := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in self.files:
            if self.stuck is not None and name.endswith(".safetensors") and body:
                self.stuck.wait(30)
            data = self.files[name]
            _send(handler, data, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}, body)
        else:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "RepoNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    def _all(self) -> list[tuple[str, bytes]]:
        return [*self.files.items(), ("samples/hello.wav", b"not wanted")]


def _names(folder: Path) -> list[str]:
    """Of all files, in folders that are links too."""
    return [
        str((Path(root) / name).relative_to(folder))
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
    ]


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _send(handler: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str], body: bool) -> None:
    handler.send_response(200)
    for name, value in {**headers, "Content-Length": str(len(data))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if body:
        handler.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one checkpoint, and an empty cache; for this process and those that it starts."""
    folder = tiny("custom_voice")
    files = {name: (folder / name).read_bytes() for name in _names(folder)}
    served = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.answer(self, body=True)

        def do_HEAD(self) -> None:
            served.answer(self, body=False)

        def log_message(self, format: str, *rest: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that was killed has hung up; nothing to print."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _use(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "hub")
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """For child processes by their environment; in this one, which has read it already, only where the cache is."""
    from huggingface_hub import constants

    for name, value in {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def apart(call: str) -> str:
    """What `call` on the module says, or its NotReady, in a process that reads the environment anew, without torch."""
    script = f"""
import sys
from api.src.backends import qwen3_hub
from api.src.errors import NotReady
try:
    print(qwen3_hub.{call})
except NotReady as error:
    print(error)
assert "torch" not in sys.modules, "seconds and 200 MB for a download"
"""
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api.src.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        (NAME, True),
        (f"{NAME}@main", True),
        ("owner/name@refs/pr/1", True),
        ("name", False),
        ("/root/model", False),
        ("./model/x", False),
        ("a/b/c", False),
        ("api/src", False),  # a folder that is here
    ],
)
def test_what_a_name_of_the_hub_looks_like(name: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert qwen3_hub.is_hub_id(name) == is_one


def test_a_folder_is_itself() -> None:
    assert qwen3_hub.find(str(tiny("base"))) == tiny("base")


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(NotReady, match="neither a folder nor"):
        qwen3_hub.find("/no/such/folder")


def test_a_checkpoint_is_downloaded_once(hub: Hub) -> None:
    assert qwen3_hub.find(NAME) is None
    assert apart(f"can_download({NAME!r})") == "True"
    folder = Path(apart(f"download({NAME!r})"))
    held = {name: (folder / name).read_bytes() for name in _names(folder)}
    assert held == hub.files  # and no samples
    hub.asked.clear()
    assert qwen3_hub.find(NAME) == folder
    assert hub.asked == []


def test_half_a_checkpoint_is_downloaded_on(hub: Hub) -> None:
    weights = Path(apart(f"download({NAME!r})")) / "speech_tokenizer" / "model.safetensors"
    weights.unlink()
    assert qwen3_hub.find(NAME) is None
    apart(f"download({NAME!r})")
    assert weights.is_file()


def test_what_the_hub_lacks_is_said(hub: Hub) -> None:
    assert apart("can_download('owner/other')") == "False"
    assert apart("download('owner/other')").startswith("The hub has no owner/other")


def test_without_a_connection_nothing_can_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert apart(f"can_download({NAME!r})") == "False"
    assert "could not be downloaded" in apart(f"download({NAME!r})")


async def test_the_server_downloads_what_it_lacks_and_speaks(hub: Hub) -> None:
    backend = Qwen3TTSBackend(models=[NAME], slots=2)
    starting = asyncio.create_task(backend.start())
    phases = set()
    while not starting.done():
        phases.add(backend.readiness().phase)
        await asyncio.sleep(0.01)
    await starting
    assert {"downloading", "loading"} <= phases
    assert backend.readiness().ready
    assert backend.models[0].id == "qwen3-tts-12hz-1.7b-custom-voice"
    await backend.stop()


async def test_a_stop_ends_a_download(hub: Hub) -> None:
    hub.stuck = threading.Event()
    backend = Qwen3TTSBackend(models=[NAME], slots=2)
    starting = asyncio.create_task(backend.start())
    async with asyncio.timeout(30):
        while not any(path.endswith(".safetensors") for path in hub.asked):  # noqa: ASYNC110 (another process's doing)
            await asyncio.sleep(0.02)
    children = _children()
    assert children
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not _children() & children
    hub.stuck.set()
    await backend.stop()


def _children() -> set[int]:
    found = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    return {int(pid) for pid in found if "qwen3_hub" in Path(f"/proc/{pid}/cmdline").read_text()}


async def test_a_download_that_fails_says_why(hub: Hub) -> None:
    backend = Qwen3TTSBackend(models=["owner/other"], slots=2)
    with pytest.raises(NotReady, match="The hub has no owner/other"):
        await backend.start()
    assert backend.readiness().phase == "failed"
    await backend.stop()


def test_the_command_downloads(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("download", NAME)
    assert done.returncode == 0, done.stderr
    assert qwen3_hub.find(NAME) == Path(done.stdout.strip())
    monkeypatch.setitem(os.environ, "TTS_MODEL", f"{tiny('base')},{NAME}")
    done = command("download")  # what the settings name
    assert done.stdout.split() == [str(tiny("base")), str(qwen3_hub.find(NAME))]
    failed = command("download", "owner/other")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "The hub has no owner/other" in failed.stderr
