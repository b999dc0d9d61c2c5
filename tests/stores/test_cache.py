"""The speech cache within one process: what is written, what is found, what is believed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.stores import cache_record
from api.src.stores.cache import CacheWriter, SpeechCache, cache_key
from api.src.stores.cache_record import CacheRecord, encode_record, parse_record
from api.src.stores.frames import BrokenFrames
from tests.stores.entries import (
    KEY,
    KINDS,
    MIB,
    audio_path,
    get,
    meta,
    names,
    open_cache,
    put,
    read_record,
    record_path,
    settle,
    using,
    write_record,
)


@pytest.fixture(autouse=True, params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[None]:
    with using(request.param):
        yield


@pytest.fixture
def cache(tmp_path: Path) -> SpeechCache:
    return open_cache(tmp_path, 10 * MIB)


class TestKey:
    def test_types_count_and_order_does_not(self) -> None:
        values: list[object] = [1, 1.0, "1", True, None, "null", [1], ["1"], {"1": 1}, 1.5, 0, 0.0, False]
        assert len({cache_key({"value": value}) for value in values}) == len(values)
        assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
        assert cache_key({"speed": -0.0}) == cache_key({"speed": 0.0})

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"bytes", {1, 2}])
    def test_what_has_no_exact_form_is_refused(self, value: object) -> None:
        with pytest.raises((TypeError, ValueError)):
            cache_key({"value": [value]})

    def test_any_text_has_a_key(self) -> None:
        assert cache_key({"text": "\ud800"}) != cache_key({"text": "\\ud800"})

    @given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)))
    def test_a_key_is_stable_hex(self, fields: dict[str, object]) -> None:
        key = cache_key(fields)
        assert cache_key(dict(reversed(fields.items()))) == key
        assert cache_record.is_key(key)

    @pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61])
    def test_odd_keys_never_reach_the_disk(self, cache: SpeechCache, key: str) -> None:
        for call in (lambda: cache.find(key, "mp3"), lambda: cache.writer(key, "mp3"), lambda: cache.remove(key)):
            with pytest.raises(ValueError, match="64 hex"):
                call()


class TestRoundTrip:
    @pytest.mark.parametrize("size", [0, 1, 40_000, 256 * 1024, 256 * 1024 + 1, 3 * MIB + 7])
    def test_what_was_committed_is_found(self, cache: SpeechCache, tmp_path: Path, size: int) -> None:
        data = random.Random(size).randbytes(size)
        with cache.writer(KEY, "mp3") as writer:
            for start in range(0, size, 100_000):
                writer.write(data[start : start + 100_000])
            assert cache.find(KEY, "mp3") is None
            writer.commit(meta(size))
        for finder in (cache, open_cache(tmp_path, 1), cache):
            entry = finder.find(KEY, "mp3")
            assert entry is not None
            with entry:
                assert (entry.meta, entry.length) == (meta(size), size)
                assert entry.read(0, size + 1) == data
                assert entry.read(size // 2, 10) == data[size // 2 : size // 2 + 10]
                assert entry.read(size + 5, 10) == b""
                assert (entry.data is None) == (size > 256 * 1024)
            settle(tmp_path)
        assert names(tmp_path) == {audio_path(tmp_path).name, record_path(tmp_path).name}

    def test_meta_counts_milliseconds(self) -> None:
        assert meta().audio_ms == 2000

    def test_leaving_without_commit_leaves_nothing(self, cache: SpeechCache, tmp_path: Path) -> None:
        with cache.writer(KEY, "mp3") as writer:
            writer.write(b"some")
            assert len(names(tmp_path)) == 1
        assert names(tmp_path) == set()
        assert cache.find(KEY, "mp3") is None

    def test_a_forgotten_writer_leaves_nothing(self, cache: SpeechCache, tmp_path: Path) -> None:
        cache.writer(KEY, "mp3").__enter__().write(b"some")
        assert names(tmp_path) == set()

    def test_after_commit_or_exit_nothing_can_be_added(self, cache: SpeechCache) -> None:
        with cache.writer(KEY, "mp3") as writer:
            writer.write(b"1234")
            writer.commit(meta(4))
            with pytest.raises(ValueError, match="committed"):
                writer.write(b"5")
            with pytest.raises(ValueError, match="committed"):
                writer.commit(meta(4))
        with pytest.raises(ValueError, match="closed"):
            writer.open()
        assert get(cache, KEY) == b"1234"

    def test_only_the_owner_may_look(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path / "cache", MIB)
        put(cache, KEY, b"data")
        paths = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
        modes = {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()}
        assert modes == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()} == {0o700}

    def test_an_overwritten_entry_is_the_new_one(self, cache: SpeechCache, tmp_path: Path) -> None:
        put(cache, KEY, b"old-data", "a")
        settle(tmp_path)
        old = cache.find(KEY, "mp3")
        put(cache, KEY, b"new-data", "b")
        new = cache.find(KEY, "mp3")
        assert old is not None
        assert new is not None
        assert (old.read(0, 9), old.meta.voice) == (b"old-data", "a")
        assert (new.read(0, 9), new.meta.voice) == (b"new-data", "b")

    def test_remove(self, cache: SpeechCache, tmp_path: Path) -> None:
        put(cache, KEY, b"data")
        cache.remove(KEY)
        cache.remove(KEY)
        assert names(tmp_path) == set()
        assert cache.stored_bytes == 0

    def test_the_folder_may_be_emptied_by_hand(self, cache: SpeechCache, tmp_path: Path) -> None:
        put(cache, KEY, b"data")
        os.rename(tmp_path / "audio", tmp_path / "gone")
        assert cache.find(KEY, "mp3") is None
        put(cache, KEY, b"data")
        assert get(cache, KEY) == b"data"


class TestReadingWhileWriting:
    @pytest.mark.parametrize("finish", ["commit", "give up", "evict"])
    def test_every_reader_gets_all_bytes(self, tmp_path: Path, finish: str) -> None:
        cache = open_cache(tmp_path, 0 if finish == "evict" else MIB)
        data = random.Random(1).randbytes(300_000)
        open_by_all, finished = threading.Barrier(5), threading.Event()
        heard: list[bytes] = []

        def listen(writer: CacheWriter) -> None:
            got = bytearray()
            with writer.open() as reader:
                open_by_all.wait()
                while not (finished.is_set() and len(got) == reader.length):
                    piece = reader.read(len(got), random.randrange(1, 5000))
                    got += piece
                    if not piece:
                        time.sleep(0.001)
            heard.append(bytes(got))

        with cache.writer(KEY, "mp3") as writer:
            threads = [threading.Thread(target=listen, args=(writer,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            open_by_all.wait()
            for start in range(0, len(data), 1000):
                writer.write(data[start : start + 1000])
                assert writer.length == min(start + 1000, len(data))
            if finish != "give up":
                writer.commit(meta(len(data)))
                cache.remove(KEY)
        finished.set()
        for thread in threads:
            thread.join()
        assert heard == [data] * 4

    def test_a_written_byte_is_readable_at_once(self, cache: SpeechCache) -> None:
        with cache.writer(KEY, "mp3") as writer, writer.open() as reader:
            for index in range(10):
                writer.write(bytes([index]))
                assert (reader.length, reader.read(index, 5)) == (index + 1, bytes([index]))
            with pytest.raises(ValueError, match="negative"):
                reader.read(-1, 1)
        with pytest.raises(ValueError, match="closed"):
            reader.read(0, 1)

    def test_leaving_waits_for_a_commit_in_another_thread(
        self, cache: SpeechCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        syncing = threading.Event()
        real_fsync = os.fsync

        def slow_fsync(number: int) -> None:
            syncing.set()
            time.sleep(0.05)
            real_fsync(number)

        monkeypatch.setattr(os, "fsync", slow_fsync)
        with cache.writer(KEY, "mp3") as writer:
            writer.write(b"data")
            thread = threading.Thread(target=writer.commit, args=(meta(4),))
            thread.start()
            assert syncing.wait(5)
        thread.join()
        assert get(cache, KEY) == b"data"

    def test_after_a_failed_write_there_is_no_entry(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_pwrite = os.pwrite

        def full_disk(number: int, data: bytes, offset: int) -> int:
            if len(data) < 3:
                raise OSError(28, "No space left on device")
            return real_pwrite(number, data[: len(data) - 2], offset)

        with cache.writer(KEY, "mp3") as writer:
            writer.write(b"begin")
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", full_disk)
                with pytest.raises(OSError, match="No space"):
                    writer.write(b"lost data" * 20_000)
            with writer.open() as reader:
                assert reader.read(0, 100) == b"begin"
            with pytest.raises(ValueError, match="given up"):
                writer.commit(meta(5))
        assert names(tmp_path) == set()


class TestDisbelief:
    """Whatever is odd is a miss, and is gone afterwards."""

    def expect_removed(self, root: Path) -> None:
        assert open_cache(root, MIB).find(KEY, "mp3") is None
        assert names(root) == set()

    @pytest.mark.parametrize("size", [40_000, 300_000])
    @pytest.mark.parametrize("damage", ["flip", "cut", "grow", "gone"])
    def test_damaged_audio(self, cache: SpeechCache, tmp_path: Path, size: int, damage: str) -> None:
        put(cache, KEY, random.Random(2).randbytes(size))
        path = audio_path(tmp_path)
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[size // 3] ^= 1
        elif damage == "cut":
            del data[-1]
        else:
            data += b"x"
        path.unlink() if damage == "gone" else path.write_bytes(data)
        self.expect_removed(tmp_path)

    @given(st.data())
    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    def test_damaged_record(self, tmp_path: Path, data: st.DataObject) -> None:
        cache = open_cache(tmp_path, MIB)
        put(cache, KEY, b"audio")
        good = record_path(tmp_path).read_bytes()
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(bad)))
            bad[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=3))
        record_path(tmp_path).write_bytes(bad)
        try:
            believable = parse_record(read_record(tmp_path)) is not None
        except BrokenFrames:
            believable = False
        if not believable:
            self.expect_removed(tmp_path)
        else:  # still a record: then it is believed only if it describes this audio
            assert get(open_cache(tmp_path, MIB), KEY) in (None, b"audio")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("version", 1), ("version", 3), ("version", 2.0), ("key", "cd" * 32), ("key", None), ("format", "wav"),
            ("format", "exe"), ("format", ["mp3"]), ("length", 4), ("length", 6),
            ("length", -1), ("length", 5.0), ("length", "5"),
            ("length", 10**400), ("sha256", "0" * 64), ("sha256", "0" * 63), ("model", ""), ("model", 7),
            ("voice", "\ud800"), ("voice", "v" * 10_000), ("audio_samples", -1), ("audio_samples", False),
            ("frames", -1), ("frames", 25.0), ("frames", None),
            ("text_digest", "text"), ("created", None), ("created", float("inf")), ("created", float("nan")),
            ("marks", {}), ("marks", [[0]]), ("marks", [[0, 1, 2]]), ("marks", [[0, "1"]]), ("marks", [[6, 1]]),
            ("marks", [[2, 1], [1, 2]]), ("marks", [[1, 2], [2, 1]]), ("extra", 1),
        ],
    )  # fmt: skip
    def test_odd_value_in_record(self, cache: SpeechCache, tmp_path: Path, name: str, value: object) -> None:
        put(cache, KEY, b"audio")
        document = json.loads(read_record(tmp_path))
        assert document.get(name) != value or type(document[name]) is not type(value)
        write_record(tmp_path, json.dumps(document | {name: value}).encode())
        self.expect_removed(tmp_path)

    def test_a_record_of_the_first_version_is_a_miss(self, cache: SpeechCache, tmp_path: Path) -> None:
        """It did not say how many frames there were."""
        put(cache, KEY, b"audio")
        document = json.loads(read_record(tmp_path))
        assert document.pop("frames") == meta().frames
        write_record(tmp_path, json.dumps(document | {"version": 1}).encode())
        self.expect_removed(tmp_path)
        put(cache, KEY, b"audio")
        assert get(cache, KEY) == b"audio"

    @pytest.mark.parametrize(
        "content", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 50_000, b" " * (2 * MIB)]
    )
    def test_no_record_at_all(self, cache: SpeechCache, tmp_path: Path, content: bytes) -> None:
        put(cache, KEY, b"audio")
        write_record(tmp_path, content)
        self.expect_removed(tmp_path)
        put(cache, KEY, b"audio")
        record_path(tmp_path).write_bytes(content)
        self.expect_removed(tmp_path)

    @given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=5), st.data())
    def test_parsing_never_raises(self, value: object, data: st.DataObject) -> None:
        document = json.loads(encode_record(CacheRecord(KEY, "mp3", 9, "0" * 64, meta(9))))
        document[data.draw(st.sampled_from(sorted(document)))] = value
        record = parse_record(json.dumps(document).encode())
        assert record is None or encode_record(record)

    def test_a_renamed_pair_is_not_believed(self, cache: SpeechCache, tmp_path: Path) -> None:
        other = cache_key({"text": "other"})
        put(cache, other, b"other")
        assert get(open_cache(tmp_path, MIB), other) == b"other"
        os.rename(audio_path(tmp_path, other), audio_path(tmp_path))
        os.rename(record_path(tmp_path, other), record_path(tmp_path))
        self.expect_removed(tmp_path)

    def test_an_unreadable_disk_is_a_miss_that_removes_nothing(
        self, cache: SpeechCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put(cache, KEY, b"audio")

        def no_descriptors(*_: object, **__: object) -> int:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", no_descriptors)
            assert cache.find(KEY, "mp3") is None
        assert get(cache, KEY) == b"audio"

    def test_meta_that_could_not_be_read_back_is_refused(self, cache: SpeechCache, tmp_path: Path) -> None:
        with cache.writer(KEY, "mp3") as writer:
            writer.write(b"1234")
            with pytest.raises(ValueError, match="does not fit"):
                writer.commit(meta(5))
        assert names(tmp_path) == set()


def test_digest_in_record_is_that_of_the_audio(cache: SpeechCache, tmp_path: Path) -> None:
    put(cache, KEY, b"data")
    document = json.loads(read_record(tmp_path))
    assert document["sha256"] == hashlib.sha256(b"data").hexdigest()
    assert b"hello" not in read_record(tmp_path)
