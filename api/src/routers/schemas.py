"""Request and response bodies of the HTTP contract, and how a request leaves HTTP behind."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from ..domain import AudioFormat, SpeechRequest, UsageEvent
from ..errors import InvalidRequest
from ..speech.catalogue import ListedVoice

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""All but those that are white space, and so may stand in a text."""

Body = TypeVar("Body", bound=BaseModel)


def _plain(text: str) -> str:
    """Refuse what no text holds: unpaired surrogates, and control characters other than white space."""
    if _SURROGATE.search(text):
        raise ValueError("must not contain unpaired surrogates")
    if _CONTROL.search(text):
        raise ValueError("must not contain control characters")
    return text


Text = Annotated[StrictStr, AfterValidator(_plain)]


class _RequestBody(BaseModel):
    """Unknown fields are tolerated and nulls count as absent: clients send both."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class VoiceReference(_RequestBody):
    id: Text


class OpenAISpeechRequest(_RequestBody):
    """The body of POST /v1/audio/speech; `language` and `seed` are extensions of OpenAI's."""

    input: Text = Field(description="The text to speak: 1 to 4096 characters (the bound is a setting).")
    model: Text = Field(default="tts-1", description="An id of GET /v1/models.")
    voice: Text | VoiceReference = Field(default="alloy", description="An id of GET /v1/audio/voices.")
    response_format: AudioFormat = "mp3"
    speed: Annotated[float, Field(strict=True, ge=0.25, le=4.0, allow_inf_nan=False)] = 1.0
    instructions: Text = Field(default="", description="How to speak, for models that can be told.")
    stream_format: Literal["audio", "sse"] = Field(
        "audio",
        description="`sse`: `speech.audio.delta` events, then `speech.audio.done`. Its `usage` counts the text's "
        "tokens in, and out the frames (80 ms) of sound that the model made for it, whatever the `speed`.",
    )
    language: Text = Field(default="auto", description="An English name or a BCP 47 code.")
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**64)] = Field(
        0, description="The same request with the same seed gives the same sound."
    )

    def to_request(
        self,
        *,
        id: str,
        account: str,
        store: bool,
        idempotency_key: str | None,
        body_digests: tuple[str, ...],
        user: str = "",
    ) -> SpeechRequest:
        """The same request, free of HTTP."""
        return SpeechRequest(
            id=id,
            account=account,
            model=self.model,
            text=self.input,
            voice=self.voice.id if isinstance(self.voice, VoiceReference) else self.voice,
            format=self.response_format,
            speed=self.speed,
            language=self.language,
            instructions=self.instructions,
            seed=self.seed,
            store=store,
            idempotency_key=idempotency_key,
            body_digest=body_digests[0] if body_digests else "",
            older_digests=body_digests[1:],
            user=user,
        )


class CreditRequest(_RequestBody):
    """The body of POST /v1/accounts/{account}/credit."""

    micros: Annotated[StrictInt, Field(gt=0, lt=2**53)] = Field(description="Micro-units to add.")
    reference: Text = Field(min_length=1, description="The same reference is credited once, however often sent.")


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["qwen3-tts"] = "qwen3-tts"


class ModelName(BaseModel):
    id: str
    name: str


class ModelsListResponse(BaseModel):
    """OpenAI reads `data`, Open WebUI reads `models`."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    models: list[ModelName]


class VoiceInfo(BaseModel):
    voice_id: str
    id: str
    name: str
    language: str
    kind: str
    preview_url: str

    @classmethod
    def of(cls, listed: ListedVoice) -> VoiceInfo:
        return cls(
            voice_id=listed.id,
            id=listed.id,
            name=listed.name,
            language=listed.voice.language,
            kind=listed.voice.kind,
            preview_url=f"/v1/audio/voices/{listed.id}/preview",
        )


class VoicesListResponse(BaseModel):
    voices: list[VoiceInfo]


class Base64SpeechResponse(BaseModel):
    audio: str = Field(description="The whole answer in base64.")
    format: AudioFormat
    sample_rate: int
    duration_ms: int


class UsageEntry(BaseModel):
    """`user` is the end user for whom a trusted account asked, empty for none."""

    request_id: str
    account: str
    user: str
    model: str
    voice: str
    characters: int
    audio_ms: int
    outcome: str
    price_micros: int
    created: float

    @classmethod
    def of(cls, event: UsageEvent) -> UsageEntry:
        return cls(
            request_id=event.request_id,
            account=event.account,
            user=event.user,
            model=event.model,
            voice=event.voice,
            characters=event.characters,
            audio_ms=event.audio_ms,
            outcome=event.outcome,
            price_micros=event.price_micros,
            created=event.at,
        )


class UsageResponse(BaseModel):
    """`balance_micros` is null for an account without a wallet: nothing bounds what it may use."""

    object: Literal["list"] = "list"
    account: str
    balance_micros: int | None
    data: list[UsageEntry]


class BalanceResponse(BaseModel):
    account: str
    balance_micros: int


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
    detail: str


def parse_body(model: type[Body], raw: bytes) -> Body:
    """Read a JSON body, whatever its Content-Type said; InvalidRequest names the field and what is wrong."""
    try:
        data = _JSON.decode(raw.decode(json.detect_encoding(raw), "surrogatepass"))
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _invalid(error) from None


def inline_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema without references, for a body that FastAPI does not parse itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {name: resolved(value) for name, value in node.items()}
        return [resolved(value) for value in node] if isinstance(node, list) else node

    inlined: dict[str, Any] = resolved(schema)
    return inlined


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
"""What json.loads with this argument would make for each body."""


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first fault, in words that quote nothing of the input: it may not even be valid Unicode."""
    fault: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(fault["loc"][0]) if fault["loc"] else None
    if fault["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_parameter")
    message = fault["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"Invalid '{param}': {message}.", param=param, code="invalid_value")
