"""Sealed files: whatever is changed, cut, moved or exchanged in them is noticed, and nothing shows through."""

from __future__ import annotations

import itertools
import os
import random
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.src.stores import frames
from api.src.stores.cache_form import Memory
from api.src.stores.frames import BrokenFrames, FrameReader, encode_frames
from api.src.stores.sealed import MIN_CHARACTERS, SealingKey, folder_salt

FRAME = 32
KEY = SealingKey(b"k" * 32)
DATA = random.Random(4).randbytes(3 * FRAME + 10)


@pytest.fixture(autouse=True)
def short_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each bit of a file of several frames can be tried."""
    monkeypatch.setattr(frames, "FRAME_BYTES", FRAME)


def seal(data: bytes, key: SealingKey = KEY, context: str = "mine") -> bytes:
    return encode_frames(key.new(context), data)


def content(stored: bytes, key: SealingKey = KEY, context: str = "mine") -> bytes:
    reader = FrameReader(Memory(stored), len(stored), key.existing(context, stored[: key.header_bytes]))
    return reader.read(0, len(stored))


def parts(stored: bytes) -> list[bytes]:
    """The header, and each frame with its length."""
    found, at = [stored[: KEY.header_bytes]], KEY.header_bytes
    while at < len(stored):
        end = at + 4 + int.from_bytes(stored[at : at + 4])
        found.append(stored[at:end])
        at = end
    return found


def refused(stored: bytes, key: SealingKey = KEY, context: str = "mine") -> bool:
    try:
        content(stored, key, context)
    except BrokenFrames:
        return True
    return False


class TestChanges:
    def test_what_was_sealed_is_opened(self) -> None:
        assert content(seal(DATA)) == DATA
        assert len(parts(seal(DATA))) == 5

    def test_every_single_bit(self) -> None:
        stored = seal(DATA)
        for bit in range(len(stored) * 8):
            changed = bytearray(stored)
            changed[bit // 8] ^= 1 << bit % 8
            assert refused(bytes(changed)), bit

    def test_every_cut_and_every_appendix(self) -> None:
        for length in (0, 1, FRAME, 2 * FRAME, len(DATA)):
            stored = seal(DATA[:length])
            assert all(refused(stored[:cut]) for cut in range(len(stored)))
            assert refused(stored + b"x")
            assert refused(stored + parts(stored)[-1])

    def test_every_cut_at_the_border_of_a_frame(self) -> None:
        """A file that was cut there is whole frames: only that none of them is the last tells it."""
        header, *stored = parts(seal(DATA))
        for kept in range(len(stored)):
            assert refused(header + b"".join(stored[:kept]))

    def test_every_other_order_of_the_frames(self) -> None:
        header, *stored = parts(seal(DATA[: 4 * FRAME]))
        orders = [order for size in range(5) for order in itertools.product(range(4), repeat=size)]
        opened = [order for order in orders if not refused(header + b"".join(stored[index] for index in order))]
        assert opened == [(0, 1, 2, 3)]

    def test_frames_of_another_file_of_the_same_content(self) -> None:
        mine, other = parts(seal(DATA)), parts(seal(DATA))
        for index in range(len(mine)):
            assert refused(b"".join([*mine[:index], other[index], *mine[index + 1 :]]))

    def test_another_key_and_another_place(self) -> None:
        stored = seal(DATA)
        assert refused(stored, key=SealingKey(b"K" * 32))
        assert refused(stored, context="yours")

    @pytest.mark.parametrize("stored", [b"", b"RIFF", b"TTSSEAL1", bytes(100), b"TTSSEAL1" + bytes(32)])
    def test_no_sealed_file_at_all(self, stored: bytes) -> None:
        assert refused(stored)

    @pytest.mark.parametrize("lengths", [[FRAME - 1, 5], [FRAME, 0], [0, 5], [FRAME + 1], [FRAME + 1, 5], [3 * FRAME]])
    def test_frames_of_a_length_that_is_never_written(self, lengths: list[int]) -> None:
        """By somebody with the key: a content has one form only."""
        assert not refused(self.by_hand([FRAME, 5]))
        assert not refused(self.by_hand([0]))
        assert refused(self.by_hand(lengths))

    def test_no_more_than_a_frame_is_ever_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(frames, "_MAX_STORED_BYTES", FRAME + 17)
        asked: list[int] = []

        class Counting(Memory):
            def read(self, offset: int, size: int) -> bytes:
                asked.append(size)
                return super().read(offset, size)

        stored = self.by_hand([FRAME] * 5 + [3 * FRAME])
        with pytest.raises(BrokenFrames):
            FrameReader(Counting(stored), len(stored), KEY.existing("mine", stored[: KEY.header_bytes]))
        assert max(asked) <= FRAME + 17

    def by_hand(self, lengths: list[int]) -> bytes:
        cipher = KEY.new("mine")
        stored = cipher.header
        for index, length in enumerate(lengths):
            frame = cipher.seal(index, index == len(lengths) - 1, bytes(1 + length))
            stored += len(frame).to_bytes(4) + frame
        return stored


class TestSecrecy:
    def test_the_content_does_not_show_and_no_two_files_are_alike(self) -> None:
        first, second = seal(bytes(96)), seal(bytes(96))
        assert bytes(8) not in first
        for offset in range(KEY.header_bytes - 32, len(first) - 16):
            if (offset - KEY.header_bytes) % (FRAME + 21) >= 4:  # the lengths of frames are alike
                assert first[offset : offset + 16] != second[offset : offset + 16]

    def test_a_name_needs_the_key(self) -> None:
        names = {key.name(plain) for key in (KEY, SealingKey(b"K" * 32)) for plain in ("one", "two")}
        assert len(names) == 4
        assert all(len(name) == 64 and int(name, 16) for name in names)
        assert KEY.name("one") == SealingKey(b"k" * 32).name("one")

    def test_a_key_says_nothing_of_itself(self) -> None:
        assert "kkk" not in repr(KEY)
        assert not hasattr(KEY, "secret")


class TestPassphrase:
    def test_passphrase_and_salt_both_count(self) -> None:
        keys = [
            SealingKey.from_passphrase(passphrase, salt)
            for passphrase in ("correct horse battery", "correct horse batterz")
            for salt in (b"s" * 32, b"t" * 32)
        ]
        assert len({key.name("one") for key in keys}) == 4
        again = SealingKey.from_passphrase("correct horse battery", b"s" * 32)
        assert content(seal(DATA, keys[0]), again) == DATA

    def test_a_short_one_is_refused_without_being_quoted(self) -> None:
        with pytest.raises(ValueError, match="at least 16 characters") as caught:
            SealingKey.from_passphrase("p" * (MIN_CHARACTERS - 1), b"s" * 32)
        assert "ppp" not in str(caught.value)

    def test_a_secret_has_32_bytes(self) -> None:
        with pytest.raises(ValueError, match="32 bytes"):
            SealingKey(b"short")


class TestSalt:
    def test_it_is_made_once(self, tmp_path: Path) -> None:
        path = tmp_path / "cache" / ".salt"
        salt = folder_salt(path)
        assert (len(salt), folder_salt(path)) == (32, salt)
        assert folder_salt(tmp_path / "other" / ".salt") != salt
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_those_who_start_together_get_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Threads stand for processes: each opens the file for itself, and so locks it for itself."""
        real_pwrite = os.pwrite

        def slow_pwrite(number: int, data: bytes, offset: int) -> int:
            time.sleep(0.02)
            return real_pwrite(number, data, offset)

        monkeypatch.setattr(os, "pwrite", slow_pwrite)
        with ThreadPoolExecutor(4) as pool:
            salts = set(pool.map(folder_salt, [tmp_path / ".salt"] * 4))
        assert salts == {(tmp_path / ".salt").read_bytes()}

    @pytest.mark.parametrize("damage", [b"x", b"x" * 31, b"x" * 33])
    def test_a_damaged_one_is_not_replaced(self, tmp_path: Path, damage: bytes) -> None:
        (tmp_path / ".salt").write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            folder_salt(tmp_path / ".salt")
        assert (tmp_path / ".salt").read_bytes() == damage
