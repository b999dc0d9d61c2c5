"""Token ids are those of transformers' Qwen2 tokenizer, from either form of the files."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.src.engine.errors import CheckpointError, EngineError
from api.src.engine.tokenizer import TextTokenizer
from tests.engine.checkpoints import TINY
from tests.engine.streams import golden

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
RECORDED = golden("variants")[1]["tokens"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name in FILES:
        shutil.copy(TINY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tokenizers(parts):
    return TextTokenizer(TINY), TextTokenizer(parts)


@pytest.mark.parametrize("text", RECORDED)
def test_ids_are_the_official_packages(tokenizers, text):
    for tokenizer in tokenizers:
        assert tokenizer.ids(text) == RECORDED[text]


@pytest.fixture(scope="module")
def peer(parts):
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen2TokenizerFast.from_pretrained(str(parts))


PIECES = [
    "'s",
    "'LL",
    "don't",
    " \n",
    "\r\n\r\n",
    "  ",
    "12345",
    "é",
    "e\u0301",
    "你好",
    "ありがとう",
    "…",
    "<|im_end|>",
    "한",
    "ий",
]


@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join))
def test_ids_are_those_of_transformers(tokenizers, peer, text):
    expected = peer(text, add_special_tokens=False)["input_ids"]
    for tokenizer in tokenizers:
        assert tokenizer.ids(text) == expected


def test_half_of_a_surrogate_pair_is_refused(tokenizers):
    for tokenizer in tokenizers:
        with pytest.raises(EngineError, match="surrogate"):
            tokenizer.ids("One \ud83d two")


def test_text_is_split_where_qwen2_splits_it(tokenizers):
    """Digits one by one, contractions apart, words whole: real vocabularies have merges that depend on it."""
    expected = ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " iPhone", "'S", "?!\n\n\n", "  ", " x", "/y"]
    text = "".join(expected)
    for tokenizer in tokenizers:
        spans = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in spans] == expected


def test_added_tokens_get_their_ids_or_the_folder_is_refused(parts, tmp_path):
    for name in FILES:
        shutil.copy(parts / name, tmp_path / name)
    assert TextTokenizer(tmp_path).ids("<|im_start|><tts_pad>") == [409, 436]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["410"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has the id 410, not 411"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("missing", FILES[:2])
def test_missing_files_are_named(parts, tmp_path, missing):
    for name in set(FILES) - {missing}:
        shutil.copy(parts / name, tmp_path / name)
    with pytest.raises(CheckpointError, match=missing):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_damaged_files_are_refused(parts, tmp_path, name):
    for other in FILES:
        shutil.copy(parts / other, tmp_path / other)
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        TextTokenizer(tmp_path)
