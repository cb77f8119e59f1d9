"""Referring in time: when and where in a video is what an expression names?

Facts: {"expressions": ["...", ...], "tube": [[time_s, x1, y1, x2, y2], ...]}: each of the expressions names what is in
these boxes, in pixels of the first video, at rising seconds from its first frame; between two of them it moves evenly.
Or {"expressions": [...], "interval": [start_s, end_s]}, where only the time is known: then only that is asked for.
Optionally "fps": frames a second on which tubes are compared, where it is not `mmchat.metrics.tubes.FPS`; and "more":
further such facts about the same video, some of which are asked first.

A tube is answered as one, an interval as the words "@1.5s-4.0s".
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise

from mmchat.conversation import Conversation, Part, Record, Region
from mmchat.errors import SampleError
from mmchat.metrics.tubes import FPS, Interval, interval_iou, score_intervals, score_tubes, tube_ious
from mmchat.region_marks import MAX_TIME_S
from mmchat.regions import check_end
from mmchat.tasks.facts import drawn, region_of, shown_in, texts_of
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, last_question
from mmchat.tasks.rec import Exchange, conversation_of, named

TRACK = (
    "When and where in the video is this: {}",
    "Track: {}",
    "Follow this through the video: {}",
    "Where is {} while it happens?",
    "Give the boxes of this over time: {}",
    "Track {}.",
    "Follow {}.",
    "Locate this in time and space: {}",
    "Mark this from when it begins to when it ends: {}",
    "Show me {} over time.",
    "Keep a box on {}.",
    "At which times and places do you see {}?",
    "Where does {} go, and when?",
    "Boxes over time, please: {}",
)
WHEN = (
    "When in the video is this: {}",
    "When does this happen: {}",
    "From when to when do you see this? {}",
    "Find the moment: {}",
    "Give the beginning and the end of this in seconds: {}",
    "At which time is this: {}",
    "Which part of the video shows this? {}",
    "Locate this in time: {}",
    "Between which seconds does this happen? {}",
    "Start and end, please: {}",
    "When do we see {}?",
    "Time span of this: {}",
    "How long, and from when on: {}",
)
_INTERVAL = re.compile(r"@(\d+(?:\.\d*)?)s?\s*-\s*@?(\d+(?:\.\d*)?)s", re.ASCII)


class Track:
    """A turn an expression."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        media = _video(record)
        *others, own = drawn(record, rng)
        # Of several expressions of one tube one alone is asked for: the first would tell the others' answer.
        asked = {str(_place(one)): one for one in others if _place(one) != _place(own)}
        header = record.media[media].header
        for one in (*asked.values(), own):
            if not isinstance(place := _place(one), Region):  # tubes are looked at with their boxes
                check_end(place, None if header is None else header.duration_s)
        return conversation_of(record, [_exchange(one, media, rng) for one in [*asked.values(), own]])

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One an expression's facts, with one of its expressions."""
        return asked_alone(record, lambda one: last_question(self.conversation(one, protocol.rng(one.key)), one))

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """vIoU of tubes, tIoU of intervals."""
        return 0.0 if question.problem else _ious(answer, question)[1]

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """What `mmchat.metrics.tubes` says of tubes and of intervals, each where such are asked for.

        An answer must name exactly one tube, or one interval; another one is worth 0. What could not be read counts as
        0 in either. parse_failures: the share of all questions whose answer does not name one, or has a broken mark.
        """
        tubes, intervals, num_failed, num_unread = list[tuple[float, float]](), list[float](), 0, 0
        for answer, question in zip(answers, questions, strict=True):
            if question is None or question.problem:
                num_unread += 1
                continue
            ious = _ious(answer, question)
            if _wants_tube(question):
                tubes.append(ious)
            else:
                intervals.append(ious[0])
            num_failed += not answer.error and (answer.num_failed > 0 or _found(answer, question) is None)
        scores: dict[str, float] = {}
        if tubes or not intervals:
            scores |= score_tubes([*tubes, *[(0.0, 0.0)] * num_unread])
        if intervals:
            scores |= score_intervals([*intervals, *[0.0] * num_unread])
        return scores | {"parse_failures": num_failed / len(questions)}


def interval_text(interval: Interval) -> str:
    """An interval in words, to a tenth of a second."""
    return f"@{interval[0]:z.1f}s-{interval[1]:z.1f}s"


def read_interval(text: str) -> Interval | None:
    """The interval that a text names; None where it names none, several, or one that ends before it starts."""
    found = _INTERVAL.findall(text)
    if len(found) != 1:
        return None
    start_s, end_s = map(float, found[0])
    return (start_s, end_s) if start_s <= end_s <= MAX_TIME_S else None


def _exchange(one: Record, media: int, rng: random.Random) -> Exchange:
    expression, place = rng.choice(texts_of(one, "expressions")), _place(one)
    if isinstance(place, Region):
        return [named(rng.choice(TRACK), expression)], [Region(media, tube=place.tube)]
    answer: list[Part] = [interval_text(place)]
    return [named(rng.choice(WHEN), expression)], answer


def _video(record: Record) -> int:
    """Which of the record's media the expressions are about."""
    media = shown_in(record)
    if record.media[media].modality != "video":
        raise SampleError("no video", f"{record.key}: found a picture first; wanted the video that is asked about")
    return media


def _place(one: Record) -> Region | Interval:
    """The tube of the facts, of media item 0, or their interval. Raises SampleError."""
    facts = one.facts
    try:
        if "tube" in facts:
            region = region_of({"media": 0, "tube": facts["tube"]})
            times_s = [box[0] for box in region.tube or ()]
            if not times_s or not all(a < b for a, b in pairwise([-1e-9, *times_s, MAX_TIME_S])):
                raise ValueError(f"times {times_s!s:.100}, wanted seconds that rise")
            return region
        start_s, end_s = (float(time_s) for time_s in facts["interval"])
    except (KeyError, TypeError, ValueError) as error:
        raise SampleError(
            "no tube",
            f"{one.key}: wanted boxes [time_s, x1, y1, x2, y2] under 'tube', or [start_s, end_s] under "
            f"'interval': {error!r:.200}",
        ) from error
    if not 0 <= start_s < end_s <= MAX_TIME_S:
        raise SampleError("impossible time", f"{one.key}: found the interval {facts['interval']}; wanted start < end")
    return start_s, end_s


def _wants_tube(question: Question) -> bool:
    return any(isinstance(part, Region) for part in question.reference)


def _found(answer: Answer, question: Question) -> Region | Interval | None:
    """The one tube of an answer, or its one interval, where that is wanted; None where there is not exactly one."""
    if not _wants_tube(question):
        return None if answer.regions else read_interval(answer.text)
    media = _video(question.record)
    is_tube = len(answer.regions) == 1 and answer.regions[0].tube is not None and answer.regions[0].media == media
    return answer.regions[0] if is_tube and not answer.num_failed else None


def _ious(answer: Answer, question: Question) -> tuple[float, float]:
    """tIoU and vIoU; of an interval tIoU twice; 0 where there is not exactly one answer of the kind that is wanted."""
    found, wanted = (None if answer.error else _found(answer, question)), _place(question.record)
    if isinstance(found, Region) and isinstance(wanted, Region) and found.tube and wanted.tube:
        return tube_ious(found.tube, wanted.tube, _fps(question.record))
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        both = interval_iou(found, wanted)
        return both, both
    return 0.0, 0.0


def _fps(record: Record) -> float:
    found = record.facts.get("fps")
    return float(found) if isinstance(found, int | float) and 0 < found <= 1000 else FPS
