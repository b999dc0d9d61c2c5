"""The speech cache over time: what is remembered, evicted and swept, and who waits for whom."""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.stores import cache as cache_module
from api.src.stores.cache import SpeechCache, cache_key
from api.src.stores.cache_files import Stored
from api.src.stores.cache_record import CacheRecord
from tests.stores.entries import (
    KEY,
    KINDS,
    MIB,
    SECOND_NS,
    audio_path,
    get,
    lock_path,
    meta,
    names,
    open_cache,
    put,
    record_path,
    settle,
    used_at,
    using,
)


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


@pytest.fixture
def cache(tmp_path: Path) -> SpeechCache:
    return open_cache(tmp_path, 10 * MIB)


class TestMemo:
    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        sizes: list[int] = []
        real = cache_module._verify

        def verify(source: object, size: int, record: CacheRecord) -> None:
            sizes.append(size)
            real(source, size, record)  # type: ignore[arg-type]

        monkeypatch.setattr(cache_module, "_verify", verify)
        return sizes

    @pytest.mark.parametrize("size", [40_000, 300_000])
    def test_a_known_file_is_not_hashed_again(
        self, cache: SpeechCache, tmp_path: Path, hashed: list[int], size: int
    ) -> None:
        put(cache, KEY, bytes(size))
        settle(tmp_path)
        for seconds in (1, 2, 3):
            used_at(tmp_path, KEY, seconds)  # so that every hit notes its use, which must not disturb
            assert get(cache, KEY) == bytes(size)
            assert abs(record_path(tmp_path).stat().st_atime_ns - time.time_ns()) < 5 * SECOND_NS
        assert hashed == [size]

    def test_what_may_still_change_unseen_is_not_remembered(self, cache: SpeechCache, hashed: list[int]) -> None:
        put(cache, KEY, b"data")
        assert get(cache, KEY) == get(cache, KEY) == b"data"
        assert len(hashed) == 2

    @pytest.mark.parametrize("size", [40_000, 300_000])
    @pytest.mark.parametrize("which", ["audio", "record"])
    def test_a_file_changed_in_place_is_seen(self, cache: SpeechCache, tmp_path: Path, size: int, which: str) -> None:
        put(cache, KEY, bytes(size))
        settle(tmp_path)
        assert get(cache, KEY) == bytes(size)
        path = audio_path(tmp_path) if which == "audio" else record_path(tmp_path)
        with path.open("r+b") as file:
            file.seek(10)
            file.write(b"!")
        assert cache.find(KEY, "mp3") is None
        assert names(tmp_path) == set()

    def test_it_is_bounded(self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_module, "_MEMO_ENTRIES", 3)
        for number in range(5):
            key = cache_key({"n": number})
            put(cache, key, b"data")
            settle(tmp_path, key)
            assert get(cache, key) == b"data"
        assert len(cache._memo._known) == 3


class TestEviction:
    def test_least_recently_used_goes_first_and_the_bound_holds(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path, 10_000)
        keys = [cache_key({"n": number}) for number in range(8)]
        for age, key in enumerate(keys[:6]):
            put(cache, key, bytes(1000))
            used_at(tmp_path, key, 100 + age)
        assert get(cache, keys[0]) is not None  # used now: the last to go
        put(cache, keys[6], bytes(1000))
        put(cache, keys[7], bytes(1000))
        left = [number for number, key in enumerate(keys) if record_path(tmp_path, key).exists()]
        assert left[0] == 0
        assert left[1:] == list(range(8 - len(left) + 1, 8))
        assert len(left) >= 5
        on_disk = sum((tmp_path / "audio" / "speech" / name).stat().st_size for name in names(tmp_path))
        assert on_disk == cache.stored_bytes <= 10_000

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4000)), min_size=1, max_size=25))
    @settings(
        max_examples=20,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    def test_one_process_never_exceeds_the_bound(self, tmp_path: Path, puts: list[tuple[int, int]]) -> None:
        cache = open_cache(tmp_path, 9000)
        cache.sweep()
        for number, size in puts:
            put(cache, cache_key({"n": number}), bytes(size))
            stored = sum((tmp_path / "audio" / "speech" / name).stat().st_size for name in names(tmp_path))
            assert stored <= 9000

    def test_several_processes_exceed_it_by_a_sixteenth_each(self, tmp_path: Path) -> None:
        caches = [open_cache(tmp_path, 160_000) for _ in range(3)]
        worst = 0
        for number, cache in zip(range(150), itertools.cycle(caches), strict=False):
            put(cache, cache_key({"n": number}), bytes(2000))
            worst = max(worst, sum(path.stat().st_size for path in (tmp_path / "audio" / "speech").glob("[0-9a-f]*.*")))
        assert 120_000 < worst <= 160_000 + 3 * (10_000 + 2500)

    def test_an_entry_larger_than_the_bound_is_not_kept(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path, 1000)
        with cache.writer(KEY, "mp3") as writer, writer.open() as reader:
            writer.write(bytes(1000))
            writer.commit(meta(1000))
            assert reader.read(0, 2000) == bytes(1000)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("size", [1000, 400_000])
    def test_a_reader_survives(self, tmp_path: Path, size: int) -> None:
        cache = open_cache(tmp_path, size + 1000)
        put(cache, KEY, b"a" * size)
        used_at(tmp_path, KEY, 1)
        entry = open_cache(tmp_path, MIB).find(KEY, "mp3")
        used_at(tmp_path, KEY, 1)
        put(cache, cache_key({"n": 2}), b"b" * size)
        assert not record_path(tmp_path).exists()
        assert entry is not None
        with entry:
            assert entry.read(0, size) == b"a" * size

    def test_neither_the_living_nor_the_busy_nor_strangers_are_touched(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path, 2000)
        put(cache, KEY, bytes(1000))
        used_at(tmp_path, KEY, 1)
        strangers = {"README", "notes.json", f"{KEY}.mp3.bak", f"x{KEY}.tmp", f"{KEY}.tmp"}
        for name in strangers:
            (tmp_path / "audio" / "speech" / name).write_bytes(bytes(10_000))
        with cache.writer(KEY, "mp3") as living:
            living.write(b"alive")
            with lock_path(tmp_path).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                put(cache, cache_key({"n": 0}), bytes(1000))
                assert record_path(tmp_path).exists()
            open_cache(tmp_path, 0).sweep()
            assert len(names(tmp_path) - strangers) == 1
            living.commit(meta(5))
        assert get(cache, KEY) == b"alive"
        assert names(tmp_path) >= strangers

    def test_what_was_used_since_the_look_at_the_folder_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = open_cache(tmp_path, 2000)
        put(cache, KEY, bytes(1000))
        used_at(tmp_path, KEY, 1)
        real_scan = cache._folder.scan

        def scan() -> dict[str, Stored]:
            found = real_scan()
            assert get(open_cache(tmp_path, 2000), KEY) is not None
            return found

        monkeypatch.setattr(cache._folder, "scan", scan)
        put(cache, cache_key({"n": 0}), bytes(1000))
        assert get(cache, KEY) == bytes(1000)


class TestSweep:
    def test_it_removes_what_the_dead_left_and_counts_the_rest(self, cache: SpeechCache, tmp_path: Path) -> None:
        put(cache, KEY, bytes(100))
        speech = tmp_path / "audio" / "speech"
        keys = [cache_key({"n": number}) for number in range(3)]
        (speech / f"{keys[0]}.mp3").write_bytes(b"audio without record")
        (speech / f"{keys[1]}.json").write_bytes(b"{}")
        (speech / f"{keys[2]}.0123456789abcdef.tmp").write_bytes(b"dead")
        fresh = open_cache(tmp_path, MIB)
        fresh.sweep()
        assert names(tmp_path) == {audio_path(tmp_path).name, record_path(tmp_path).name}
        assert fresh.stored_bytes == audio_path(tmp_path).stat().st_size + record_path(tmp_path).stat().st_size

    def test_it_leaves_a_pair_whose_record_is_just_landing(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_rename = os.rename

        def rename(source: str, target: str) -> None:
            real_rename(source, target)
            if target == str(audio_path(tmp_path)):
                open_cache(tmp_path, MIB).sweep()

        monkeypatch.setattr(os, "rename", rename)
        put(cache, KEY, b"data")
        assert get(cache, KEY) == b"data"

    def test_a_temp_file_taken_for_dead_is_made_anew(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_flock = fcntl.flock
        swept: list[set[str]] = []

        def flock(number: int, how: int) -> None:
            if how == fcntl.LOCK_EX and not swept:
                swept.append(names(tmp_path))
                open_cache(tmp_path, MIB).sweep()
                assert names(tmp_path) == set()
            real_flock(number, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        put(cache, KEY, b"data")
        assert len(swept) == 1
        assert get(cache, KEY) == b"data"


class TestLock:
    def test_interleaved_commits_leave_a_consistent_pair(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real_rename = os.rename

        def slow_rename(source: str, target: str) -> None:
            real_rename(source, target)
            time.sleep(0.01)

        monkeypatch.setattr(os, "rename", slow_rename)
        contents = {"a": b"a" * 1000, "b": b"b" * 1000, "c": b"c" * 1000}
        for _ in range(5):
            threads = [
                threading.Thread(target=put, args=(open_cache(tmp_path, MIB), KEY, data, voice))
                for voice, data in contents.items()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            entry = open_cache(tmp_path, MIB).find(KEY, "mp3")
            assert entry is not None
            assert entry.read(0, 1000) == contents[entry.meta.voice]

    def test_the_old_record_never_stands_beside_the_new_audio(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[Path, bool]] = []
        real_rename = os.rename

        def rename(source: str, target: str) -> None:
            seen.append((Path(target), record_path(tmp_path).exists()))
            real_rename(source, target)

        put(cache, KEY, b"old")
        monkeypatch.setattr(os, "rename", rename)
        put(cache, KEY, b"new")
        assert seen == [(audio_path(tmp_path), False), (record_path(tmp_path), False)]

    def test_a_find_between_the_two_renames_does_not_remove(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The old record without the new audio, seen by a reader without the lock, is not yet the truth."""
        put(cache, KEY, b"old", "a")
        found: list[str | None] = []
        between = threading.Event()
        real_unlink, real_rename = os.unlink, os.rename

        def unlink(path: str) -> None:
            if path != str(record_path(tmp_path)):
                real_unlink(path)

        def rename(source: str, target: str) -> None:
            if target == str(record_path(tmp_path)):
                between.set()
                time.sleep(0.05)
            real_rename(source, target)

        def find() -> None:
            assert between.wait(5)
            entry = open_cache(tmp_path, MIB).find(KEY, "mp3")
            found.append(None if entry is None else entry.meta.voice)

        finder = threading.Thread(target=find)
        finder.start()
        with monkeypatch.context() as patch:  # a commit that leaves the old record standing, for the worst case
            patch.setattr(os, "unlink", unlink)
            patch.setattr(os, "rename", rename)
            put(cache, KEY, b"new", "b")
            finder.join()
        assert found == ["b"]

    def test_a_fork_does_not_keep_the_lock_alive(self, cache: SpeechCache, tmp_path: Path) -> None:
        """What shares a descriptor of the lock (a reader, a forked child) must not keep it after its release."""
        writer = cache.writer(KEY, "mp3")
        with writer:
            reader = writer.open()
            writer.write(b"data")
            writer.commit(meta(4))
        with audio_path(tmp_path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        reader.close()
