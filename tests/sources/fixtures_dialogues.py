"""Small VQAv2, video QA, Visual Dialog, AVSD and Image-Chat sets in the published layouts."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def _picture(i: int) -> bytes:
    return tiny.picture(list(tiny.COLOURS)[i % 4], random.Random(i))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def vqa2(folder: Path) -> Fixture:
    """Annotations in another order than questions, pictures in COCO's zip; one question is without an annotation."""
    images = [9, 25, 30]
    with zipfile.ZipFile(folder / "train2014.zip", "w", zipfile.ZIP_STORED) as archive:
        for image in images:
            archive.writestr(f"train2014/COCO_train2014_{image:012d}.jpg", _picture(image))
    asked = [(9000, 9, "What colour is it?"), (9001, 9, "Is it round?"), (25000, 25, "How many?"), (30000, 30, "Why?"),
             (30001, 30, "Who knows?")]  # fmt: skip
    questions = [{"image_id": image, "question": text, "question_id": number} for number, image, text in asked]
    _write(folder / "v2_OpenEnded_mscoco_train2014_questions.json",
           {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "train2014",
            "questions": questions})  # fmt: skip
    annotations = [
        {"question_type": "what", "multiple_choice_answer": "red", "image_id": image, "answer_type": "other",
         "question_id": number,
         "answers": [{"answer": "red" if i else "dark red", "answer_confidence": "yes", "answer_id": i + 1}
                     for i in range(10)]}
        for number, image, _ in asked[:4]
    ]  # fmt: skip
    annotations[3]["image_id"] = 9  # an answer to another picture's question
    _write(
        folder / "v2_mscoco_train2014_annotations.json", {"info": {}, "license": {}, "annotations": annotations[::-1]}
    )
    return Fixture("vqa", folder, 2, {"unlike rows": 1, "no answer": 1})


def activitynet_qa(folder: Path) -> Fixture:
    """Questions without marks; files with v_ in front, also mkv; one clip is gone."""
    clips = {"1QIUV7WYKXg": "v_1QIUV7WYKXg.mp4", "2Z3qMhN7gdg": "2Z3qMhN7gdg.mkv"}
    (folder / "videos").mkdir()
    for name in clips.values():
        (folder / "videos" / name).write_bytes(tiny.clip("left"))
    names = [*clips, "gone0000000", "1QIUV7WYKXg"]
    rows = [
        {"video_name": name, "question": "is it moving", "question_id": f"{name}_{i}"} for i, name in enumerate(names)
    ]
    _write(folder / "val_q.json", rows)
    answers = [{"answer": "yes", "type": 3, "question_id": row["question_id"]} for row in rows]
    _write(folder / "val_a.json", answers[::-1])
    options = ("--media", str(folder / "videos"), "--set", "missing=skip")
    return Fixture("video_qa", folder, 3, {"missing media": 1}, "val", options)


def _clip_questions(folder: Path, files: dict[int, str]) -> None:
    for name in files.values():
        (folder / name).write_bytes(tiny.clip("right"))
    rows = [
        {"answer": "square", "id": 100 + i, "question": "what moves?", "video_id": clip} for i, clip in enumerate(files)
    ]
    _write(folder / "test_qa.json", [*rows, {"answer": None, "id": 200, "question": "what?", "video_id": min(files)}])


def msrvtt_qa(folder: Path) -> Fixture:
    _clip_questions(folder, {7010: "video7010.mp4", 7011: "video7011.mp4"})
    return Fixture("video_qa", folder, 2, {"unreadable row": 1}, "test")


def msvd_qa(folder: Path) -> Fixture:
    """Clips under their YouTube names; the mapping's lines are "NAME vidN"."""
    _clip_questions(folder, {1: "-4wsuPCjDBc_5_15.avi", 2: "mv89psg6zh4_33_46.avi"})
    (folder / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid2\n")
    return Fixture("video_qa", folder, 2, {"unreadable row": 1}, "test")


def visdial(folder: Path) -> Fixture:
    """Two rounds a picture, a hundred candidates, a dense annotation; one round names an answer that is not there."""
    questions = ["is it red", "how many are there", "is it small"]
    answers = [f"answer {i}" for i in range(110)]
    options = list(range(5, 105))
    dialogs = []
    for number, image in enumerate((185565, 284024, 574189)):
        (folder / "VisualDialog_val2018").mkdir(exist_ok=True)
        (folder / f"VisualDialog_val2018/VisualDialog_val2018_{image:012d}.jpg").write_bytes(_picture(number))
        rounds = [{"question": i, "answer": 7 + i, "gt_index": 2 + i, "answer_options": options} for i in range(2)]
        dialogs.append({"image_id": image, "caption": f"a circle of kind {number}", "dialog": rounds})
    dialogs[2]["dialog"][1]["answer"] = 999
    content = {"questions": questions, "answers": answers, "dialogs": dialogs}
    _write(folder / "visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": content})
    dense = [{"image_id": 284024, "round_id": 2, "gt_relevance": [1.0] + [0.0] * 98 + [0.4]}]
    _write(folder / "visdial_1.0_val_dense_annotations.json", dense)
    return Fixture("visdial", folder, 2, {"unreadable round": 1}, "val")


def avsd(folder: Path) -> Fixture:
    """The undisclosed test set: its last rounds have no answers; one clip is missing."""
    dialogs: list[dict[str, Any]] = []
    for clip in ("7UPGT", "LWV9Y", "GONE0"):
        rounds = [{"question": "is anyone there?", "answer": "no, a square only"},
                  {"question": "where does it go?", "answer": "__UNDISCLOSED__"}]  # fmt: skip
        dialogs.append({"image_id": clip, "caption": "a square moves", "summary": "", "dialog": rounds})
        if clip != "GONE0":
            (folder / f"{clip}.mp4").write_bytes(tiny.clip("left"))
    _write(folder / "test_set4DSTC7-AVSD.json", {"type": "test", "dialogs": dialogs})
    return Fixture("visdial", folder, 2, {"missing media": 1}, "test")


def image_chat(folder: Path) -> Fixture:
    """Three turns, candidates of the valid set; a turn that lost its style."""
    rows = []
    for number in range(3):
        image = f"{number:032x}"
        (folder / "yfcc_images").mkdir(exist_ok=True)
        (folder / f"yfcc_images/{image}.jpg").write_bytes(_picture(number))
        dialog = [["Sweet", "What a lovely circle!"], ["Skeptical", "Is it round at all?"], ["Sweet", "It is to me."]]
        candidates = [{"100": [f"candidate {i}" for i in range(100)], "1000": []} for _ in dialog]
        rows.append({"image_hash": image, "dialog": dialog, "candidates": candidates})
    rows.append({**rows[0], "dialog": [["Sweet", "Hello"], ["no style"]]})
    _write(folder / "valid.json", rows)
    _write(folder / "personalities.json", {"positive": ["Sweet"], "neutral": ["Skeptical"], "negative": []})
    return Fixture("image_chat", folder, 3, {"unreadable turn": 1}, "val")


FIXTURES: Fixtures = {
    "vqa2": vqa2,
    "activitynet_qa": activitynet_qa,
    "msrvtt_qa": msrvtt_qa,
    "msvd_qa": msvd_qa,
    "visdial": visdial,
    "avsd": avsd,
    "image_chat": image_chat,
}
