"""What each form loses on the small checkpoints, whose weights are large: bounds twice as wide as what was measured."""

from __future__ import annotations

import pytest

from tests.bench.weight_forms import MODEL_BF16, compare
from tests.engine.checkpoints import tiny, variant

BOUNDS = {MODEL_BF16: (0.006, 0.02, 0.002), "bf16": (0.006, 0.012, 0.0005), "int8": (0.02, 0.04, 0.005)}
"""Of a product, of the logits by their spread, and KL in nats."""


@pytest.mark.parametrize("name", ["tiny", "small", "deep", "wide", "custom"])
def test_what_forms_lose(name):
    folder = tiny("custom_voice") if name == "tiny" else variant(name)
    found = compare(folder, ["fp32", *BOUNDS, "int4"], frames=4, streams=3)
    exact = found.pop("fp32")
    assert (exact.product_max, exact.logits, exact.kl) == (0, 0, 0)
    assert (exact.first, exact.greedy) == (1, 1)
    for form, (product, logits, kl) in BOUNDS.items():
        errors = found[form]
        assert 0 < errors.product_max < product, form
        assert 0 < errors.logits < logits, form
        assert 0 < errors.kl < kl, form
        assert errors.first > 0.9, form
    assert found["int4"].product_max < 0.13
    assert found["int4"].kl < 0.2
