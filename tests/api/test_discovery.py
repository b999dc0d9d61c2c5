"""What there is: the document, the models, the voices and their previews, in the shapes that each client reads."""

from __future__ import annotations

import pytest

from tests.api.wire import OPENAI_MODELS, assert_error
from tests.conftest import Server
from tests.decoding import decoded
from tests.fakes import OPENAI_VOICES

ROUTES = {
    ("post", "/v1/audio/speech"),
    ("post", "/v1/audio/speech/base64"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("get", "/v1/audio/models"),
    ("get", "/v1/audio/voices"),
    ("get", "/v1/audio/voices/{voice_id}"),
    ("get", "/v1/audio/voices/{voice_id}/preview"),
    ("get", "/v1/usage"),
    ("post", "/v1/accounts/{account}/credit"),
    ("get", "/v1/accounts"),
    ("post", "/v1/accounts"),
    ("get", "/v1/accounts/{account}"),
    ("patch", "/v1/accounts/{account}"),
    ("get", "/v1/accounts/{account}/keys"),
    ("post", "/v1/accounts/{account}/keys"),
    ("post", "/v1/accounts/{account}/keys/{key_id}/rotate"),
    ("delete", "/v1/accounts/{account}/keys/{key_id}"),
    ("get", "/v1/audit"),
    ("get", "/healthz"),
    ("get", "/ready"),
    ("get", "/version"),
    ("get", "/metrics"),
}


def test_the_document_lists_every_route(house: Server) -> None:
    document = house.client.get("/openapi.json").json()
    assert {(method, path) for path, item in document["paths"].items() for method in item} == ROUTES


def test_the_document_promises_no_422(house: Server) -> None:
    document = house.client.get("/openapi.json").json()
    promised = {
        (path, status)
        for path, item in document["paths"].items()
        for operation in item.values()
        for status in operation["responses"]
    }
    assert not {path for path, status in promised if status == "422"}


# --- models ---


@pytest.mark.parametrize("path", ["/v1/models", "/v1/audio/models"])
def test_models_for_openai_and_for_open_webui(house: Server, path: str) -> None:
    body = house.client.get(path).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [*OPENAI_MODELS, "fake-1"]
    for model in body["data"]:
        assert set(model) == {"id", "object", "created", "owned_by"}
        assert (model["object"], model["owned_by"]) == ("model", "qwen3-tts")
        assert isinstance(model["created"], int)
    assert body["models"] == [{"id": model["id"], "name": model["id"]} for model in body["data"]]


def test_one_model(house: Server) -> None:
    listed = house.client.get("/v1/models").json()["data"]
    for model in listed:
        assert house.client.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("name", ["no-such-model", "qwen3-tts-12hz-1.7b-base", "%00", "%F0%9F%98%80"])
def test_a_model_that_is_not_served_is_a_404(house: Server, name: str) -> None:
    assert_error(house.client.get(f"/v1/models/{name}"), 404, code="model_not_found", param="model")


# --- voices ---


def test_voices_have_what_each_client_reads(house: Server) -> None:
    body = house.client.get("/v1/audio/voices").json()
    assert set(body) == {"voices"}
    assert {voice["id"] for voice in body["voices"]} == {"tone", "hum", *OPENAI_VOICES}
    for voice in body["voices"]:
        assert {"voice_id", "id", "name", "preview_url", "language"} <= set(voice)
        assert all(isinstance(value, str) and value for value in voice.values())
        assert voice["voice_id"] == voice["id"]
        assert voice["preview_url"] == f"/v1/audio/voices/{voice['id']}/preview"


def test_an_alias_says_who_answers(house: Server) -> None:
    assert "Hum" in house.client.get("/v1/audio/voices/nova").json()["name"]


def test_a_voice_whatever_the_case(house: Server) -> None:
    listed = {voice["id"]: voice for voice in house.client.get("/v1/audio/voices").json()["voices"]}
    for asked, known in [("alloy", "alloy"), ("ALLOY", "alloy"), ("Tone", "tone"), ("hUM", "hum")]:
        assert house.client.get(f"/v1/audio/voices/{asked}").json() == listed[known]


@pytest.mark.parametrize("path", ["nobody", "nobody/preview", "%00", "%0a/preview", "%F0%9F%98%80"])
def test_an_unknown_voice_is_a_404(house: Server, path: str) -> None:
    assert_error(house.client.get(f"/v1/audio/voices/{path}"), 404, code="voice_not_found", param="voice_id")


def test_every_preview_plays_and_is_made_once(server: Server) -> None:
    voices = server.client.get("/v1/audio/voices").json()["voices"]
    assert len(voices) == 15
    for voice in voices:
        first, second = (server.client.get(voice["preview_url"]) for _ in range(2))
        assert first.headers["content-type"] == "audio/mpeg"
        assert len(decoded("mp3", first.content)) > 0
        assert second.headers["x-cache"] == "hit"
        assert second.content == first.content
    assert server.backend.spoken == 2  # one for each voice behind the names
