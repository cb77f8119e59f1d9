"""Referring expression comprehension: where is what an expression names?

Facts: {"expressions": ["...", ...], "boxes": [[x1, y1, x2, y2], ...]}: each of the expressions names all of the boxes,
in pixels; without boxes, nothing in the picture is meant. Optionally "more": further {"expressions", "boxes"} of the
same picture, some of which are asked first, so that a picture with fifty regions is stored and encoded once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Part, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.tasks.box_score import Box, num_matched, parsed_boxes
from mmchat.tasks.facts import boxes_of, drawn, texts_of

PROMPTS = (
    "Where is this: {}",
    "Locate: {}",
    "Give the position of what this names: {}",
    "Which part of the picture is meant by this? {}",
    "Mark all that fits: {}",
    "Find {}.",
)
NOTHING = "There is none."


class REC:
    """A turn a target; the one that is scored is last."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        turns: list[Turn] = []
        for expressions, boxes in targets(record, rng):
            prompt, expression = rng.choice(PROMPTS), rng.choice(expressions)
            # The prompt has marks of its own: not "Find a man..".
            question = prompt.replace("{}", expression.rstrip(" .!?,;:") or expression)
            turns.append(Turn("user", (*([] if turns else record.media), question)))
            turns.append(Turn("assistant", tuple(region_parts(boxes)) or (NOTHING,)))
        return Conversation(tuple(turns))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Share of answers that have each wanted box, at an IoU above 0.5, and no other; an empty one needs no box.

        For one box this is the field's accuracy, where an answer of two boxes is wrong. Answers are read as
        `mmchat.tasks.box_score` says, so they must be in the default dialect.
        """
        return {"accuracy": sum(_is_right(*one) for one in zip(answers, records, strict=True)) / len(records)}


def targets(record: Record, rng: random.Random) -> list[tuple[list[str], list[Box]]]:
    """Expressions and boxes to ask for in turn. Raises SampleError."""
    if not record.media:
        raise SampleError("no media", f"{record.key}: wanted a picture")
    return [(texts_of(one, "expressions"), boxes_of(one, "boxes")) for one in drawn(record, rng)]


def region_parts(boxes: Sequence[Box]) -> list[Part]:
    """The boxes, a blank apart."""
    return spaced([Region(0, box=box) for box in boxes])


def spaced(regions: Sequence[Region]) -> list[Part]:
    """The regions, a blank apart."""
    parts: list[Part] = []
    for region in regions:
        parts += [*([" "] if parts else []), region]
    return parts


def _is_right(answer: str, record: Record) -> bool:
    try:
        wanted = boxes_of(record, "boxes")
    except SampleError:
        return False
    found = parsed_boxes(answer, record)
    return len(found) == len(wanted) == num_matched(found, wanted)
