"""Open-ended questions about videos, by exact match, for each type of question (ActivityNet-QA, arXiv 1906.02467).

Facts and phrasing are those of `mmchat.tasks.vqa`, with "question_type" (0 to 8, see TYPES) where the set has types.
Optionally "missing_video": the name of a video that could not be had. Such a question is not asked, and counts as
wrong: leaving it out would score an easier set, and asking without the video would score guesses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from mmchat.conversation import Conversation, Record
from mmchat.metrics.text import normalised, token_f1
from mmchat.tasks.facts import texts_of
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.vqa import VQA, final_answer

# ActivityNet-QA's types: three kinds of questions, and what its other, "free" ones are answered with.
TYPES = ("motion", "spatial", "temporal", "yes_no", "colour", "object", "location", "number", "other")
FREE = TYPES[3:]


class VideoQA:
    """Asks as VQA does."""

    def __init__(self) -> None:
        self.vqa = VQA()

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return self.vqa.conversation(record, rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """Each question of the record, alone."""
        return [_checked(question) for question in self.vqa.questions(record, protocol)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """1 for an exact match, else token F1."""
        if question.problem or answer.said is None:
            return 0.0
        return max(_is_right(answer, question), token_f1(final_answer(answer.said), _answers(question)))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """accuracy: the share of all questions whose answer equals a right one; and token_f1.

        Where the set has types, accuracy_TYPE for each that occurs, and accuracy_free over all free ones: the lines of
        ActivityNet-QA's own script. That compares texts sign by sign; here both are normalised first (case, outer
        punctuation, a leading article: `mmchat.metrics.text.normalised`), as a language model writes "Yes." for "yes".
        A record that could not be read is of no known type, and counts as wrong in each.
        """
        pairs = list(zip(answers, questions, strict=True))
        right = [_is_right(answer, question) for answer, question in pairs]
        types = [None if question is None else _type(question) for question in questions]
        f1 = [
            token_f1(None if answer.said is None else final_answer(answer.said), _answers(question))
            for answer, question in pairs
        ]
        scores = {"accuracy": sum(right) / len(right), "token_f1": sum(f1) / len(f1)}
        num_unread = sum(question is None for question in questions)
        groups = {name: (name,) for name in TYPES} | {"free": FREE}
        for name, group in groups.items():
            own = [one for one, type_ in zip(right, types, strict=True) if type_ in group]
            if own:
                scores[f"accuracy_{name}"] = sum(own) / (len(own) + num_unread)
        return scores


def _checked(question: Question) -> Question:
    """The question, with its problem where the video is missing or the type is none."""
    facts = question.record.facts
    if question.problem:
        return question
    if "missing_video" in facts:
        return replace(question, problem=f"missing video: {facts['missing_video']!s:.200}")
    kind = facts.get("question_type")
    if isinstance(kind, int) and not 0 <= kind < len(TYPES):
        detail = f"{question.record.key}: found {kind}; wanted 0 to {len(TYPES) - 1}"
        return replace(question, problem=f"unknown question type: {detail}")
    return question


def _type(question: Question) -> str | None:
    """The name of the question's type; None where the set has none."""
    match question.record.facts.get("question_type"):
        case int(found) if 0 <= found < len(TYPES):
            return TYPES[found]
    return None


def _answers(question: Question | None) -> list[str]:
    return [] if question is None or question.problem else texts_of(question.record, "answers")


def _is_right(answer: Answer, question: Question | None) -> bool:
    if answer.said is None:
        return False
    said = normalised(final_answer(answer.said))
    return any(normalised(text) == said for text in _answers(question))
