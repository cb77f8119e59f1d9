"""What the OpenAPI document says beyond what FastAPI finds out: bodies that the server reads and writes itself."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

from mmchat.serving.requests import ChatRequest


class _Answered(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorBody(_Answered):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(_Answered):
    error: ErrorBody


class NamedRegion(_Answered):
    """A place in a picture (`image`) or a clip (`video`), in original pixels; `start` and `end` are in the content."""

    image: int | None = None
    video: int | None = None
    time_s: float | None = None
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    tube: list[tuple[float, float, float, float, float]] | None = None
    start: int
    end: int
    text: str | None


class AnswerMessage(_Answered):
    role: Literal["assistant"]
    content: str
    regions: list[NamedRegion]


class Choice(_Answered):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class Usage(_Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ChatCompletion(_Answered):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


COMPLETION: dict[str, Any] = {
    "model": ChatCompletion,
    "description": "The answer; where `stream` is true, events that hold a chat.completion.chunk, an error or [DONE]",
    "content": {"text/event-stream": {"schema": {}}},
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorObject, "description": "The request is not answered; the message says why"},
    "5XX": {"model": ErrorObject, "description": "Not now, or a fault of the server"},
}


def describe(app: FastAPI, needs_key: bool) -> None:
    """Completes the document, which `app.openapi()` gives from then on."""
    document = app.openapi()
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = document["components"]
    components["schemas"].update(schema.pop("$defs"))
    components["schemas"]["ChatRequest"] = schema
    body = {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}
    document["paths"]["/v1/chat/completions"]["post"]["requestBody"] = {"required": True, "content": body}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        document["paths"]["/health"]["get"]["security"] = []
