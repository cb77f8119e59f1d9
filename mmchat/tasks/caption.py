"""Captioning: say what a picture, a video or a recording holds.

Facts: {"caption": "..."} or {"captions": ["...", ...]}, and optionally "objects": [{"label": "dog", "box":
[x1, y1, x2, y2]}] in pixels, which the shard keeps for tasks that ground a caption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mmchat.conversation import MODALITIES, Conversation, Modality, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.text_score import references, score_texts

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
    """One prompt, one caption."""

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
