"""Shikra's jsonl families: rows told by their keys, marks and boxes matched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mmchat.conversation import MediaHeader, MediaRef, Record, Region
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from tests.sources.fixtures_shikra import BOX, FIXTURES, OTHER, POINT
from tests.sources.made import records_of


@pytest.mark.parametrize("name", FIXTURES)
def test_families(tmp_path: Path, name: str) -> None:
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert len(good) == fixture.num_samples and bad == fixture.skipped


def read(name: str, folder: Path, **options: str) -> Record:
    fixture = FIXTURES[f"shikra:{name}"](folder)
    files = Files(fixture.source, [folder / "pictures"])
    found = next(read_source("shikra", files, "any", options))
    assert isinstance(found, Record), found
    return found


def test_phrases_of_a_spotting_caption(tmp_path: Path) -> None:
    facts = read("spot", tmp_path).facts
    assert facts["caption"] == "Two circles beside a wall ."
    assert [facts["caption"][one["start"] : one["end"]] for one in facts["phrases"]] == ["Two circles", "a wall"]
    assert [one["boxes"] for one in facts["phrases"]] == [[BOX, OTHER], [OTHER]]


@pytest.mark.parametrize(("answer", "regions"), [("grounded", [BOX, OTHER]), ("cot", []), ("short", [])])
def test_grounded_reasoning(tmp_path: Path, answer: str, regions: list[list[float]]) -> None:
    record = read("rd", tmp_path, answer=answer)
    asked, answered = TASKS["instruct"].conversation(record, random.Random(0)).turns
    assert [part.box for part in asked.parts if isinstance(part, Region)] == [tuple(OTHER)]
    assert [list(part.box or ()) for part in answered.parts if isinstance(part, Region)] == regions
    text = "".join(part for part in answered.parts if isinstance(part, str))
    assert "<ph" not in text and ("circle" in text or "so it is one" in text)


def test_what_pointqa_asks_about(tmp_path: Path) -> None:
    facts = read("pointqa_twice", tmp_path).facts
    assert facts["question"] == "How many of these?" and facts["regions"] == [{"media": 0, "point": POINT}]
    files = Files(tmp_path / "pointQA_twice_test.jsonl", [tmp_path / "pictures"])
    record = next(read_source("shikra", files, "any", {"question": "super", "region": "box"}))
    assert isinstance(record, Record) and record.facts["question"] == "How many of these shapes?"
    asked = TASKS["vqa"].conversation(record, random.Random(0)).turns[0]
    assert [part.box for part in asked.parts if isinstance(part, Region)] == [tuple(BOX)]
    with pytest.raises(ValueError, match="--set region is point or box or each, not circle"):
        list(read_source("shikra", files, "any", {"region": "circle"}))


def test_pointqa_in_every_way(tmp_path: Path) -> None:
    facts = read("pointqa_twice", tmp_path, question="each", region="each").facts
    asked = [facts, *facts["more"]]
    assert len({one["question"] for one in asked}) == 3 and len(asked) == 6
    assert {tuple(one["regions"][0]) for one in asked} == {("media", "point"), ("media", "box")}
    (tmp_path / "local").mkdir()
    local = read("pointqa_local", tmp_path / "local", region="each").facts
    assert "point" in local["regions"][0] and ["box" in one["regions"][0] for one in local["more"]] == [True]


def test_braces_in_native_text_are_text(tmp_path: Path) -> None:
    record = read("native", tmp_path)
    asked, answered = TASKS["instruct"].conversation(record, random.Random(0)).turns
    assert asked.parts[0] == "What is " and isinstance(asked.parts[5], MediaRef)
    assert asked.parts[1] == Region(0, box=tuple(BOX)) and asked.parts[3] == Region(0, point=tuple(POINT))
    assert answered.parts[0] == "One of {two}: " and answered.parts[3] == Region(0, box=tuple(OTHER))


def test_a_folder_of_many_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("REC_a.jsonl", "REC_b.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="name one of them"):
        list(read_source("shikra", Files(tmp_path), "train"))


def test_rows_state_the_size_of_their_picture(tmp_path: Path) -> None:
    assert read("native", tmp_path).media[0].header == MediaHeader(width=48, height=32)
    row = {"img_path": "0.jpg", "expression": "x", "bbox": BOX, "width": 640, "height": 480}
    (tmp_path / "REC_x_val.jsonl").write_text(json.dumps(row))
    files = Files(tmp_path / "REC_x_val.jsonl", [tmp_path / "pictures"])
    (found,) = read_source("shikra", files, "val")
    assert isinstance(found, Record) and found.media[0].header == MediaHeader(width=640, height=480)
