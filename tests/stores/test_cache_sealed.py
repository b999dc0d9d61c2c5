"""The sealed speech cache: what it hides, what it refuses, and what happens when keys come and go."""

from __future__ import annotations

import builtins
import hashlib
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.domain import AudioFormat
from api.src.errors import NotReady
from api.src.stores import cache_choice, packing
from api.src.stores.cache import EntryMeta, SpeechCache, cache_key
from api.src.stores.cache_choice import cache_at
from api.src.stores.cache_form import FramedForm, PlainForm
from api.src.stores.frames import FRAME_BYTES, BrokenFrames
from api.src.stores.sealed import SealingKey
from tests.stores.entries import KEY, MIB, audio_path, get, meta, names, open_cache, put, record_path, using

OLD, NEW = SealingKey(b"old" + bytes(29)), SealingKey(b"new" + bytes(29))
PASSPHRASES = ["the kettle is on again", "sixteen letters!"]
LONG = 300_000
"""More than is kept in memory, and several frames."""


def sealed(root: Path, *keys: SealingKey, compress: bool = False, max_bytes: int = 10 * MIB) -> SpeechCache:
    return SpeechCache(root, max_bytes, [FramedForm(key, compress=compress) for key in keys])


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def speech_like(size: int) -> bytes:
    """Samples that follow one another as those of a voice do."""
    rng = np.random.default_rng(1)
    steps = np.cumsum(rng.normal(0, 40, size // 2)) % 8000
    return steps.astype("<i2").tobytes()


@pytest.fixture(autouse=True)
def kind() -> Iterator[None]:
    with using("sealed"):
        yield


@pytest.fixture
def cache(tmp_path: Path) -> SpeechCache:
    return open_cache(tmp_path, 10 * MIB)


def every_file(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class TestSecrecy:
    def test_neither_files_nor_names_nor_logs_tell_anything(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.DEBUG)
        text, voice, model = "The merger is off.", "planted-voice", "planted-model"
        audio = b"planted-sound" * 30_000
        key = cache_key({"text": text, "voice": voice})
        digest = hashlib.sha256(text.encode()).hexdigest()
        described = EntryMeta(model, voice, 48_000, 25, digest, ((0, 3), (len(audio), 7)))
        cache = cache_at(tmp_path, 10 * MIB, keys=PASSPHRASES)
        with cache.writer(key, "pcm") as writer:
            for start in range(0, len(audio), 50_000):
                writer.write(audio[start : start + 50_000])
                seen = every_file(tmp_path)
            assert len(seen) == 2, "the salt and the temp file"
            writer.commit(described)
        seen |= every_file(tmp_path)
        assert len(seen) == 5, "with the audio, the record and their lock"
        entry = cache.find(key, "pcm")
        assert entry is not None
        assert entry.meta == described
        entry.close()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", _no_descriptors)
            assert cache.find(key, "pcm") is None
        assert "cannot be read" in caplog.text
        said = [name.encode() + content for name, content in seen.items()] + [caplog.text.encode()]
        hashes = [hash_ for whole in (key, digest, hashlib.sha256(audio).hexdigest()) for hash_ in _forms_of(whole)]
        planted = [text, "merger", voice, model, "planted", "pcm", "audio_samples", *PASSPHRASES]
        for secret in [word.encode() for word in planted] + hashes:
            assert not any(secret in place for place in said), secret

    def test_the_same_search_finds_it_all_where_nothing_is_sealed(self, tmp_path: Path) -> None:
        cache = SpeechCache(tmp_path, MIB)
        put(cache, KEY, b"planted-sound", voice="planted-voice")
        found = b"".join(name.encode() + content for name, content in every_file(tmp_path).items())
        assert all(word in found for word in (b"planted-sound", b"planted-voice", KEY.encode(), b"mp3"))


def _forms_of(digest: str) -> list[bytes]:
    return [digest[:16].encode(), bytes.fromhex(digest)[:8]]


def _no_descriptors(*_: object, **__: object) -> int:
    raise OSError(24, "Too many open files")


class TestDamage:
    @pytest.mark.parametrize("size", [500, LONG])
    @given(data=st.data())
    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    def test_a_flipped_bit_anywhere_is_a_miss(self, tmp_path: Path, size: int, data: st.DataObject) -> None:
        put(open_cache(tmp_path, MIB), KEY, noise(size))
        path = data.draw(st.sampled_from([audio_path(tmp_path), record_path(tmp_path)]))
        stored = bytearray(path.read_bytes())
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(stored)
        assert get(open_cache(tmp_path, MIB), KEY) is None
        assert names(tmp_path) == set()

    def test_a_cut_at_any_border_of_a_frame_is_a_miss(self, tmp_path: Path) -> None:
        frame = FRAME_BYTES + 4 + 1 + 16
        borders = [SealingKey.header_bytes + number * frame for number in range(LONG // FRAME_BYTES + 1)]
        for border in borders:
            put(open_cache(tmp_path, MIB), KEY, noise(LONG))
            os.truncate(audio_path(tmp_path), border)
            assert get(open_cache(tmp_path, MIB), KEY) is None
            assert names(tmp_path) == set()

    @pytest.mark.parametrize("size", [500, LONG])
    def test_swapped_files_are_misses(self, cache: SpeechCache, tmp_path: Path, size: int) -> None:
        other = cache_key({"text": "other"})
        put(cache, KEY, noise(size))
        put(cache, other, noise(size))  # the same length and content, another entry
        spare = tmp_path / "spare"
        os.rename(audio_path(tmp_path), spare)
        os.rename(audio_path(tmp_path, other), audio_path(tmp_path))
        os.rename(spare, audio_path(tmp_path, other))
        assert get(cache, KEY) is None
        assert get(cache, other) is None
        assert names(tmp_path) == set()

    def test_the_audio_of_an_earlier_attempt_is_a_miss(self, cache: SpeechCache, tmp_path: Path) -> None:
        """Both were sealed for this very place."""
        put(cache, KEY, noise(500, seed=1))
        earlier = audio_path(tmp_path).read_bytes()
        put(cache, KEY, noise(500, seed=2))
        audio_path(tmp_path).write_bytes(earlier)
        assert get(cache, KEY) is None

    def test_what_is_changed_while_it_is_served_ends_the_reading(self, cache: SpeechCache, tmp_path: Path) -> None:
        put(cache, KEY, noise(LONG + FRAME_BYTES * 8))
        entry = cache.find(KEY, "mp3")
        assert entry is not None
        with entry, audio_path(tmp_path).open("r+b") as file:
            assert entry.read(0, 100) == noise(100)
            file.seek(3 * FRAME_BYTES)
            file.write(b"changed")
            file.flush()
            with pytest.raises(BrokenFrames):
                entry.read(0, entry.length)
        assert get(cache, KEY) is None


class TestKeys:
    def test_the_first_key_seals_and_all_open(self, tmp_path: Path) -> None:
        put(sealed(tmp_path, OLD), KEY, b"old")
        rotated = sealed(tmp_path, NEW, OLD)
        assert get(rotated, KEY) == b"old"
        other = cache_key({"text": "other"})
        put(rotated, other, b"new")
        assert get(sealed(tmp_path, OLD), other) is None
        assert get(sealed(tmp_path, NEW), other) == b"new"
        assert get(sealed(tmp_path, OLD, NEW), other) == b"new"
        assert get(rotated, KEY) == b"old"

    @pytest.mark.parametrize("size", [500, LONG])
    def test_a_retired_key_leaves_misses_that_make_room(self, tmp_path: Path, size: int) -> None:
        put(sealed(tmp_path, OLD), KEY, noise(size))
        left = names(tmp_path)
        bound = int((size + 600) * 2.5)
        cache = sealed(tmp_path, NEW, max_bytes=bound)
        cache.sweep()
        assert get(cache, KEY) is None
        assert names(tmp_path) == left, "a miss is no reason to remove what another key may open"
        put(cache, KEY, noise(size, seed=2))
        settle_names(tmp_path, left)
        put(cache, cache_key({"n": 1}), noise(size, seed=3))
        assert not names(tmp_path) & left
        assert get(cache, KEY) == noise(size, seed=2)

    def test_remove_forgets_it_under_every_key(self, tmp_path: Path) -> None:
        put(sealed(tmp_path, OLD), KEY, b"old")
        put(sealed(tmp_path, NEW), KEY, b"new")
        cache = sealed(tmp_path, NEW, OLD)
        cache.sweep()
        cache.remove(KEY)
        assert names(tmp_path) == set()
        assert cache.stored_bytes == 0

    def test_a_file_put_in_the_place_of_another_key_is_a_miss(self, tmp_path: Path) -> None:
        put(sealed(tmp_path, OLD), KEY, b"data")
        for name in names(tmp_path):
            path = tmp_path / "audio" / "speech" / name
            path.rename(path.with_name(NEW.name(KEY) + path.suffix))
        assert get(sealed(tmp_path, NEW), KEY) is None
        assert names(tmp_path) == set()


def settle_names(root: Path, which: set[str]) -> None:
    """Let these be the least recently used."""
    for name in which:
        os.utime(root / "audio" / "speech" / name, (1, 1))


class TestChangeOfForm:
    def test_unsealed_entries_are_misses_and_are_swept(self, tmp_path: Path) -> None:
        unsealed = [
            SpeechCache(tmp_path, MIB, [PlainForm()]),
            SpeechCache(tmp_path, MIB, [FramedForm(compress=True)]),
        ]
        for cache in unsealed:
            put(cache, KEY, b"planted")
        put(sealed(tmp_path, OLD), KEY, b"hidden")
        cache = sealed(tmp_path, NEW, OLD)
        assert get(cache, cache_key({"text": "other"})) is None
        assert get(cache, KEY) == b"hidden"
        cache.sweep()
        assert not any(b"planted" in content for content in every_file(tmp_path).values())
        assert len(names(tmp_path)) == 2
        assert get(cache, KEY) == b"hidden"

    def test_sealed_entries_are_misses_where_nothing_is_sealed(self, tmp_path: Path) -> None:
        put(sealed(tmp_path, OLD), KEY, b"hidden")
        cache = SpeechCache(tmp_path, MIB)
        cache.sweep()
        assert get(cache, KEY) is None
        assert get(sealed(tmp_path, OLD), KEY) == b"hidden"

    def test_packed_and_plain_entries_are_both_found(self, tmp_path: Path) -> None:
        put(cache_at(tmp_path, MIB), KEY, b"plain")
        packing_cache = cache_at(tmp_path, MIB, compress=True)
        packing_cache.sweep()
        assert get(packing_cache, KEY) == b"plain"
        put(packing_cache, KEY, b"packed")
        assert get(packing_cache, KEY) == b"packed"
        packing_cache.remove(KEY)
        assert names(tmp_path) == set()


class TestCompression:
    @pytest.mark.parametrize("keys", [[], PASSPHRASES[:1]])
    @pytest.mark.parametrize("ext", ["pcm", "wav", "flac"])
    def test_samples_take_less_room(self, tmp_path: Path, ext: AudioFormat, keys: list[str]) -> None:
        data = speech_like(1_000_000)
        cache = cache_at(tmp_path, 10 * MIB, keys=keys, compress=True)
        joined = bytearray()
        with cache.writer(KEY, ext) as writer, writer.open() as reader:
            for start in range(0, len(data), 7001):
                writer.write(data[start : start + 7001])
                joined += reader.read(len(joined), 9000)
            writer.commit(meta(len(data)))
            joined += reader.read(len(joined), len(data))
        assert joined == data
        entry = cache.find(KEY, ext)
        assert entry is not None
        with entry:
            assert entry.read(0, len(data) + 1) == data
            assert entry.read(500_001, 70_000) == data[500_001:570_001]
        on_disk = sum((tmp_path / "audio" / "speech" / name).stat().st_size for name in names(tmp_path))
        assert cache.stored_bytes == on_disk
        assert on_disk < 0.8 * len(data) if ext != "flac" else on_disk > len(data)

    def test_the_bound_is_one_of_bytes_on_the_disk(self, tmp_path: Path) -> None:
        data = speech_like(1_000_000)
        cache = cache_at(tmp_path, 900_000, compress=True)
        with cache.writer(KEY, "pcm") as writer:
            writer.write(data)
            writer.commit(meta(len(data)))
        assert cache.find(KEY, "pcm") is not None

    def test_without_lz4_a_packed_entry_is_a_miss_that_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = speech_like(100_000)
        with sealed(tmp_path, NEW, compress=True).writer(KEY, "pcm") as writer:
            writer.write(data)
            writer.commit(meta(len(data)))
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_lz4", None)
            assert sealed(tmp_path, NEW).find(KEY, "pcm") is None
        entry = sealed(tmp_path, NEW).find(KEY, "pcm")
        assert entry is not None
        assert entry.data == data


class TestJoining:
    @pytest.mark.parametrize("compress", [False, True])
    def test_many_join_a_sealed_entry_at_any_time(self, tmp_path: Path, compress: bool) -> None:
        cache = sealed(tmp_path, NEW, compress=compress)
        data = speech_like(600_000)
        heard: list[bytes] = []
        finished = threading.Event()

        with cache.writer(KEY, "pcm") as writer:

            def listen(seed: int) -> None:
                rng = random.Random(seed)
                got = bytearray()
                with writer.open() as reader:
                    while not (finished.is_set() and len(got) == reader.length):
                        piece = reader.read(len(got), rng.randrange(1, 100_000))
                        got += piece
                        if not piece:
                            time.sleep(0.0005)
                heard.append(bytes(got))

            threads = []
            for start in range(0, len(data), 3000):
                writer.write(data[start : start + 3000])
                if start % 90_000 == 0:
                    threads.append(threading.Thread(target=listen, args=(start,)))
                    threads[-1].start()
            writer.commit(meta(len(data)))
        finished.set()
        for thread in threads:
            thread.join()
        assert heard == [data] * len(threads)


class TestRefusal:
    """Encryption that was asked for is had, or there is no cache."""

    def test_a_short_key_anywhere_in_the_list(self, tmp_path: Path) -> None:
        for keys in (["short"], [PASSPHRASES[0], "fifteen letters"], [""]):
            with pytest.raises(ValueError, match="16 characters"):
                cache_at(tmp_path, MIB, keys=keys)

    @pytest.mark.parametrize("keys", [[], PASSPHRASES[:1]])
    def test_a_missing_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]) -> None:
        real_import = builtins.__import__

        def without_cryptography(name: str, *args: object, **options: object) -> object:
            if name.split(".")[0] == "cryptography":
                raise ImportError(f"No module named {name}")
            return real_import(name, *args, **options)  # type: ignore[arg-type]

        for module in [name for name in sys.modules if name.startswith(("cryptography", "api.src.stores.sealed"))]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr("api.src.stores.sealed", raising=False)
        monkeypatch.setattr(builtins, "__import__", without_cryptography)
        if keys:
            with pytest.raises(NotReady, match="needs cryptography"):
                cache_at(tmp_path, MIB, keys=keys)
        else:
            put(cache_at(tmp_path, MIB), KEY, b"plain")

    def test_missing_lz4(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_choice, "can_pack", lambda: False)
        with pytest.raises(NotReady, match="needs lz4"):
            cache_at(tmp_path, MIB, compress=True)

    def test_a_damaged_salt(self, tmp_path: Path) -> None:
        (tmp_path / ".salt").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"\.salt is damaged"):
            cache_at(tmp_path, MIB, keys=PASSPHRASES)
