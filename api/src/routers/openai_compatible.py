"""OpenAI's speech API: speech, models and voices."""

from __future__ import annotations

import base64
import re
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..domain import MEDIA_TYPES, SAMPLE_RATE, Account, SpeechRequest
from ..errors import InvalidRequest, NotFound
from ..observe import request_id
from ..speech.listener import Listener
from .failures import AccountBreakers
from .guards import Service, get_tts_service, http_policy, read_body, require_account
from .limit_headers import limit_headers
from .responses import SpeechEventResponse, SpeechResponse, until_hangup
from .schemas import (
    Base64SpeechResponse,
    ErrorResponse,
    ModelEntry,
    ModelName,
    ModelsListResponse,
    OpenAISpeechRequest,
    VoiceInfo,
    VoicesListResponse,
    inline_schema,
    parse_body,
)

__all__ = ["get_tts_service", "router"]

MODELS_CREATED = 1_769_040_000
"""Unix time of the Qwen3-TTS release (2026-01-22), as `created` of every model."""

router = APIRouter(responses={503: {"model": ErrorResponse, "description": "Not ready; see Retry-After."}})

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The encoded speech, streamed while it is made.",
        "content": dict.fromkeys(MEDIA_TYPES.values(), _BINARY),
    }
}
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request cannot be spoken."},
    401: {"model": ErrorResponse, "description": "The API key is missing or unknown."},
    402: {"model": ErrorResponse, "description": "The balance does not cover the price."},
    403: {"model": ErrorResponse, "description": "The account is switched off."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    429: {"model": ErrorResponse, "description": "Too many requests; see Retry-After."},
    500: {"model": ErrorResponse, "description": "The speech could not be generated."},
    502: {"model": ErrorResponse, "description": "The remote server that speaks failed."},
    504: {"model": ErrorResponse, "description": "The remote server that speaks did not answer in time."},
}
_SPEECH_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": inline_schema(OpenAISpeechRequest)}},
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "A repeat under the same key is not charged again for a day.",
            "schema": {"type": "string", "maxLength": 255},
        },
        {
            "name": "Cache-Control",
            "in": "header",
            "required": False,
            "description": "`no-store`: neither read from the cache nor write to it.",
            "schema": {"type": "string"},
        },
    ],
}


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses=_REFUSALS | {200: {**_AUDIO[200], "content": {**_AUDIO[200]["content"], **_EVENTS}}},
    openapi_extra=_SPEECH_BODY,
)
async def create_speech(request: Request, service: Service) -> Response:
    """Speak a text, streamed while it is generated."""
    account, body, speech = await _read_speech(request)
    listener = service.open(speech, caller=account)
    await _start(request, listener)
    response = SpeechEventResponse if body.stream_format == "sse" else SpeechResponse
    return response(listener, http_policy(request).stall_timeout_s)


@router.post("/v1/audio/speech/base64", responses=_REFUSALS, openapi_extra=_SPEECH_BODY)
async def create_speech_base64(request: Request, response: Response, service: Service) -> Base64SpeechResponse:
    """Speak a text and answer it whole."""
    account, _, speech = await _read_speech(request)
    listener = service.open(speech, caller=account)
    await _start(request, listener)
    response.headers.update(limit_headers(listener.standings))
    try:
        audio = await until_hangup(request.receive, listener.whole())
    finally:
        listener.close()
    return Base64SpeechResponse(
        audio=base64.b64encode(audio).decode("ascii"),
        format=speech.format,
        sample_rate=SAMPLE_RATE,
        duration_ms=listener.audio_ms,
    )


@router.get("/v1/models")
@router.get("/v1/audio/models")
async def list_models(service: Service) -> ModelsListResponse:
    """The models that this server can serve now."""
    ids = service.catalogue.models()
    return ModelsListResponse(
        data=[ModelEntry(id=id, created=MODELS_CREATED) for id in ids],
        models=[ModelName(id=id, name=id) for id in ids],
    )


@router.get("/v1/models/{model_id}", responses={404: {"model": ErrorResponse}})
async def get_model(model_id: str, service: Service) -> ModelEntry:
    """One model."""
    if model_id not in service.catalogue.models():
        raise NotFound("There is no such model.", param="model", code="model_not_found")
    return ModelEntry(id=model_id, created=MODELS_CREATED)


@router.get("/v1/audio/voices")
async def list_voices(service: Service) -> VoicesListResponse:
    """The built-in voices and the aliases that answer to OpenAI's names."""
    return VoicesListResponse(voices=[VoiceInfo.of(listed) for listed in service.catalogue.voices()])


@router.get("/v1/audio/voices/{voice_id}", responses={404: {"model": ErrorResponse}})
async def get_voice(voice_id: str, service: Service) -> VoiceInfo:
    """One voice."""
    return VoiceInfo.of(service.catalogue.listed_voice(voice_id))


@router.get(
    "/v1/audio/voices/{voice_id}/preview",
    response_class=Response,
    responses=_AUDIO | {404: {"model": ErrorResponse}, 500: _REFUSALS[500]},
)
async def preview_voice(voice_id: str, request: Request, service: Service) -> Response:
    """A short sample of a built-in voice, made once and then cached."""
    listener = service.open_preview(voice_id, request_id.get())
    await _start(request, listener)
    return SpeechResponse(listener, http_policy(request).stall_timeout_s)


async def _read_speech(request: Request) -> tuple[Account, OpenAISpeechRequest, SpeechRequest]:
    """Who asks, the validated body, and what it asks for; refused unread where the account is stopped."""
    account = await require_account(request)
    breakers: AccountBreakers = request.app.state.account_breakers
    breakers.watch(account, request.scope)
    raw = await read_body(request)
    body = parse_body(OpenAISpeechRequest, raw)
    key = _idempotency_key(request)
    return (
        account,
        body,
        body.to_request(
            id=request_id.get(),
            account=account.name,
            store="no-store" not in request.headers.get("cache-control", "").lower(),
            idempotency_key=key,
            body_digests=http_policy(request).body_digests(raw) if key else (),
            user=account.user,
        ),
    )


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise InvalidRequest(
            "Must be 1 to 255 printable ASCII characters.", param="Idempotency-Key", code="invalid_value"
        )
    return key


async def _start(request: Request, listener: Listener) -> None:
    """Wait for the first sound; unless it comes, the listener is let go."""
    try:
        await until_hangup(request.receive, listener.start())
    except BaseException:
        listener.close()
        raise
    finally:
        request.state.standings = listener.standings  # for the answer, if that becomes an error
