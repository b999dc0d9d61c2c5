"""Text to ids: Qwen2's byte-level BPE.

Owns reading tokenizer.json, or vocab.json + merges.txt with the added tokens of tokenizer_config.json.
The official package, given a local folder, lets transformers 4.57.3 swap the pattern below for Mistral's if config.json
names a version after 4.57.2; given a hub id it does not. Qwen2's own pattern is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from .errors import CheckpointError, EngineError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizer splits text before merging."""


class TextTokenizer:
    """The tokenizer of the checkpoint in `folder`.

    Raises:
        CheckpointError: files that are missing, cannot be read, or disagree on an id.
    """

    def __init__(self, folder: Path) -> None:
        try:
            ready = folder / "tokenizer.json"
            self._tokenizer = Tokenizer.from_file(str(ready)) if ready.is_file() else _from_parts(folder)
            path = folder / "tokenizer_config.json"
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            added = config.get("added_tokens_decoder", {})
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{folder} has no usable tokenizer: {error}") from error
        _add(self._tokenizer, added, folder)

    def ids(self, text: str) -> list[int]:
        """The text's tokens; a special token's name in the text is that token, as in the official package.

        Raises:
            EngineError: half of a surrogate pair, which is no character.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise EngineError("the text has half of a surrogate pair, which is no character") from None
        return ids


def _from_parts(folder: Path) -> Tokenizer:
    paths = [folder / "vocab.json", folder / "merges.txt"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no tokenizer.json and lacks {', '.join(missing)}")
    tokenizer = Tokenizer(models.BPE.from_file(*(str(path) for path in paths)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def _add(tokenizer: Tokenizer, added: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Tokens beyond the vocabulary, in the order of their ids, which is what gives them their ids."""
    options = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, entry in sorted((int(number), entry) for number, entry in added.items()):
        content = entry["content"]
        if tokenizer.token_to_id(content) is None:
            token = AddedToken(content, **{name: entry[name] for name in options if name in entry})
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(content) != number:
            raise CheckpointError(f"{folder}: {content} has the id {tokenizer.token_to_id(content)}, not {number}")
