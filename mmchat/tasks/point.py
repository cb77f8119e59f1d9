"""Pointing (Visual7W, arXiv 1511.03416): which of the candidate boxes answers the question?

Facts: {"question": "...", "candidates": [[x1, y1, x2, y2], ...], "answer": index}.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.metrics.boxes import Box, best_candidate
from mmchat.tasks.facts import boxes_of, shown_in, text_of
from mmchat.tasks.prompts import CHOOSE
from mmchat.tasks.question import Answer, Protocol, Question, last_question
from mmchat.tasks.rec import placed, region_parts


class Point:
    """Names the candidates in the question, in an order drawn anew, and answers with one of them."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return _asked(record, rng, rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """The one question. The candidates are always shuffled: the right one comes first in many a set's facts."""
        order = random.Random(f"{protocol.seed}/{record.key}")
        return [last_question(_asked(record, protocol.rng(record.key), order), record)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Whether the answer's one box or point means the right candidate: see `metrics.boxes.best_candidate`."""
        if answer.error or answer.num_failed or len(answer.regions) != 1:
            return 0.0
        (region,), (candidates, right) = answer.regions, _candidates(question.record)
        is_there = region.media == shown_in(question.record)
        return float(is_there and best_candidate(region, candidates) == candidates[right])

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """accuracy: share of answers that mean the right candidate. What names none or several regions is wrong.

        parse_failures: share with a broken mark or no region at all, which are wrong too.
        """
        both = list(zip(answers, questions, strict=True))
        right = sum(self.judge(answer, question, protocol) for answer, question in both if question is not None)
        failed = sum(
            bool(answer.num_failed or not answer.regions)
            for answer, question in both
            if question is not None and not answer.error
        )
        return {"accuracy": right / len(both), "parse_failures": failed / len(both)}


def _asked(record: Record, rng: random.Random, order: random.Random) -> Conversation:
    media = shown_in(record)
    question, candidates, answer = text_of(record, "question"), *_candidates(record)
    shuffled = order.sample(candidates, len(candidates))
    parts = [*record.media, f"{question} ", *placed(rng.choice(CHOOSE), region_parts(shuffled, media))]
    return Conversation((Turn("user", tuple(parts)), Turn("assistant", (Region(media, box=candidates[answer]),))))


def _candidates(record: Record) -> tuple[list[Box], int]:
    candidates, answer = boxes_of(record, "candidates"), record.facts.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(candidates):
        raise SampleError("no answer", f"{record.key}: answer {answer!r:.50} of {len(candidates)} candidates")
    return candidates, answer
