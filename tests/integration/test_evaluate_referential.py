"""benchmarks/referential.py: scenes that cannot be read count as wrong, and every checkpoint has its own folder."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import referential
from mmchat.checkpoint import Checkpoint
from mmchat.conversation import MediaHeader, MediaRef, Record
from mmchat.inference.load import Loaded
from tests import tiny
from tests.evaluations import awake, shards


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return awake()


def scene(key: str, box: list[int]) -> Record:
    picture = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))
    return Record(key, {"expressions": ["the disc"], "boxes": [box], "kind": "name"}, (picture,))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two of three can be read, and in one of them a box in the middle is right; no facts are under "more"."""
    records = [scene("middle", [12, 8, 36, 24]), scene("cut", [1, 1, 9, 9]), scene("corner", [1, 1, 9, 9])]
    names = Path(shards(tmp_path / "objects-test", records))
    (tar,) = names.glob("*.tar")
    data = tar.read_bytes()
    place = data.index(b'{"', data.index(b"cut.json"))
    tar.write_bytes(data[:place] + b"[" + data[place + 1 :])
    return tmp_path


def test_a_scene_that_cannot_be_read_counts_as_wrong(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["configs/tiny.yaml", "--shards", str(scenes), "--out", str(out), "--small"]
    monkeypatch.setattr(sys, "argv", ["referential.py", *arguments])
    assert referential.main() == 1
    said = capsys.readouterr()
    assert "MISSED: places 0.000, controls 0.333" in said.out and "error" not in said.err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["places"]["num_questions"] == 3
    assert scores["places"]["by_kind"] == {"name": [0.0, 2], "unreadable": [0.0, 1]}


def test_a_caption_of_a_scene_that_cannot_be_read_names_nothing() -> None:
    facts = {"caption": "a cat and a cat", "phrases": [{"start": 0, "end": 5}, {"start": 10, "end": 15}]}
    assert referential._share_named("Cat.", Record("k", facts)) == 0.5
    assert referential._share_named("Cat.", None) == 0.0


def test_every_checkpoint_has_its_folder(loaded: Loaded) -> None:
    def named(folder: str) -> str:
        return str(referential.default_out(replace(loaded, checkpoint=Checkpoint(Path(folder), {}))))

    assert str(referential.default_out(loaded)) == "evaluations/tiny-untrained"
    assert named("checkpoints/tiny/align/step-000005") == "evaluations/tiny-align-step-000005"
    assert named("checkpoints/demo") == "evaluations/tiny-demo"


def test_a_limit_is_positive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["referential.py", "x", "--limit", "0"])
    with pytest.raises(SystemExit):
        referential.main()
    assert "wanted 1 or more, found 0" in capsys.readouterr().err
