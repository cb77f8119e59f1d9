"""Answers as OpenAI's objects, whole or in chunks, and the places that they name in pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmchat.conversation import Conversation, Region, Turn
from mmchat.data.chat_template import ChatTemplate
from mmchat.errors import SampleError
from mmchat.inference.draw import named_regions
from mmchat.region_marks import marks
from mmchat.serving.answer import Answer, Piece, TokenScore

_LEAST_LOGPROB = -9999.0  # what OpenAI says of a token that was out of the question
# So much of a question is looked at for the words that name a place.
_NAMED_FROM = 2000


@dataclass
class Said:
    """One choice as far as it has come."""

    text: str = ""
    tokens: list[TokenScore] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


@dataclass(frozen=True)
class Reply:
    """What all objects of one response share."""

    id: str
    created: int
    model: str
    has_logprobs: bool

    def whole(self, said: Sequence[Said], regions: Sequence[list[dict[str, Any]]], usage: dict[str, Any]) -> Any:
        """A `chat.completion`."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": one.text, "refusal": None, "regions": places},
                "logprobs": self._logprobs(one.tokens),
                "finish_reason": one.finish,
            }
            for i, (one, places) in enumerate(zip(said, regions, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenScore] = (), finish: str | None = None
    ) -> Any:
        """A `chat.completion.chunk` of one choice."""
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> Any:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[TokenScore]) -> Any:
        if not self.has_logprobs:
            return None
        content = [
            {**_scored(token.text, token.logprob), "top_logprobs": [_scored(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _scored(text: str, logprob: float) -> dict[str, Any]:
    kept = logprob if math.isfinite(logprob) and logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
    return {"token": text, "logprob": kept, "bytes": list(text.encode())}


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's `usage`; the prompt counts once, however many answers it gets."""
    prompt, completion = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
    }


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def regions_of(text: str, conversation: Conversation, template: ChatTemplate) -> list[dict[str, Any]]:
    """The places that an answer names, in original pixels, each with where it stands in the answer and what it names.

    A place in a picture has `image`, counted from 0 over the pictures; one in a clip has `video` and its time. `start`
    and `end` are the mark's in `text`; `text` is the words that it belongs to, or None.
    """
    try:
        read = template.read_regions(text, conversation)
        if not read.regions:
            return []
        question = tuple(part[:_NAMED_FROM] if isinstance(part, str) else part for part in conversation.turns[-1].parts)
        asked = Conversation((*conversation.turns[:-1], replace(conversation.turns[-1], parts=question)))
        told = Conversation((*asked.turns, Turn("assistant", (text,))))
        words = [one.words for one in named_regions(told, template) if not one.is_asked]
    except SampleError:  # the model could not have answered what the template cannot read
        return []
    places = _places(text, read.parts, template.config.regions.dialect == "loc")
    number = _numbers(conversation)
    return [
        {**number[region.media], **_shape(region), "start": start, "end": end, "text": name or None}
        for (region, start, end), name in zip(places, words, strict=True)
    ]


def _places(text: str, parts: Sequence[str | Region], is_loc: bool) -> Iterator[tuple[Region, int, int]]:
    """Each region with the ends of its mark; `parts` is the text with its regions in place."""
    found = {mark.start: mark for mark in marks(text, is_loc)}
    place = left = 0
    start = end = 0
    for part in parts:
        if isinstance(part, str):
            place += len(part)
            continue
        if not left:  # the first region of the next mark
            mark = found[place]
            left = 1 if mark.is_tube else len(mark.groups)
            start, end = mark.start, mark.end
            place = end
        left -= 1
        yield part, start, end


def _numbers(conversation: Conversation) -> list[dict[str, int]]:
    """Which picture, or which clip, each item of the conversation is."""
    counts = {"image": 0, "video": 0, "audio": 0}
    numbers: list[dict[str, int]] = []
    for item in conversation.media:
        numbers.append({item.modality: counts[item.modality]})
        counts[item.modality] += 1
    return numbers


def _shape(region: Region) -> dict[str, Any]:
    shape: dict[str, Any] = {} if region.time_s is None else {"time_s": region.time_s}
    if region.box is not None:
        shape["box"] = [round(value, 2) for value in region.box]
    elif region.point is not None:
        shape["point"] = [round(value, 2) for value in region.point]
    else:
        shape["tube"] = [[round(value, 2) for value in box] for box in region.tube or ()]
    return shape
