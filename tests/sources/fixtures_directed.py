"""A small corpus of device-directed speech as data_prep/directed_speech.py writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.sources.fixture import Fixture, Fixtures
from tests.sources.fixtures_audio import flac

ROWS: list[dict[str, Any]] = [
    {"text": "turn off the light", "directed": True, "kind": "command", "speaker": "flite.slt@1", "distance_m": 1.2},
    {"text": "turn off the light", "directed": False, "kind": "to_person", "speaker": "flite.slt@1", "distance_m": 3.1},
    {"text": "how was your day", "directed": False, "kind": "dialogue", "speaker": "hibari.heart@1", "distance_m": 2.0},
    {"text": "nobody was recorded", "directed": False, "kind": "background", "speaker": "a", "distance_m": 2.0},
    {"text": "nobody said whether", "directed": "yes", "kind": "command", "speaker": "a", "distance_m": 2.0},
]


def directed_speech(folder: Path) -> Fixture:
    """One clip's file is missing, and one row's answer is no yes or no."""
    where = folder / "test" / "audio"
    where.mkdir(parents=True)
    lines = []
    for number, row in enumerate(ROWS):
        name = f"audio/{number:06d}.flac"
        if number != 3:
            (folder / "test" / name).write_bytes(flac(200 + 50 * number, 1.0))
        lines.append(json.dumps({"id": f"test-{number:06d}", "audio": name, **row}))
    (folder / "test" / "directed.jsonl").write_text("\n".join(lines) + "\n")
    skipped = {"missing media": 1, "unreadable row": 1}
    others = ("directed_audio", "directed_text", "transcribe")
    return Fixture("directed", folder, 3, skipped, "test", other_tasks=others)


FIXTURES: Fixtures = {"directed_speech": directed_speech}
