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
from mmchat.tasks.image_chat import ImageChat  # noqa: E402
from mmchat.tasks.instruct import Instruct  # noqa: E402
from mmchat.tasks.point import Point  # noqa: E402
from mmchat.tasks.rec import REC  # noqa: E402
from mmchat.tasks.reg import REG  # noqa: E402
from mmchat.tasks.spot import Spot  # noqa: E402
from mmchat.tasks.transcribe import Transcribe  # noqa: E402
from mmchat.tasks.visdial import VisDial  # noqa: E402
from mmchat.tasks.vqa import VQA  # noqa: E402

TASKS: dict[str, Task] = {
    "caption": Caption(),
    "instruct": Instruct(),
    "point": Point(),
    "rec": REC(),
    "reg": REG(),
    "spot": Spot(),
    "transcribe": Transcribe(),
    "visdial": VisDial(),
    "image_chat": ImageChat(),
    "vqa": VQA(),
}
