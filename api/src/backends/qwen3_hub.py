"""Where a checkpoint lies on this machine: in a folder of the user's, or in the hub's cache once it is downloaded.

Owns the names of checkpoints, what belongs to one, and the download, which is also this module's command:
`python -m api.src.backends.qwen3_hub NAME` prints the folder. The cache is huggingface_hub's own (HF_HOME), with its
settings (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE ...).
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from ..engine.config import INDEX, SINGLE
from ..errors import NotReady
from .workers import python_module

FILES = ["*.json", "*.txt", "*.safetensors"]
"""What a checkpoint consists of; some repositories hold sounds and pictures beside it."""

PROBE_S = 5.0
"""How long the hub may take to say whether it has a checkpoint."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether `name` is one of the hub's (owner/name, perhaps with @revision) and no folder of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def find(name: str) -> Path | None:
    """The folder of a checkpoint that is here and whole; None if it would have to be downloaded.

    Raises:
        NotReady: neither a folder nor a name of the hub's.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise NotReady(f"{name} is neither a folder nor the name of a checkpoint on the hub, such as owner/name.")
    try:
        folder = _snapshot(name, local_files_only=True)
    except (OSError, HFValidationError):
        return None
    return folder if _is_whole(folder) else None


def can_download(name: str) -> bool:
    """Whether the hub answers and has `name`. Blocks for PROBE_S at most."""
    repository, _, revision = name.partition("@")
    try:
        HfApi().model_info(repository, revision=revision or None, timeout=PROBE_S)
    except Exception:  # its transport's errors have no class in common
        return False
    return True


def download(name: str) -> Path:
    """Fetch what is not here yet and return the folder. Goes on where an earlier download broke off.

    Raises:
        NotReady: no such checkpoint, no access, no connection, no room.
    """
    try:
        return _snapshot(name)
    except GatedRepoError:
        raise NotReady(f"{name} needs permission: accept its terms on the hub and set HF_TOKEN.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise NotReady(f"The hub has no {name}, or does not show it without a token (HF_TOKEN).") from None
    except Exception as error:  # as above; or the disk's
        raise NotReady(f"{name} could not be downloaded: {error}") from error


async def download_apart(name: str) -> Path:
    """As `download`, in a process of its own: a thread could not be stopped, and gigabytes may be on their way."""
    command, environment = python_module(__name__, name)
    if not sys.stderr.isatty():
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a log is no place for a bar
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    answer = said.decode().strip()
    if process.returncode != 0:
        raise NotReady(answer or f"The download of {name} ended with status {process.returncode}.")
    return Path(answer)


def _snapshot(name: str, *, local_files_only: bool = False) -> Path:
    repository, _, revision = name.partition("@")
    return Path(
        snapshot_download(
            repository, revision=revision or None, allow_patterns=FILES, local_files_only=local_files_only
        )
    )


def _is_whole(folder: Path) -> bool:
    """Whether nothing is missing without which no checkpoint can be loaded. Shards are named by their index."""
    tokenizer = folder / "speech_tokenizer"
    return (
        all((part / "config.json").is_file() for part in (folder, tokenizer))
        and (tokenizer / SINGLE).is_file()
        and ((folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file())
        and ((folder / SINGLE).is_file() or _has_shards(folder))
    )


def _has_shards(folder: Path) -> bool:
    index = folder / INDEX
    if not index.is_file():
        return False
    names = set(re.findall(r'"([^"/]+\.safetensors)"', index.read_text(encoding="utf-8")))
    return bool(names) and all((folder / name).is_file() for name in names)


def main() -> int:
    """Download the checkpoint that the command line names; print its folder, or what went wrong."""
    try:
        answer, status = str(download(sys.argv[1])), 0
    except NotReady as error:
        answer, status = str(error), 1
    sys.stdout.write(answer + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
