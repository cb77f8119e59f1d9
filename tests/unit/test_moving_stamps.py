"""Clips of moving things: what is said of them is what the pixels do; neither words nor unordered frames tell it."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.motion_language import DIRECTIONS, OPPOSITE, Design, captions, designs, questions
from data_prep.moving_stamps import FPS, Materials, Mover, _path, compose, draw_clip, encoded
from data_prep.stamp_scenes import CutOut
from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files


def cut_out(label: str, colour: tuple[int, int, int]) -> CutOut:
    picture = Image.new("RGBA", (70, 70))
    ImageDraw.Draw(picture).ellipse((5, 5, 64, 64), fill=(*colour, 255))
    return CutOut(label, "an" if label[0] in "aeiou" else "a", picture, f"test {label}")


RED, BLUE = cut_out("apple", (230, 0, 0)), cut_out("drum", (0, 0, 230))
DARK = np.full((30, 120, 160, 3), 40, np.uint8)
MATERIALS = Materials((RED, BLUE), (Image.new("RGB", (300, 300), (30, 30, 30)),), (DARK,))
CHANNELS = {"apple": 0, "drum": 2}


def seen(frames: np.ndarray) -> dict[str, np.ndarray]:
    """The middle of each thing, [frames, 2] as x and y, measured in a clip as it is decoded again."""
    with av.open(io.BytesIO(encoded(frames))) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)
    assert decoded.shape == frames.shape
    found = {}
    for label, channel in CHANNELS.items():
        others = decoded[..., [one for one in range(3) if one != channel]].max(-1)
        mask = decoded[..., channel] - others > 60
        assert mask.any((1, 2)).all(), "both are always in sight"
        found[label] = np.array([np.argwhere(one).mean(0)[::-1] for one in mask])
    return found


@pytest.mark.parametrize("number", range(16))
def test_things_move_as_is_said_and_when(number: int) -> None:
    design = designs(16, np.random.default_rng(3))[number]
    frames, movers = draw_clip(MATERIALS, design, np.random.default_rng(number))
    places = seen(frames)
    side = min(frames.shape[1:3])
    halves = []
    for mover, direction in zip(movers, (*design.directions, None), strict=False):
        place = places[mover.label]
        way = place[-1] - place[0]
        if direction is None:
            assert np.abs(way).max() < 2 and np.ptp(place, axis=0).max() < 3
            continue
        axis = 0 if direction in ("left", "right") else 1
        assert way[axis] * DIRECTIONS[direction][axis] > 0.2 * side
        assert abs(way[1 - axis]) < 0.1 * side  # what is partly outside seems to move a little across
        halves.append(int(np.abs(place[:, axis] - place[0, axis]).searchsorted(abs(way[axis]) / 2)))
    assert halves == sorted(halves) and len(set(halves)) == len(halves)
    if len(design.directions) == 2:
        middle = len(frames) // 2
        first, second = (places[mover.label] for mover in movers)
        assert np.abs(second[middle - 1] - second[0]).max() < 3 and np.abs(first[-1] - first[middle]).max() < 3


def test_a_path_is_as_likely_backwards() -> None:
    """So frames without their order do not tell a direction from its opposite."""
    for seed in range(20):
        for one, other in OPPOSITE.items():
            rngs = np.random.default_rng(seed), np.random.default_rng(seed)
            before, after = _path((50, 40), one, (224, 168), rngs[0])
            assert (after, before) == _path((50, 40), other, (224, 168), rngs[1])
    mover = Mover("apple", "an", RED.picture, (50, 50), (100, 50), 0.5, 1.5)
    there, back = (
        [mover.box(time_s)[0] for time_s in times] for times in (np.arange(0, 2.1, 0.25), np.arange(2, -0.1, -0.25))
    )
    assert [a + b for a, b in zip(there, back, strict=True)] == [2 * 15 + 50] * 9


def test_words_alone_tell_no_more_than_chance() -> None:
    rng = np.random.default_rng(0)
    asked: dict[str, Counter[str]] = {}
    num_types = Counter[int]()
    for design in designs(6000, rng):
        labels = ("apple", "drum") if rng.random() < 0.5 else ("drum", "apple")
        for one in questions(design, labels):
            asked.setdefault(one["question"], Counter())[one["answer"]] += 1
            num_types[one["type"]] += 1
    assert set(num_types) == {0, 2, 3, 5} and min(num_types.values()) > 1000
    for question, answers in asked.items():
        chance = 0.25 if re.search("which way", question, re.IGNORECASE) else 0.5
        assert len(answers) == 1 / chance, (question, answers)
        share = max(answers.values()) / answers.total()
        assert share < chance + 4 * (chance * (1 - chance) / answers.total()) ** 0.5, (question, answers)
    # Exactly as often in whole rounds of all that can be, whoever is named first.
    rounds = [one for one in designs(2 * 128, rng) if len(one.directions) == 2]
    orders = Counter((questions(one, ("a", "b"))[0]["answer"], one.which, one.is_first_named) for one in rounds)
    assert set(orders.values()) == {16} and len(orders) == 8


def test_questions_do_not_answer_each_other() -> None:
    """The direction of the one that moves is asked without its name."""
    for design in designs(200, np.random.default_rng(1)):
        which, *ways = (one["question"] for one in questions(design, ("apple", "drum")))
        if len(design.directions) == 1:
            assert (len(ways) == 1 and "apple or" in ways[0].lower()) or "drum or" in ways[0].lower()
            assert re.match("(Which moves|Does the (apple|drum) move)", which)
        else:
            assert len(ways) == 2 and " first" not in str(ways)


def test_captions() -> None:
    both = Design(("left", "up"), 0, True, ((0, True), (0, True)))
    assert captions(both, ("a drum", "an apple"))[0] == "First a drum moves left, then an apple moves up."
    assert captions(both, ("a drum", "an apple"))[2] == "An apple moves up after a drum has moved left."
    one = Design(("down",), 0, True, ((0, True),))
    assert captions(one, ("a drum", "an apple"))[1] == "An apple stays and a drum moves down."


def test_the_same_bytes_in_forms_that_are_read(tmp_path: Path) -> None:
    folder = compose(MATERIALS, tmp_path / "one", "test", 6, 0)
    other = compose(MATERIALS, tmp_path / "two", "test", 6, 0, num_processes=2)
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert files == {file.relative_to(other): file.read_bytes() for file in other.rglob("*") if file.is_file()}
    train = compose(MATERIALS, tmp_path / "one", "train", 6, 0)
    assert {one.read_bytes() for one in train.glob("videos/*")}.isdisjoint(files.values())
    made = (folder / "source.json").stat().st_mtime_ns
    assert compose(MATERIALS, tmp_path / "one", "test", 6, 0).joinpath("source.json").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="other num_clips"):
        compose(MATERIALS, tmp_path / "one", "test", 7, 0)

    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    records = list(read_source("activitynet_qa", Files(folder), "test", {"grouped": "yes"}))
    assert len(records) == 6
    for row, record in zip(rows, records, strict=True):
        assert isinstance(record, Record)
        facts = [record.facts, *record.facts["more"]]
        assert [one["answers"] for one in facts] == [[one["answer"]] for one in row["questions"]]
        assert [one["question_type"] for one in facts] == [one["type"] for one in row["questions"]]
        assert record.media[0].read() == files[Path(row["video"])]
    captioned = list(read_source("captions", Files(folder), "test"))
    assert [one.facts["captions"] for one in captioned if isinstance(one, Record)] == [row["captions"] for row in rows]
    with av.open(io.BytesIO(records[0].media[0].read())) as container:
        assert container.streams.video[0].average_rate == FPS
