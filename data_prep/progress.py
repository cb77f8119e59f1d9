"""What long work says on stderr while it runs."""

from __future__ import annotations

import sys
import time
from datetime import timedelta


class Progress:
    """Every few seconds: how much is done, how fast, and how long the rest will take where that can be known."""

    def __init__(self, noun: str, whole: str = "the source", every_s: float = 5.0) -> None:
        self.noun, self.whole = noun, whole
        self.every_s = every_s
        self.num = self.num_bytes = 0
        self.share = 0.0
        self.start = self.said = self.first = time.monotonic()
        self.first_share = 0.0

    def add(self, num: int = 0, num_bytes: int = 0, share: float | None = None) -> None:
        """Counts what was done.

        Args:
            share: how far the whole work is now, 0 to 1, with what an earlier run did; None where that is not known.
        """
        now = time.monotonic()
        self.share = max(self.share, share or 0.0)
        if not self.num:  # what was found done costs no time, so the time left counts from here
            self.first, self.first_share = now, self.share
        self.num += num
        self.num_bytes += num_bytes
        if now - self.said >= self.every_s:
            self.said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        rate = self.num / (now - self.start)
        line = f"{self.num:,} {self.noun}, {rate:,.0f} a second, {self.num_bytes / 1e6:,.1f} MB"
        if self.share:
            line += f"; {self.share:.0%} of {self.whole}"
            if self.share > self.first_share:
                left = (now - self.first) * (1 - self.share) / (self.share - self.first_share)
                line += f", about {timedelta(seconds=round(left))} left"
        return line
