"""Questions about pictures and videos, answered in a word or a phrase.

Facts: {"question": "...", "answers": ["...", ...], "regions": [{"media": 0, "box" | "point": [...]}]}. The first
answer is the one that is learned, the others are further annotators'; regions, where there are any, are what the
question is about. Optionally "more": further such facts about the same media, some of which are asked first, so that a
picture with many questions is stored and encoded once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mmchat.conversation import Conversation, Part, Record, Turn
from mmchat.tasks.facts import drawn, regions_of, text_of, texts_of
from mmchat.tasks.rec import spaced
from mmchat.tasks.text_score import references, score_texts

SHORT = (" Answer in a word or a short phrase.", " Give a short answer.", " Answer briefly.", "")
MARKS = tuple(".?!:;\u2026\u3002\uff1f\uff01\u061f")  # also those of Chinese and Arabic
ABOUT = ("About {}: ", "Look at {}. ", "This is about {}. ")


class VQA:
    """Asks the questions as they are; the one that is scored is last."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        turns: list[Turn] = []
        for one in drawn(record, rng):
            question, answer = text_of(one, "question"), _answers(one)[0]
            parts: list[Part] = [] if turns else [*record.media]
            if regions := regions_of(one, one.facts.get("regions", [])):
                before, _, after = rng.choice(ABOUT).partition("{}")
                parts += [before, *spaced(regions), after]
            turns.append(Turn("user", (*parts, asked(question) + rng.choice(SHORT))))
            turns.append(Turn("assistant", (answer,)))
        return Conversation(tuple(turns))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the annotator's that is nearest to it."""
        return score_texts(answers, [references(record, _answers) for record in records])


def asked(question: str) -> str:
    """The question with a mark, and no blank before it; some sets leave the mark out."""
    question = question.rstrip()
    mark = question[-1:] if question[-1:] in MARKS else "?"
    return question.removesuffix(mark).rstrip() + mark


def _answers(record: Record) -> list[Any]:
    return texts_of(record, "answers")
