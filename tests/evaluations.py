"""Small evaluations for tests: records and shards to ask about, and what an evaluation left."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_prep.make_shards import media_header
from mmchat.conversation import MediaHeader, MediaRef, Record
from mmchat.data.shard_writer import write_shards
from mmchat.inference.load import Loaded, load
from mmchat.tasks.question import Protocol
from tests import models, tiny

SHORT = Protocol(max_new_tokens=4)
SHARD = ".cache/tiny/shards/000000.tar"  # 20 records: picture, sound, clip, two pictures, text, and again


def awake(config: str | Path = tiny.ROOT / "configs/tiny.yaml") -> Loaded:
    """An untrained model whose fusion says something, so that media changes what it says."""
    found = load(config)
    models.wake(found.model)
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def metrics_of(out: Path) -> dict[str, Any]:
    """metrics.json without what depends on the clock."""
    return {name: value for name, value in json.loads((out / "metrics.json").read_text()).items() if name != "timing"}


def say(out: Path, said: dict[str, str]) -> None:
    """Puts answers into a finished evaluation, by key, as if the model had given them."""
    changed = [line | {"answer": said.get(line["key"], line["answer"])} for line in lines(out)]
    (out / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def shards(folder: Path, records: list[Record], header_of: Any = media_header) -> str:
    """Their folder; without `header_of`, media is stored as it is."""
    write_shards(records, folder, samples_per_shard=1000, header_of=header_of)
    return str(folder)


def asked(key: str, picture: bytes | None, answer: str = "red") -> Record:
    """An instruct record about one picture, or none."""
    question = [{"media": 0}] * (picture is not None) + [{"text": "What colour?"}]
    facts = {"turns": [{"role": "user", "parts": question}, {"role": "assistant", "parts": [{"text": answer}]}]}
    return Record(key, facts, () if picture is None else (MediaRef("image", picture, MediaHeader(48, 32)),))


def dialogue(key: str, options: list[str], **more: Any) -> Record:
    rounds = [{"question": "what colour is it", "answer": "red", "options": options, "gt_index": 0, **more}]
    media = (MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32)),)
    return Record(key, {"caption": "a disc", "rounds": rounds, "image_id": 7}, media)
