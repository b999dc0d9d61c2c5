"""The cache of quantised weights: whole, right and its own, or not there at all."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from api.src.engine import weight_cache
from api.src.engine.weight_cache import FOLDER, SUFFIX, WeightCache, fingerprint

TENSORS = {
    "a.codes": torch.randint(-127, 128, (5, 7), dtype=torch.int8),
    "a.scales": torch.randn(5),
    "b.codes": torch.randint(0, 256, (4, 3), dtype=torch.uint8),
    "b.scales": torch.randn(2, 4, 2).bfloat16(),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
NAME = "int8-0123"


def make(*folders, name=NAME, tensors=TENSORS):
    cache = WeightCache(folders, name, LAYOUT)
    assert not cache.full
    for key, tensor in tensors.items():
        cache.write(key, tensor)
    cache.close()


def read(*folders, name=NAME):
    """All tensors, None if the file is not taken."""
    cache = WeightCache(folders, name, LAYOUT)
    found = {key: cache.read(key) for key in LAYOUT} if cache.full else None
    cache.close()
    return found


def same(found):
    return found is not None and all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())


def test_what_was_written_is_read(tmp_path):
    make(tmp_path / FOLDER)
    assert same(read(tmp_path / FOLDER))
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [NAME + SUFFIX]
    assert set(load_file(tmp_path / FOLDER / (NAME + SUFFIX))) == {*LAYOUT, "checksums"}


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty", "folder"])
def test_a_file_that_is_not_whole_is_not_read_and_made_anew(tmp_path, damage):
    make(tmp_path)
    path = tmp_path / (NAME + SUFFIX)
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[20] ^= 1
    path.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}.get(damage, content))
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert read(tmp_path) is None
        return
    assert read(tmp_path) is None
    make(tmp_path)
    assert same(read(tmp_path))


@pytest.mark.parametrize("at", [-1, -60, -100])
def test_a_changed_byte_is_found_and_the_file_goes(tmp_path, at):
    make(tmp_path)
    path = tmp_path / (NAME + SUFFIX)
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    found = read(tmp_path)
    assert found is not None
    assert [key for key, tensor in found.items() if tensor is None]
    assert all(tensor is None or torch.equal(tensor, TENSORS[key]) for key, tensor in found.items())
    assert not path.exists()


def test_a_file_for_other_weights_is_not_read(tmp_path):
    make(tmp_path, name="int8-other")
    shutil.copy(tmp_path / ("int8-other" + SUFFIX), tmp_path / (NAME + SUFFIX))
    assert read(tmp_path) is None


def test_an_unfinished_file_leaves_nothing(tmp_path):
    make(tmp_path, tensors=dict(list(TENSORS.items())[:-1]))
    assert list(tmp_path.iterdir()) == []


def test_the_first_folder_that_can_be_written_is_used(tmp_path):
    (tmp_path / "file").write_text("no folder")
    folders = tmp_path / "file" / FOLDER, tmp_path / "second", tmp_path / "third"
    make(*folders)
    assert same(read(*folders))
    assert (folders[1] / (NAME + SUFFIX)).is_file()
    assert not folders[2].exists()


def test_without_any_folder_nothing_is_kept_and_nothing_fails(tmp_path):
    (tmp_path / "file").write_text("no folder")
    make(tmp_path / "file" / FOLDER)
    make()
    assert read(tmp_path / "file" / FOLDER) is None


def test_a_full_disk_fails_nothing(tmp_path, monkeypatch):
    cache = WeightCache([tmp_path], NAME, LAYOUT)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def seek(self, place):
            return place

        def close(self):
            pass

    cache._file.close()
    cache._file = Full()
    for key, tensor in TENSORS.items():
        cache.write(key, tensor)
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_make_one_right_file(tmp_path):
    first, second = WeightCache([tmp_path], NAME, LAYOUT), WeightCache([tmp_path], NAME, LAYOUT)
    for key, tensor in TENSORS.items():
        first.write(key, tensor)
        second.write(key, tensor)
    first.close()
    second.close()
    assert same(read(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_beside_a_checkpoint_older_files_of_the_form_go(tmp_path):
    make(tmp_path / FOLDER, name="int8-old")
    make(tmp_path / FOLDER, name="int4-old")
    left = tmp_path / FOLDER / "x.part"
    left.touch()
    os.utime(left, (time.time() - 7200,) * 2)
    make(tmp_path / FOLDER)
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {NAME + SUFFIX, "int4-old" + SUFFIX}


def test_in_a_folder_for_many_checkpoints_others_stay(tmp_path):
    make(tmp_path, name="int8-other")
    make(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_fingerprint_follows_the_weights_torch_and_the_form(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = fingerprint(tmp_path, "int8")
    assert fingerprint(tmp_path, "int8") == first
    assert fingerprint(tmp_path, "int4") != first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    second = fingerprint(tmp_path, "int8")
    assert second != first
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert fingerprint(tmp_path, "int8") != second
    (tmp_path / "other.safetensors").unlink()
    assert fingerprint(tmp_path, "int8") == second
    monkeypatch.setattr(weight_cache.torch, "__version__", "9.9")
    assert fingerprint(tmp_path, "int8") != second
