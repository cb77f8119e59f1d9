from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.referential_scenes import Materials, compose, draw_scene
from data_prep.scene_language import NUM_CANDIDATES, Thing, language, plural
from data_prep.stamp_scenes import CutOut

SIZE = (100, 100)
ABSENT = [f"sign {number}" for number in range(60)]


def cut_out(label: str, colour: tuple[int, int, int]) -> CutOut:
    picture = Image.new("RGBA", (60, 50))
    ImageDraw.Draw(picture).ellipse((5, 5, 54, 44), fill=(*colour, 255))
    return CutOut(label, "an" if label[0] in "aeiou" else "a", picture, f"test {label}")


COLOURS = {"apple": (255, 0, 0), "drum": (0, 0, 0), "key": (0, 255, 0), "saw": (0, 0, 255)}
MATERIALS = Materials(
    tuple(cut_out(label, colour) for label, colour in COLOURS.items()),
    (Image.new("RGB", (400, 300), (128, 128, 128)),),
    (*COLOURS, *ABSENT),
)
LEFT, RIGHT = Thing("drum", "a", "", (5, 40, 25, 60), 300), Thing("drum", "a", "red", (60, 30, 95, 70), 1000)
SEAL = Thing("seal", "a", "", (40, 5, 55, 20), 150)


def said(things: list[Thing], seed: int = 0) -> dict:
    return language(things, SIZE, ABSENT, np.random.default_rng(seed))


def meant(things: list[Thing], seed: int = 0) -> dict[str, list]:
    return {words: target["boxes"] for target in said(things, seed)["targets"] for words in target["expressions"]}


def at(label: str, x: int, y: int, side: int = 10) -> Thing:
    return Thing(label, "a", "", (x, y, x + side, y + side), side * side)


def test_an_expression_means_what_it_says_and_nothing_else() -> None:
    found = meant([LEFT, RIGHT, SEAL], seed=1)
    assert found["the seal"] == [SEAL.box]
    assert found["the left drum"] == [LEFT.box] and found["the right drum"] == [RIGHT.box]
    assert found["the red drum"] == [RIGHT.box] and found["the bigger drum"] == [RIGHT.box]
    assert found["every drum"] == found["all drums"] == [LEFT.box, RIGHT.box]
    assert found["the thing left of the seal"] == [LEFT.box]
    assert "the drum" not in found  # there are two
    assert "the upper drum" not in found  # both are at one height
    assert "the thing below the seal" not in found  # that would be both


def test_what_is_disputable_is_not_said() -> None:
    near = Thing("seal", "a", "", (8, 30, 28, 55), 400)  # hardly above, hardly right, hardly larger
    pair = [Thing("drum", "a", "", (5, 32, 25, 60), 380), near]
    assert not [words for words in meant(pair) if words.startswith("the thing ")]
    questions = [one["question"] for seed in range(20) for one in said(pair, seed)["questions"]]
    assert not [one for one in questions if "left of" in one or "bigger" in one]
    talks = [str(said(pair, seed)["turns"]) for seed in range(20)]
    assert not [talk for talk in talks if "biggest" in talk or "further to the left" in talk]
    # Another thing is a little right of the fox too: "the thing right of the fox" could be either.
    assert "the thing right of the fox" not in meant([at("fox", 20, 40), at("key", 80, 40), at("saw", 28, 70)])
    assert "the thing right of the fox" in meant([at("fox", 20, 40), at("key", 80, 40), at("saw", 15, 70)])


def test_twins_are_not_talked_about_as_if_there_were_one() -> None:
    for seed in range(40):
        turns = str(said([LEFT, RIGHT], seed)["turns"])
        assert "Where is it" not in turns and "biggest" not in turns and "Which of the two" not in turns


def test_nothing_is_described_by_where_it_is_from_something_else() -> None:
    for target in said([LEFT, RIGHT, SEAL])["targets"]:
        assert not [one for one in target.get("descriptions", []) if "thing" in one], target
        if target["boxes"] == [SEAL.box]:
            assert target["descriptions"] == ["the seal"]


@pytest.mark.parametrize("seed", range(8))
def test_answers_follow_from_the_boxes(seed: int) -> None:
    questions = said([LEFT, SEAL, RIGHT], seed)["questions"]
    assert len({one["question"] for one in questions}) == len(questions)
    for one in questions:
        question, answer = one["question"], one["answers"][0]
        expected = {
            "How many things are there?": "three",
            "How many drums are there?": "two",
            "How many seals are there?": "one",
            "Is there a drum?": "yes",
            "Is there a seal?": "yes",
            "In which part is the seal?": "at the top",
            "What is left of the seal?": "a drum",
            "What is right of the seal?": "a drum",
            "What colour is it?": "red",
        }.get(question)
        if "sign" in question:
            expected = "no" if question.startswith("Is") else "zero"
        if question == "What is it?":
            expected = {LEFT.box: "a drum", RIGHT.box: "a drum", SEAL.box: "a seal"}[tuple(one["regions"][0]["box"])]
        assert answer == expected, question


def test_reasons_read_without_their_places() -> None:
    (cot,) = (one["cot"] for one in said([RIGHT, SEAL])["questions"] if one["question"] == "How many things are there?")
    assert "".join(part.get("text", "") for part in cot) == "I see a red drum  and a seal ."
    assert [tuple(part["region"]["box"]) for part in cot if "region" in part] == [RIGHT.box, SEAL.box]


def test_a_phrase_is_the_text_of_its_thing() -> None:
    facts = said([RIGHT, SEAL])
    assert facts["caption"] == "A red drum and a seal."
    phrases = {facts["caption"][one["start"] : one["end"]]: one["boxes"] for one in facts["phrases"]}
    assert phrases == {"A red drum": [RIGHT.box], "a seal": [SEAL.box]}


def test_rounds_have_a_hundred_different_candidates_and_need_their_history() -> None:
    answers = set()
    for seed in range(10):
        rounds = said([LEFT, SEAL], seed)["rounds"]
        for one in rounds:
            assert len(set(one["options"])) == NUM_CANDIDATES
            assert one["options"][one["gt_index"]] == one["answer"]
            answers.add(one["answer"].split(",")[0])
        where = [one for one in rounds if one["question"] == "where is it"]
        # The same words ask for different things, and each answer is among the other's candidates.
        assert where[0]["answer"] != where[1]["answer"] and where[1]["answer"] in where[0]["options"]
        assert where[0]["relevance"][where[0]["gt_index"]] == 1.0
        assert rounds[rounds.index(where[0]) - 1]["answer"].startswith("yes")  # "it" is what is there
    assert {"yes", "no"} <= answers


def test_plurals() -> None:
    assert [plural(one) for one in ("fox", "palm tree", "mouse", "sheep", "key", "berry", "green bus")] == [
        "foxes", "palm trees", "mice", "sheep", "keys", "berries", "green buses",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_boxes_hold_what_is_visible(seed: int) -> None:
    """On a photograph of one colour, every pixel that differs is in a box, and every side of a box touches one."""
    only_photo = Materials(MATERIALS.cut_outs, (Image.new("RGB", (400, 300), (200, 90, 220)),), MATERIALS.names)
    rng = np.random.default_rng(seed)
    picture, things = draw_scene(only_photo, rng)
    assert 1 <= len(things) <= 4
    pixels = np.asarray(picture).astype(int)
    inside = np.zeros(pixels.shape[:2], bool)
    for thing in things:
        x1, y1, x2, y2 = thing.box
        assert 0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height
        assert 0 < thing.num_pixels <= (x2 - x1) * (y2 - y1)
        inside[y1:y2, x1:x2] = True
    corner = pixels[~inside].reshape(-1, 3)
    if len(corner) and np.ptp(corner, axis=0).max() == 0:  # the photograph, not a made background
        differs = (pixels != corner[0]).any(-1)
        assert not (differs & ~inside).any()
        for x1, y1, x2, y2 in (thing.box for thing in things):
            assert differs[y1, x1:x2].any() and differs[y2 - 1, x1:x2].any()
            assert differs[y1:y2, x1].any() and differs[y1:y2, x2 - 1].any()
    else:
        assert seed not in (0, 1, 2, 3, 4) or len(corner)


def test_the_same_arguments_give_the_same_bytes_and_others_are_refused(tmp_path: Path) -> None:
    one, two = (compose(MATERIALS, tmp_path / str(n), "train", 24, 5, num_processes=n) for n in (1, 2))
    files = [{file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()} for folder in (one, two)]
    assert files[0] == files[1] and len(files[0]) == 26
    assert len([json.loads(line) for line in (one / "scenes.jsonl").read_text().splitlines()]) == 24
    assert compose(MATERIALS, tmp_path / "1", "train", 24, 5) == one
    with pytest.raises(ValueError, match="exists with other seed"):
        compose(MATERIALS, tmp_path / "1", "train", 24, 6)
