"""Spotting captions (Shikra, arXiv 2306.15195): a caption in which each phrase is followed by its boxes.

Facts: {"caption": "...", "phrases": [{"start": 0, "end": 5, "boxes": [[x1, y1, x2, y2], ...]}, ...]}; start and end
count characters of the caption, phrases do not overlap, and one without boxes is left as it is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from mmchat.conversation import Conversation, Part, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.box_score import Box, num_matched, parsed_boxes
from mmchat.tasks.facts import boxes_of, text_of
from mmchat.tasks.rec import region_parts
from mmchat.tasks.text_score import references, score_texts

PROMPTS = (
    "Describe the picture, and say where each thing is.",
    "Give this picture a caption with the boxes of what it names.",
    "What is in this picture, and where?",
    "Tell me what you see, with the position of everything that you mention.",
    "Write a grounded caption.",
)


class Spot:
    """One prompt, one caption with regions."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        if not record.media:
            raise SampleError("no media", f"{record.key}: wanted a picture")
        caption, rest = text_of(record, "caption"), 0
        answer: list[Part] = []
        for end, boxes in _phrases(record):
            if boxes:
                answer += [caption[rest:end] + " ", *region_parts(boxes)]
                rest = end
        answer += [caption[rest:]] if caption[rest:] else []
        return Conversation((Turn("user", (*record.media, rng.choice(PROMPTS))), Turn("assistant", tuple(answer))))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """The words alone against the caption, and the share of all boxes that are found at an IoU above 0.5.

        Answers are read as `mmchat.tasks.box_score` says. `box_recall` does not ask behind which phrase a box stands.
        """
        found = wanted = 0
        for answer, record in zip(answers, records, strict=True):
            try:
                boxes = [box for _, boxes in _phrases(record) for box in boxes]
            except SampleError:
                continue
            wanted += len(boxes)
            found += num_matched(parsed_boxes(answer, record), boxes)
        words = [re.sub(r"\s*\[[\d.,;\s-]+\]", "", answer) for answer in answers]
        scores = score_texts(words, [references(record, lambda one: [text_of(one, "caption")]) for record in records])
        return scores | {"box_recall": found / wanted if wanted else 0.0}


def _phrases(record: Record) -> list[tuple[int, list[Box]]]:
    """End and boxes of each phrase, in order. Raises SampleError."""
    length, found, last = len(text_of(record, "caption")), record.facts.get("phrases"), 0
    phrases = []
    for phrase in sorted(found, key=_start) if isinstance(found, list) else [None]:
        match phrase:
            case {"start": int(start), "end": int(end), "boxes": boxes} if last <= start < end <= length:
                phrases.append((end, boxes_of(Record(record.key, {"boxes": boxes}), "boxes")))
                last = end
            case _:
                raise SampleError(
                    "unreadable phrases", f"{record.key}: wanted start, end and boxes in order, found {phrase!r:.200}"
                )
    return phrases


def _start(phrase: object) -> int:
    start = phrase.get("start") if isinstance(phrase, dict) else None
    return start if isinstance(start, int) else -1
