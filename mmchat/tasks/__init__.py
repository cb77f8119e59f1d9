"""Things to talk about, and how each is scored: one file a task, its line in the table below."""

from __future__ import annotations

import random
import typing
from collections.abc import Sequence

from mmchat.conversation import Conversation, Record
from mmchat.tasks.question import Answer, Protocol, Question


class Task(typing.Protocol):
    """Phrases a task's facts, asks its questions and scores the answers."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """In loader workers: phrases the facts. Raises SampleError for facts that cannot be phrased."""

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """What an evaluation asks about a record, at least one question. Raises SampleError."""

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """How right one answer is, 0 to 1: what an evaluation's page sorts by."""

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """The field's own metrics. None stands for a record that could not be read; it counts, as wrong."""


# The table is at the end: a task may import the protocol above from here.
from mmchat.tasks.caption import Caption  # noqa: E402
from mmchat.tasks.directed import Directed  # noqa: E402
from mmchat.tasks.image_chat import ImageChat  # noqa: E402
from mmchat.tasks.instruct import Instruct  # noqa: E402
from mmchat.tasks.point import Point  # noqa: E402
from mmchat.tasks.rec import REC  # noqa: E402
from mmchat.tasks.refer import Refer  # noqa: E402
from mmchat.tasks.reg import REG  # noqa: E402
from mmchat.tasks.spoken import Spoken  # noqa: E402
from mmchat.tasks.spot import Ground, Spot  # noqa: E402
from mmchat.tasks.track import Track  # noqa: E402
from mmchat.tasks.transcribe import Transcribe  # noqa: E402
from mmchat.tasks.video_qa import VideoQA  # noqa: E402
from mmchat.tasks.visdial import VisDial  # noqa: E402
from mmchat.tasks.vqa import VQA  # noqa: E402

TASKS: dict[str, Task] = {
    "caption": Caption(),
    "directed": Directed(),
    "directed_audio": Directed("audio"),
    "directed_text": Directed("text"),
    "ground": Ground(),
    "instruct": Instruct(),
    "point": Point(),
    "rec": REC(),
    "refer": Refer(),
    "reg": REG(),
    "spoken": Spoken(),
    "spoken_audio": Spoken("audio"),
    "spoken_text": Spoken("text"),
    "spot": Spot(),
    "track": Track(),
    "transcribe": Transcribe(),
    "video_qa": VideoQA(),
    "visdial": VisDial(),
    "image_chat": ImageChat(),
    "vqa": VQA(),
}
