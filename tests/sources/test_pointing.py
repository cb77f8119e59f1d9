"""PointQA and Visual7W's pointing questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files
from tests.sources.fixtures_pointing import FIXTURES
from tests.sources.made import records_of


@pytest.mark.parametrize("name", FIXTURES)
def test_good_records_are_read_and_others_are_counted(tmp_path: Path, name: str) -> None:
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert len(good) == fixture.num_samples and bad == fixture.skipped
    assert len({record.key for record in good}) == len(good)


def test_each_object_of_a_question_has_its_answer(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["pointqa:local"](tmp_path), "pointqa")
    assert [record.facts["answers"] for record in good] == [["red"], ["blue"]] * 2
    assert good[0].facts["regions"] == [{"media": 0, "point": [10.0, 12.0]}]
    found = next(read_source("pointqa", Files(tmp_path), "test", {"region": "box"}))
    assert isinstance(found, Record) and found.facts["regions"] == [{"media": 0, "box": (2, 3, 20, 23)}]


def test_look_twice_asks_in_three_ways(tmp_path: Path) -> None:
    FIXTURES["pointqa:twice"](tmp_path)
    for kind, text in (
        ("general", "How many of these?"),
        ("object", "How many circles?"),
        ("super", "How many shapes?"),
    ):
        found = next(read_source("pointqa", Files(tmp_path), "val", {"question": kind, "region": "box"}))
        assert isinstance(found, Record) and found.facts["question"] == text
    assert {one.reason for one in read_source("pointqa", Files(tmp_path), "val") if not isinstance(one, Record)} == {
        "no point"
    }
    with pytest.raises(ValueError, match="question=general"):
        list(read_source("pointqa", Files(tmp_path), "val", {"question": "all"}))


def test_every_way_to_ask_is_drawn_from_one_record(tmp_path: Path) -> None:
    FIXTURES["pointqa:local"](tmp_path / "local")
    options = {"region": "each", "question": "each", "grouped": "yes"}
    found = [
        one for one in read_source("pointqa", Files(tmp_path / "local"), "test", options) if isinstance(one, Record)
    ]
    asked = [facts for one in found for facts in (one.facts, *one.facts["more"])]
    assert len(found) == 2 and len(asked) == 2 * 4  # two objects by point and by box
    FIXTURES["pointqa:twice"](tmp_path / "twice")
    found = [
        one for one in read_source("pointqa", Files(tmp_path / "twice"), "val", options) if isinstance(one, Record)
    ]
    texts = {facts["question"] for one in found for facts in (one.facts, *one.facts["more"])}
    assert len(texts) == 3, "without a point, each is asked about by its box"


def test_visual7w_puts_the_right_box_first(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["visual7w"](tmp_path), "visual7w")
    assert good[0].facts == {
        "question": "Which is left?",
        "candidates": [(-1, 5, 9, 17), (0, 0, 10, 12), (20, 0, 30, 12), (0, 12, 10, 24)],
        "answer": 0,
    }


def test_the_list_of_a_split_is_beside_the_annotation_file(tmp_path: Path) -> None:
    FIXTURES["pointqa:local"](tmp_path)
    files = Files(tmp_path / "localqa_dataset.json")
    assert sum(isinstance(one, Record) for one in read_source("pointqa", files, "test")) == 4
    with pytest.raises(ValueError, match=r"has none of localqa_val_imgs.json, localqa_valfinal_imgs.json"):
        list(read_source("pointqa", files, "val"))
