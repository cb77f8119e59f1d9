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
from mmchat.metrics.cider import cider_d
from mmchat.metrics.text import bleu_4, rouge_l, score_texts, token_f1
from mmchat.tasks.question import Answer, Protocol, Question, last_question

PROMPTS: dict[Modality, tuple[str, ...]] = {
    "image": (
        "What is in this picture?",
        "Describe the picture.",
        "Tell me what you see here.",
        "Give this picture a caption.",
        "What does the picture show?",
        "Say in a sentence what this picture shows.",
        "Write a caption for this.",
        "What can be seen here?",
        "What is this a picture of?",
        "Put this picture into words.",
        "A short description, please.",
        "How would you describe this to somebody who cannot see it?",
        "What is going on in this picture?",
        "Sum up the picture in one line.",
    ),
    "video": (
        "What happens in this video?",
        "Describe the video.",
        "Tell me what you see in this clip.",
        "Give this video a caption.",
        "What is going on here?",
        "Say in a sentence what happens.",
        "Write a caption for this clip.",
        "What does the clip show?",
        "Sum up the video in one line.",
        "Put what happens into words.",
        "What do you see happen?",
        "A short description of the video, please.",
        "How would you describe this clip to somebody who cannot see it?",
    ),
    "audio": (
        "What can be heard here?",
        "Describe the recording.",
        "Tell me what you hear.",
        "Give this recording a caption.",
        "What do you hear?",
        "Which sounds are these?",
        "Say in a sentence what this sounds like.",
        "Write a caption for this recording.",
        "What makes these sounds?",
        "Put these sounds into words.",
        "Sum up the recording in one line.",
        "What is going on, by the sound of it?",
        "A short description of the sounds, please.",
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

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One: the caption."""
        return [last_question(self.conversation(record, protocol.rng(record.key)), record)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Token F1 with the nearest caption."""
        return token_f1(answer.said, _captions(question.record))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Exact match and token F1 with the nearest caption, CIDEr-D (0 to 10), BLEU-4 and ROUGE-L against all."""
        said = [answer.said for answer in answers]
        wanted = [[] if question is None else _captions(question.record) for question in questions]
        scores = score_texts(said, wanted)
        ciders = cider_d(said, wanted)
        others = {"cider": sum(ciders) / len(ciders), "bleu_4": bleu_4(said, wanted), "rouge_l": rouge_l(said, wanted)}
        return scores | others


def _captions(record: Record) -> list[str]:
    """Raises SampleError where there is none."""
    found: Any = record.facts.get("captions", [record.facts.get("caption")])
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise SampleError(
            "no caption", f"{record.key}: wanted text under 'caption' or 'captions', found {found!r:.200}"
        )
    return found
