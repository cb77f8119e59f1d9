"""Instruction following and open chat: turns of text, media and regions.

Facts: {"turns": [{"role": "user", "parts": [{"text": "..."} | {"media": 0} | {"region": {"media": 0,
"box": [...]}}], "learn": optional bool}]}; `media` counts through the record's media. In a video a region may have a
"time_s", or be a "tube": [[time_s, x1, y1, x2, y2], ...].

Of a test set alone: "more" holds further such facts about the same media, each asked alone, as the second wording of a
question; "missing_video" names a video that could not be had, so that its question counts as wrong and is not asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from mmchat.conversation import Conversation, Part, Record, Region, Role, Turn
from mmchat.errors import SampleError
from mmchat.metrics.boxes import Box, assigned, iou
from mmchat.metrics.text import score_texts, token_f1, words_alone
from mmchat.metrics.tubes import tube_ious
from mmchat.regions import in_place
from mmchat.tasks.facts import region_of
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, last_question

POINT_SHARE = 0.1  # a point is compared as a square of this share of its picture's longer side
TIME_SLACK_S = 0.5  # a place at a time is found at most this far from the right time


class Instruct:
    """Phrases turns as they are, and scores the last answer."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        try:
            return _conversation(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SampleError("unreadable facts", f"{record.key}: turns cannot be read: {error!r}") from error

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """The last answer, after all turns before it as they are; and that of each dialogue under "more", alone."""
        return asked_alone(record, lambda one: _asked(self.conversation(one, protocol.rng(one.key)), one))

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Token F1 of the words and the share of the regions that are found; the mean where there are both."""
        if answer.error:
            return 0.0
        wanted, num_found = _regions(question), _num_found(answer, question, protocol)
        parts = [num_found / max(len(wanted), len(answer.regions))] if wanted else []
        if _words(question) or not wanted:
            parts.append(token_f1(_said(answer, question), [_words(question)]))
        return sum(parts) / len(parts)

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Exact match and token F1.

        Where the right answer has regions, words are compared without what was read as a region on either side, and an
        exact match needs each right region found by one of the answer's, at the protocol's IoU, and no further one.
        A point is compared as a square around it (POINT_SHARE). In a video, a place at a time is found within half a
        second of it (TIME_SLACK_S), and a tube where vIoU is above the protocol's IoU. Where the right answer has no
        region, the texts are compared as they are.
        """
        pairs = list(zip(answers, questions, strict=True))
        said = [answer.said if question is None else _said(answer, question) for answer, question in pairs]
        wanted = [[] if question is None else [_words(question)] for question in questions]
        # Of an answer with another place the words count, and the match does not.
        placed = [
            wanted[i] if question is not None and _is_placed(answer, question, protocol) else []
            for i, (answer, question) in enumerate(pairs)
        ]
        return score_texts(said, wanted) | {"exact_match": score_texts(said, placed)["exact_match"]}


def _asked(conversation: Conversation, record: Record) -> Question:
    """The last question, with its problem where its video could not be had."""
    question = last_question(conversation, record)
    if "missing_video" in record.facts and not question.problem:
        return replace(question, problem=f"missing video: {record.facts['missing_video']!s:.200}")
    return question


def _words(question: Question) -> str:
    return words_alone(question.reference)


def _said(answer: Answer, question: Question) -> str | None:
    """The answer's words; None where there is no answer."""
    if answer.error:
        return None
    parts = in_place(answer.text, answer.regions, answer.num_failed) if _regions(question) else None
    return words_alone([answer.text] if parts is None else parts)


def _regions(question: Question) -> list[Region]:
    return [part for part in question.reference if isinstance(part, Region)]


def _is_placed(answer: Answer, question: Question, protocol: Protocol) -> bool:
    """Whether the answer's regions are those of the reference, where that has any."""
    wanted = _regions(question)
    return not wanted or _num_found(answer, question, protocol) == len(wanted) == len(answer.regions)


def _num_found(answer: Answer, question: Question, protocol: Protocol) -> int:
    """How many regions of the reference are found, each by another one of the same kind in the same item."""
    wanted = _regions(question)
    fits = [[j for j, right in enumerate(wanted) if _fits(one, right, question, protocol)] for one in answer.regions]
    return len(assigned(fits))


def _fits(found: Region, wanted: Region, question: Question, protocol: Protocol) -> bool:
    """Whether an answer's region is the right one, as `Instruct.score` says."""
    if found.media != wanted.media or (found.time_s is None) != (wanted.time_s is None):
        return False
    if found.time_s is not None and wanted.time_s is not None and abs(found.time_s - wanted.time_s) > TIME_SLACK_S:
        return False
    if found.tube and wanted.tube:
        return tube_ious(found.tube, wanted.tube)[1] > protocol.iou
    if found.point and wanted.point:
        return iou(_square(found, question), _square(wanted, question)) > protocol.iou
    if found.box and wanted.box:
        return iou(found.box, wanted.box) > protocol.iou
    return False


def _square(region: Region, question: Question) -> Box:
    """A point as a box."""
    assert region.point is not None, "only a point has a square"
    header = question.conversation.media[region.media].header
    # In a picture of unknown size the square has none, and is never found.
    side = max(header.width or 0, header.height or 0) * POINT_SHARE if header is not None else 0.0
    x, y = region.point
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def _conversation(record: Record) -> Conversation:
    facts = record.facts["turns"]
    shown = [part["media"] for turn in facts for part in turn["parts"] if "media" in part]
    turns = []
    for turn in facts:
        parts: list[Part] = []
        for part in turn["parts"]:
            match part:
                case {"text": str(text)}:
                    parts.append(text)
                case {"media": int(i)} if 0 <= i < len(record.media):
                    parts.append(record.media[i])
                case {"region": {"media": int(i)} as region} if i in shown:
                    # Regions count media as the conversation shows them.
                    parts.append(region_of(region | {"media": shown.index(i)}))
                case _:
                    raise ValueError(f"part {part!r:.200} among {len(record.media)} media")
        if turn["role"] not in get_args(Role) or not isinstance(turn.get("learn"), bool | None):
            raise ValueError(f"role {turn['role']!r:.100}, learn {turn.get('learn')!r:.100}")
        turns.append(Turn(turn["role"], tuple(parts), turn.get("learn")))
    return Conversation(tuple(turns))
