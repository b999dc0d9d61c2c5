"""Files made of frames, sealed and not: what is written is read, at once and afterwards."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.src.stores import frames, packing
from api.src.stores.cache_files import TempFile
from api.src.stores.cache_form import Ciphers, FramedForm, Memory
from api.src.stores.frames import FRAME_BYTES, BrokenFrames, FrameReader, FrameWriter, encode_frames
from api.src.stores.packing import pack, unpack
from api.src.stores.sealed import SealingKey

SHORT = 64
CIPHERS: dict[str, Ciphers] = {"sealed": SealingKey(b"k" * 32), "clear": FramedForm()._ciphers}


@pytest.fixture
def short_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAME_BYTES", SHORT)
    monkeypatch.setattr(packing, "MIN_BYTES", 16)


@pytest.fixture(params=CIPHERS)
def ciphers(request: pytest.FixtureRequest) -> Ciphers:
    return CIPHERS[request.param]


def open_file(ciphers: Ciphers, stored: bytes) -> FrameReader:
    return FrameReader(Memory(stored), len(stored), ciphers.existing("a file", stored[: ciphers.header_bytes]))


@pytest.mark.usefixtures("short_frames")
@pytest.mark.parametrize("compress", [False, True])
@given(pieces=st.lists(st.binary(max_size=3 * SHORT) | st.integers(0, 200).map(bytes), max_size=8), rng=st.randoms())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_what_is_written_can_be_read_at_once_and_afterwards(
    tmp_path: Path, ciphers: Ciphers, compress: bool, pieces: list[bytes], rng: random.Random
) -> None:
    whole = b"".join(pieces)
    spans = [sorted((rng.randint(0, len(whole)), rng.randint(0, len(whole) + 9))) for _ in range(5)]
    with TempFile(str(tmp_path / "entry")) as file:
        writer = FrameWriter(file, ciphers.new("a file"), compress=compress)
        reader = writer.open()
        so_far = b""
        for piece in pieces:
            writer.write(piece)
            so_far += piece
            assert [reader.read(start, end - start) for start, end in spans] == [so_far[a:b] for a, b in spans]
        size = writer.finish()
        stored = file.read(0, size + 1)
    # The file has lost its name, the writer is done: who reads goes on.
    assert [reader.read(start, end - start) for start, end in spans] == [whole[a:b] for a, b in spans]
    reader.close()
    assert len(stored) == size
    finished = open_file(ciphers, stored)
    assert finished.length == len(whole)
    assert finished.read(0, len(whole) + 9) == whole
    assert [finished.read(start, end - start) for start, end in spans] == [whole[a:b] for a, b in spans]


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES])
def test_lengths_around_a_frame(ciphers: Ciphers, size: int) -> None:
    data = random.Random(size).randbytes(size)
    reader = open_file(ciphers, encode_frames(ciphers.new("a file"), data))
    assert (reader.length, reader.read(0, size + 1)) == (size, data)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(0, 1)


def test_no_more_than_a_frame_waits_in_memory(tmp_path: Path, ciphers: Ciphers) -> None:
    with TempFile(str(tmp_path / "entry")) as file:
        writer = FrameWriter(file, ciphers.new("a file"), compress=False)
        for _ in range(20):
            writer.write(bytes(FRAME_BYTES // 3))
            assert len(writer._tail) <= FRAME_BYTES
        assert file.stat().st_size > 5 * FRAME_BYTES


class _FullDisk:
    """Takes some frames, then no more."""

    def __init__(self, file: TempFile, frames: int) -> None:
        self._file = file
        self._left = frames
        self.duplicate = file.duplicate

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if not self._left:
            raise OSError(28, "No space left on device")
        self._left -= 1
        self._file.write(offset, data)


@pytest.mark.usefixtures("short_frames")
@pytest.mark.parametrize("room", [0, 1, 2])
def test_on_a_full_disk_what_was_written_stays_readable(tmp_path: Path, ciphers: Ciphers, room: int) -> None:
    data = random.Random(1).randbytes(5 * SHORT)
    with TempFile(str(tmp_path / "entry")) as file:
        writer = FrameWriter(_FullDisk(file, room), ciphers.new("a file"), compress=False)
        reader = writer.open()
        writer.write(data[:50])
        with pytest.raises(OSError, match="No space"):
            writer.write(data[50:])
        assert reader.read(0, 50) == data[:50]
        reader.close()


class TestPacking:
    @given(st.binary(max_size=300) | st.lists(st.integers(0, 3), max_size=300).map(bytes))
    def test_nothing_is_lost(self, data: bytes) -> None:
        patched = pytest.MonkeyPatch()
        with patched.context() as patch:
            patch.setattr(packing, "MIN_BYTES", 1)
            packed = pack(data, compress=True)
        assert unpack(packed, 400) == data
        assert len(packed) <= len(data) + 1

    def test_only_what_becomes_smaller_is_packed(self) -> None:
        noise = random.Random(3).randbytes(FRAME_BYTES)
        tone = (np.sin(np.arange(FRAME_BYTES // 2) / 20) * 8000).astype("<i2").tobytes()
        assert pack(noise, compress=True) == b"\x00" + noise
        assert pack(tone, compress=False) == b"\x00" + tone
        assert pack(tone, compress=True)[:1] == b"\x01"
        assert len(pack(tone, compress=True)) < 0.7 * len(tone)
        assert pack(bytes(packing.MIN_BYTES - 1), compress=True)[:1] == b"\x00"

    @pytest.mark.parametrize("stored", [b"", b"\x02abc", b"\x01", b"\x01\xff\xff\xff\xff\xff"])
    def test_what_was_never_packed_is_refused(self, stored: bytes) -> None:
        with pytest.raises(ValueError, match="a frame"):
            unpack(stored, FRAME_BYTES)

    def test_a_frame_cannot_unpack_into_more_than_a_frame(self) -> None:
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpack(pack(bytes(FRAME_BYTES), compress=True), FRAME_BYTES - 1)

    def test_without_lz4_nothing_is_packed_and_packed_frames_cannot_be_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = pack(bytes(FRAME_BYTES), compress=True)
        monkeypatch.setattr(packing, "_lz4", None)
        assert not packing.can_pack()
        assert pack(bytes(FRAME_BYTES), compress=True)[:1] == b"\x00"
        with pytest.raises(OSError, match="not installed") as caught:
            unpack(packed, FRAME_BYTES)
        assert not isinstance(caught.value, BrokenFrames)
