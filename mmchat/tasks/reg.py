"""Referring expression generation: which words single out what is in a box? Facts as those of `mmchat.tasks.rec`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Record
from mmchat.errors import SampleError
from mmchat.metrics.cider import cider_d
from mmchat.metrics.text import score_texts, token_f1
from mmchat.tasks.prompts import DESCRIBE
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, last_question
from mmchat.tasks.rec import Exchange, Target, conversation_of, placed, region_parts, targets, words_of


class REG:
    """A turn a target that has boxes."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        asked = targets(record, rng)
        if not asked[-1].boxes:
            raise SampleError("no box", f"{record.key}: there is nothing to describe")
        return conversation_of(record, [describe(target, rng) for target in asked if target.boxes])

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One a target that has boxes."""
        asked = asked_alone(record, lambda one: last_question(self.conversation(one, protocol.rng(one.key)), one))
        return [question for question in asked if question.record.facts.get("boxes") != []] or asked[:1]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Token F1 with the nearest expression or description."""
        return 0.0 if question.problem else token_f1(answer.said, words_of(question.record))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Compares each answer with the target's expressions and descriptions: exact match, token F1 and CIDEr-D, 0 to
        10.
        """
        references = [
            [] if question is None or question.problem else words_of(question.record) for question in questions
        ]
        said = [answer.said for answer in answers]
        return score_texts(said, references) | {"cider_d": sum(cider_d(said, references)) / len(said)}


def describe(target: Target, rng: random.Random) -> Exchange:
    """Asks for the words that single out what is in the boxes."""
    return placed(rng.choice(DESCRIBE), region_parts(target.boxes, target.media)), [rng.choice(target.descriptions)]
