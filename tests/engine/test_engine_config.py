"""Reading config.json: all that is in it, the official defaults for what is not, and a clear no to anything else."""

from __future__ import annotations

import json

import pytest

from api.src.engine.config import CodecConfig, ModelConfig
from api.src.engine.errors import CheckpointError
from tests.engine.checkpoints import TINY, tiny


def changed(folder, **sections):
    """The tiny custom_voice configuration with fields of config.json or of a section (as `talker_config`) replaced."""
    raw = json.loads((TINY / "config-custom_voice.json").read_text())
    for name, value in sections.items():
        if isinstance(value, dict) and name in raw:
            raw[name].update(value)
            raw[name] = {key: entry for key, entry in raw[name].items() if entry != "removed"}
        else:
            raw[name] = value
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "removed"}))
    return folder


def test_a_config_is_read_whole():
    config = ModelConfig.read(tiny("custom_voice"))
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    assert (config.tts_model_type, config.tts_model_size, config.tts_eos_token_id) == ("custom_voice", "1b7", 438)
    assert (talker.hidden_size, predictor.hidden_size, talker.rope_theta) == (32, 16, 1e6)
    assert talker.spk_is_dialect["eric"] == "sichuan_dialect"
    assert talker.spk_is_dialect["ryan"] is False
    assert talker.codec_language_id["beijing_dialect"] == 2074
    assert config.speaker_encoder_config.enc_channels == (16, 16, 16, 16, 48)
    assert (config.generation.max_new_tokens, config.generation.top_k) == (8192, 50)


def test_a_codec_config_is_read_from_either_folder():
    for folder in (tiny("base"), tiny("base") / "speech_tokenizer"):
        codec = CodecConfig.read(folder)
        assert codec.decoder_config.sliding_window == 12
        assert codec.decoder_config.upsample_rates == (8, 5, 4, 3)
        assert codec.encoder_config.num_filters == 4
        assert codec.decode_upsample_rate == 1920


def test_what_is_left_out_has_the_official_default(tmp_path):
    changed(
        tmp_path,
        talker_config={"rope_scaling": None, "spk_id": None, "head_dim": "removed", "attention_bias": "removed"},
        speaker_encoder_config={"enc_channels": "removed"},
    )
    config = ModelConfig.read(tmp_path)
    assert config.talker_config.spk_id == {}
    assert config.talker_config.head_dim == 32 // 4
    assert config.speaker_encoder_config.enc_channels == (512, 512, 512, 512, 1536)
    assert config.generation.max_new_tokens == 2048  # no generation_config.json here
    (tmp_path / "speech_tokenizer").mkdir()
    (tmp_path / "speech_tokenizer" / "config.json").write_text('{"model_type": "qwen3_tts_tokenizer_12hz"}')
    codec = CodecConfig.read(tmp_path)
    assert (codec.encoder_config.head_dim, codec.encoder_config.num_quantizers) == (64, 32)
    assert (codec.decoder_config.hidden_size, codec.encoder_valid_num_quantizers) == (1024, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "describes a 'qwen2', not a 'qwen3_tts'"),
        ({"model_type": "removed"}, "describes a None"),
        ({"tts_model_type": "singer"}, "'singer' is none of custom_voice, voice_design, base"),
        ({"tts_model_type": 3}, "tts_model_type is 3"),
        ({"talker_config": "removed"}, "lacks talker_config"),
        ({"talker_config": {"text_vocab_size": "removed"}}, "talker_config lacks text_vocab_size"),
        ({"talker_config": {"hidden_size": "32"}}, "talker_config: hidden_size is '32'"),
        ({"talker_config": {"hidden_size": True}}, "hidden_size is True"),
        ({"talker_config": {"rms_norm_eps": "small"}}, "rms_norm_eps is 'small'"),
        ({"talker_config": {"codec_language_id": []}}, "codec_language_id is"),
        ({"talker_config": {"code_predictor_config": 7}}, "code_predictor_config is 7"),
        ({"talker_config": {"num_code_groups": 8}}, "differ in num_code_groups"),
        ({"talker_config": {"hidden_act": "gelu"}}, "talker_config.hidden_act = 'gelu' is not supported"),
        ({"talker_config": {"attention_bias": True}}, "attention_bias"),
        ({"talker_config": {"use_sliding_window": True}}, "use_sliding_window"),
        ({"talker_config": {"rope_scaling": {"rope_type": "yarn"}}}, "rope_scaling"),
        ({"talker_config": {"num_key_value_heads": 3}}, "num_key_value_heads = 3"),
        ({"speaker_encoder_config": {"enc_channels": [1, "2"]}}, "enc_channels is '2'"),
    ],
)
def test_what_the_engine_cannot_use_is_named(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.read(changed(tmp_path, **change))


@pytest.mark.parametrize("text", ["{", "[1]", "", b"\xff\xfe"])
def test_a_file_that_is_no_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config.json"):
        ModelConfig.read(tmp_path)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no config.json"):
        ModelConfig.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json"):
        CodecConfig.read(tmp_path)
