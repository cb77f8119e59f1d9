"""Visual Genome 1.0 to 1.4: regions with their descriptions, objects, and questions (arXiv 1602.07332).

Format: the readme of its data (homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html), its Python driver, and
the loader of Hugging Face, which knows how the versions differ: `id` or `image_id`. Annotations may stay in their
.json.zip. Pictures are VG_100K/ID.jpg and VG_100K_2/ID.jpg, in folders or in images.zip and images2.zip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.coco import Target, picture_record
from mmchat.sources.files import Files
from mmchat.sources.refcoco import LEAK, checked_box, evaluation_images
from mmchat.sources.rows import GROUPED, UNREADABLE, annotated, grouped, is_grouped, problem
from mmchat.sources.source import Source


@dataclass(frozen=True)
class _Picture:
    number: int
    width: int
    height: int
    item: MediaRef

    def box(self, thing: Mapping[str, Any]) -> list[float]:
        """Raises SampleError. Regions have width and height, objects w and h."""
        size = [thing.get("width", thing.get("w")), thing.get("height", thing.get("h"))]
        found = [thing.get("x"), thing.get("y"), *size]
        if not all(isinstance(x, int | float) for x in found):
            raise SampleError("unreadable box", f"wanted x, y, width and height, found {found}")
        return checked_box(found, self.width, self.height)

    @property
    def item_with_size(self) -> MediaRef:
        return annotated(self.item, self.width, self.height)

    def error(self, error: SampleError) -> SampleError:
        return SampleError(error.reason, f"image {self.number}: {error.detail}")


def read_regions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a picture: each region's description and box."""

    def records(regions: list[Any], picture: _Picture) -> Iterator[Record | SampleError]:
        targets: list[Target] = []
        for region in regions:
            try:
                targets.append({"expressions": [_text(region, "phrase")], "boxes": [picture.box(region)]})
            except SampleError as error:
                yield picture.error(error)
        if targets:
            yield picture_record(f"{picture.number}", targets, picture.item_with_size, {"image_id": picture.number})

    return _read(files, split, options, "region_descriptions.json", "regions", records)


def read_objects(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a picture: each name of an object and the boxes of all objects that are called so.

    A name of which one box is unusable is left out. Not everything in a picture is annotated.
    """

    def records(things: list[Any], picture: _Picture) -> Iterator[Record | SampleError]:
        boxes: dict[str, list[list[float]]] = {}
        unusable: dict[str, SampleError] = {}
        for thing in things:
            names = thing.get("names") if isinstance(thing, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                yield SampleError("unreadable object", f"image {picture.number}: {thing!r:.200}")
                continue
            for name in dict.fromkeys(map(str.strip, names)):
                try:
                    boxes.setdefault(name, []).append(picture.box(thing))
                except SampleError as error:
                    unusable[name] = picture.error(error)
        yield from unusable.values()
        targets = [{"expressions": [name], "boxes": boxes[name]} for name in boxes if name not in unusable]
        if targets:
            yield picture_record(f"{picture.number}", targets, picture.item_with_size, {"image_id": picture.number})

    return _read(files, split, options, "objects.json", "objects", records)


def read_questions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Questions and answers, a picture's in one record unless `--set grouped=no` says otherwise."""

    def records(questions: list[Any], picture: _Picture) -> Iterator[Record | SampleError]:
        for qa in questions:
            try:
                facts = {"question": _text(qa, "question"), "answers": [_text(qa, "answer")]}
                key = f"{picture.number}/{qa.get('qa_id')}"
                yield Record(key, facts | {"image_id": picture.number}, (picture.item,))
            except SampleError as error:
                yield picture.error(error)

    found = _read(files, split, options, "question_answers.json", "qas", records)
    return grouped(found) if is_grouped(options, split) else found


_OPTIONS = {"leak": f"{LEAK}; told by the coco_id in image_data.json"}

SOURCES = {
    "visual_genome_regions": Source(("rec", "reg", "refer"), ("region_descriptions.json",), read_regions, _OPTIONS),
    "visual_genome_objects": Source(("rec", "reg", "refer"), ("objects.json",), read_objects, _OPTIONS),
    "visual_genome_qa": Source(
        ("vqa",),
        ("question_answers.json",),
        read_questions,
        _OPTIONS | GROUPED,
    ),
}


def _read(
    files: Files,
    split: str,
    options: Mapping[str, str],
    name: str,
    key: str,
    records: Callable[[list[Any], _Picture], Iterator[Record | SampleError]],
) -> Iterator[Record | SampleError]:
    """What `records` makes of the list under `key`, picture by picture. Sizes and COCO ids are held in memory."""
    if split != "train":
        raise ValueError(f"Visual Genome has no splits, found {split}: wanted train, which is all but what leak names")
    images: dict[int, tuple[int, int, int | None]] = {}
    sizes = files.beside("image_data.json")
    if not sizes:
        raise ValueError(f"{files} has no image_data.json beside its annotations, which has the sizes of the pictures")
    for row in files.rows(sizes[0]):
        match row:
            case {"width": int(width), "height": int(height)} if (number := _number(row)) is not None:
                images[number] = (width, height, row.get("coco_id"))
            case _:
                yield SampleError("unreadable image row", f"image_data.json: {row!r:.200}")
    held_out = evaluation_images(options.get("leak", ""))
    name = files.one(name)
    for row in files.rows(name):
        number = _number(row)
        try:
            if number is None or not isinstance(row.get(key), list):
                raise SampleError("unreadable row", f"wanted image_id and {key}, found {row!r:.200}")
            if number not in images:
                raise SampleError("unknown picture", f"image {number} is not in image_data.json")
            width, height, coco_id = images[number]
            if coco_id in held_out:
                raise SampleError("image of an evaluation split", f"image {number}, of COCO {coco_id}")
            yield from records(row[key], _Picture(number, width, height, genome_picture(files, number)))
        except UNREADABLE as error:
            yield problem(error, name)


def genome_picture(files: Files, image: Any) -> MediaRef:
    """A picture of Visual Genome by its number, in either of its two folders. Raises SampleError."""
    folders = ("VG_100K/", "VG_100K_2/", "", "images/VG_100K/", "images2/VG_100K_2/")
    names = [f"{folder}{image}.jpg" for folder in folders]
    return files.media("image", names[0], *names[1:])


def _number(row: Any) -> int | None:
    """The picture's number in a row."""
    number = row.get("image_id", row.get("id")) if isinstance(row, dict) else None
    return number if isinstance(number, int) else None


def _text(row: Any, name: str) -> str:
    text = row.get(name) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise SampleError(f"no {name}", f"found {row!r:.200}")
    return text.strip()
