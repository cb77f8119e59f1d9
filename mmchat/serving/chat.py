"""One chat completion: its body read within bounds, its answers asked for together, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mmchat.conversation import Conversation
from mmchat.errors import SampleError
from mmchat.inference.generate import Decoding
from mmchat.serving.answer import Answer, Ask, EngineError, EngineFull, Piece
from mmchat.serving.errors import ApiError, internal, of_sample
from mmchat.serving.requests import ChatRequest, parse_request, stops
from mmchat.serving.responses import DONE, PING, Reply, Said, event, regions_of, usage_of
from mmchat.serving.service import Call, Model, Service

_LOG = logging.getLogger("mmchat.serving")
# Below it, the division of the logits would overflow, and the likeliest token is all there is anyway.
_LEAST_TEMPERATURE = 1e-3
# So many times the body that may be.
_THROWN_AWAY = 4

T = TypeVar("T")


async def complete(service: Service, request: Request) -> Response:
    """POST /v1/chat/completions. Raises ApiError, and ClientDisconnect where nobody waits for the answer any more."""
    call: Call = request.state.call
    model = service.model
    _check_types(request)
    body = await _read_body(service, request, call)
    asked: ChatRequest = await model.reader.in_thread(parse_request, body, service.limits)
    del body
    if asked.model is not None and asked.model != model.name:
        raise ApiError(
            404, f"there is no model {asked.model[:100]!r} here, only {model.name!r}", "model_not_found", "model"
        )
    gone = asyncio.create_task(_until_gone(request.receive))
    try:
        conversation = await _unless(gone, model.reader.conversation(asked, partial(service.hold, call)))
        answers = _submit(service.model, asks_of(asked, conversation, model, service.limits.default_new_tokens))
    except BaseException:
        gone.cancel()
        raise
    running = Running(answers, call)
    reply = Reply(f"chatcmpl-{call.id.removeprefix('req_')}", int(time.time()), model.name, bool(asked.logprobs))
    try:
        if asked.stream:
            has_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            stream = _Stream(service, model, conversation, running, reply, gone, has_usage)
            await stream.begin()
            return stream
        said = await _unless(gone, running.all())
        regions = [
            await model.reader.in_thread(regions_of, one.text, conversation, model.loaded.template) for one in said
        ]
        return JSONResponse(reply.whole(said, regions, usage_of(running.answers)))
    except BaseException:
        running.close()
        gone.cancel()
        raise
    finally:
        if not asked.stream:
            running.close()
            gone.cancel()


def asks_of(asked: ChatRequest, conversation: Conversation, model: Model, default_new_tokens: int) -> list[Ask]:
    """One for each answer; the seeds of several follow each other."""
    temperature = model.temperature if asked.temperature is None else asked.temperature
    top_p = 1.0 if asked.top_p is None else asked.top_p
    if temperature < _LEAST_TEMPERATURE or top_p == 0:
        temperature, top_p = 0.0, 1.0
    num_tokens = asked.max_completion_tokens or asked.max_tokens or default_new_tokens
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    return [
        Ask(conversation, Decoding(num_tokens, temperature, top_p, (seed + i) % 2**63), stops(asked), top)
        for i in range(asked.n or 1)
    ]


def _submit(model: Model, asks: Sequence[Ask]) -> list[Answer]:
    """All of them, or none."""
    answers: list[Answer] = []
    try:
        for ask in asks:
            answers.append(model.engine.submit(ask))
    except EngineFull as error:
        for answer in answers:
            answer.cancel()
        raise ApiError(
            503, "the server is full; try again", "server_full", retry_after_s=error.retry_after_s
        ) from error
    return answers


def _check_types(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"found the content type {kind[:100]!r}; wanted application/json", "unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "found a compressed body; wanted it as it is", "unsupported_media_type")


async def _read_body(service: Service, request: Request, call: Call) -> bytes:
    """Never keeps more of it than may be. Raises ApiError, and ClientDisconnect."""
    limits = service.limits
    too_large = ApiError(413, f"the body is too large; wanted up to {limits.body_bytes} bytes", "body_too_large")
    is_too_large = int(request.headers.get("content-length", 0)) > limits.body_bytes
    if is_too_large and "expect" in request.headers:  # it waits for leave to send
        raise too_large
    body, num_sent = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                num_sent += len(chunk)
                is_too_large |= num_sent > limits.body_bytes
                if is_too_large:
                    # What it still sends is thrown away: a client that writes would not see the answer.
                    body.clear()
                    if num_sent > _THROWN_AWAY * limits.body_bytes:
                        raise too_large
                    continue
                service.hold(call, len(chunk))
                body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body took over {limits.body_timeout_s:g} s", "body_timeout") from None
    if is_too_large:
        raise too_large
    return bytes(body)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _unless(gone: asyncio.Task[None], work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClientDisconnect as soon as the client is gone."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()


class Running:
    """The answers to one request, read together. A full queue stops the reading; the pieces then wait in the engine."""

    def __init__(self, answers: Sequence[Answer], call: Call) -> None:
        self.answers = answers
        self.call = call
        self.said = [Said() for _ in answers]
        self.num_left = len(answers)
        self._queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(maxsize=len(answers))
        self._readers = [asyncio.create_task(self._read(i, answer)) for i, answer in enumerate(answers)]

    async def next(self, timeout_s: float | None = None) -> tuple[int, Piece] | None:
        """The next piece and its answer's number; None where nothing came in time, or where all are over.

        Raises ApiError for a prompt that cannot be used; EngineError.
        """
        while self.num_left:
            try:
                async with asyncio.timeout(timeout_s):
                    number, piece = await self._queue.get()
            except TimeoutError:
                return None
            if isinstance(piece, SampleError):
                raise _too_long(piece) from piece
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                self.num_left -= 1
                if self.said[number].finish is None:
                    raise EngineError("an answer ended without its last piece")
                continue
            if self.call.first_s is None:
                self.call.first_s = self.call.seconds
            self.said[number].add(piece)
            return number, piece
        return None

    async def all(self) -> list[Said]:
        while await self.next() is not None:
            continue
        return self.said

    def close(self) -> None:
        """Cancels what still runs, and counts."""
        for answer in self.answers:
            answer.cancel()
        for reader in self._readers:
            reader.cancel()
        call, first = self.call, self.answers[0]
        call.prompt_tokens, call.cached_tokens = first.prompt_tokens, first.cached_tokens
        call.completion_tokens = sum(answer.completion_tokens for answer in self.answers)
        call.finish = ",".join(one.finish or "cancelled" for one in self.said)

    async def _read(self, number: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                await self._queue.put((number, piece))
            await self._queue.put((number, None))
        except Exception as error:
            await self._queue.put((number, error))


def _too_long(error: SampleError) -> ApiError:
    if error.reason == "conversation too long":
        said = error.detail.partition(": ")[2] or error.detail
        return ApiError(400, f"{error.reason}: {said}", "context_length_exceeded", "messages")
    return of_sample(error)


class _Stream(Response):
    """Server-sent events of one request. A client that goes away cancels it at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        model: Model,
        conversation: Conversation,
        running: Running,
        reply: Reply,
        gone: asyncio.Task[None],
        has_usage: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.ping_s = service.limits.ping_s
        self.model = model
        self.conversation = conversation
        self.running = running
        self.reply = reply
        self.gone = gone
        self.has_usage = has_usage
        self._first: tuple[int, Piece] | None = None

    async def begin(self) -> None:
        """Waits a little for the first piece: until then, a refusal can still have its own status."""
        self._first = await _unless(self.gone, self.running.next(self.ping_s))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await _unless(self.gone, self._send_all(send))
        finally:
            self.running.close()
            self.gone.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
        except Exception:
            _LOG.exception("%s failed in its stream", self.running.call.id)
            body = event(internal(self.running.call.id).body())
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        running, reply = self.running, self.reply
        for number in range(len(running.answers)):
            yield self._event(reply.chunk(number, {"role": "assistant", "content": ""}))
        found, self._first = self._first, None
        while True:
            if found is None and running.num_left:
                yield PING
            if found is not None:
                number, piece = found
                if piece.text or piece.tokens:
                    yield self._event(reply.chunk(number, {"content": piece.text}, piece.tokens))
                if piece.finish is not None:
                    places = await self._regions(running.said[number].text)
                    if places:
                        yield self._event(reply.chunk(number, {"regions": places}))
                    yield self._event(reply.chunk(number, {}, finish=piece.finish))
            if not running.num_left:
                break
            found = await running.next(self.ping_s)
        if self.has_usage:
            yield event(reply.usage_chunk(usage_of(running.answers)))
        yield DONE

    async def _regions(self, text: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self.model.reader.in_thread(
            regions_of, text, self.conversation, self.model.loaded.template
        )
        return found

    def _event(self, chunk: dict[str, Any]) -> bytes:
        return event({**chunk, "usage": None} if self.has_usage else chunk)
