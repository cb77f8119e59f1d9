"""Free referential dialogue: places are asked for, described and pointed at in turn. Facts as those of
`mmchat.tasks.rec`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

from mmchat.conversation import Conversation, Record, Region
from mmchat.errors import SampleError
from mmchat.metrics.boxes import Box, centre, is_inside
from mmchat.tasks.facts import boxes_of, shown_in
from mmchat.tasks.prompts import AT_POINT, POINT_TO
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, each_alone, last_question
from mmchat.tasks.rec import REC, Exchange, Target, conversation_of, locate, named, parse_failures, placed, targets
from mmchat.tasks.reg import REG, describe

# How often each kind of turn is drawn. REC comes first, so an evaluation with one phrasing asks that alone.
LOCATE_WEIGHT = 0.5
DESCRIBE_WEIGHT = 0.3
AT_POINT_WEIGHT = 0.1
POINT_TO_WEIGHT = 0.1


class Refer:
    """A turn a target, each of a kind drawn anew."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return _conversation(record, _all_boxes(record), rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One a target, of a kind that the protocol draws; `phrasing: first` asks where each thing is."""
        boxes = _all_boxes(record)
        return asked_alone(record, lambda one: last_question(_conversation(one, boxes, protocol.rng(one.key)), one))

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """What `rec` and `reg` say of theirs; whether a point is right."""
        if question.problem:
            return 0.0
        match _kind(question):
            case "describe":
                return REG().judge(answer, question, protocol)
            case "point":
                return float(_is_pointed(answer, question))
        return REC().judge(answer, question, protocol)

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Scores of `rec` under `locate_`, of `reg` under `describe_`, and under `point_` the share of answers that
        are one point within the target's box. A question that could not be read is wrong in each kind that was asked.
        """
        kinds = [None if question is None or question.problem else _kind(question) for question in questions]
        scores: dict[str, float] = {}
        for kind in sorted({kind for kind in kinds if kind} or {"locate"}):
            asked = [i for i, other in enumerate(kinds) if other in (kind, None)]
            said, about = [answers[i] for i in asked], [questions[i] if kinds[i] else None for i in asked]
            if kind == "point":
                right = sum(_is_pointed(a, q) for a, q in zip(said, about, strict=True) if q is not None)
                found = {"accuracy": right / len(said), "parse_failures": parse_failures(said, about)}
            else:
                found = (REG() if kind == "describe" else REC()).score(said, about, protocol)
            scores |= {f"{kind}_{name}": value for name, value in found.items()}
        return scores


def _conversation(record: Record, all_boxes: Sequence[Box], rng: random.Random) -> Conversation:
    return conversation_of(record, [_exchange(target, all_boxes, rng) for target in targets(record, rng)])


def _all_boxes(record: Record) -> list[Box]:
    """All that can be read."""
    boxes: list[Box] = []
    for one in each_alone(record):
        with suppress(SampleError):
            boxes += boxes_of(one, "boxes")
    return boxes


def _exchange(target: Target, all_boxes: Sequence[Box], rng: random.Random) -> Exchange:
    """One turn about a target. A point is asked about or answered only where it can mean one thing."""
    (kind,) = rng.choices(
        (locate, describe, _at_point, _point_to),
        (LOCATE_WEIGHT, DESCRIBE_WEIGHT, AT_POINT_WEIGHT, POINT_TO_WEIGHT),
    )
    if not target.boxes:
        return locate(target, rng)
    if kind in (_at_point, _point_to) and (len(target.boxes) > 1 or _is_shared(target.boxes[0], all_boxes)):
        kind = describe if kind is _at_point else locate
    return kind(target, rng)


def _at_point(target: Target, rng: random.Random) -> Exchange:
    return placed(rng.choice(AT_POINT), [_middle(target)]), [rng.choice(target.descriptions)]


def _point_to(target: Target, rng: random.Random) -> Exchange:
    return [named(rng.choice(POINT_TO), rng.choice(target.expressions))], [_middle(target)]


def _middle(target: Target) -> Region:
    return Region(target.media, point=centre(target.boxes[0]))


def _is_shared(box: Box, all_boxes: Sequence[Box]) -> bool:
    """Whether the box's centre lies in another one too. An equal box is the same thing, named by another target."""
    return any(other != box and is_inside(centre(box), other) for other in all_boxes)


def _kind(question: Question) -> str:
    """What was asked for, told by the question's right answer."""
    regions = [part for part in question.reference if isinstance(part, Region)]
    if regions:
        return "point" if regions[0].point is not None else "locate"
    return "describe" if question.record.facts["boxes"] else "locate"


def _is_pointed(answer: Answer, question: Question) -> bool:
    """Whether the answer is one point in the target's box."""
    media = shown_in(question.record)
    points = [region.point for region in answer.regions if region.point is not None and region.media == media]
    (box,) = boxes_of(question.record, "boxes")
    is_one = len(points) == 1 == len(answer.regions) and not answer.num_failed and not answer.error
    return is_one and is_inside(points[0], box)
