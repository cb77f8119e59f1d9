"""What goes into the engine and what comes out: requests, pieces of answers, and the handle of a running one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmchat.conversation import Conversation
from mmchat.data.chat_template import ChatTemplate
from mmchat.inference.generate import Decoding
from mmchat.inference.slots import RowCache
from mmchat.inference.text_stream import TextStream
from mmchat.serving.prompt import Prompt

Finish = Literal["stop", "length"]
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Ask:
    """One request.

    stop: texts that end the answer, which is cut before them. top_logprobs: how many alternatives a token is told with
    (0 to 20); None: no log-likelihoods at all. Raises ValueError for a number outside.
    """

    conversation: Conversation
    decoding: Decoding
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs: found {self.top_logprobs}; wanted 0 to {MAX_TOP_LOGPROBS}")
        if "" in self.stop:
            raise ValueError("stop: found an empty text, with which every answer would end at once; leave it out")


@dataclass(frozen=True)
class TokenScore:
    """A said token: its text, log-likelihood in nats at temperature 1, and the likeliest tokens in its place."""

    text: str
    token_id: int
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one has `finish`: "stop" (end marker or a stop text) or "length"."""

    text: str
    tokens: tuple[TokenScore, ...] = ()
    finish: Finish | None = None


class EngineError(RuntimeError):
    """The model failed while it answered, or the server ends; nothing that the request holds is to blame."""


class EngineFull(RuntimeError):
    """Too many requests wait already; to be tried again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the server is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Answer:
    """Handle of one running request, used from any thread or event loop.

    What nobody has read yet waits here as one piece, so that a slow reader neither stops the engine nor takes more
    memory than its own answer.

    prompt_tokens, cached_tokens (of the prompt, not read again): known when the first piece came; completion_tokens: at
    the end, end marker included.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.is_cancelled = False
        self._on_cancel = on_cancel
        self._lock = threading.Lock()
        self._texts: list[str] = []
        self._tokens: list[TokenScore] = []
        self._finish: Finish | None = None
        self._error: Exception | None = None
        self._is_over = False  # nothing more will be put
        self._wake: Callable[[], object] | None = None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yields the pieces, once; ends without a last one after `cancel`. A reader that goes away cancels.

        Raises:
            SampleError: media that cannot be used, a prompt that is too long.
            EngineError: the model failed.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the reader's loop has ended
                self.cancel()

        try:
            while True:
                piece, is_over = self._take(wake)
                if piece is not None:
                    yield piece
                elif is_over:
                    break
                else:
                    await arrived.wait()
                    arrived.clear()
            if self._error is not None:
                raise self._error
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request within one token and frees its place; again, or after the end, does nothing."""
        with self._lock:
            if self._is_over or self.is_cancelled:
                return
            self.is_cancelled = True
        self._on_cancel()
        self.end()

    # ---- the engine's side

    def put(self, piece: Piece) -> None:
        with self._lock:
            if self._is_over:
                return
            self._texts.append(piece.text)
            self._tokens += piece.tokens
            self._finish = piece.finish
            self._is_over = piece.finish is not None
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def end(self, error: Exception | None = None) -> None:
        """No piece will follow."""
        with self._lock:
            if self._is_over:
                return
            self._error = error
            self._is_over = True
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def _take(self, wake: Callable[[], object]) -> tuple[Piece | None, bool]:
        """Everything that has been put, as one piece; without any, `wake` is called when there is more."""
        with self._lock:
            texts, tokens, self._texts, self._tokens = self._texts, self._tokens, [], []
            finish, self._finish = self._finish, None
            if self.is_cancelled:
                return None, True
            if texts:
                return Piece("".join(texts), tuple(tokens), finish), False
            self._wake = wake
            return None, self._is_over


class Speaker:
    """Tokens of one answer to its pieces: text that is certain, with the scores of the tokens that it came from."""

    def __init__(self, template: ChatTemplate, stop: Sequence[str], answer: Answer, max_tokens: int) -> None:
        """stop: texts that end the answer. max_tokens: after so many it ends too."""
        self.answer = answer
        self.max_tokens = max_tokens
        self.ids: list[int] = []
        self._text = TextStream(template, stop)
        self._scores: list[tuple[int, TokenScore]] = []  # with the place in the text at which the token begins

    def say(self, token_id: int, score: TokenScore | None) -> Piece | None:
        """What is new with this token, if anything; the piece with `finish` is the last."""
        self.ids.append(token_id)
        self.answer.completion_tokens = len(self.ids)
        if score is not None:
            self._scores.append((self._text.length, score))
        text = self._text.feed(token_id)
        finish: Finish | None = "stop" if self._text.is_over else None
        if finish is None and len(self.ids) >= self.max_tokens:
            text += self._text.finish()
            finish = "length"
        return Piece(text, self._told(finish), finish) if text or finish is not None else None

    def _told(self, finish: Finish | None) -> tuple[TokenScore, ...]:
        """Scores of tokens whose text has been sent; of an answer that ended by its length, all of them."""
        if finish == "stop" and self.ids[-len(self._text.end_ids) :] == self._text.end_ids:
            del self._scores[-len(self._text.end_ids) :]
        count = sum(begin < self._text.sent or finish == "length" for begin, _ in self._scores)
        told, self._scores = self._scores[:count], self._scores[count:]
        return tuple(score for _, score in told)


class Request:
    """A request on its way: prepared, read, answered.

    Attributes:
        conversation: until it is prepared; it holds the media files.
        num_read: prompt tokens that are in `cache`, which only a request has whose prompt is being read.
        is_sound: the model's output for it was finite so far.
    """

    def __init__(self, ask: Ask, answer: Answer) -> None:
        self.decoding = ask.decoding
        self.stop = ask.stop
        self.top_logprobs = ask.top_logprobs
        self.answer = answer
        self.begun_s = time.monotonic()
        self.conversation: Conversation | None = ask.conversation
        self.generator = torch.Generator().manual_seed(ask.decoding.seed % (1 << 63))
        self.prompt: Prompt
        self.speaker: Speaker
        self.gates: Tensor  # [modalities], of every token of the answer
        self.cache: RowCache | None = None
        self.num_read = 0
        self.is_sound = True

    @property
    def room(self) -> int:
        """Tokens that its slot may come to hold."""
        return len(self.prompt) + self.speaker.max_tokens
