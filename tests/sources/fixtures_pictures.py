"""Small RefCOCO, COCO, Flickr30k Entities and Visual Genome folders in the published layouts."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def picture(i: int) -> bytes:
    """48 x 32 pixels."""
    return tiny.picture(list(tiny.COLOURS)[i % 4], random.Random(i))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def python2_pickle(value: Any) -> bytes:
    """As cPickle of Python 2 writes it in protocol 0, where `str` is bytes."""

    def opcodes(one: Any) -> bytes:
        match one:
            case dict():
                return b"(d" + b"".join(opcodes(key) + opcodes(item) + b"s" for key, item in one.items())
            case list():
                return b"(l" + b"".join(opcodes(item) + b"a" for item in one)
            case bytes():
                return b"S'" + repr(one)[2:-1].encode() + b"'\n"
            case str():
                return opcodes(one.encode("latin1"))
            case int():
                return b"I%d\n" % one
        raise TypeError(type(one))

    return opcodes(value) + b"."


def ref(ref_id: int, image_id: int, split: str, *sentences: str, ann_id: int | None = None) -> dict[str, Any]:
    """A ref with all its fields; its file_name names no file, as in the published ones."""
    ann_id = ref_id + 1000 if ann_id is None else ann_id
    sents = [
        {"tokens": text.split(), "raw": text.title(), "sent_id": ref_id * 10 + n, "sent": text}
        for n, text in enumerate(sentences)
    ]
    return {
        "sent_ids": [sent["sent_id"] for sent in sents],
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sents,
        "category_id": 1,
    }


def write_refs(folder: Path, partition: str, refs: list[Any]) -> None:
    """refs(PARTITION).p and the instances.json that goes with it, whose boxes are [id's last digit, 2.5, 20, 10.25]."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({partition}).p").write_bytes(python2_pickle(refs))
    known = [one for one in refs if "ann_id" in one and one["ann_id"] < 9000]
    write_json(
        folder / "instances.json",
        {
            "info": {},
            "images": [
                {"file_name": f"COCO_train2014_{i:012d}.jpg", "height": 32, "width": 48, "id": i}
                for i in sorted({one["image_id"] for one in known})
            ],
            "annotations": [
                {"segmentation": [[1.0, 2.0, 3.0, 2.0, 3.0, 4.0]], "area": 12.5, "iscrowd": 0, "category_id": 1,
                 "image_id": one["image_id"], "bbox": [one["ann_id"] % 10, 2.5, 20, 10.25], "id": one["ann_id"]}
                for one in known
            ],
            "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
        },
    )  # fmt: skip


def refcoco(folder: Path) -> Fixture:
    """The three sets; a picture of RefCOCOg's test split is in RefCOCO's train split; one box is nowhere."""
    write_refs(
        folder / "refcoco",
        "unc",
        [
            ref(1, 11, "train", "man on left", "caf\xe9 guest"),
            ref(2, 12, "train", "red ball"),
            ref(3, 12, "train", "the other ball"),
            ref(4, 13, "train", "a lamp", "left lamp", "  "),
            ref(5, 14, "train", "blue thing", ann_id=9999),
            ref(6, 15, "train", "in a test split of refcocog"),
            ref(7, 16, "val", "woman", "woman with hat"),
            ref(8, 17, "testA", "boy"),
            ref(9, 18, "testB", "chair"),
            {"ref_id": 10, "split": "train"},
        ],
    )
    write_refs(folder / "refcoco+", "unc", [ref(1, 12, "train", "red one"), ref(2, 16, "val", "smiling")])
    write_refs(folder / "refcocog", "umd", [ref(1, 15, "test", "a picture that is for tests")])
    write_refs(
        folder / "refcocog", "google", [ref(1, 11, "val", "google's split"), ref(2, 11, "train", "shares pictures")]
    )
    (folder / "train2014").mkdir()
    for i in range(11, 19):
        (folder / f"train2014/COCO_train2014_{i:012d}.jpg").write_bytes(picture(i))
    skipped = {"image of an evaluation split": 1, "no box": 1, "unreadable ref": 1}
    return Fixture("rec", folder, 4, skipped, options=("--set", "set=refcoco"), other_tasks=("reg",))


def _write_coco(folder: Path, subset: str, name: str) -> None:
    """Captions and instances in one zip, pictures in another, as they are downloaded."""
    folder.mkdir(exist_ok=True)
    images = [
        {"license": 1, "file_name": name.format(i), "coco_url": "http://x", "height": 32, "width": 48,
         "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://x", "id": i}
        for i in (9, 25, 30, 34, 36)
    ]  # fmt: skip
    captions = [
        {"image_id": 25, "id": 1, "caption": "A giraffe eating food from the tree."},
        {"image_id": 9, "id": 2, "caption": "A ball\non a table. "},
        {"image_id": 25, "id": 3, "caption": "Two giraffes."},
        {"image_id": 30, "id": 4, "caption": "A vase."},
        {"image_id": 34, "id": 5, "caption": "A zebra."},
        {"image_id": 34, "id": 6, "caption": None},
        {"image_id": 99, "id": 7, "caption": "Of no listed picture."},
    ]
    polygon, rle = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]], {"counts": [272, 2, 4], "size": [32, 48]}
    things = [
        {"image_id": 25, "category_id": 90, "bbox": [1.5, 2.25, 20.13, 8.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 25, "category_id": 90, "bbox": [30.0, 3.0, 18.4, 20.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 25, "category_id": 1, "bbox": [0.0, 0.0, 40.0, 30.0], "iscrowd": 1, "segmentation": rle},
        {"image_id": 9, "category_id": 2, "bbox": [4.0, 4.0, 10.0, 10.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 9, "category_id": 1, "bbox": [0.0, 4.0, 5.0, 10.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 30, "category_id": 1, "bbox": [4.0, 4.0, 10.0, 10.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 34, "category_id": 2, "bbox": [4.0, 4.0, 60.0, 10.0], "iscrowd": 0, "segmentation": polygon},
        {"image_id": 34, "category_id": 90, "bbox": [4.0, 4.0, 6.0, 10.0], "iscrowd": 0, "segmentation": polygon},
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}, {"id": 90, "name": "toothbrush"}]
    with zipfile.ZipFile(folder / f"annotations_trainval{subset[-4:]}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        common = {"info": {}, "images": images, "licenses": []}
        archive.writestr(f"annotations/captions_{subset}.json", json.dumps(common | {"annotations": captions}))
        numbered = [thing | {"id": i, "area": 1.0} for i, thing in enumerate(things)]
        found = common | {"annotations": numbered, "categories": categories}
        archive.writestr(f"annotations/instances_{subset}.json", json.dumps(found))
    with zipfile.ZipFile(folder / f"{subset}.zip", "w") as archive:
        for i in (9, 25, 30, 34):  # 36 is listed and lost
            archive.writestr(f"{subset}/{name.format(i)}", picture(i))


def coco_captions(folder: Path) -> Fixture:
    """Of 2014: one caption is null, one is of no listed picture, one picture is lost, one box is too wide."""
    _write_coco(folder, "train2014", "COCO_train2014_{:012d}.jpg")
    skipped = {"unreadable annotation": 1, "caption without a picture": 1, "missing media": 1}
    return Fixture("caption", folder, 4, skipped | {"region outside the picture": 1})


def coco_instances(folder: Path) -> Fixture:
    """Of 2017: one category has a crowd, one a box that is too wide, one picture is lost."""
    _write_coco(folder, "val2017", "{:012d}.jpg")
    skipped = {"category with a crowd": 1, "region outside the picture": 1, "missing media": 1}
    return Fixture("rec", folder, 4, skipped, "val", other_tasks=("reg",))


_XML = """<annotation>
<filename>{id}.jpg</filename>
<size><width>48</width><height>32</height><depth>3</depth></size>
{objects}
</annotation>
"""


def _object(names: str, box: tuple[int, ...] | None = None, scene: int = 0) -> str:
    inside = f"<scene>{scene}</scene><nobndbox>{1 - scene}</nobndbox>"
    if box:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        inside = "<bndbox>" + "".join(f"<{side}>{number}</{side}>" for side, number in sides) + "</bndbox>"
    return "<object>" + "".join(f"<name>{name}</name>" for name in names.split()) + inside + "</object>"


def _write_flickr30k(folder: Path) -> None:
    sentences = {
        "1000092795": (
            "[/EN#1/people Two guys] show [/EN#2/bodyparts their hands] .\n"
            "[/EN#1/people Two men] are in [/EN#3/scene the yard] , [/EN#0/notvisual it] seems .\n"
            "A caption of something else .\n"
        ),
        "2000000001": "[/EN#7/people/clothing A man in a blue shirt] stands on [/EN#8/other a ladder] .\n",
        "2000000002": "[/EN#9/people A girl reads .\n[/EN#10/animals A dog] sleeps near [/EN#11/other a wall] .\n",
    }
    boxes = {
        "1000092795": [_object("1 2", (1, 1, 20, 30)), _object("1", (21, 3, 48, 32)), _object("3", scene=1)],
        "2000000001": [_object("7", (5, 5, 20, 20)), _object("8")],
        "2000000002": [_object("10", (2, 2, 30, 30)), _object("11", (40, 2, 90, 30))],
    }
    with zipfile.ZipFile(folder / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for one, text in sentences.items():
            archive.writestr(f"Sentences/{one}.txt", text)
            archive.writestr(f"Annotations/{one}.xml", _XML.format(id=one, objects="\n".join(boxes[one])))
    (folder / "train.txt").write_text("1000092795\n2000000001\n2000000002\n2000000003\n")
    (folder / "UNRELATED_CAPTIONS").write_text("# format: <imageID> <sentence number>\n1000092795 3\n36 1")
    (folder / "flickr30k-images").mkdir()
    for i, one in enumerate([*sentences, "2000000003"]):
        (folder / f"flickr30k-images/{one}.jpg").write_bytes(picture(i))


def flickr30k_entities(folder: Path) -> Fixture:
    """An unclosed phrase, a caption of another picture, a box outside of its picture, a picture without annotations."""
    _write_flickr30k(folder)
    skipped = {"unrelated caption": 1, "unreadable sentence": 1, "region outside the picture": 1}
    return Fixture("spot", folder, 3, skipped | {"missing annotation": 1})


def flickr30k_captions(folder: Path) -> Fixture:
    _write_flickr30k(folder)
    return Fixture("caption", folder, 3, {"unrelated caption": 1, "unreadable sentence": 1, "missing annotation": 1})


def _write_visual_genome(folder: Path, name: str, rows: list[Any]) -> None:
    """The annotation stays in the zip it is downloaded in; the pictures lie in two folders."""
    folder.mkdir(exist_ok=True)
    images = [
        {"image_id": i, "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{i}.jpg", "width": 48, "height": 32,
         "coco_id": {4: 15}.get(i), "flickr_id": None}
        for i in (1, 2, 3, 4)
    ]  # fmt: skip
    for file, value in (("image_data.json", images), (name, rows)):
        with zipfile.ZipFile(folder / f"{file}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(file, json.dumps(value))
    for i in (1, 2, 3, 4):
        where = folder / ("VG_100K" if i % 2 else "VG_100K_2")
        where.mkdir(exist_ok=True)
        (where / f"{i}.jpg").write_bytes(picture(i))


def _region(i: int, image: int, phrase: str, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"region_id": i, "width": width, "height": height, "image_id": image, "phrase": phrase, "y": y, "x": x}


def visual_genome_regions(folder: Path) -> Fixture:
    """Rows by `id`, as published; one region reaches over the edge, another by a pixel only, one has no words."""
    rows = [
        {"id": 1, "regions": [_region(1382, 1, "the clock is green ", 4, 5, 10, 20),
                              _region(1383, 1, "reaches over the edge", 40, 5, 20, 20),
                              _region(1384, 1, "a pixel over", 10, 13, 20, 20)]},
        {"id": 2, "regions": [_region(1385, 2, "a road", 0, 0, 48, 32), _region(1386, 2, " ", 1, 1, 5, 5)]},
        {"id": 3, "regions": [_region(1387, 3, "a spot", 3, 3, 9, 9)]},
        {"id": 4, "regions": [_region(1400, 4, "a lamp", 1, 1, 5, 5)]},
        {"id": 5, "regions": [_region(1401, 5, "of no known picture", 1, 1, 5, 5)]},
    ]  # fmt: skip
    _write_visual_genome(folder, "region_descriptions.json", rows)
    skipped = {"region outside the picture": 1, "no phrase": 1, "unknown picture": 1}
    return Fixture("rec", folder, 4, skipped, other_tasks=("reg",))


def visual_genome_objects(folder: Path) -> Fixture:
    """Two things of one name, one thing of two names, one that is flat, one without a name."""

    def thing(names: list[str], x: int, y: int, w: int, h: int) -> dict[str, Any]:
        return {"synsets": ["tree.n.01"], "h": h, "object_id": 1, "merged_object_ids": [], "names": names, "w": w,
                "y": y, "x": x}  # fmt: skip

    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    rows = [
        {
            "image_id": 1,
            "objects": [thing(["tree"], 0, 0, 9, 9), thing(["tree", "oak"], 20, 0, 9, 9)],
            "image_url": url,
        },
        {"image_id": 2, "objects": [thing(["line"], 0, 5, 20, 0), thing(["dog"], 3, 3, 9, 9)], "image_url": url},
        {"image_id": 3, "objects": [thing(["cat"], 1, 1, 9, 9), {"x": 1, "y": 1, "w": 1, "h": 1}], "image_url": url},
        {"image_id": 4, "objects": [thing(["lamp"], 1, 1, 9, 9)], "image_url": url},
    ]
    _write_visual_genome(folder, "objects.json", rows)
    return Fixture("rec", folder, 4, {"empty region": 1, "unreadable object": 1}, other_tasks=("reg",))


def visual_genome_qa(folder: Path) -> Fixture:
    """One question has no answer."""

    def qa(i: int, image: int, question: str, answer: str | None) -> dict[str, Any]:
        return {"a_objects": [], "question": question, "image_id": image, "qa_id": i, "answer": answer, "q_objects": []}

    rows = [
        {"id": 1, "qas": [qa(986768, 1, "What color is the clock?", "Green."), qa(986769, 1, "How tall?", None)]},
        {"id": 2, "qas": [qa(986770, 2, "When was this taken?", "Daytime."), qa(986771, 2, "Who is here?", "Nobody.")]},
        {"id": 4, "qas": [qa(986772, 4, "What is it?", "A lamp.")]},
    ]
    _write_visual_genome(folder, "question_answers.json", rows)
    return Fixture("vqa", folder, 3, {"no answer": 1})


FIXTURES: Fixtures = {
    "refcoco": refcoco,
    "coco_captions": coco_captions,
    "coco_instances": coco_instances,
    "flickr30k_entities": flickr30k_entities,
    "flickr30k_captions": flickr30k_captions,
    "visual_genome_regions": visual_genome_regions,
    "visual_genome_objects": visual_genome_objects,
    "visual_genome_qa": visual_genome_qa,
}
