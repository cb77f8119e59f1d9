"""Instruction following and open chat: turns of text, media and regions.

Facts: {"turns": [{"role": "user", "parts": [{"text": "..."} | {"media": 0} | {"region": {"media": 0,
"box": [...]}}], "learn": optional bool}]}; `media` counts through the record's media.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from mmchat.conversation import Conversation, Part, Record, Region, Role, Turn
from mmchat.errors import SampleError
from mmchat.metrics.boxes import Box, matched
from mmchat.metrics.text import score_texts, token_f1, words_alone
from mmchat.regions import in_place
from mmchat.tasks.facts import region_of
from mmchat.tasks.question import Answer, Protocol, Question, last_question

POINT_SHARE = 0.1  # a point is compared as a square of this share of its picture's longer side


class Instruct:
    """Phrases turns as they are, and scores the last answer."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        try:
            return _conversation(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SampleError("unreadable facts", f"{record.key}: turns cannot be read: {error!r}") from error

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """The last answer, after all turns before it as they are."""
        return [last_question(self.conversation(record, protocol.rng(record.key)), record)]

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
        A point is compared as a square around it (POINT_SHARE). Where it has none, the texts are compared as they are.
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
    """How many regions of the reference are found, each by another one of the same kind in the same picture."""
    found, wanted = (_by_place(regions, question) for regions in (answer.regions, _regions(question)))
    return sum(len(matched(found.get(place, []), boxes, protocol.iou)) for place, boxes in wanted.items())


def _by_place(regions: Sequence[Region], question: Question) -> dict[tuple[int, bool], list[Box]]:
    """Boxes, and points as boxes, by picture and kind. A tube, which has no text, is never found."""
    boxes: dict[tuple[int, bool], list[Box]] = defaultdict(list)
    for region in regions:
        if region.point is not None:
            header = question.conversation.media[region.media].header
            # Of a picture of unknown size the square has none, and is never found.
            side = max(header.width or 0, header.height or 0) * POINT_SHARE if header is not None else 0.0
            x, y = region.point
            boxes[region.media, True].append((x - side / 2, y - side / 2, x + side / 2, y + side / 2))
        elif region.box is not None:
            boxes[region.media, False].append(region.box)
    return boxes


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
