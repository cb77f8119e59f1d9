"""Which format and which file of a folder is read, and that no malformed row stops a reader."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources import SOURCES, choose_source, read_source
from mmchat.sources.files import Files
from mmchat.sources.rows import finder, of_split, records_from
from tests.sources.fixtures_pictures import coco_captions, write_json


@pytest.mark.parametrize("split", ["", "/train", "a/b/c", "../train", "val*", "tes[t]", "wh?t", "a\\b", "train/"])
def test_a_split_is_a_name(tmp_path: Path, split: str) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match="is no name of a split"):
        choose_source("instruct", Files(tmp_path), split)


def test_formats_of_other_tasks_are_named(tmp_path: Path) -> None:
    coco_captions(tmp_path / "coco")
    with pytest.raises(ValueError, match="looks like coco_captions, of task caption or coco_instances, of task rec"):
        choose_source("vqa", Files(tmp_path / "coco"), "train")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"It looks like .*chat, of task instruct\."):
        choose_source("vqa", Files(tmp_path / "rows"), "train")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"for split train\. Name one"):
        choose_source("vqa", Files(tmp_path / "none"), "train")


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["a_train.json", "a_val.json"], "train", ["a_train.json"]),
        (["a_train.json", "notes.json"], "train", ["a_train.json"]),
        (["a-validation-0.parquet", "a-test-0.parquet"], "val", ["a-validation-0.parquet"]),
        (["dev.jsonl", "train.jsonl"], "valid", ["dev.jsonl"]),
        (["rows.json", "latest.json"], "val", ["rows.json", "latest.json"]),
        (["rows.json", "q_test.json"], "val", ["rows.json"]),
        (["a_train_val.json"], "val", ["a_train_val.json"]),
        (["q_test-dev.json"], "val", None),
        (["train2014.json"], "val", None),
        (["train.json"], "train_sub", None),
        (["a_train_sub.json", "a_train.json"], "train_sub", ["a_train_sub.json"]),
    ],
)
def test_no_split_stands_for_another(tmp_path: Path, names: list[str], split: str, chosen: list[str] | None) -> None:
    if chosen is None:
        with pytest.raises(ValueError, match=f"of the splits .*wanted {split}"):
            of_split(Files(tmp_path), names, split)
    else:
        assert of_split(Files(tmp_path), names, split) == chosen


@pytest.mark.parametrize(("name", "file"), [("chat", "a_train.json"), ("captions", "a_train.jsonl")])
def test_rows_of_another_split_are_not_read(tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).write_text('{"caption": "x"}\n')
    with pytest.raises(ValueError, match="of the splits train; wanted val"):
        list(read_source(name, Files(tmp_path), "val"))
    assert len(list(read_source(name, Files(tmp_path / file), "val"))) == 1, "a file that is named is meant"


def bad_rows(name: str, files: Files, split: str = "train") -> list[str]:
    """Reasons; every record that is read is an error."""
    found = list(read_source(name, files, split))
    assert all(isinstance(one, SampleError) for one in found), found
    return [one.reason for one in found if isinstance(one, SampleError)]


BOX = {"x": 1, "y": 1, "w": 5, "h": 5}
HUGE = 10**400
TALK = [{"role": "user", "content": "<bbox>"}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("name", "file", "content", "reasons"),
    [
        ("chat", "train.json", [{"messages": TALK, "objects": {"bbox": [[HUGE, 1]]}}], ["unreadable objects"]),
        (
            "chat",
            "train.json",
            json.dumps({"messages": TALK, "objects": {"bbox": [[1, 1]], "image_id": [5]}}).replace("[5]", "[1e999]"),
            ["unreadable objects"],
        ),
        (
            "coco_instances",
            "instances_train.json",
            {
                "categories": [{"id": 1}, 5, {"id": 2, "name": "dog"}],
                "annotations": [
                    {"image_id": 1, "category_id": 2, "bbox": [1, 1, 1, 1], "iscrowd": "0"},
                    {"image_id": 1, "category_id": 2, "bbox": [1, 1, 1, "1"], "iscrowd": 0},
                    {"image_id": 1, "category_id": 2, "bbox": [1, 1, 1, HUGE]},
                    {"image_id": 1, "category_id": [2], "bbox": [1, 1, 1, 1]},
                ],
                "images": [[1]],
            },
            ["unreadable category"] * 2
            + ["unreadable annotation", "unreadable row", "unreadable row", "unreadable annotation"]
            + ["unreadable image row"],
        ),
        (
            "coco_captions",
            "captions_train.json",
            {"annotations": [], "images": [{"id": [9], "file_name": "x"}]},
            ["unreadable image row"],
        ),
        (
            "visual7w",
            "dataset_v7w_pointing.json",
            {"boxes": [{"box_id": [1]}, 3], "images": [7, {"split": "train", "qa_pairs": None}]},
            ["unreadable row"] * 2,
        ),
        ("visdial", "visdial_1.0_train_dense.json", [5, {"image_id": [1]}], ["unreadable dense annotation"] * 2),
        (
            "vqa2",
            "v2_OpenEnded_mscoco_train2014_questions.json",
            {"questions": [{"question_id": [1]}, 5, {"question_id": 1}]},
            ["no answer"] * 3,
        ),
        (
            "shikra",
            "GPT4GEN_train.jsonl",
            [
                {"img_path": "x", "cot_with_ans": "a", "boxes": []},
                {"target": {}, "conversations": [{"from": "human", "value": "x", "boxes_seq": 3}]},
            ],
            ["unreadable row"] * 2,
        ),
        (
            "pointqa",
            "localqa_dataset.json",
            {"1": [["all_objs"], {"all_objs": [BOX], "points": [{"x": HUGE, "y": 1}], "all_ans": ["x"]}]},
            ["unreadable row"] * 2,
        ),
    ],
)
def test_a_malformed_row_is_counted(tmp_path: Path, name: str, file: str, content: Any, reasons: list[str]) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    if name == "shikra":
        text = "\n".join(map(json.dumps, content))
    (tmp_path / file).write_text(text)
    write_json(tmp_path / "v2_mscoco_train2014_annotations.json", {"annotations": [{"question_id": [1]}, 7]})
    write_json(tmp_path / "visdial_1.0_train.json", {"data": {"questions": [], "answers": [], "dialogs": []}})
    write_json(tmp_path / "localqa_train_imgs.json", ["1"])
    (tmp_path / "1.jpg").write_bytes(b"")
    assert bad_rows(name, Files(tmp_path)) == reasons


def test_a_row_that_is_too_deep_to_be_shown_is_counted(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]

    def record(row: dict[str, Any], key: str, find: object) -> Record:
        raise SampleError("unreadable turn", f"{row!r:.200}")

    find = finder(Files(tmp_path), PurePosixPath())
    found = list(records_from([[deep], {"conversations": deep}], "rows", find, record))
    assert [one.reason for one in found if isinstance(one, SampleError)] == ["unreadable row"] * 2


def test_what_no_reader_expects_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> Any:
        yield Record("k", {})
        raise ZeroDivisionError("by zero")

    monkeypatch.setitem(SOURCES, "chat", SOURCES["chat"].__class__(("instruct",), (), read))
    with pytest.raises(ValueError, match=r"format chat stopped behind record 1: ZeroDivisionError: by zero"):
        list(read_source("chat", Files(tmp_path), "train"))
