"""Media longer than its budget: an evaluation lists it as a warning, and a plan counts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mmchat.config import load_config
from mmchat.conversation import MediaRef, Record
from mmchat.data.build import build_template
from mmchat.inference.evaluate import evaluate, summary
from mmchat.inference.load import Loaded
from mmchat.training.plan import plan_stage
from mmchat.training.plan_table import WIDTH, plan_table
from tests import models, odd_media, tiny
from tests.evaluations import SHORT, awake, lines, metrics_of, shards

HEARD = "sound longer than max_duration_s, windows all over it heard"
SEEN = "frames limited by sample.max_frames, seen further apart"


def records() -> list[Record]:
    """A short sound, two long ones, a clip that fits and one that does not, and a sound that is no numbers."""
    broken = np.full(16_000, np.nan, np.float32)
    media: Sequence[tuple[str, MediaRef]] = [
        ("short", MediaRef("audio", tiny.tone(300, 0.4))),
        ("long", MediaRef("audio", tiny.tone(300, 4.0))),
        ("longer", MediaRef("audio", tiny.tone(300, 8.0))),
        ("clip", MediaRef("video", tiny.clip("left", num_frames=16))),
        ("film", MediaRef("video", tiny.clip("left", num_frames=80))),
        ("broken", MediaRef("audio", odd_media.wav(broken))),
    ]
    return [Record(key, tiny._turns([{"media": 0}, {"text": "What?"}], "left"), (item,)) for key, item in media]


@pytest.fixture(scope="module")
def written(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with budgets of 2 seconds and 2 frames a second up to 6, and shards."""
    folder = tmp_path_factory.mktemp("long")
    text = (tiny.ROOT / "configs/tiny.yaml").read_text()
    text = text.replace("sample: {kind: num_frames, num_frames: 4}", "sample: {kind: fps, fps: 2, max_frames: 6}")
    limits = "      max_duration_s: 2\n      too_long: spread\n"
    text = text.replace("      connector: {kind: pool", f"{limits}      connector: {{kind: pool")
    (folder / "long.yaml").write_text(text)
    shards(folder / "shards", records())
    return folder


@pytest.fixture(scope="module")
def loaded(written: Path) -> Loaded:
    return awake(written / "long.yaml")


def test_an_evaluation_lists_what_was_shortened(loaded: Loaded, written: Path, tmp_path: Path) -> None:
    metrics = evaluate(loaded, "instruct", str(written / "shards"), tmp_path, SHORT, batch_size=4)
    assert metrics["warnings"] == {
        HEARD: {"count": 2, "keys": ["long", "longer"]},
        SEEN: {"count": 1, "keys": ["film"]},
    }
    assert metrics["not_answered"] == {"audio not finite": {"count": 1, "keys": ["broken"]}}
    assert metrics["num_questions"] == 6, "every record stays in the denominator"
    assert {line["key"]: line["excerpts"] for line in lines(tmp_path)} == {
        "short": [],
        "long": [f"{HEARD}: 2 of 4 s (50.00%)"],
        "longer": [f"{HEARD}: 2 of 8 s (25.00%)"],
        "clip": [],
        "film": [f"{SEEN}: 6 of 20 frames (30.00%)"],
        "broken": [],
    }
    said = summary(metrics, tmp_path)
    assert f"warning: 2 x {HEARD}" in said and f"warning: 1 x {SEEN}" in said
    assert HEARD in (tmp_path / "index.html").read_text()


def test_a_continued_evaluation_lists_the_same(loaded: Loaded, written: Path, tmp_path: Path) -> None:
    evaluate(loaded, "instruct", str(written / "shards"), tmp_path, SHORT, batch_size=2)
    whole = metrics_of(tmp_path)
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    evaluate(loaded, "instruct", str(written / "shards"), tmp_path, SHORT, batch_size=2)
    assert metrics_of(tmp_path) == whole


def test_a_plan_counts_what_is_shortened(written: Path) -> None:
    data = f"stages.instruct.data=[{{name: long, task: instruct, shards: {written}/shards}}]"
    config = load_config(str(written / "long.yaml"), [data, "stages.instruct.batch.tokens=2000"])
    stage = config.stages[1]
    plan = plan_stage(config, stage, seconds=60)
    assert plan["is_exact"]
    found = {one["rule"]: one for one in plan["excerpts"]}
    assert set(found) == {HEARD, SEEN}
    epochs = found[SEEN]["items"]
    assert epochs > 0 and found[SEEN]["shown"] == 6 * epochs and found[SEEN]["whole"] == 20 * epochs
    heard = found[HEARD]
    assert heard["shown"] == 2 * heard["items"] and 4 * heard["items"] <= heard["whole"] <= 8 * heard["items"]
    table = plan_table(plan)
    assert f"shortened: {heard['items']:,} items, {HEARD}: " in " ".join(table.split())
    assert all(len(line) <= WIDTH for line in table.splitlines())
    json.dumps(plan)
    plain = load_config("configs/tiny.yaml")
    assert plan_stage(plain, plain.stages[1], seconds=60)["excerpts"] == []


def test_what_fits_has_the_tokens_that_it_had(written: Path) -> None:
    """The rule for what is longer changes nothing of what is not."""
    plain, long = load_config("configs/tiny.yaml"), load_config(str(written / "long.yaml"))
    (conversation,) = [c for c in models.conversations() if [m.modality for m in c.media] == ["audio"]]
    before, now = (build_template(config).render(conversation) for config in (plain, long))
    assert before.token_ids == now.token_ids and before.media == now.media
    for one, other in zip(before.media, now.media, strict=True):
        sounds = [
            build_template(config).preprocesses["audio"](one.ref.read(), item.plan)
            for config, item in ((plain, one), (long, other))
        ]
        assert torch.equal(*sounds)
