"""The one exception of a bad sample: it carries a short reason that can be counted."""

from __future__ import annotations


class SampleError(Exception):
    """One sample cannot be used; the run goes on without it.

    Attributes:
        reason: a short, stable phrase that log and reports count by, such as "undecodable image".
        detail: what was found, what was wanted and what to do, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        # An exception that crosses a process border is rebuilt from its arguments.
        return type(self), (self.reason, self.detail)
