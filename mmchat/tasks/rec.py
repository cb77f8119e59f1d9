"""Referring expression comprehension: where is what an expression names?

Facts: {"expressions": ["...", ...], "boxes": [[x1, y1, x2, y2], ...]}: each of the expressions names all of the boxes,
in pixels of the first picture or video; without boxes, nothing in it is meant.
Optionally "descriptions": ["...", ...]: what is said of the target where a task asks for words (`mmchat.tasks.reg` and
`refer`), for targets some of whose expressions are good to ask with but not to answer with ("the thing on the left"). A
score takes either. Optionally "more": further such facts of the same picture, some of which are asked first, so that a
picture with fifty regions is stored and encoded once; of those with a box in common one alone is, as a place that was
said tells the next answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmchat.conversation import Conversation, Part, Record, Region, Turn
from mmchat.metrics.boxes import Box, Located, score_boxes
from mmchat.tasks.facts import boxes_of, drawn, shown_in, texts_of
from mmchat.tasks.prompts import LOCATE
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, last_question

NOTHING = "There is none."

Exchange = tuple[list[Part], list[Part]]  # a question and its answer


@dataclass(frozen=True)
class Target:
    """What one turn is about.

    Attributes:
        expressions: that name it in a question; descriptions: that name it in an answer.
        boxes: around all of it, in media item `media`; there may be none.
    """

    expressions: list[str]
    descriptions: list[str]
    boxes: list[Box]
    media: int


class REC:
    """A turn a target."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return conversation_of(record, [locate(target, rng) for target in targets(record, rng)])

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One a target, with one of its expressions: a set that counts each expression has a record for each."""
        return asked_alone(record, lambda one: last_question(self.conversation(one, protocol.rng(one.key)), one))

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """For one target its IoU, otherwise F1 of the boxes."""
        found = located(answer, question)
        return found.only_iou() if len(found.wanted) == 1 else found.f1(protocol.iou)

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """What `mmchat.metrics.boxes.score_boxes` says, and `parse_failures`.

        For one target that is RefCOCO's accuracy, where an answer of two boxes is wrong; for none or several, that of
        generalised grounding (gRefCOCO, arXiv 2308.16182). parse_failures: the share of questions whose answer has a
        broken mark, or no box where one was wanted; each of them counts as wrong too.
        """
        found = [
            None if question is None or question.problem else located(answer, question)
            for answer, question in zip(answers, questions, strict=True)
        ]
        return score_boxes(found, protocol.iou) | {"parse_failures": parse_failures(answers, questions)}


def targets(record: Record, rng: random.Random) -> list[Target]:
    """What to ask about in turn. Raises SampleError."""
    media = shown_in(record)
    return [
        Target(texts_of(one, "expressions"), _descriptions(one), boxes_of(one, "boxes"), media)
        for one in drawn(record, rng)
    ]


def words_of(record: Record) -> list[str]:
    """Everything that names the target: its expressions and descriptions. Raises SampleError."""
    return [*dict.fromkeys([*texts_of(record, "expressions"), *_descriptions(record)])]


def _descriptions(record: Record) -> list[str]:
    return texts_of(record, "descriptions" if "descriptions" in record.facts else "expressions")


def locate(target: Target, rng: random.Random) -> Exchange:
    """Asks where the things are that an expression names."""
    question = named(rng.choice(LOCATE), rng.choice(target.expressions))
    return [question], region_parts(target.boxes, target.media) or [NOTHING]


def named(prompt: str, expression: str) -> str:
    """The prompt with the expression in it."""
    # The prompt has marks of its own: not "Find a man..".
    return prompt.replace("{}", expression.rstrip(" .!?,;:") or expression)


def placed(prompt: str, regions: Sequence[Part]) -> list[Part]:
    """The prompt with regions in it."""
    before, _, after = prompt.partition("{}")
    return [part for part in (before, *regions, after) if part]


def conversation_of(record: Record, exchanges: Sequence[Exchange]) -> Conversation:
    """Questions and answers in turn, the record's media before the first."""
    turns: list[Turn] = []
    for question, answer in exchanges:
        turns.append(Turn("user", (*([] if turns else record.media), *question)))
        turns.append(Turn("assistant", tuple(answer)))
    return Conversation(tuple(turns))


def region_parts(boxes: Sequence[Box], media: int) -> list[Part]:
    """Boxes in a media item, a blank apart."""
    return spaced([Region(media, box=box) for box in boxes])


def spaced(regions: Sequence[Region]) -> list[Part]:
    """The regions, a blank apart."""
    parts: list[Part] = []
    for region in regions:
        parts += [*([" "] if parts else []), region]
    return parts


def located(answer: Answer, question: Question) -> Located:
    """The boxes of an answer and of its reference, in the first picture or video."""
    media = shown_in(question.record)
    boxes = tuple(region.box for region in answer.regions if region.box is not None and region.media == media)
    wanted = tuple(part.box for part in question.reference if isinstance(part, Region) and part.box is not None)
    return Located(boxes, len(answer.regions) - len(boxes) + answer.num_failed, wanted, not answer.error)


def parse_failures(answers: Sequence[Answer], questions: Sequence[Question | None]) -> float:
    """Share of questions whose answer has a broken mark, or no region of the kind that the reference has."""
    failed = 0
    for answer, question in zip(answers, questions, strict=True):
        if question is not None and not answer.error:
            wanted = {_kind(part) for part in question.reference if isinstance(part, Region)}
            failed += answer.num_failed > 0 or not wanted <= {_kind(region) for region in answer.regions}
    return failed / len(questions)


def _kind(region: Region) -> str:
    return "point" if region.point is not None else "box"
