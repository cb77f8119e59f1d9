"""The body of a chat completion, in OpenAI's form and checked field by field; no media is touched here.

Source of the format: OpenAI's API reference, "Create chat completion". Beside it, a user part of the type `region` is
a place in a picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, ValidationError
from typing_extensions import TypeAliasType

from mmchat.serving.errors import ApiError
from mmchat.serving.limits import Limits


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str = Field(description="data:image/...;base64,..., or an address where the server allows its domain")
    detail: str | None = Field(None, description="ignored: a model has one resolution")


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Part):
    data: str = Field(description="base64")
    format: str | None = Field(None, max_length=32, description="ignored: the bytes tell it")


class AudioPart(_Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


class VideoUrl(_Part):
    url: str = Field(description="data:video/...;base64,..., or an address where the server allows its domain")


class VideoPart(_Part):
    type: Literal["video_url"]
    video_url: VideoUrl


class RegionPart(_Part):
    """A place in a picture, in its pixels as it is shown; the pictures of the request are counted from 0."""

    type: Literal["region"]
    image: int = Field(ge=0)
    box: tuple[float, float, float, float] | None = Field(None, description="x1, y1, x2, y2")
    point: tuple[float, float] | None = Field(None, description="x, y")


Part = Annotated[TextPart | ImagePart | AudioPart | VideoPart | RegionPart, Field(discriminator="type")]
# An alias by name, as a union must be able to hash its cases, and FailFast has no hash.
Parts = TypeAliasType("Parts", Annotated[list[Part], FailFast()])
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
]


class Message(BaseModel):
    """One turn. An assistant's message may be sent back as it was received."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="ignored")
    refusal: str | None = Field(None, description="ignored")
    annotations: Any = Field(None, description="ignored")
    regions: Any = Field(None, description="of an answer that is sent back: ignored")
    audio: Any = Field(None, description="not supported")
    tool_calls: Any = Field(None, description="not supported")
    function_call: Any = Field(None, description="not supported")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="ignored: nothing is obfuscated")


class ChatRequest(BaseModel):
    """OpenAI's chat completion. Fields that would change the answer and are not supported are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    model: str | None = Field(None, description="the id that /v1/models tells; without it, that model")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | list[Annotated[str, Field(min_length=1, max_length=256)]]
        | None
    ) = Field(None, description="one text or up to four")
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # Ignored: they do not change the answer.
    user: Any = Field(None, description="ignored")
    metadata: Any = Field(None, description="ignored")
    store: Any = Field(None, description="ignored")
    service_tier: Any = Field(None, description="ignored")
    safety_identifier: Any = Field(None, description="ignored")
    prompt_cache_key: Any = Field(None, description="ignored")
    prompt_cache_retention: Any = Field(None, description="ignored")
    parallel_tool_calls: Any = Field(None, description="ignored: there are no tools")
    prediction: Any = Field(None, description="ignored: it could only be faster")
    # Refused where they say anything: see NEUTRAL.
    audio: Any = Field(None, description="not supported")
    frequency_penalty: Any = Field(None, description="0 only")
    function_call: Any = Field(None, description="'none' only")
    functions: Any = Field(None, description="not supported")
    logit_bias: Any = Field(None, description="not supported")
    modalities: Any = Field(None, description='["text"] only')
    moderation: Any = Field(None, description="not supported")
    presence_penalty: Any = Field(None, description="0 only")
    reasoning_effort: Any = Field(None, description="'none' only")
    response_format: Any = Field(None, description='{"type": "text"} only')
    tool_choice: Any = Field(None, description="'none' and 'auto' only")
    tools: Any = Field(None, description="not supported")
    verbosity: Any = Field(None, description="'medium' only")
    web_search_options: Any = Field(None, description="not supported")


# Values with which an unsupported field says what happens anyway.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_OF_MESSAGES: Mapping[str, tuple[Any, ...]] = {"audio": (), "tool_calls": ([],), "function_call": ()}
MAX_STOPS = 4
# Beyond so many faults they are not told apart: each is an object of its own.
_MAX_FAULTS = 100
_MAX_PATH = 200


def parse_request(body: bytes, limits: Limits) -> ChatRequest:
    """The request in a body. Work for a thread: a body may be large.

    Raises:
        ApiError: no JSON, a field that is unknown, unsupported, of another type or out of range; too much of anything.
    """
    # A tree of small values takes many times the memory of its text, so they are counted first.
    num_values = body.count(b",") + body.count(b"{") + body.count(b"[")
    if num_values > limits.values:
        raise ApiError(400, f"found {num_values} values in the JSON; wanted up to {limits.values}", "too_many_values")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _of_validation(error) from None
    _check_supported(request)
    _check_sizes(request, limits)
    return request


def _of_validation(error: ValidationError) -> ApiError:
    """The first fault, without the input."""
    if error.error_count() > _MAX_FAULTS:
        found = f"found {error.error_count()} fields that are unknown or of another type"
        return ApiError(400, f"{found}; wanted an object as OpenAI's chat completions take it", "invalid_value")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(first["loc"])
    match first["type"]:
        case "json_invalid":
            return ApiError(400, "the body is no valid JSON; wanted an object as OpenAI's chat completions take it")
        case "extra_forbidden":
            return ApiError(400, f"{param}: this server does not know it", "unknown_parameter", param)
        case "missing":
            return ApiError(400, f"{param}: it is missing", "missing_required_parameter", param)
        case "union_tag_invalid" | "union_tag_not_found":
            found = "found a part of another type" if first["type"].endswith("invalid") else "found a part without one"
            wanted = "text, image_url, input_audio, video_url or region"
            return ApiError(400, f"{param}.type: {found}; wanted {wanted}", "invalid_value", f"{param}.type")
        case "list_type" if param.endswith(".content"):
            return ApiError(400, f"{param}: wanted a text or a list of parts", "invalid_value", param)
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param}: {message}" if param else message, "invalid_value", param or None)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content[1].image_url.url`: the names of the cases of a union are left out."""
    path = ""
    for i, step in enumerate(location):
        before = location[max(0, i - 2) : i]
        is_case = before[-1:] == ("content",) and step in ("text", "parts")
        is_case |= len(before) == 2 and before[0] == "parts" and isinstance(before[1], int)
        is_case |= before[-1:] == ("stop",) and isinstance(step, str)
        if isinstance(step, int):
            path += f"[{step}]"
        elif not is_case:
            path += f".{step}" if path else step
    return path[:_MAX_PATH]


def _check_supported(request: ChatRequest) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name}: this server does not support it; leave it out", "unsupported_parameter", name)
    for i, message in enumerate(request.messages):
        for name, neutral in _OF_MESSAGES.items():
            value, param = getattr(message, name), f"messages[{i}].{name}"
            if value is not None and value not in neutral:
                raise ApiError(400, f"{param}: this server does not support it", "unsupported_parameter", param)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only where stream is true", "invalid_value", "stream_options")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only where logprobs is true", "invalid_value", "top_logprobs")


def _check_sizes(request: ChatRequest, limits: Limits) -> None:
    def refuse(found: int, most: int, param: str, what: str) -> None:
        if found > most:
            raise ApiError(400, f"{param}: found {found} {what}; wanted up to {most}", "invalid_value", param)

    refuse(len(request.messages), limits.messages, "messages", "messages")
    refuse(request.n or 1, limits.choices, "n", "answers")
    refuse(request.max_tokens or 1, limits.new_tokens, "max_tokens", "tokens")
    refuse(request.max_completion_tokens or 1, limits.new_tokens, "max_completion_tokens", "tokens")
    refuse(len(stops(request)), MAX_STOPS, "stop", "texts")
    parts = [part for message in request.messages if not isinstance(message.content, str) for part in message.content]
    texts = [message.content for message in request.messages if isinstance(message.content, str)]
    texts += [part.text for part in parts if isinstance(part, TextPart)]
    refuse(len(parts), limits.parts, "messages", "parts")
    refuse(sum(map(len, texts)), limits.characters, "messages", "characters of text")
    for kind, most, what in (
        (ImagePart, limits.images, "pictures"),
        (VideoPart, limits.videos, "clips"),
        (AudioPart, limits.audios, "sounds"),
        (RegionPart, limits.regions, "regions"),
    ):
        refuse(sum(isinstance(part, kind) for part in parts), most, "messages", what)


def stops(request: ChatRequest) -> tuple[str, ...]:
    """The texts that end an answer."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
