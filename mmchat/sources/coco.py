"""COCO's captions and instances, of 2014 and 2017 (cocodataset.org, "Data format").

annotations/captions_SUBSET.json and instances_SUBSET.json, pictures in SUBSET/, all in folders or in the zips of the
download. SUBSET is train2014, val2017 and the like; the split may be `train` where there is only one year.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.refcoco import LEAK, checked_box, evaluation_images
from mmchat.sources.rows import annotated, problem
from mmchat.sources.source import Source

_CAPTIONS = ("annotations/captions_{split}*.json", "captions_{split}*.json")
_INSTANCES = ("annotations/instances_{split}*.json", "instances_{split}*.json")

Target = dict[str, Any]  # {"expressions": [...], "boxes": [...]}: facts of the tasks rec and reg

# Picture to its things, six numbers each: category, x, y, width, height, iscrowd. Segmentations are passed over.
_Things = dict[int, "array[float]"]


def read_coco_captions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a picture with its captions, and its objects where instances_SUBSET.json lies beside the captions.

    Captions and boxes are held in memory, since the files do not group them by picture. Things that an annotation
    covers as a crowd are no objects, since its box has many things.
    """
    name = files.one(*(mark.format(split=split) for mark in _CAPTIONS))
    captions: dict[int, list[str]] = {}
    for row in files.items(name, "annotations.item"):
        match row:
            case {"image_id": int(i), "caption": str(caption)} if caption.strip():
                captions.setdefault(i, []).append(" ".join(caption.split()))
            case _:
                yield SampleError("unreadable annotation", f"{name}: {row!r:.200}")
    things: _Things = {}
    labels: dict[int, str] = {}
    instances = str(PurePosixPath(name).with_name(PurePosixPath(name).name.replace("captions_", "instances_")))
    if files.stored(instances) is not None:
        yield from _fill(files, instances, things, labels)
    for image, item in _pictures(files, name, options):
        if isinstance(item, SampleError):
            if isinstance(number := image.get("id"), int):
                captions.pop(number, None)
            yield item
            continue
        objects = []
        for label, box in _boxes(image, things, labels):
            if isinstance(box, SampleError):
                yield box
            elif box is not None:
                objects.append({"label": label, "box": box})
        if image["id"] not in captions:
            yield SampleError("no caption", f"{name}: image {image['id']}")
            continue
        facts: dict[str, Any] = {"captions": captions.pop(image["id"]), "image_id": image["id"]}
        if objects:
            facts, item = facts | {"objects": objects}, annotated(item, image["width"], image["height"])
        yield Record(f"{image['id']:012d}", facts, (item,))
    for i in captions:
        yield SampleError("caption without a picture", f"{name}: no image {i} is listed")


def read_coco_instances(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a picture: its categories as expressions, each with all its boxes. What is held in memory is the boxes.

    A category with a crowd in the picture is left out: its boxes are not all there. `--set absent=N` adds N categories
    a picture that it does not show, with no box.
    """
    name = files.one(*(mark.format(split=split) for mark in _INSTANCES))
    num_absent = options.get("absent", "0")
    if not num_absent.isdecimal():
        raise ValueError(f"--set absent={num_absent}: wanted a number of categories")
    things: _Things = {}
    labels: dict[int, str] = {}
    yield from _fill(files, name, things, labels)
    for image, item in _pictures(files, name, options):
        if isinstance(item, SampleError):
            yield item
            continue
        by_label: dict[str, list[list[float]]] = {}
        incomplete: dict[str, SampleError] = {}
        for label, box in _boxes(image, things, labels):
            by_label.setdefault(label, [])
            if isinstance(box, list):
                by_label[label].append(box)
            else:
                crowd = SampleError("category with a crowd", f"{name}: image {image['id']}: {label}")
                incomplete[label] = box or crowd
        yield from incomplete.values()
        absent = [label for label in labels.values() if label not in by_label]
        absent = random.Random(image["id"]).sample(absent, min(int(num_absent), len(absent)))
        targets = [
            {"expressions": [label], "boxes": boxes} for label, boxes in by_label.items() if label not in incomplete
        ] + [{"expressions": [label], "boxes": []} for label in absent]
        if targets:
            item = annotated(item, image["width"], image["height"])
            yield picture_record(f"{image['id']:012d}", targets, item, {"image_id": image["id"]})
        elif not incomplete:
            yield SampleError("no objects", f"{name}: image {image['id']}")


_OPTIONS = {"leak": LEAK}

SOURCES = {
    "coco_captions": Source(("caption",), _CAPTIONS, read_coco_captions, _OPTIONS),
    "coco_instances": Source(
        ("rec", "reg", "refer"),
        _INSTANCES,
        read_coco_instances,
        _OPTIONS | {"absent": "how many categories to ask for that a picture does not show (default 0)"},
    ),
}


def picture_record(key: str, targets: Sequence[Target], item: MediaRef, facts: Mapping[str, Any]) -> Record:
    """All targets of a picture in one record, so that it is stored once: see `mmchat.tasks.rec`."""
    first, *more = random.Random(key).sample(list(targets), len(targets))
    return Record(key, first | ({"more": more} if more else {}) | dict(facts), (item,))


def _fill(files: Files, name: str, things: _Things, labels: dict[int, str]) -> Iterator[SampleError]:
    """Reads categories and boxes; yields the annotations that cannot be read."""
    for row in files.items(name, "categories.item"):
        match row:
            case {"id": int(i), "name": str(label)} if label.strip():
                labels[i] = label
            case _:
                yield SampleError("unreadable category", f"{name}: wanted id and name, found {row!r:.200}")
    for row in files.items(name, "annotations.item"):
        match row:
            case {"image_id": int(i), "category_id": int(category), "bbox": [_, _, _, _] as box} if (
                category in labels and row.get("iscrowd") in (0, 1, None)
            ):
                try:
                    things.setdefault(i, array("d")).extend(array("d", [category, *box, row.get("iscrowd") or 0]))
                except (TypeError, OverflowError) as error:
                    yield problem(error, f"{name}: {row!r:.200}")
            case _:
                yield SampleError("unreadable annotation", f"{name}: {row!r:.200}")


def _pictures(
    files: Files, name: str, options: Mapping[str, str]
) -> Iterator[tuple[dict[str, Any], MediaRef | SampleError]]:
    """Rows of "images", each with its picture or the reason why it cannot be used."""
    held_out = evaluation_images(options.get("leak", ""))
    subset = PurePosixPath(name).stem.partition("_")[2]
    for image in files.items(name, "images.item"):
        try:
            match image:
                case {"id": int(i), "file_name": str(file), "width": int(), "height": int()}:
                    if i in held_out:
                        raise SampleError("image of an evaluation split", f"{name}: image {i}")
                    yield image, files.media("image", f"{subset}/{file}", f"images/{subset}/{file}", file)
                case _:
                    raise SampleError("unreadable image row", f"{name}: {image!r:.200}")
        except SampleError as error:
            yield image if isinstance(image, dict) else {}, error


def _boxes(
    image: Mapping[str, Any], things: _Things, labels: Mapping[int, str]
) -> Iterator[tuple[str, list[float] | SampleError | None]]:
    """Label and box [x1, y1, x2, y2] of each thing in a picture; None for a crowd. The picture's entry is used up."""
    numbers = things.pop(image["id"], array("d"))
    for start in range(0, len(numbers), 6):
        category, *box, is_crowd = numbers[start : start + 6]
        label = labels[int(category)]
        if is_crowd:
            yield label, None
            continue
        try:
            yield label, checked_box(box, image["width"], image["height"])
        except SampleError as error:
            yield label, SampleError(error.reason, f"image {image['id']}: {label}: {error.detail}")
