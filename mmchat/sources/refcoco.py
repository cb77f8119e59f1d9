"""RefCOCO, RefCOCO+ and RefCOCOg: expressions and boxes on COCO's pictures, and which of those are for evaluation only.

Format: github.com/lichengunc/refer (its README and refer.py), SET/refs(PARTITION).p and SET/instances.json.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmchat.conversation import MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.regions import check_region, read_box
from mmchat.sources.files import Files
from mmchat.sources.rows import UNREADABLE, annotated, problem
from mmchat.sources.source import Source

# Who made the split. RefCOCOg's umd keeps pictures apart, which google's does not: the first that is there counts.
PARTITIONS = ("umd", "unc", "google")

LEAK = (
    "comma-separated refs(*).p files, folders of such, or COCO annotation files: their evaluation pictures are left out"
)

_MARKS = ("refs(*).p", "*/refs(*).p")


def read_refcoco(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """To learn from, one record a ref with all its expressions; in other splits one an expression, as they are counted.

    The train split leaves out every picture that is in an evaluation split of any of the three sets in SOURCE or
    beside it. The refs are held in memory whole, since a pickle cannot be streamed, and of instances.json the boxes of
    the split's refs and the sizes of the pictures. A ref's file_name names no file (it ends in the annotation's id):
    the picture is found by its id.
    """
    sets = _sets(files)
    wanted = options.get("set", next(iter(sets)) if len(sets) == 1 else None)
    if wanted not in sets:
        found = f"found {wanted}" if wanted else "found none"
        raise ValueError(
            f"{files} holds {', '.join(sorted(sets)) or 'no refs(*).p'}: say which by --set set=NAME, {found}"
        )
    name = _refs_name(sets[wanted], options.get("partition"))
    refs = load_refs(files, name)
    splits = sorted({ref["split"] for ref in refs if isinstance(ref, dict) and isinstance(ref.get("split"), str)})
    if not any(_is_in(one, split) for one in splits):
        raise ValueError(f"{name} in {files} has the splits {', '.join(splits)}, not {split}")
    held_out: set[int] = set()
    if split == "train" and (leak := options.get("leak", "")) != "none":
        own = {wanted: options.get("partition")}
        held_out = evaluation_images(leak) | _images_held_out(files, own)
        if "/" not in name:  # SOURCE is one set's own folder, or the file in it
            held_out |= _images_held_out(Files(_folder(files).parent), own)
    instances = str(PurePosixPath(name).with_name("instances.json"))
    boxes, sizes = _instances(files, instances, {ref["ann_id"] for ref in refs if _is_usable(ref)})
    for ref in refs:
        if not _is_usable(ref):
            yield SampleError("unreadable ref", f"{name}: {ref!r:.200}")
        elif _is_in(ref["split"], split):
            try:
                if ref["image_id"] in held_out:
                    raise SampleError("image of an evaluation split", f"COCO image {ref['image_id']}")
                yield from _records(files, ref, boxes, sizes, split == "train")
            except UNREADABLE as error:
                yield problem(error, f"{name} ref {ref['ref_id']}")


SOURCES = {
    "refcoco": Source(
        ("rec", "reg", "refer"),
        _MARKS,
        read_refcoco,
        {
            "set": "refcoco, refcoco+ or refcocog, where SOURCE holds several",
            "partition": f"who made the split; by default the first there is of {', '.join(PARTITIONS)}",
            "leak": f"{LEAK}; none: nothing is left out",
        },
    )
}


def evaluation_images(leak: str) -> set[int]:
    """COCO ids of the evaluation pictures of the paths in the option `leak`; all pictures of a COCO annotation file.

    Raises ValueError for a path that holds neither refs nor COCO annotations.
    """
    images: set[int] = set()
    for path in filter(None, leak.split(",")):
        files = Files(Path(path))
        if files.annotation is not None and path.endswith(".json"):
            found = {i for i in files.items(files.annotation, "images.item.id") if isinstance(i, int)}
        else:
            found = _images_held_out(files)
        if not found:
            raise ValueError(f"--set leak={path}: wanted refs(*).p, a folder of such, or a COCO annotation file")
        images |= found
    return images


def load_refs(files: Files, name: str) -> list[Any]:
    """The refs of a Python 2 pickle, in which nothing but plain values is accepted. Raises ValueError."""
    with files.open(name) as file:
        try:
            refs = _PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{name} in {files} is no pickle of plain values: {error!r:.300}") from error
    if not isinstance(refs, list):
        raise ValueError(f"{name} in {files} holds a {type(refs).__name__}, wanted a list of refs")
    return refs


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, text and numbers, for which no pickle needs to import anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which refs never need; it is not opened")


def _sets(files: Files) -> dict[str, dict[str, str]]:
    """Name of a set, which is its folder's, to partition to refs file."""
    sets: dict[str, dict[str, str]] = {}
    for name in files.find(*_MARKS):
        path = PurePosixPath(name)
        sets.setdefault(path.parent.name or _folder(files).name, {})[path.name[len("refs(") : -len(").p")]] = name
    return sets


def _folder(files: Files) -> Path:
    source = files.source.absolute()
    return source if source.is_dir() else source.parent


def _refs_name(partitions: Mapping[str, str], wanted: str | None = None) -> str:
    """The refs file of a partition, by default of the first in PARTITIONS. Raises ValueError."""
    order = [wanted] if wanted else [*PARTITIONS, *partitions]
    name = next((partitions[one] for one in order if one in partitions), None)
    if name is None:
        raise ValueError(f"no refs({wanted}).p; the partitions are {', '.join(partitions)}")
    return name


def _images_held_out(files: Files, partition: Mapping[str, str | None] | None = None) -> set[int]:
    """COCO ids of the pictures outside of `train`, of every set there is."""
    images: set[int] = set()
    for one, partitions in _sets(files).items():
        refs = load_refs(files, _refs_name(partitions, (partition or {}).get(one)))
        images |= {ref["image_id"] for ref in refs if _is_usable(ref) and ref["split"] != "train"}
    return images


def _is_usable(ref: Any) -> bool:
    match ref:
        case {"ref_id": int(), "ann_id": int(), "image_id": int(), "split": str(), "sentences": [*_]}:
            return True
    return False


def _is_in(own: str, split: str) -> bool:
    """Whether a ref's split counts to the one asked for: testAB is in testA, in testB and in test."""
    if own.startswith("test") and split.startswith("test"):
        return set(split[4:]) <= set(own[4:])
    return own == split


def _instances(
    files: Files, name: str, wanted: set[int]
) -> tuple[dict[int, tuple[float, ...]], dict[int, tuple[int, int]]]:
    """Annotation to its box [x, y, width, height], and picture to its width and height."""
    boxes = {}
    for row in files.items(name, "annotations.item"):
        match row:
            case {"id": int(i), "bbox": [_, _, _, _] as box} if i in wanted:
                boxes[i] = tuple(box)
    sizes = {}
    for row in files.items(name, "images.item"):
        match row:
            case {"id": int(i), "width": int(width), "height": int(height)}:
                sizes[i] = (width, height)
    return boxes, sizes


def _records(
    files: Files,
    ref: dict[str, Any],
    boxes: Mapping[int, tuple[float, ...]],
    sizes: Mapping[int, tuple[int, int]],
    is_one_record: bool,
) -> Iterator[Record]:
    if ref["ann_id"] not in boxes or ref["image_id"] not in sizes:
        raise SampleError("no box", f"annotation {ref['ann_id']} or image {ref['image_id']} is not in instances.json")
    box = checked_box(boxes[ref["ann_id"]], *sizes[ref["image_id"]])
    said = [(s["sent"].strip(), s.get("sent_id")) for s in ref["sentences"] if isinstance(s.get("sent"), str)]
    said = [(text, i) for text, i in said if text]
    if not said:
        raise SampleError("no expression", f"sentences {ref['sentences']!r:.200}")
    item = annotated(coco_picture(files, ref["image_id"]), *sizes[ref["image_id"]])
    facts = {"boxes": [box], "ref_id": ref["ref_id"], "image_id": ref["image_id"]}
    if is_one_record:
        yield Record(f"{ref['ref_id']}", {"expressions": [text for text, _ in said]} | facts, (item,))
        return
    for text, i in said:
        yield Record(f"{ref['ref_id']}/{i}", {"expressions": [text]} | facts | {"sent_id": i}, (item,))


def checked_box(xywh: Sequence[float], width: int, height: int) -> list[float]:
    """[x1, y1, x2, y2] to hundredths of a pixel. Raises SampleError for a box that is not in the picture."""
    try:
        box = read_box(xywh, "xywh")
    except (TypeError, ValueError, OverflowError) as error:
        raise SampleError("unreadable box", str(error)) from error
    check_region(Region(0, box=box), width, height)
    return [round(x, 2) for x in box]


def coco_picture(files: Files, image_id: int) -> MediaRef:
    """A picture of COCO's train2014 by its id, under its name of 2014 or of 2017. Raises SampleError."""
    old, new = f"COCO_train2014_{image_id:012d}.jpg", f"{image_id:012d}.jpg"
    folders = ("train2014", "images/train2014", "images/mscoco/images/train2014")
    return files.media("image", *(f"{folder}/{old}" for folder in folders), old, f"train2017/{new}", new)
