"""Instruction following and open chat: turns of text, media and regions.

Facts: {"turns": [{"role": "user", "parts": [{"text": "..."} | {"media": 0} | {"region": {"media": 0,
"box": [...]}}], "learn": optional bool}]}; `media` counts through the record's media.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import get_args

from mmchat.conversation import Conversation, Part, Record, Role, Turn
from mmchat.errors import SampleError
from mmchat.tasks.facts import region_of
from mmchat.tasks.text_score import references, score_texts


class Instruct:
    """Phrases turns as they are, and scores the last answer."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        try:
            return _conversation(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SampleError("unreadable facts", f"{record.key}: turns cannot be read: {error!r}") from error

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the text of the record's last assistant turn."""
        return score_texts(answers, [references(record, self._last_answer) for record in records])

    def _last_answer(self, record: Record) -> list[str]:
        """Raises SampleError where there is none."""
        answers = [t for t in self.conversation(record, random.Random(0)).turns if t.role == "assistant"]
        if not answers:
            raise SampleError("no answer", f"{record.key}: wanted an assistant turn")
        return ["".join(part for part in answers[-1].parts if isinstance(part, str))]


def _conversation(record: Record) -> Conversation:
    facts = record.facts["turns"]
    shown = [part["media"] for turn in facts for part in turn["parts"] if "media" in part]
    turns = []
    for turn in facts:
        parts: list[Part] = []
        for part in turn["parts"]:
            match part:
                case {"text": str(text)}:
                    parts.append(text)
                case {"media": int(i)} if 0 <= i < len(record.media):
                    parts.append(record.media[i])
                case {"region": {"media": int(i)} as region} if i in shown:
                    # Regions count media as the conversation shows them.
                    parts.append(region_of(region | {"media": shown.index(i)}))
                case _:
                    raise ValueError(f"part {part!r:.200} among {len(record.media)} media")
        if turn["role"] not in get_args(Role) or not isinstance(turn.get("learn"), bool | None):
            raise ValueError(f"role {turn['role']!r:.100}, learn {turn.get('learn')!r:.100}")
        turns.append(Turn(turn["role"], tuple(parts), turn.get("learn")))
    return Conversation(tuple(turns))
