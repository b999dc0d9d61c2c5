"""The speech cache against death: killed at every step and at random instants, and several processes at once.

This file is also the script that its tests run: only a process without threads may fork.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from api.src.stores.cache import CacheWriter, EntryMeta, SpeechCache, StoredEntry, cache_key
from tests.stores.entries import open_cache, using

ROOT = Path(__file__).parents[2]
KEYS = [cache_key({"n": number}) for number in range(5)]
KILLS = 220
MAX_BYTES = 200_000
STEPS = [
    (os, "open"), (os, "pwrite"), (os, "fsync"), (os, "rename"), (os, "unlink"), (os, "close"), (fcntl, "flock"),
]  # fmt: skip


# --- contents that say themselves whether they are right ---


def content(key: str, nonce: int) -> tuple[bytes, EntryMeta]:
    """An entry that follows from the key and a nonce, which its record names."""
    rng = random.Random(f"{key} {nonce}")
    # Few lengths, so that those of different attempts are often equal; the last is more than a frame.
    data = rng.randbytes(rng.choice([1000, 1000, 20_000, 90_000]))
    digest = hashlib.sha256(f"{key} {nonce}".encode()).hexdigest()
    return data, EntryMeta(
        "model", str(nonce), len(data), nonce, digest, ((0, 5), (len(data), 9)), created=float(nonce)
    )


def write_content(writer: CacheWriter, key: str, nonce: int) -> EntryMeta:
    data, meta = content(key, nonce)
    for start in range(0, len(data), 7000):
        writer.write(data[start : start + 7000])
    return meta


def commit(cache: SpeechCache, key: str, nonce: int) -> None:
    with cache.writer(key, "pcm") as writer:
        writer.commit(write_content(writer, key, nonce))


def nonce_of(entry: StoredEntry, key: str) -> int:
    """Which attempt the entry is of; AssertionError if it is of none, a false hit."""
    with entry:
        nonce = int(entry.meta.voice)
        data, meta = content(key, nonce)
        assert entry.meta == meta
        assert entry.length == len(data)
        assert entry.read(0, entry.length + 1) == data
        return nonce


def check(root: Path, key: str) -> int | None:
    """What a process that knows nothing finds."""
    entry = open_cache(root, MAX_BYTES).find(key, "pcm")
    return None if entry is None else nonce_of(entry, key)


def litter(root: Path) -> set[str]:
    """Names that are not those of whole pairs."""
    names = {path.name for path in (root / "audio" / "speech").iterdir()} - {".locks"}
    stems = Counter(name.split(".")[0] for name in names if name.endswith((".json", ".pcm", ".record", ".frames")))
    return {name for name in names if name.endswith(".tmp") or stems[name.split(".")[0]] != 2}


def bytes_on_disk(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "audio" / "speech").glob("[0-9a-f]*.*"))


def dead_temps(root: Path) -> int:
    """Temp files whose lock nobody holds any more."""
    dead = 0
    for path in (root / "audio" / "speech").glob("*.tmp"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead += os.fstat(file.fileno()).st_nlink
        except (FileNotFoundError, BlockingIOError):
            continue
    return dead


# --- the script: faults at every step of a commit ---


def forked(act: Callable[[], None]) -> int:
    """Run `act` in a child; returns its exit status, 99 if it raised."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


def break_step(number: int, fault: str) -> None:
    """Let the `number`-th call into the system fail, or be the last one: before or after it is done."""
    steps = iter(range(1, 10_000))

    def broken(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            step = next(steps)
            if step == number and fault == "fails":
                raise OSError(errno.EROFS if name == "unlink" else errno.ENOSPC, "A fault of the disk")
            if step == number and fault == "dies before":
                os._exit(7)
            try:
                return real(*args, **kwargs)
            finally:
                if step == number:
                    os._exit(7)

        return call

    for module, name in STEPS:
        setattr(module, name, broken(name, getattr(module, name)))


def attempt(root: Path, number: int, fault: str) -> None:
    """Commit attempt 2 with a fault; exit 7 or 8 if dead or failed by it, 0 if it came after the end."""
    cache = open_cache(root, MAX_BYTES)
    break_step(number, fault)
    try:
        commit(cache, KEYS[0], 2)
    except OSError as error:
        os._exit({errno.ENOSPC: 7, errno.EROFS: 8}[error.errno or 0])


def faults(root: Path) -> None:
    """Every fault at every step of a commit, over nothing and over an older entry."""
    outcomes: Counter[str] = Counter()
    for fault in ("fails", "dies before", "dies after"):
        for older in (None, 1):
            number, status = 0, 7
            while status in (7, 8):
                number += 1
                folder = root / f"{fault} {older} {number}"
                if older is not None:
                    commit(open_cache(folder, MAX_BYTES), KEYS[0], older)
                status = forked(lambda n=number, f=fault, d=folder: attempt(d, n, f))  # type: ignore[misc]
                assert status in (0, 7, 8), status
                # One who fails but lives tidies up himself, unless it is that which fails.
                assert fault != "fails" or status == 8 or not litter(folder), (older, number, litter(folder))
                found = check(folder, KEYS[0])
                assert found in (None, older, 2), (fault, older, number, found)
                if status == 0:
                    assert found == 2
                outcomes[f"{fault}: {'nothing' if found is None else 'older' if found == 1 else 'new'}"] += 1
                open_cache(folder, MAX_BYTES).sweep()
                assert litter(folder) == set(), (fault, older, number, litter(folder))
                assert check(folder, KEYS[0]) == found
                commit(open_cache(folder, MAX_BYTES), KEYS[0], 3)
                assert check(folder, KEYS[0]) == 3
            assert number > 15, (fault, older, number)
    sys.stdout.write(json.dumps(outcomes))


# --- the script: killed at random ---


def work(root: Path, seed: int) -> None:
    """Write, find and remove a few keys for ever, as a process of the server would."""
    rng = random.Random(seed)
    cache = open_cache(root, MAX_BYTES)
    cache.sweep()
    while True:
        key = rng.choice(KEYS)
        act = rng.random()
        if act < 0.5:
            with cache.writer(key, "pcm") as writer:
                meta = write_content(writer, key, rng.getrandbits(48))
                if rng.random() < 0.8:
                    writer.commit(meta)
        elif act < 0.97:
            entry = cache.find(key, "pcm")
            if entry is not None:
                nonce_of(entry, key)
        else:
            cache.remove(key)


def start(root: Path, seed: int) -> int:
    child = os.fork()
    if not child:
        try:
            work(root, seed)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    return child


def kills(root: Path) -> None:
    """Kill one of three processes at random instants and start another in its place."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    open_cache(root, MAX_BYTES)
    children = [start(root, rng.getrandbits(32)) for _ in range(3)]
    for _ in range(KILLS):
        time.sleep(rng.random() * 0.02)
        child = children.pop(rng.randrange(3))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"a process ended by itself with {status}; seed {seed}"
        seen["kills"] += 1
        seen["kills in the middle of writing"] += dead_temps(root) > 0
        seen["hits"] += sum(check(root, key) is not None for key in KEYS)
        children.append(start(root, rng.getrandbits(32)))
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [check(root, key) for key in KEYS]
    # A process killed between its commit and making room leaves more than the bound: the sweep evicts then.
    over = bytes_on_disk(root) > MAX_BYTES
    last = open_cache(root, MAX_BYTES)
    last.sweep()
    assert litter(root) == set(), litter(root)
    left = [check(root, key) for key in KEYS]
    assert all(after == before or (over and after is None) for before, after in zip(found, left, strict=True))
    assert bytes_on_disk(root) == last.stored_bytes <= MAX_BYTES
    sys.stdout.write(json.dumps(seen))


# --- the tests ---


def run_script(name: str, kind: str, root: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, __file__, name, kind, str(root)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "sealed"])
def test_a_fault_at_any_step_of_a_commit_makes_no_false_hit_and_leaves_no_litter(tmp_path: Path, kind: str) -> None:
    outcomes = run_script("faults", kind, tmp_path)
    # The faults struck on both sides of the commit mark.
    for fault in ("fails", "dies before", "dies after"):
        assert outcomes[f"{fault}: nothing"] > 5
        assert outcomes[f"{fault}: new"] >= 2
        assert outcomes[f"{fault}: older"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "sealed"])
def test_processes_killed_at_random_make_no_false_hit_and_leave_no_litter(tmp_path: Path, kind: str) -> None:
    seen = run_script("kills", kind, tmp_path)
    assert seen["kills"] >= 200
    assert seen["kills in the middle of writing"] > 20
    assert seen["hits"] > 100


if __name__ == "__main__":
    with using(sys.argv[2]):
        {"faults": faults, "kills": kills}[sys.argv[1]](Path(sys.argv[3]))
