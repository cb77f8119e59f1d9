"""Referring expression generation: which words single out what is in a box? Facts as those of `mmchat.tasks.rec`."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.facts import texts_of
from mmchat.tasks.rec import region_parts, targets
from mmchat.tasks.text_score import references, score_texts

PROMPTS = (
    "What is at {}?",
    "Describe what is at {}.",
    "Which words single out {}?",
    "Say what {} shows, so that it is not taken for something else.",
    "Give {} a description.",
)


class REG:
    """A turn a target that has boxes; the one that is scored is last."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        turns: list[Turn] = []
        asked = targets(record, rng)
        if not asked[-1][1]:
            raise SampleError("no box", f"{record.key}: there is nothing to describe")
        for expressions, boxes in asked:
            if boxes:
                before, _, after = rng.choice(PROMPTS).partition("{}")
                question = [part for part in (before, *region_parts(boxes), after) if part]
                turns.append(Turn("user", (*([] if turns else record.media), *question)))
                turns.append(Turn("assistant", (rng.choice(expressions),)))
        return Conversation(tuple(turns))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the expression that is nearest to it."""
        return score_texts(answers, [references(record, _expressions) for record in records])


def _expressions(record: Record) -> list[str]:
    return texts_of(record, "expressions")
