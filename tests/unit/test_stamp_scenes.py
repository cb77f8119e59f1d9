from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.packages import PackageError
from data_prep.stamp_scenes import (
    QUESTIONS,
    CutOut,
    _distinct,
    _stamps,
    caption,
    compose,
    draw_scene,
    load_cut_outs,
    main,
    place,
)
from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files

SIZE = 96


def cut_out(label: str, colour: tuple[int, int, int], width: int, height: int) -> CutOut:
    """An ellipse on nothing."""
    picture = Image.new("RGBA", (width + 10, height + 10))
    ImageDraw.Draw(picture).ellipse((5, 5, 4 + width, 4 + height), fill=(*colour, 255))
    return CutOut(label, "an" if label[0] in "aeiou" else "a", picture, f"test {label}")


# One channel far from any background, which is at least 40: a pixel of the thing is never equal to one of those.
THINGS = [
    cut_out("apple", (255, 0, 0), 40, 40),
    cut_out("harp seal", (0, 0, 255), 90, 30),
    cut_out("drum", (0, 0, 0), 20, 60),
]


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("seed", range(40))
def test_boxes_are_those_of_the_pixels_that_differ(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(THINGS, SIZE, (1, 1), rng)
    differs = (np.asarray(scene.picture) != np.asarray(scene.background)).any(-1)
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    assert scene.boxes == ((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1),)


@pytest.mark.parametrize("seed", range(10))
def test_several_things_share_a_scene_without_covering_each_other(seed: int) -> None:
    scene = draw_scene(THINGS, SIZE, (3, 3), np.random.default_rng(seed))
    assert {thing.label for thing in scene.things} == {thing.label for thing in THINGS}
    differs = (np.asarray(scene.picture) != np.asarray(scene.background)).any(-1)
    inside = np.zeros_like(differs)
    for x1, y1, x2, y2 in scene.boxes:
        assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE
        # Something of the thing touches every edge of its box.
        assert differs[y1, x1:x2].any() and differs[y2 - 1, x1:x2].any()
        assert differs[y1:y2, x1].any() and differs[y1:y2, x2 - 1].any()
        inside[y1:y2, x1:x2] = True
    assert not (differs & ~inside).any()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    one = compose(THINGS, tmp_path / "one", "train", 40, 7, SIZE, (1, 2))
    two = compose(THINGS, tmp_path / "two", "train", 40, 7, SIZE, (1, 2), num_processes=2)
    assert files(one) == files(two)
    other_seed = compose(THINGS, tmp_path / "seed", "train", 40, 8, SIZE, (1, 2))
    other_split = compose(THINGS, tmp_path / "one", "test", 40, 7, SIZE, (1, 2))
    images = [
        {data for name, data in files(folder).items() if name.endswith(".jpg")}
        for folder in (one, other_seed, other_split)
    ]
    assert all(len(found) == 40 for found in images)
    assert not images[0] & images[1] and not images[0] & images[2]


def test_what_is_made_is_kept(tmp_path: Path) -> None:
    folder = compose(THINGS, tmp_path, "train", 3, 0, SIZE)
    made = (folder / "captions.jsonl").stat().st_mtime_ns
    assert compose(THINGS, tmp_path, "train", 3, 0, SIZE) == folder
    assert (folder / "captions.jsonl").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match=r"exists with other num_scenes; remove it"):
        compose(THINGS, tmp_path, "train", 4, 0, SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["train"]  # nothing half-made lies around


def test_lines_are_what_the_tasks_read(tmp_path: Path) -> None:
    folder = compose(THINGS, tmp_path, "train", 30, 0, SIZE, (1, 3))
    described = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (folder / "instruct.jsonl").read_text().splitlines()]
    assert len(described) == len(asked) == 30
    templates = {template.split("{")[0] for group in QUESTIONS.values() for template in group}
    for row, dialogue in zip(described, asked, strict=True):
        with Image.open(folder / row["image"]) as picture:
            assert (picture.format, picture.size) == ("JPEG", (SIZE, SIZE))
        assert row["image"] == dialogue["image"]
        for thing in row["objects"]:
            assert thing["label"] in row["caption"].lower()
            assert all(isinstance(number, int) for number in thing["box"])
        turns = dialogue["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text = question["value"].removeprefix("<image>\n")
            assert any(text.startswith(template) for template in templates)
            if text in QUESTIONS["what"]:
                assert answer["value"] == row["caption"]
            elif text in QUESTIONS["count"]:
                assert answer["value"] == f"{['', 'One', 'Two', 'Three'][len(row['objects'])]}."
            else:
                (box,) = (thing["box"] for thing in row["objects"] if f" {thing['label']}?" in text)
                assert answer["value"] == place(box, SIZE)

    for name in ("captions", "chat"):
        records = list(read_source(name, Files(tmp_path), "train"))
        assert len(records) == 30
        assert all(isinstance(record, Record) and len(record.media) == 1 for record in records)


def test_one_thing_a_scene_is_not_counted(tmp_path: Path) -> None:
    folder = compose(THINGS, tmp_path, "train", 30, 0, SIZE)
    text = (folder / "instruct.jsonl").read_text()
    assert not any(question in text for question in QUESTIONS["count"])


def test_captions() -> None:
    apple, seal, drum = THINGS
    assert caption([seal]) == "A harp seal."
    assert caption([apple, seal]) == "An apple and a harp seal."
    assert caption([drum, apple, seal]) == "A drum, an apple and a harp seal."


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ((0, 40, 20, 60), "On the left."),
        ((80, 40, 100, 60), "On the right."),
        ((40, 0, 60, 20), "At the top."),
        ((40, 80, 60, 100), "At the bottom."),
        ((30, 30, 70, 72), "In the middle."),
    ],
)
def test_place(box: tuple[int, ...], answer: str) -> None:
    assert place(box, 100) == answer


def test_kinds_are_distinct_and_of_many_groups() -> None:
    groups = {
        "seals": [cut_out("seal", (9, 9, 9), 20, 20), cut_out("harp seal", (0, 0, 255), 20, 20)],
        "fruit": [cut_out("apple", (255, 0, 0), 20, 20), cut_out("lime", (0, 255, 0), 20, 20)],
    }
    for seed in range(5):
        picked = _distinct(groups, 3, seed)
        assert [thing.label for thing in picked] == [thing.label for thing in _distinct(groups, 3, seed)]
        assert sum("seal" in thing.label for thing in picked) == 1
        assert len({"seal" in thing.label for thing in picked[:2]}) == 2
    with pytest.raises(ValueError, match="4 kinds are more than the 3 that there are"):
        _distinct(groups, 4, 0)


def test_which_stamps_are_taken(tmp_path: Path) -> None:
    def stamp(name: str, text: str, side: int = 120, is_flat: bool = False, is_cut_out: bool = True) -> None:
        pixels = np.full((side, side, 4), 128, np.uint8)
        if not is_flat:
            pixels[..., :3] = np.random.default_rng(0).integers(0, 255, (side, side, 3))
        pixels[..., 3] = 255
        if is_cut_out:
            pixels[:10, :, 3] = 0
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"{text}\nfr.utf8=Un truc.\n", encoding="utf-8")

    stamp("animals/birds/owl", "An owl.")
    stamp("food/pear", "A yellow pear")
    stamp("vehicles/xebec", "A xebec.")  # no common name: taken last
    stamp("animals/owl_mirror", "An ape.")
    stamp("animals/cartoon/cow", "A cow.")
    stamp("animals/small", "A mouse.", side=50)
    stamp("animals/framed", "A goat.", is_cut_out=False)
    stamp("clothes/hat", "A hat.", is_flat=True)
    stamp("food/typo", "An hamburger.")
    stamp("food/many", "Some peas.")
    stamp("people/name", "A Martian.")
    for seed in range(3):
        things = _stamps(tmp_path, 3, seed)
        assert {f"{thing.article} {thing.label}" for thing in things} == {
            "an owl",
            "a yellow pear",
            "a xebec",
        }
    with pytest.raises(ValueError, match="4 kinds are more than the 3"):
        _stamps(tmp_path, 4, 0)


@pytest.mark.parametrize(
    ("objects", "num_scenes", "message"),
    [((2, 1), 1, "objects per scene 2 to 1"), ((1, 4), 1, "MAX <= 3"), ((1, 1), 0, "0 scenes")],
)
def test_refusals(tmp_path: Path, objects: tuple[int, int], num_scenes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(THINGS, tmp_path, "train", num_scenes, 0, SIZE, objects)
    assert not list(tmp_path.iterdir())


def test_without_any_registry_the_refusal_says_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither apt-get nor npm
    with pytest.raises(PackageError, match=r"there is no apt-get here.*there is no npm here"):
        load_cut_outs("auto", 3, 0, tmp_path / "cache")
    assert main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--pictures", "emoji"]) == 1
    error = capsys.readouterr().err
    assert "emoji-datasource-google@16.0.0" in error and "npm pack" in error and "Traceback" not in error
