"""Questions about a place in a picture, or answered by one: PointQA and Visual7W's pointing questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.regions import read_box
from mmchat.sources.files import Files
from mmchat.sources.rows import GROUPED, UNREADABLE, grouped, is_grouped, problem
from mmchat.sources.source import Source
from mmchat.sources.visual_genome import genome_picture

_POINTQA = tuple(f"{at}{kind}qa_dataset.json" for at in ("", "*/") for kind in ("local", "looktwice"))
_SHAPES = ("point", "box")
_QUESTIONS = {"general": "general_question", "object": "obj_question", "super": "super_question"}


def _pointqa(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """PointQA (arXiv 2011.13681, github.com/arjunmani/pointingqa): LocalQA and LookTwiceQA, on Visual Genome.

    {local,looktwice}qa_dataset.json maps a picture's number to its questions, *_SPLIT_imgs.json lists the numbers of
    a split (LocalQA's final test is testfinal). Boxes are {x, y, w, h}, points {x, y}.
    """
    name = files.one(*_POINTQA)
    lists = [name.replace("dataset", f"{one}_imgs") for one in (split, f"{split}final")]
    listed = next((one for one in lists if files.stored(one) is not None), None)
    if listed is None:
        raise ValueError(f"{files} has none of {', '.join(lists)}, which list the pictures of the split {split}")
    images = {str(number) for number in files.rows(listed)}
    shapes, questions = _chosen(options, "region", _SHAPES), _chosen(options, "question", tuple(_QUESTIONS))
    for image, asked in files.pairs(name):
        if image not in images:
            continue
        try:
            item = genome_picture(files, image)
            if not isinstance(asked, list):
                raise SampleError("unreadable row", f"wanted a list of questions, found {asked!r:.200}")
        except SampleError as error:
            yield problem(error, f"{name} picture {image}")
            continue
        for number, row in enumerate(asked):
            try:
                for place, (text, region, answer) in enumerate(_pointed(row, shapes, questions)):
                    facts = {"question": text, "answers": [answer], "regions": [{"media": 0, **region}]}
                    yield Record(f"{image}/{number}-{place}", facts, (item,))
            except (*UNREADABLE, ValueError) as error:
                yield problem(error, f"{name} picture {image} question {number}")


def read_pointqa(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """PointQA (see `_pointqa`), a picture's questions in one record where `--set grouped` says so."""
    found = _pointqa(files, split, options)
    return grouped(found) if is_grouped(options, split) else found


def _chosen(options: Mapping[str, str], name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    found = options.get(name, known[0])
    if found not in (*known, "each"):
        raise ValueError(f"--set {name}={'|'.join((*known, 'each'))}; found {found}")
    return known if found == "each" else (found,)


def _pointed(
    row: Mapping[str, Any], shapes: tuple[str, ...], questions: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Question, place and answer; a question of LocalQA has an answer for each of its objects."""
    if "all_objs" in row:
        boxes, points, answers = row["all_objs"], row["points"], row["all_ans"]
        if not len(boxes) == len(points) == len(answers):
            raise SampleError("unlike rows", f"{len(boxes)} objects, {len(points)} points, {len(answers)} answers")
        for box, point, answer in zip(boxes, points, answers, strict=True):
            for shape in shapes:
                yield row["question"], _place(shape, box, point), str(answer)
    else:
        point = row.get("point")
        if point is None and "box" not in shapes:
            raise SampleError("no point", "this question has a box only: --set region=box")
        for shape in shapes if point is not None else ("box",):
            for question in questions:
                yield row[_QUESTIONS[question]], _place(shape, row["bbox"], point), str(row["ans"])


def _place(shape: str, box: Any, point: Any) -> dict[str, Any]:
    if shape == "point":
        return {"point": [float(point["x"]), float(point["y"])]}
    return {"box": read_box([box[side] for side in "xywh"], "xywh")}


def read_visual7w(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Visual7W pointing (arXiv 1511.03416): dataset_v7w_pointing.json, pictures images/v7w_NUMBER.jpg.

    Boxes are listed apart, by box_id, as x, y, width, height; they are held in memory (50 MB). The right box comes
    first in the facts; a box that starts a pixel before the picture is clamped to it.
    """
    name = files.one("dataset_v7w_pointing.json", "*/dataset_v7w_pointing.json")
    boxes = {}
    for box in files.items(name, "boxes.item"):
        if isinstance(box, dict) and isinstance(box.get("box_id"), int):
            boxes[box["box_id"]] = box
    for image in files.items(name, "images.item"):
        if not isinstance(image, dict) or not isinstance(image.get("qa_pairs"), list):
            yield SampleError("unreadable row", f"{name}: wanted a picture with qa_pairs, found {image!r:.200}")
            continue
        if image.get("split") != split:
            continue
        file = str(image.get("filename"))
        for qa in image["qa_pairs"]:
            try:
                item = files.media("image", f"images/{file}", file)
                match qa:
                    case {"qa_id": int(number), "question": str(asked), "answer": right, "multiple_choices": [*others]}:
                        candidates = [_box(boxes, one) for one in (right, *others)]
                        facts = {"question": asked, "candidates": candidates, "answer": 0}
                        yield Record(f"{number:08d}", facts, (item,))
                    case _:
                        raise SampleError("unreadable row", f"wanted question, answer, multiple_choices; {qa!r:.200}")
            except UNREADABLE as error:
                yield problem(error, f"{name} {file}")


def _box(boxes: Mapping[Any, dict[str, Any]], number: Any) -> tuple[float, float, float, float]:
    try:
        box = boxes[number]
        return read_box([box[side] for side in ("x", "y", "width", "height")], "xywh")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SampleError("unreadable box", f"box_id {number!r}: {error!r}") from error


SOURCES = {
    "pointqa": Source(
        ("vqa",),
        _POINTQA,
        read_pointqa,
        {
            "region": "point (default), box or each: how the place is named; each asks once in both ways",
            "question": "of LookTwiceQA: general (default), object, super or each",
            **GROUPED,
        },
    ),
    "visual7w": Source(("point",), ("dataset_v7w_pointing.json", "*/dataset_v7w_pointing.json"), read_visual7w),
}
