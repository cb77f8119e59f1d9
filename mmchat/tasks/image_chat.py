"""Open-domain chat about a picture between two speakers, each in a style of their own (Image-Chat, arXiv 1811.00945).

Facts: {"turns": [{"style": "Sweet", "text": "..."}, ...], "candidates": [[...], ...]}; the speakers take turns.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.text_score import references, score_texts

OPENINGS = (
    "Say something about this picture.",
    "What do you think of this?",
    "Look at this.",
    "Talk with me about this.",
)
STYLES = ("Your style: {}.", "Be {} in what you say.", "Talk in this manner: {}.")


class ImageChat:
    """The model is the speaker of the last turn; that one's style is said in front."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        said = _turns(record)
        own = (len(said) - 1) % 2  # parity of the model's turns
        style = rng.choice(STYLES).format(said[own][0].lower())
        if own == 0:
            turns = [Turn("user", (*record.media, f"{style} {rng.choice(OPENINGS)}"))]
        else:
            turns = [Turn("user", (*record.media, f"{style}\n{said[0][1]}"))]
            said = said[1:]
        turns += [Turn("assistant" if number % 2 == 0 else "user", (text,)) for number, (_, text) in enumerate(said)]
        return Conversation(tuple(turns))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the last turn."""
        return score_texts(answers, [references(record, lambda one: [_turns(one)[-1][1]]) for record in records])


def _turns(record: Record) -> list[tuple[str, str]]:
    """Style and text in order. Raises SampleError."""
    turns = record.facts.get("turns")
    if not isinstance(turns, list) or not turns:
        raise SampleError("no turns", f"{record.key}: wanted a list of turns, found {turns!r:.200}")
    said = []
    for turn in turns:
        match turn:
            case {"style": str(style), "text": str(text)} if style.strip() and text.strip():
                said.append((style.strip(), text.strip()))
            case _:
                raise SampleError("unreadable turn", f"{record.key}: wanted style and text, found {turn!r:.200}")
    return said
