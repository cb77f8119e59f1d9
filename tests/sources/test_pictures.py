"""RefCOCO, COCO, Flickr30k Entities and Visual Genome."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.make_shards import media_header
from mmchat.conversation import Record
from mmchat.data.shard_writer import write_shards
from mmchat.errors import SampleError
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from tests.sources import fixtures_pictures as fixtures
from tests.sources.fixtures_pictures import FIXTURES, ref, write_json, write_refs
from tests.sources.made import records_of


def read(name: str, source: Path, split: str = "train", **options: str) -> tuple[list[Record], list[SampleError]]:
    found = list(read_source(name, Files(source), split, options))
    return [one for one in found if isinstance(one, Record)], [one for one in found if isinstance(one, SampleError)]


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures(tmp_path: Path, name: str) -> None:
    """What is read, what is not and why; the keys and the order are the same each time."""
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert (len(good), bad) == (fixture.num_samples, fixture.skipped)
    assert len({record.key for record in good}) == len(good)
    assert good == records_of(fixture, name)[0]
    assert all(record.media[0].read()[:2] == b"\xff\xd8" for record in good)
    for task in fixture.other_tasks:
        assert all(TASKS[task].conversation(record, random.Random(0)).turns for record in good)


# ---- RefCOCO --------------------------------------------------------------------------------------------------------


def test_refcoco_trains_on_refs_and_scores_expressions(tmp_path: Path) -> None:
    fixtures.refcoco(tmp_path)
    train, _ = read("refcoco", tmp_path, set="refcoco")
    assert train[0].facts == {
        "expressions": ["man on left", "café guest"],  # latin-1, as Python 2 wrote it
        "boxes": [[1.0, 2.5, 21.0, 12.75]],
        "ref_id": 1,
        "image_id": 11,
    }
    assert [record.key for record in train] == ["1", "2", "3", "4"]
    assert train[3].facts["expressions"] == ["a lamp", "left lamp"]
    val, _ = read("refcoco", tmp_path, "val", set="refcoco")
    assert [(one.key, one.facts["expressions"]) for one in val] == [("7/70", ["woman"]), ("7/71", ["woman with hat"])]
    assert val[0].facts["sent_id"] == 70


@pytest.mark.parametrize(
    ("split", "ids"), [("testA", [8, 10]), ("testB", [9, 10]), ("test", [8, 9, 10]), ("testAB", [10]), ("val", [7])]
)
def test_refcoco_splits(tmp_path: Path, split: str, ids: list[int]) -> None:
    refs = [ref(7, 1, "val", "x"), ref(8, 2, "testA", "x"), ref(9, 3, "testB", "x"), ref(10, 4, "testAB", "x")]
    write_refs(tmp_path / "refclef", "unc", refs)
    for i in range(1, 5):
        (tmp_path / f"COCO_train2014_{i:012d}.jpg").write_bytes(b"jpeg")
    good, bad = read("refcoco", tmp_path, split)
    assert [record.facts["ref_id"] for record in good] == ids and not bad
    with pytest.raises(ValueError, match="has the splits testA, testAB, testB, val, not train"):
        read("refcoco", tmp_path, "train")


def held_out(source: Path, **options: str) -> list[int]:
    """Refs of the train split that are left out for their picture."""
    _, bad = read("refcoco", source, **options)
    return [int(e.detail.split(" ref ")[1].split(":")[0]) for e in bad if e.reason == "image of an evaluation split"]


def test_no_picture_of_an_evaluation_split_is_learned(tmp_path: Path) -> None:
    fixtures.refcoco(tmp_path)
    assert held_out(tmp_path, set="refcoco") == [6], "picture 15 is in RefCOCOg's test split"
    assert held_out(tmp_path, set="refcoco", leak="none") == []
    assert held_out(tmp_path, set="refcocog", partition="google") == [2], "both splits have picture 11"


def test_the_other_sets_count_where_source_is_one_sets_folder(tmp_path: Path) -> None:
    fixtures.refcoco(tmp_path)
    for source in (tmp_path / "refcoco", tmp_path / "refcoco/refs(unc).p"):
        found = list(read_source("refcoco", Files(source, [tmp_path]), "train"))
        assert [one.reason for one in found if isinstance(one, SampleError)].count("image of an evaluation split") == 1
        assert sum(isinstance(one, Record) for one in found) == 4


@pytest.mark.parametrize("named", ["file", "folder", "coco"])
def test_further_pictures_to_leave_out_can_be_named(tmp_path: Path, named: str) -> None:
    fixtures.refcoco(tmp_path / "sets")
    write_refs(tmp_path / "other/refcocog", "umd", [ref(1, 12, "val", "x"), ref(2, 11, "train", "x")])
    write_json(tmp_path / "instances_val.json", {"images": [{"id": 12}], "annotations": []})
    path = {"file": "other/refcocog/refs(umd).p", "folder": "other", "coco": "instances_val.json"}[named]
    assert held_out(tmp_path / "sets", set="refcoco", leak=str(tmp_path / path)) == [2, 3, 6]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: wanted refs"):
        held_out(tmp_path / "sets", set="refcoco", leak=str(tmp_path / "empty"))


class Shell:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_not_opened(tmp_path: Path, protocol: int) -> None:
    write_refs(tmp_path / "refcoco", "unc", [])
    trap = pickle.dumps([ref(1, 11, "train", "x"), Shell(tmp_path / "it ran")], protocol)
    (tmp_path / "refcoco/refs(unc).p").write_bytes(trap)
    with pytest.raises(ValueError, match=r"no pickle of plain values.*it is not opened"):
        read("refcoco", tmp_path)
    assert not (tmp_path / "it ran").exists()
    with pytest.raises(ValueError, match="no pickle of plain values"):
        read("coco_captions", fixtures.coco_captions(tmp_path).source, leak=str(tmp_path / "refcoco/refs(unc).p"))
    pickle.loads(trap)
    assert (tmp_path / "it ran").exists(), "the trap does work"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pickle of plain values"),
        (b"(d.", "holds a dict, wanted a list"),
        (b"\x80", "no pickle of plain values"),
    ],
)
def test_refs_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    write_refs(tmp_path / "refcoco", "unc", [])
    (tmp_path / "refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read("refcoco", tmp_path)


def test_refcoco_says_what_is_missing(tmp_path: Path) -> None:
    fixtures.refcoco(tmp_path)
    with pytest.raises(ValueError, match=r"holds refcoco, refcoco\+, refcocog: say which by --set set=NAME"):
        read("refcoco", tmp_path)
    with pytest.raises(ValueError, match=r"no refs\(berkeley\).p; the partitions are unc"):
        read("refcoco", tmp_path, set="refcoco", partition="berkeley")
    (tmp_path / "refcoco/instances.json").unlink()
    with pytest.raises(ValueError, match=r"refcoco/instances.json is not in"):
        read("refcoco", tmp_path, set="refcoco")


# ---- COCO -----------------------------------------------------------------------------------------------------------


def test_coco_joins_captions_and_objects_by_picture(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.coco_captions(tmp_path), "coco_captions")
    by_id = {record.facts["image_id"]: record.facts for record in good}
    assert by_id[9]["captions"] == ["A ball on a table."], "a line break and a blank at the end are gone"
    assert by_id[25]["captions"] == ["A giraffe eating food from the tree.", "Two giraffes."]
    brush = {"label": "toothbrush", "box": [1.5, 2.25, 21.63, 10.25]}  # the sum as it is meant, not 21.630000000000003
    assert by_id[25]["objects"] == [brush, {"label": "toothbrush", "box": [30.0, 3.0, 48.4, 23.0]}], "no crowd"
    assert by_id[34]["objects"] == [{"label": "toothbrush", "box": [4.0, 4.0, 10.0, 14.0]}]
    assert [record.key for record in good] == ["000000000009", "000000000025", "000000000030", "000000000034"]


def test_coco_captions_need_no_instances(tmp_path: Path) -> None:
    write_json(
        tmp_path / "annotations/captions_train2014.json",
        {
            "annotations": [{"image_id": 9, "id": 1, "caption": "A ball."}],
            "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 48, "height": 32}],
        },
    )
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").write_bytes(fixtures.picture(0))
    (record,), bad = read("coco_captions", tmp_path)
    assert record.facts == {"captions": ["A ball."], "image_id": 9} and not bad
    named = tmp_path / "annotations/captions_train2014.json"
    (record,) = (one for one in read_source("coco_captions", Files(named, [tmp_path]), "train"))
    assert isinstance(record, Record)


def test_two_years_of_coco_must_be_told_apart(tmp_path: Path) -> None:
    for year in ("2014", "2017"):
        write_json(tmp_path / f"annotations/captions_train{year}.json", {"images": [], "annotations": []})
    with pytest.raises(ValueError, match=r"2 files annotations/captions_train\*.json"):
        read("coco_captions", tmp_path)
    assert read("coco_captions", tmp_path, "train2017") == ([], [])


def test_coco_instances_ask_for_whole_categories(tmp_path: Path) -> None:
    fixtures.coco_instances(tmp_path)
    plain, _ = read("coco_instances", tmp_path, "val")

    def asked(record: Record) -> dict[str, list[list[float]]]:
        found = [record.facts, *record.facts.get("more", [])]
        return {target["expressions"][0]: target["boxes"] for target in found}

    by_id = {record.facts["image_id"]: asked(record) for record in plain}
    assert by_id[25] == {"toothbrush": [[1.5, 2.25, 21.63, 10.25], [30.0, 3.0, 48.4, 23.0]]}, "persons are a crowd"
    assert by_id[9] == {"bicycle": [[4, 4, 14, 14]], "person": [[0, 4, 5, 14]]}
    assert by_id[34] == {"toothbrush": [[4, 4, 10, 14]]}, "one bicycle is not all bicycles"
    with_absent, _ = read("coco_instances", tmp_path, "val", absent="9")
    for record in with_absent:
        shown = by_id[record.facts["image_id"]]
        absent = asked(record).keys() - shown.keys()
        assert all(asked(record)[name] == ([] if name in absent else shown[name]) for name in asked(record))
    assert {name for name, boxes in asked(with_absent[1]).items() if not boxes} == {"bicycle"}, "a crowd is not absent"
    with pytest.raises(ValueError, match="absent=some: wanted a number"):
        read("coco_instances", tmp_path, "val", absent="some")


def test_coco_leaves_out_what_is_for_evaluation(tmp_path: Path) -> None:
    fixtures.coco_captions(tmp_path / "coco")
    write_refs(tmp_path / "refcoco", "unc", [ref(1, 25, "testA", "x"), ref(2, 9, "train", "x")])
    good, bad = read("coco_captions", tmp_path / "coco", leak=str(tmp_path / "refcoco"))
    assert [record.facts["image_id"] for record in good] == [9, 30, 34]
    assert [error.reason for error in bad].count("image of an evaluation split") == 1
    assert not any("25" in error.detail for error in bad if error.reason == "caption without a picture")


# ---- Flickr30k Entities ---------------------------------------------------------------------------------------------


def test_flickr30k_phrases_have_the_boxes_of_their_chain(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.flickr30k_entities(tmp_path), "flickr30k_entities")
    first, second, ladder = good
    assert first.facts["caption"] == "Two guys show their hands ."
    spans = [(first.facts["caption"][one["start"] : one["end"]], one["boxes"]) for one in first.facts["phrases"]]
    assert spans == [
        ("Two guys", [[0, 0, 19, 29], [20, 2, 47, 31]]),  # pixels from 0; one object is two chains'
        ("their hands", [[0, 0, 19, 29]]),
    ]
    assert [one["boxes"] for one in second.facts["phrases"]][1:] == [[], []], "a scene, and what is not visible"
    assert second.facts["phrases"][2]["chain"] == "0"
    assert ladder.facts["phrases"][0]["types"] == ["people", "clothing"]
    assert [record.key for record in good] == ["1000092795/1", "1000092795/2", "2000000001/1"]
    answer = TASKS["spot"].conversation(second, random.Random(0)).turns[1].parts
    assert [part for part in answer if isinstance(part, str)] == ["Two men ", " ", " are in the yard , it seems ."]


def test_flickr30k_in_folders(tmp_path: Path) -> None:
    for name, text in (
        ("Sentences/5.txt", "[/EN#1/people A man] walks .\n\n"),
        ("Annotations/5.xml", fixtures._XML.format(id=5, objects=fixtures._object("1", (1, 1, 48, 32)))),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "val.txt").write_text("5\n")
    (tmp_path / "5.jpg").write_bytes(fixtures.picture(1))
    (record,), bad = read("flickr30k_entities", tmp_path, "val")
    assert record.facts["phrases"][0]["boxes"] == [[0, 0, 47, 31]] and not bad
    (tmp_path / "Annotations/5.xml").write_text("<annotation><size>")
    assert [error.reason for error in read("flickr30k_entities", tmp_path, "val")[1]] == ["unreadable annotation"]
    with pytest.raises(ValueError, match=r"holds none of test.txt"):
        read("flickr30k_entities", tmp_path, "test")


def test_flickr30k_captions_are_joined_without_marks(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.flickr30k_captions(tmp_path), "flickr30k_captions")
    assert good[0].facts["captions"] == [
        "Two guys show their hands .",
        "Two men are in the yard , it seems .",
    ]
    assert good[2].facts["captions"] == ["A dog sleeps near a wall ."], "a bad box does not matter here"


# ---- Visual Genome --------------------------------------------------------------------------------------------------


def test_visual_genome_regions_of_a_picture_are_one_record(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.visual_genome_regions(tmp_path), "visual_genome_regions")
    first, *_ = good
    found = {one["expressions"][0]: one["boxes"] for one in [first.facts, *first.facts["more"]]}
    assert found == {"the clock is green": [[4, 5, 14, 25]], "a pixel over": [[10, 13, 30, 33]]}
    assert [one.media[0].read() for one in good] == [fixtures.picture(i) for i in (1, 2, 3, 4)], "of both folders"


def test_visual_genome_rows_by_image_id(tmp_path: Path) -> None:
    """As the readme of the data has them."""
    rows = [{"image_id": 2, "regions": [fixtures._region(1, 2, "a road", 0, 0, 9, 9)]}, {"regions": []}, 7]
    fixtures._write_visual_genome(tmp_path, "region_descriptions.json", rows)
    good, bad = read("visual_genome_regions", tmp_path)
    assert [record.key for record in good] == ["2"]
    assert [error.reason for error in bad] == ["unreadable row", "unreadable row"]


def test_visual_genome_leaves_out_coco_pictures_for_evaluation(tmp_path: Path) -> None:
    fixtures.visual_genome_regions(tmp_path / "vg")
    fixtures.refcoco(tmp_path / "sets")  # picture 15 is in RefCOCOg's test split, and is 4 in Visual Genome
    good, bad = read("visual_genome_regions", tmp_path / "vg", leak=str(tmp_path / "sets"))
    assert [record.key for record in good] == ["1", "2", "3"]
    assert [e.detail for e in bad if e.reason == "image of an evaluation split"] == [
        "region_descriptions.json: image 4, of COCO 15"
    ]
    with pytest.raises(ValueError, match="has no splits, found val"):
        read("visual_genome_regions", tmp_path / "vg", "val")


def test_visual_genome_objects_of_one_name_are_one_target(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.visual_genome_objects(tmp_path), "visual_genome_objects")
    found = {one["expressions"][0]: one["boxes"] for one in [good[0].facts, *good[0].facts["more"]]}
    assert found == {"tree": [[0, 0, 9, 9], [20, 0, 29, 9]], "oak": [[20, 0, 29, 9]]}


def test_visual_genome_questions(tmp_path: Path) -> None:
    good, _ = records_of(fixtures.visual_genome_qa(tmp_path), "visual_genome_qa")
    asked = {"question": "When was this taken?", "answers": ["Daytime."], "image_id": 2}
    assert good[1].key == "2/986770" and [one["question"] for one in good[1].facts["more"]] == ["Who is here?"]
    assert {name: good[1].facts[name] for name in asked} == asked
    alone = read("visual_genome_qa", tmp_path, grouped="no")[0]
    assert [one.key for one in alone] == ["1/986768", "2/986770", "2/986771", "4/986772"]
    assert alone[1].facts == asked


def test_each_format_is_told_by_its_files(tmp_path: Path) -> None:
    for name, make in FIXTURES.items():
        (tmp_path / name).mkdir()
        fixture = make(tmp_path / name)
        assert choose_source(fixture.task, Files(fixture.source), fixture.split) == name


# ---- Pictures of another size ---------------------------------------------------------------------------------------


def turned(data: bytes) -> bytes:
    """The same picture, which EXIF turns by a quarter."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(io.BytesIO(data)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def larger(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((96, 64)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "task", "picture", "options"),
    [
        ("refcoco", "rec", "train2014/COCO_train2014_000000000011.jpg", {"set": "refcoco"}),
        ("visual_genome_regions", "rec", "VG_100K/1.jpg", {}),
        ("flickr30k_entities", "spot", "flickr30k-images/1000092795.jpg", {}),
        ("coco_captions", "caption", "train2014/COCO_train2014_000000000025.jpg", {}),
        ("coco_instances", "rec", "val2017/000000000025.jpg", {}),
    ],
)
@pytest.mark.parametrize(
    ("changed", "detail"),
    [(turned, "annotated 48x32, the file, which EXIF turns, shows 32x48"), (larger, "the file shows 96x64")],
)
def test_a_picture_of_another_size_than_annotated_is_refused(
    tmp_path: Path,
    name: str,
    task: str,
    picture: str,
    options: dict[str, str],
    changed: Callable[[bytes], bytes],
    detail: str,
) -> None:
    (tmp_path / "source").mkdir()
    fixture = FIXTURES[name](tmp_path / "source")
    files = Files(tmp_path / "source")
    data = changed(files.media("image", picture).read())
    (tmp_path / "source" / picture).parent.mkdir(exist_ok=True)
    (tmp_path / "source" / picture).write_bytes(data)  # a file counts before an archive's member
    records = [one for one in read_source(name, files, fixture.split, options) if isinstance(one, Record)]
    report = write_shards(records, tmp_path / "out", header_of=media_header)
    count = report.problems.pop("picture of another size")
    assert 0 < count < len(records) == count + report.num_samples and not report.problems
    assert detail in report.examples["picture of another size"][0]


def test_a_caption_without_boxes_fits_any_size(tmp_path: Path) -> None:
    fixtures.flickr30k_captions(tmp_path)
    good, _ = read("flickr30k_captions", tmp_path)
    assert all(record.media[0].header is None for record in good)
