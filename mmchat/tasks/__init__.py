"""Things to talk about, and how each is scored: one file a task, its line in the table below."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from mmchat.conversation import Conversation, Record


class Task(Protocol):
    """Phrases a task's facts and scores its answers."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """In loader workers: phrases the facts. Raises SampleError for facts that cannot be phrased."""

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """The field's own metric; every record counts in the denominator."""


# The table is at the end: a task may import the protocol above from here.
from mmchat.tasks.caption import Caption  # noqa: E402
from mmchat.tasks.instruct import Instruct  # noqa: E402

TASKS: dict[str, Task] = {
    "caption": Caption(),
    "instruct": Instruct(),
}
