"""The automatic form: fast, safe, said why, and measured once."""

from __future__ import annotations

import json

import pytest
import torch

from api.src.engine import form_choice
from api.src.engine.config import ModelConfig
from api.src.engine.form_choice import MAX_ERROR, choose_form, product_error
from api.src.engine.native.check import find
from tests.engine.checkpoints import variant


@pytest.fixture
def config():
    return ModelConfig.read(variant("wide")).talker_config


def measured(monkeypatch, **seconds):
    calls = []

    def measure(config, forms, native):
        calls.append(list(forms))
        return {form: list(seconds[form]) for form in forms}

    monkeypatch.setattr(form_choice, "_measure", measure)
    return calls


def test_4_bits_lose_too_much_and_8_do_not():
    errors = {form: product_error(form) for form in ("fp32", "bf16", "int8", "int4")}
    assert errors["fp32"] < 1e-5 < errors["bf16"] < errors["int8"] < MAX_ERROR < errors["int4"]


def test_a_real_measurement_names_a_safe_form_and_its_reason(config):
    before = torch.get_num_threads()
    choice = choose_form(config)
    assert choice.form in ("fp32", "bf16", "int8")
    assert set(choice.frame_ms) == {"fp32", "bf16", "int8"}
    assert all(ms > 0 for each in choice.frame_ms.values() for ms in each)
    assert choice.reason.startswith(f"{choice.form}: ")
    assert "int4 left out" in choice.reason
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ({"fp32": (2, 8), "bf16": (3, 4), "int8": (1, 2)}, "int8"),
        ({"fp32": (2, 8), "bf16": (1, 1), "int8": (1, 2)}, "bf16"),
        ({"fp32": (2, 2), "bf16": (3, 3), "int8": (1.9, 1.9)}, "fp32"),  # not worth what it loses
        ({"fp32": (1, 1), "bf16": (3, 3), "int8": (2, 2)}, "fp32"),
        ({"fp32": (2, 2), "bf16": (3, 3), "int8": (1, 4)}, "fp32"),  # half the time alone, twice with 8 streams
    ],
)
def test_the_fastest_wins_if_that_is_worth_it(config, monkeypatch, seconds, form):
    measured(monkeypatch, **seconds)
    assert choose_form(config).form == form


def test_the_choice_is_noted_and_not_measured_again(config, monkeypatch, tmp_path):
    calls = measured(monkeypatch, fp32=(2, 2), bf16=(2, 2), int8=(1, 1))
    (tmp_path / "file").write_text("no folder")
    folders = [tmp_path / "file" / "inside", tmp_path / "notes"]
    first = choose_form(config, folders)
    assert choose_form(config, folders) == first
    assert len(calls) == 1
    (note,) = (tmp_path / "notes").iterdir()
    assert json.loads(note.read_text())["form"] == "int8"


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"form": "int2", "reason": "", "frame_ms": {}}', "\xff"])
def test_a_broken_note_is_replaced(config, monkeypatch, tmp_path, content):
    calls = measured(monkeypatch, fp32=(2, 2), bf16=(2, 2), int8=(1, 1))
    choose_form(config, [tmp_path])
    (note,) = tmp_path.iterdir()
    note.write_bytes(content.encode("latin-1"))
    assert choose_form(config, [tmp_path]).form == "int8"
    assert len(calls) == 2
    assert choose_form(config, [tmp_path]).form == "int8"
    assert len(calls) == 2


def test_another_processor_or_size_measures_for_itself(config, monkeypatch, tmp_path):
    calls = measured(monkeypatch, fp32=(2, 2), bf16=(2, 2), int8=(1, 1))
    choose_form(config, [tmp_path])
    monkeypatch.setattr(form_choice, "processor", lambda: "another")
    choose_form(config, [tmp_path])
    choose_form(ModelConfig.read(variant("deep")).talker_config, [tmp_path])
    assert len(calls) == 3


def test_the_kernel_s_own_speed_is_measured_and_noted_apart(config, tmp_path):
    native = find(tmp_path / "kernel").native
    if native is None:
        pytest.skip("no C compiler")
    assert product_error("int8", native) == pytest.approx(product_error("int8"), rel=0.01)
    choice = choose_form(config, [tmp_path], native)
    assert set(choice.frame_ms) == {"fp32", "bf16", "int8"}
    assert not native.pool.running  # its threads were as few as the measurement's
    assert choose_form(config, [tmp_path], native) == choice
    choose_form(config, [tmp_path])
    assert len(list(tmp_path.glob("*.choice"))) == 2
