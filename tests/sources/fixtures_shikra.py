"""One file of each of Shikra's jsonl families."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures

BOX, OTHER, POINT = [2, 3, 20, 21], [22.5, 4, 40, 30], [10, 12]

# Family to task, file, rows in which IMAGE stands for a picture's path, and the reason of the row that cannot be used.
FAMILIES: dict[str, tuple[str, str, list[dict[str, Any]], str]] = {
    "rec": (
        "rec", "REC_refcoco_unc_val.jsonl",
        [{"img_path": "IMAGE", "expression": "the red {one}", "bbox": BOX},
         {"img_path": "IMAGE", "expression": "its half", "bbox": BOX[:3]}],
        "unreadable boxes",
    ),
    "reg": (
        "reg", "GC_genome196_train.jsonl",
        [{"img_path": "IMAGE", "expression": "a circle", "bbox": BOX},
         {"img_path": "IMAGE", "expression": "", "bbox": BOX}],
        "no expression",
    ),
    "caption": (
        "caption", "CAP_coco2014_train.jsonl",
        [{"img_path": "IMAGE", "caption": "A circle."}, {"img_path": "none.jpg", "caption": "Nothing."}],
        "missing media",
    ),
    "spot": (
        "spot", "CWB_flickr30k_eval.jsonl",
        [{"id": 1, "image_id": "NUMBER", "boxes": [BOX, OTHER], "boxes_seq": [[0, 1], [1]],
          "sentence": "<ph_st>Two circles<ph_ed> beside <ph_st>a wall<ph_ed> ."},
         {"id": 2, "image_id": "NUMBER", "boxes": [BOX], "boxes_seq": [[0]], "sentence": "No phrase at all ."}],
        "unmatched boxes",
    ),
    "rd": (
        "instruct", "GPT4GEN_BoxCoT_train.jsonl",
        [{"img_path": "IMAGE", "boxes": [BOX, OTHER], "question": "What is <ph_st>this<ph_ed>?",
          "question_boxes_seq": [[1]], "answer": "A circle.", "answer_boxes_seq": [[0, 1]],
          "cot_with_ans": "There are <ph_st>circles<ph_ed>, so it is one."},
         {"img_path": "IMAGE", "boxes": [BOX], "question": "What?", "question_boxes_seq": [], "answer": "x",
          "answer_boxes_seq": [[4]], "cot_with_ans": "<ph_st>It<ph_ed> is."}],
        "unmatched boxes",
    ),
    "pointqa_local": (
        "vqa", "pointQA_local_val.jsonl",
        [{"file_path": "IMAGE", "question": "What colour is this?", "bbox": BOX, "point": POINT, "answer": "red"},
         {"file_path": "IMAGE", "question": "What is this?", "bbox": BOX, "point": [1], "answer": "red"}],
        "unreadable regions",
    ),
    "pointqa_twice": (
        "vqa", "pointQA_twice_test.jsonl",
        [{"file_path": "IMAGE", "obj_question": "How many of these circles?",
          "super_question": "How many of these shapes?",
          "general_question": "How many of these?", "bbox": BOX, "point": POINT, "answer": "2"},
         {"file_path": "IMAGE", "bbox": BOX, "point": POINT, "answer": "2"}],
        "no question",
    ),
    "v7w": (
        "point", "v7w_pointing_val.jsonl",
        [{"file_path": "IMAGE", "question": "Which is round?", "candidates": [OTHER, BOX], "answer": BOX,
          "point": POINT},
         {"file_path": "IMAGE", "question": "Which?", "candidates": [OTHER], "answer": BOX, "point": POINT}],
        "no answer",
    ),
    "vqa": (
        "vqa", "v2_OpenEnded_mscoco_val2014_questions.jsonl",
        [{"image_path": "IMAGE", "question": "Round?", "annotation": {"multiple_choice_answer": "yes"}},
         {"image_path": "IMAGE", "question": "Round?", "annotation": None}],
        "unknown row",
    ),
    "pope": (
        "vqa", "coco_pope_random.jsonl",
        [{"image": "IMAGE", "text": "Is there a circle?", "label": "Yes", "question_id": 1},
         {"image": "IMAGE", "text": " ", "label": "no"}],
        "no question",
    ),
    "native": (
        "instruct", "REC_ref3_train.jsonl",
        [{"image": "IMAGE", "target": {"boxes": [BOX, OTHER], "points": [POINT], "width": 48, "height": 32},
          "conversations": [
              {"from": "human", "value": "What is <boxes> near <points> in <image>?", "boxes_seq": [[0]],
               "points_seq": [[0]]},
              {"from": "gpt", "value": "One of {two}: <boxes>.", "boxes_seq": [[0, 1]]}]},
         {"image": "IMAGE", "target": {"boxes": [BOX]},
          "conversations": [{"from": "human", "value": "<boxes>", "boxes_seq": [[0], [0]]}]}],
        "unmatched boxes",
    ),
}  # fmt: skip


def _family(family: str, folder: Path) -> Fixture:
    task, name, rows, reason = FAMILIES[family]
    (folder / "pictures").mkdir()
    for i in range(4):
        (folder / f"pictures/{i}.jpg").write_bytes(tiny.picture(list(tiny.COLOURS)[i], random.Random(i)))
    lines = []
    for row in [*(rows[:1] * 4), rows[1]]:
        number = str(len(lines) % 4)
        lines.append(json.dumps(row).replace("IMAGE", f"{number}.jpg").replace("NUMBER", number))
    (folder / name).write_text("\n".join(lines) + "\n")
    options = ("--media", str(folder / "pictures"))
    return Fixture(task, folder / name, 4, {reason: 1}, "any", options)


_made: dict[str, Callable[[Path], Fixture]] = {f"shikra:{family}": partial(_family, family) for family in FAMILIES}
FIXTURES: Fixtures = _made
