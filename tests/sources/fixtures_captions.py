"""The project's own rows of captions."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def captions(folder: Path) -> Fixture:
    """A picture with objects, a clip with several captions, a tone; a row without a caption."""
    (folder / "train/media").mkdir(parents=True)
    media = {"a.jpg": tiny.picture("red", random.Random(0)), "b.mp4": tiny.clip("left"), "c.wav": tiny.tone(300, 0.4)}
    for name, data in media.items():
        (folder / "train/media" / name).write_bytes(data)
    rows = [
        {"image": "media/a.jpg", "caption": "A circle.", "objects": [{"label": "circle", "box": [1, 2, 20, 21]}]},
        {"video": "media/b.mp4", "captions": ["A square moves.", "It moves left."]},
        {"audio": "media/c.wav", "caption": "A low tone."},
        {"image": "media/a.jpg"},
    ]
    (folder / "train/captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Fixture("caption", folder, 3, {"no caption": 1})


FIXTURES: Fixtures = {"captions": captions}
