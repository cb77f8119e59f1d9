"""Dialogue about a picture or a video in questions and answers: Visual Dialog (arXiv 1611.08669) and AVSD.

Facts: {"caption": "...", "rounds": [{"question": "...", "answer": "...", "options": [...], "gt_index": 7,
"relevance": [...]}], "summary": "..."}. A last round without an answer is what a test set asks for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.facts import text_of
from mmchat.tasks.text_score import references, score_texts
from mmchat.tasks.vqa import asked

OPENINGS = ("Here is what is known: {}", "It was described so: {}", "The caption says: {}", "Caption: {}")


class VisDial:
    """History as turns: the caption stands in front of the first question."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        caption, rounds = text_of(record, "caption"), _rounds(record)
        opening = rng.choice(OPENINGS).format(caption.strip()) + "\n"
        turns = []
        for number, one in enumerate(rounds):
            question = asked(one["question"])  # VisDial's questions have no mark
            turns.append(Turn("user", (*record.media, opening + question) if number == 0 else (question,)))
            if "answer" in one:
                turns.append(Turn("assistant", (one["answer"],)))
        return Conversation(tuple(turns))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with that of the last round that has one. Ranking candidates is not done here."""
        return score_texts(answers, [references(record, _last) for record in records])


def _last(record: Record) -> list[str]:
    return [one["answer"] for one in _rounds(record) if "answer" in one][-1:]


def _rounds(record: Record) -> list[dict[str, Any]]:
    """Rounds in order; only the last may lack its answer. Raises SampleError."""
    rounds = record.facts.get("rounds")
    if not isinstance(rounds, list) or not rounds:
        raise SampleError("no rounds", f"{record.key}: wanted a list of rounds, found {rounds!r:.200}")
    for number, one in enumerate(rounds):
        match one:
            case {"question": str(question), "answer": str(answer)} if question.strip() and answer.strip():
                continue
            case {"question": str(question)} if question.strip() and "answer" not in one and number == len(rounds) - 1:
                continue
        raise SampleError("unreadable round", f"{record.key} round {number + 1}: {one!r:.200}")
    return rounds
