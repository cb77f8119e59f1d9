"""Captioning: say what a picture, a video or a recording holds.

Facts: {"caption": "..."} or {"captions": ["...", ...]}, and optionally "objects": [{"label": "dog", "box":
[x1, y1, x2, y2]}] in pixels, which the shard keeps for tasks that ground a caption.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmchat.conversation import MODALITIES, Conversation, Modality, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.rows import find_file, given_media, read_rows
from mmchat.tasks.text_score import references, score_texts

_FACTS: tuple[str, ...] = ("caption", "captions", "objects")

PROMPTS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "What is in this picture?",
        "Describe the picture.",
        "Tell me what you see here.",
        "Give this picture a caption.",
        "What does the picture show?",
    ),
    "video": (
        "What happens in this video?",
        "Describe the video.",
        "Tell me what you see in this clip.",
        "Give this video a caption.",
    ),
    "audio": (
        "What can be heard here?",
        "Describe the recording.",
        "Tell me what you hear.",
        "Give this recording a caption.",
    ),
}


class Caption:
    """Reads lines of {"image" | "video" | "audio": path, "caption" | "captions", "objects"}."""

    def records(self, source: Path, split: str) -> Iterator[Record | SampleError]:
        """Rows of a .jsonl file, or of a folder with SPLIT/captions.jsonl. Raises ValueError for neither."""
        file, roots = find_file(source, [f"{split}/captions.jsonl"])
        for number, row in enumerate(read_rows(file)):
            if isinstance(row, SampleError):
                yield row
                continue
            try:
                facts = {name: row[name] for name in _FACTS if row.get(name) is not None}
                media = itertools.chain.from_iterable(given_media(row, roots).values())
                record = Record(f"{number:08d}", facts, tuple(media))
                self.conversation(record, random.Random(0))  # what cannot be phrased is not worth storing
                _check_objects(facts.get("objects", []))
                yield record
            except SampleError as error:
                yield SampleError(error.reason, f"{file.name} row {number}: {error.detail}")

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """One prompt about the media, answered with one of the captions."""
        captions = _captions(record)
        shown = {item.modality for item in record.media}
        if not shown:
            raise SampleError("no media", f"{record.key}: a caption needs something to describe")
        # A recording that comes with a video is a part of it, and a video's still picture too.
        subject = next(modality for modality in ("video", *MODALITIES) if modality in shown)
        prompt = rng.choice(PROMPTS[subject])
        return Conversation((Turn("user", (*record.media, prompt)), Turn("assistant", (rng.choice(captions),))))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the caption that is nearest to it."""
        return score_texts(answers, [references(record, _captions) for record in records])


def _captions(record: Record) -> list[str]:
    """Raises SampleError where there is none."""
    found: Any = record.facts.get("captions", [record.facts.get("caption")])
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise SampleError(
            "no caption", f"{record.key}: wanted text under 'caption' or 'captions', found {found!r:.200}"
        )
    return found


def _check_objects(objects: Any) -> None:
    """Raises SampleError where `objects` is not a list of labels with boxes."""
    for thing in objects if isinstance(objects, list) else [objects]:
        match thing:
            case {"label": str(), "box": [_, _, _, _] as box} if all(isinstance(x, int | float) for x in box):
                continue
        raise SampleError("unreadable objects", f'wanted {{"label": ..., "box": [4 numbers]}}, found {thing!r:.200}')
