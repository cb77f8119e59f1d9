"""PointQA and Visual7W in the published layouts, a few pictures each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures

BOX, POINT = {"x": 2, "y": 3, "w": 18, "h": 20}, {"x": 10, "y": 12}


def _pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(tiny.picture(list(tiny.COLOURS)[i % 4], random.Random(i)))


def pointqa_local(folder: Path) -> Fixture:
    """A question of two objects is two records; a list that lost a point; the final test's own list of pictures."""
    _pictures(folder / "VG_100K", ["1.jpg"])
    _pictures(folder / "VG_100K_2", ["107.jpg"])
    two = {"id": "1", "question": "What colour is this?", "all_objs": [BOX, BOX], "points": [POINT, POINT],
           "all_ans": ["red", "blue"]}  # fmt: skip
    content = {"1": [two], "107": [{**two, "id": "107"}, {**two, "points": [POINT]}], "999": [two]}
    (folder / "localqa_dataset.json").write_text(json.dumps(content))
    (folder / "localqa_train_imgs.json").write_text('["999"]')
    (folder / "localqa_testfinal_imgs.json").write_text('["1", "107"]')
    return Fixture("vqa", folder, 4, {"unlike rows": 1}, "test")


def pointqa_twice(folder: Path) -> Fixture:
    _pictures(folder / "VG_100K", ["1.jpg", "2.jpg"])
    row = {"id": "1", "obj_type": "circle", "obj_question": "How many circles?", "super_question": "How many shapes?",
           "general_question": "How many of these?", "bbox": BOX, "ans": "2"}  # fmt: skip
    content = {"1": [row, {**row, "ans": "1"}], "2": [row, {**row, "bbox": {"x": 1, "y": 2}}]}
    (folder / "looktwiceqa_dataset.json").write_text(json.dumps(content))
    (folder / "looktwiceqa_val_imgs.json").write_text('["1", "2"]')
    return Fixture("vqa", folder, 3, {"unreadable row": 1}, "val", ("--set", "region=box"))


def visual7w(folder: Path) -> Fixture:
    """Boxes listed apart; one starts a pixel before the picture, one is named but not listed."""
    _pictures(folder / "images", ["v7w_1.jpg", "v7w_2.jpg"])
    places = [(0, 0), (20, 0), (0, 12), (-1, 5)]
    boxes = [
        {"box_id": 100 + i, "name": "x", "x": x, "y": y, "width": 10, "height": 12} for i, (x, y) in enumerate(places)
    ]
    images: list[dict[str, Any]] = []
    for number in (1, 2):
        qa = {
            "qa_id": number,
            "type": "which",
            "question": "Which is left?",
            "answer": 103,
            "multiple_choices": [100, 101, 102],
        }
        pairs = [qa, {**qa, "qa_id": 10 + number}]
        images.append({"image_id": number, "filename": f"v7w_{number}.jpg", "split": "val", "qa_pairs": pairs})
    images[0]["qa_pairs"].append({**images[0]["qa_pairs"][0], "qa_id": 3, "multiple_choices": [100, 999, 102]})
    images.append({"image_id": 3, "filename": "v7w_3.jpg", "split": "train", "qa_pairs": [{}]})
    content = {"dataset": "visual7w", "boxes": boxes, "images": images}
    (folder / "dataset_v7w_pointing.json").write_text(json.dumps(content))
    return Fixture("point", folder, 4, {"unreadable box": 1}, "val")


FIXTURES: Fixtures = {"pointqa:local": pointqa_local, "pointqa:twice": pointqa_twice, "visual7w": visual7w}
