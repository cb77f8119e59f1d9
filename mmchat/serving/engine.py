"""Many conversations at once, one token of each a step: requests join and leave between tokens.

transformers' continuous batching does not serve this model: it runs on token ids alone, while here media tokens come as
embeddings and every token has gates of its own. So one thread runs the model, over a cache with a slot for each answer.
A turn of it makes the next token of every running answer at once and reads a bounded part of a prompt that waits, in
the same pass where the attention allows it. Prompts are prepared (rendered, decoded, encoded) by other threads.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import sys
import threading
import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from mmchat.batch import IGNORE, Batch, MediaBatch
from mmchat.errors import SampleError
from mmchat.inference.generate import choose
from mmchat.inference.load import Loaded
from mmchat.inference.slots import MixedCache, RowCache, SlotCache, check_cacheable, row_cache, states_of
from mmchat.models.head import logits_of
from mmchat.models.llm import SEGMENTS
from mmchat.serving.answer import Answer, Ask, EngineError, EngineFull, Piece, Request, Speaker, TokenScore
from mmchat.serving.media_cache import MediaCache
from mmchat.serving.prefixes import PrefixStore
from mmchat.serving.prompt import Reader, in_one_row, late_media

__all__ = ["Answer", "Ask", "Engine", "EngineError", "EngineFull", "Piece", "TokenScore"]

_LOG = logging.getLogger(__name__)

# Threads that prepare prompts: for those with video or sound, whose decoders may hang, and for all others.
_SLOW_READERS = 3
_QUICK_READERS = 2
# Lower priorities make the steps of many answers begin later, and so cost tokens; higher ones make single steps slow.
_READERS_NICENESS = 5
# Prompt tokens that are read while others answer: as many as make the pass this share longer than a step, within these
# bounds. In a pass of their own, few hardly take less time than many, as every pass reads all weights.
_MAX_EXTRA = 0.6
_MIN_CHUNK = 16
_MIN_CHUNK_ALONE = 64
_MAX_CHUNK = 512
# So many failed steps one after another mean that the device is lost.
_MAX_FAILURES = 3


class Engine:
    """The model's own thread and the queue in front of it. All public methods may be called from any thread.

    Between `start` and `close` nobody else may run the model: its gates belong to one forward pass at a time.
    """

    def __init__(
        self,
        loaded: Loaded,
        max_running: int = 16,
        max_waiting: int = 64,
        cache_tokens: int = 16384,
        slot_tokens: int = 65536,
        media_bytes: int = 256 << 20,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            max_running: answers that are written at the same time.
            max_waiting: requests beyond these that may wait.
            cache_tokens: tokens of finished conversations whose keys and values are kept for the next question.
            slot_tokens: bound for the running answers times the longest of them, prompts and room for answers counted;
                the next request waits where it would not fit. One alone always fits.
            media_bytes: of encoded media that is kept.
        Raises:
            ValueError: the LLM has states that cannot be batched this way.
        """
        check_cacheable(loaded.model.llm.config)
        self.loaded = loaded
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.slot_tokens = slot_tokens
        self.media = MediaCache(media_bytes)
        self._reader = Reader(loaded, self.media)
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._alive: set[Request] = set()
        self._ready: deque[Request] = deque()
        self._is_closing = False
        self._mean_s = 1.0  # that a request takes
        self._totals = dict.fromkeys(
            ("requests", "finished", "failed", "cancelled", "prompt_tokens", "cached_tokens", "completion_tokens"), 0
        )
        # The engine thread's own:
        self._rows: list[Request] = []  # by slot
        self._slots = SlotCache()
        self._prefixes = PrefixStore(cache_tokens)
        self._reading: Request | None = None
        self._late: tuple[dict[str, MediaBatch], dict[str, Tensor]] | None = None  # of the rows, until these change
        self._step_s = 0.0
        self._failures = 0
        self._can_mix = loaded.model.late is None and loaded.model.llm.config._attn_implementation == SEGMENTS
        self._chunk = _MIN_CHUNK if self._can_mix else _MIN_CHUNK_ALONE
        self._num_threads = torch.get_num_threads()
        self._settled = threading.Barrier(_QUICK_READERS + _SLOW_READERS + 1)
        self._thread = threading.Thread(target=self._run, name="mmchat-engine", daemon=True)
        self._quick: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Starts the threads."""
        self._thread.start()
        for lane, count in ((self._quick, _QUICK_READERS), (self._slow, _SLOW_READERS)):
            for _ in range(count):
                # Daemons: a decoder that hangs must not keep the process from ending.
                threading.Thread(target=self._prepare_all, args=(lane,), name="mmchat-reader", daemon=True).start()

    def close(self) -> None:
        """Ends the threads; requests that are not answered fail with EngineError."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._quick.put(None)
        self._slow.put(None)
        with self._wake:
            left = list(self._alive)
        for request in left:
            self._end(request, EngineError("the server is being stopped"))

    @property
    def is_ready(self) -> bool:
        """Whether requests would be answered: started, not closing, and the last steps did not all fail."""
        return self._thread.is_alive() and not self._is_closing and self._failures < _MAX_FAILURES

    def submit(self, ask: Ask) -> Answer:
        """Queues a request. Raises EngineFull."""
        answer = Answer(self._look)
        request = Request(ask, answer)
        with self._wake:
            if self._is_closing:
                raise EngineFull(1)
            if len(self._alive) >= self.max_running + self.max_waiting:
                raise EngineFull(self._retry_after_s())
            self._alive.add(request)
            self._totals["requests"] += 1
        may_hang = any(ref.modality != "image" and ref.data is not None for ref in ask.conversation.media)
        (self._slow if may_hang else self._quick).put(request)
        return answer

    def stats(self) -> dict[str, float]:
        """Gauges and totals since the start: requests, tokens, caches."""
        with self._wake:
            # A finished answer leaves its slot a moment after its last piece.
            running = len(self._alive.intersection(self._rows))
            return {
                "running": running,
                "waiting": len(self._alive) - running,
                "max_running": self.max_running,
                "max_waiting": self.max_waiting,
                "prefix_tokens": self._prefixes.num_tokens,
                "media_bytes": self.media.num_bytes,
                "step_seconds": self._step_s,
            } | {f"{name}_total": value for name, value in self._totals.items()}

    def _retry_after_s(self) -> int:
        return min(60, max(1, math.ceil(self._mean_s * len(self._alive) / self.max_running)))

    def _look(self) -> None:
        """Somebody has cancelled."""
        with self._wake:
            self._wake.notify_all()

    # ---- the readers' threads

    def _prepare_all(self, lane: queue.SimpleQueue[Request | None]) -> None:
        # On a CPU, steps go before pictures. Where OpenMP has more threads than there are cores, they no longer wait
        # awake for the next operation: on two cores, readers with two threads each made steps twice as long.
        _use_threads(max(1, self._num_threads // 4))
        self._settled.wait()
        if sys.platform == "linux":  # where threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _READERS_NICENESS)
        while (request := lane.get()) is not None:
            self._prepare(request)
            del request  # it holds media, and the next one may be long in coming
        lane.put(None)  # for the next thread

    def _prepare(self, request: Request) -> None:
        conversation = request.conversation
        if conversation is None or request.answer.is_cancelled:
            return
        try:
            prompt = self._reader.read(conversation)
        except SampleError as error:
            self._end(request, error)
            return
        except Exception:
            _LOG.exception("a request could not be prepared")
            self._end(request, EngineError("the model failed while it read the media of this request"))
            return
        room = int(self.loaded.model.llm.config.max_position_embeddings) - len(prompt)
        request.prompt = prompt
        max_tokens = min(request.decoding.max_new_tokens, room)
        request.speaker = Speaker(self.loaded.template, request.stop, request.answer, max_tokens)
        request.gates = torch.from_numpy(prompt.gates[-1].copy())
        request.answer.prompt_tokens = len(prompt)
        request.conversation = None
        with self._wake:
            if request in self._alive:
                self._ready.append(request)
                self._wake.notify_all()

    # ---- the engine's thread

    @torch.no_grad()
    def _run(self) -> None:
        self._settled.wait()
        _use_threads(self._num_threads)
        while True:
            with self._wake:
                while not (self._is_closing or self._rows or self._reading or self._ready or self._any_cancelled()):
                    self._wake.wait()
                if self._is_closing:
                    return
            try:
                self._turn()
            except Exception as error:
                _LOG.exception("a step failed, and the %d running answers with it", len(self._rows))
                self._fail_running()
                self._count_failure(error)

    def _any_cancelled(self) -> bool:
        return any(request.answer.is_cancelled for request in self._alive)

    def _turn(self) -> None:
        self._drop_cancelled()
        self._reading = self._reading or self._next_ready()
        went_on = self._reading is not None and self._read_on(self._reading)
        if self._rows and not went_on:
            self._step()

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = {request for request in self._alive if request.answer.is_cancelled}
            if not gone:
                return
            self._ready = deque(request for request in self._ready if request not in gone)
        if self._reading in gone:
            self._reading = None
        for row in range(len(self._rows) - 1, -1, -1):
            if self._rows[row] in gone:
                self._leave(row)
        for request in gone:
            self._end(request)

    def _read_on(self, request: Request) -> bool:
        """Reads a part of a prompt, so small that the running answers hardly feel it.

        Returns whether the running answers went on in the same pass, which costs less than two.
        """
        assert request.cache is not None
        model, prompt, rows = self.loaded.model, request.prompt, len(self._rows)
        mixes = bool(rows) and self._can_mix
        begun_s, begin = time.perf_counter(), request.num_read
        request.num_read = end = min(len(prompt), begin + (self._chunk if rows else _MAX_CHUNK))
        try:
            batch, tokens = prompt.part(begin, end, model.late is not None)
            cache: RowCache | MixedCache = request.cache
            if mixes:
                self._slots.begin_step()
                batch, cache = in_one_row(self._next_tokens({}), batch), MixedCache(self._slots, request.cache)
            hidden = model.hidden(batch.to(self.loaded.device), cache, None, tokens, mixes)
        except Exception as error:
            self._fail_reading(request, error)
            return False
        if mixes:
            self._go_on(hidden[0, :rows])
        try:
            if end == len(prompt):
                self._begin_answer(request, hidden[:, -1])
        except Exception as error:
            self._fail_reading(request, error)
        if rows:
            self._fit_chunk(end - begin, time.perf_counter() - begun_s, mixes)
        return mixes

    def _fit_chunk(self, num_read: int, taken_s: float, mixes: bool) -> None:
        """Makes the next parts of prompts shorter or longer, by what it took to read one of num_read tokens."""
        extra_s = taken_s - self._step_s
        if extra_s > _MAX_EXTRA * self._step_s:
            self._chunk = max(_MIN_CHUNK if mixes else _MIN_CHUNK_ALONE, min(num_read, self._chunk) // 2)
        elif num_read == self._chunk and extra_s < 0.4 * _MAX_EXTRA * self._step_s:
            self._chunk = min(_MAX_CHUNK, self._chunk * 2)

    def _fail_reading(self, request: Request, error: Exception) -> None:
        _LOG.error("a prompt could not be read", exc_info=error)
        self._reading = None
        self._prefixes.clear()
        self._count_failure(error)
        self._end(request, EngineError("the model failed on this request"))

    def _next_ready(self) -> Request | None:
        """The request that has waited longest, if there is a slot and room for it."""
        with self._wake:
            if not self._ready or len(self._rows) >= self.max_running:
                return None
            longest = max(request.room for request in (*self._rows, self._ready[0]))
            if self._rows and longest * (len(self._rows) + 1) > self.slot_tokens:
                return None
            request = self._ready.popleft()
        # The last token is read in any case: it tells the first one of the answer.
        known, states = self._prefixes.longest(request.prompt.marks[:-1])
        request.cache, request.num_read = row_cache(states, known), known
        request.answer.cached_tokens = known
        return request

    def _begin_answer(self, request: Request, hidden: Tensor) -> None:
        """The first token behind a prompt that has been read; hidden: [1, dim] of its last position."""
        assert request.cache is not None
        states = states_of(request.cache)
        self._reading = request.cache = None
        with self._wake:
            self._totals["prompt_tokens"] += len(request.prompt)
            self._totals["cached_tokens"] += request.answer.cached_tokens
        is_over = self._say([request], logits_of(self.loaded.model.llm, hidden))[0]
        if request.is_sound:
            self._prefixes.put(request.prompt.marks, states)
            self._failures = 0
        if not is_over:
            self._slots.join(states)
            self._rows.append(request)
            self._late = None

    def _step(self) -> None:
        """The next token of every row."""
        begun_s = time.perf_counter()
        self._slots.begin_step()
        media, tokens = self._late_media()
        batch, device = self._next_tokens(media), self.loaded.device
        hidden = self.loaded.model.hidden(batch.to(device), self._slots, self._slots.mask(device), tokens)
        self._go_on(hidden[:, -1])
        taken_s = time.perf_counter() - begun_s
        self._step_s = 0.8 * self._step_s + 0.2 * taken_s if self._step_s else taken_s

    def _next_tokens(self, media: dict[str, MediaBatch]) -> Batch:
        """The newest token of every row, [rows, 1], which has not been read yet."""
        ids = torch.tensor([[request.speaker.ids[-1]] for request in self._rows])
        return Batch(
            token_ids=ids,
            labels=torch.full_like(ids, IGNORE),
            segment_ids=torch.zeros_like(ids),
            positions=torch.tensor(self._slots.lengths)[:, None],
            presence=torch.stack([request.gates for request in self._rows])[:, None],
            media=media,
        )

    def _go_on(self, hidden: Tensor) -> None:
        """Says the next token of every row, whose newest has now been read; hidden: [rows, dim]."""
        self._slots.end_step()
        is_over = self._say(self._rows, logits_of(self.loaded.model.llm, hidden))
        for row in range(len(self._rows) - 1, -1, -1):
            if is_over[row]:
                self._remember(row)
                self._leave(row)
        self._failures = 0

    def _late_media(self) -> tuple[dict[str, MediaBatch], dict[str, Tensor]]:
        """Under late fusion the media of all rows, which every step looks at; else none."""
        if self.loaded.model.late is None:
            return {}, {}
        if self._late is None:
            self._late = late_media([request.prompt for request in self._rows])
        return self._late

    def _say(self, requests: list[Request], logits: Tensor) -> list[bool]:
        """Chooses a token for each of the requests, logits [requests, vocabulary]; returns which answers are over."""
        likeliest = logits.argmax(-1, keepdim=True)
        is_finite = logits.gather(-1, likeliest)[:, 0].isfinite().tolist()  # argmax finds a nan
        greedy = likeliest[:, 0].tolist()
        is_over = []
        for row, request in enumerate(requests):
            if not is_finite[row]:
                _LOG.error("the logits of an answer are not finite")
                request.is_sound = False
                self._end(request, EngineError("the model's output for this request is not finite"))
                is_over.append(True)
                continue
            chosen = greedy[row]
            if request.decoding.temperature > 0:
                chosen = int(choose(logits[row : row + 1], request.decoding, request.generator))
            piece = request.speaker.say(chosen, self._score(request, logits[row], chosen))
            is_over.append(piece is not None and piece.finish is not None)
            if is_over[-1]:
                self._end(request, last=piece)
            elif piece is not None:
                request.answer.put(piece)
        return is_over

    def _score(self, request: Request, logits: Tensor, chosen: int) -> TokenScore | None:
        count = request.top_logprobs
        if count is None:
            return None
        likelihoods = logits.log_softmax(-1)
        values, ids = likelihoods.topk(min(count, len(likelihoods)))
        top = zip(map(self._token_text, ids.tolist()), values.tolist(), strict=True)
        return TokenScore(self._token_text(chosen), chosen, float(likelihoods[chosen]), tuple(top))

    def _token_text(self, token_id: int) -> str:
        return str(self.loaded.template.tokenizer.decode([token_id]))

    def _remember(self, row: int) -> None:
        """Keeps what a finished answer has read and said; its last token was never read."""
        request = self._rows[row]
        if request.is_sound:
            said = request.prompt.answer_marks(request.speaker.ids[:-1])
            self._prefixes.put(np.concatenate([request.prompt.marks, said]), self._slots.copy_of(row))

    def _leave(self, row: int) -> None:
        """Frees a slot, which the last row takes."""
        self._slots.leave(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        self._late = None

    def _fail_running(self) -> None:
        reading = [] if self._reading is None else [self._reading]
        for request in [*self._rows, *reading]:
            self._end(request, EngineError("the model failed while it answered"))
        self._rows, self._slots, self._late, self._reading = [], SlotCache(), None, None
        self._prefixes.clear()

    def _count_failure(self, error: Exception) -> None:
        # Where memory ran out the device is well: a few prompts that are too long must not end the service.
        self._failures += not isinstance(error, torch.OutOfMemoryError)

    def _end(self, request: Request, error: Exception | None = None, last: Piece | None = None) -> None:
        """Takes a request off the books, once, before its reader hears of the end."""
        answer = request.answer
        with self._wake:
            if request not in self._alive:
                return
            self._alive.remove(request)
            request.conversation = None
            how = "cancelled" if answer.is_cancelled else "finished" if error is None else "failed"
            self._totals[how] += 1
            self._totals["completion_tokens"] += answer.completion_tokens
            if how == "finished":
                self._mean_s = 0.9 * self._mean_s + 0.1 * (time.monotonic() - request.begun_s)
        if last is not None:
            answer.put(last)
        answer.end(error)


def _use_threads(count: int) -> None:
    """How many threads an operation of the calling thread takes.

    A thread that has not asked yet takes what any other one has set last, also after it has set its own.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
