"""Small folders of spoken dialogues and of spoken questions about pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def spoken_dialogue(folder: Path) -> Fixture:
    """Two turns, and three of which one lost its sentiment; a recording that is gone; a reply without words."""
    good = {"audio": "a.wav", "text": "I lost my keys", "attributes": {"sentiment": "negative", "emotion": None}}
    reply = {"audio": "b.wav", "text": "Oh no.", "attributes": {"sentiment": "neutral"}}
    rows: list[dict[str, Any]] = [
        {"turns": [good, reply], "source": "made up"},
        {"turns": [reply, {"audio": "b.wav", "text": None, "attributes": None}, {"text": "Fine."}]},
        {"turns": [{"audio": "gone.wav"}, reply]},
        {"turns": [good, {"audio": "b.wav"}]},
    ]
    for name, hz in (("a", 300), ("b", 500)):
        (folder / f"train/{name}.wav").parent.mkdir(exist_ok=True)
        (folder / f"train/{name}.wav").write_bytes(tiny.tone(hz, 0.4))
    (folder / "train/spoken_dialogue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fixture("spoken", folder, 2, {"missing media": 1, "no reply": 1}, other_tasks=("spoken_audio",))


def spoken_question(folder: Path) -> Fixture:
    """A picture with two spoken questions, a clip with one, a row about nothing."""
    (folder / "train").mkdir()
    (folder / "train/p.jpg").write_bytes(tiny.picture("red", random.Random(0)))
    (folder / "train/c.mp4").write_bytes(tiny.clip("left"))
    for name, hz in (("a", 300), ("b", 500)):
        (folder / f"train/{name}.wav").write_bytes(tiny.tone(hz, 0.4))
    one = {"audio": "a.wav", "text": "What colour is it?", "answers": ["red"]}
    rows: list[dict[str, Any]] = [
        {"image": "p.jpg", "questions": [one, {"audio": "b.wav", "answers": ["a disc", "disc"]}]},
        {"video": "c.mp4", "questions": [one]},
        {"questions": [one]},
    ]
    (folder / "train/spoken_question.json").write_text(json.dumps(rows))
    return Fixture("vqa", folder, 2, {"unreadable row": 1})


FIXTURES: Fixtures = {"spoken_dialogue": spoken_dialogue, "spoken_question": spoken_question}
