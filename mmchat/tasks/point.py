"""Pointing (Visual7W, arXiv 1511.03416): which of the candidate boxes answers the question?

Facts: {"question": "...", "candidates": [[x1, y1, x2, y2], ...], "answer": index}.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Part, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.tasks.box_score import iou, parsed_boxes
from mmchat.tasks.facts import boxes_of, text_of

PROMPTS = ("Which of these is it: {}?", "Choose one of {}.", "The candidates are {}. Point at the right one.")


class Point:
    """Names the candidates in the question, in an order drawn anew, and answers with one of them."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        question, candidates, answer = text_of(record, "question"), *_candidates(record)
        order = rng.sample(range(len(candidates)), len(candidates))
        before, _, after = rng.choice(PROMPTS).partition("{}")
        parts: list[Part] = [*record.media, f"{question} {before}"]
        for place, i in enumerate(order):
            parts += [*([" "] if place else []), Region(0, box=candidates[i])]
        parts.append(after)
        return Conversation((Turn("user", tuple(parts)), Turn("assistant", (Region(0, box=candidates[answer]),))))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Share of answers whose one box is nearer, by overlap, to the right candidate than to any other.

        What names no box, several boxes, or one that no candidate overlaps is wrong.
        """
        return {"accuracy": sum(_is_right(*one) for one in zip(answers, records, strict=True)) / len(records)}


def _candidates(record: Record) -> tuple[list[tuple[float, float, float, float]], int]:
    candidates, answer = boxes_of(record, "candidates"), record.facts.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(candidates):
        raise SampleError("no answer", f"{record.key}: answer {answer!r:.50} of {len(candidates)} candidates")
    return candidates, answer


def _is_right(answer: str, record: Record) -> bool:
    try:
        candidates, right = _candidates(record)
    except SampleError:
        return False
    found = parsed_boxes(answer, record)
    overlaps = [iou(found[0], candidate) for candidate in candidates] if len(found) == 1 else [0.0]
    return max(overlaps) > 0 and overlaps.index(max(overlaps)) == right
