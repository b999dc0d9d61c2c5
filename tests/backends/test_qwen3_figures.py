"""What the engine says of itself, over HTTP: its metrics, and the usage of what it spoke."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from api.src.backends.qwen3_tts import Qwen3TTSBackend  # noqa: E402
from api.src.domain import SpeechRequest  # noqa: E402
from api.src.engine.messages import FINISH_REASONS  # noqa: E402
from tests.conftest import Server  # noqa: E402
from tests.engine.checkpoints import tiny  # noqa: E402

MODEL = "qwen3-tts-12hz-1.7b-custom-voice"
TEXT = "The first sentence is long enough to be spoken alone. So is the second sentence, which ends here."


def engine(server: Server) -> dict[str, dict[str, float]]:
    """The engine's metrics: name -> value by the label beside the model."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("tts_engine_"):
                assert sample.labels.pop("model") == MODEL
                name = sample.name.removeprefix("tts_engine_")
                found.setdefault(name, {})["".join(sample.labels.values())] = sample.value
    return found


def ask(server: Server, **fields: object) -> tuple[str, int, int]:
    """The cache status, and the tokens in and out."""
    answer = server.client.post("/v1/audio/speech", json={"input": TEXT, "stream_format": "sse", **fields})
    assert answer.status_code == 200, answer.text
    usage = json.loads(answer.text.rstrip().rpartition("data: ")[2])["usage"]
    return answer.headers["x-cache"], usage["input_tokens"], usage["output_tokens"]


def test_the_usage_is_what_the_engine_counts(start_server: Callable[..., Server]) -> None:
    backend = Qwen3TTSBackend(models=[str(tiny("custom_voice"))], slots=2)
    server = start_server(backend)
    before = engine(server)
    assert set(before) == {
        "frames_total",
        "requests_total",
        "slots",
        "waiting",
        "step_seconds",
        "uncaptured_steps_total",
    }
    assert set(before["requests_total"]) == set(FINISH_REASONS)
    status, tokens, frames = ask(server, speed=2.0, seed=7)
    after = engine(server)
    assert status == "miss"
    assert tokens == backend.text_tokens(SpeechRequest("req", "anonymous", "tts-1", TEXT, "alloy"))
    assert frames == after["frames_total"][""] - before["frames_total"][""] > 1
    ended = {reason: after["requests_total"][reason] - before["requests_total"][reason] for reason in FINISH_REASONS}
    assert ended["stop"] + ended["length"] == sum(ended.values()) == 2
    assert after["slots"] == {"active": 0, "paused": 0}
    assert after["step_seconds"][""] > 0
    assert ask(server, speed=2.0, seed=7) == ("hit", tokens, frames)
    assert engine(server)["frames_total"] == after["frames_total"]
