"""What an evaluation or a judge says on stderr while it runs."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

SAY_EVERY_S = 30.0  # where the output is no terminal


class Progress:
    """One line on stderr that is written over; where that is no terminal, a line now and then."""

    def __init__(self, total: int, words: str = "{num:,} questions of {done} records") -> None:
        """words: what is said, with `num` and `done` of `say`; the time left comes behind it."""
        self.total, self.words = total, words
        self.first = 0.0  # records that were done before
        self.started = self.said = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def skip(self, done: float) -> None:
        """So many records were done by an earlier run; the time left counts from here."""
        self.first, self.started = done, time.monotonic()

    def say(self, num_questions: int, done: float) -> None:
        """Questions and records done so far; of a record of several questions, also a part of it."""
        now = time.monotonic()
        if done >= self.total or (not self.is_terminal and now - self.said < SAY_EVERY_S):
            return  # `end` says the rest
        self.said = now
        left = timedelta(seconds=round((now - self.started) / (done - self.first) * (self.total - done)))
        said = self.words.format(num=num_questions, done=f"{int(done):,}/{self.total:,}")
        line = f"{said}, {left} left"
        if self.is_terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self, num_questions: int) -> None:
        line = self.words.format(num=num_questions, done=f"{self.total:,}")
        print(f"\r{line}\033[K" if self.is_terminal else line, file=sys.stderr, flush=True)
