"""Places at a time and tubes: their text in every dialect, back into pixels and seconds, and what is none."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest

from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.errors import SampleError
from mmchat.modalities.image import square_geometry
from mmchat.region_marks import MAX_TIME_S
from mmchat.regions import Dialect, RegionFormat, check_region, in_place, sampled_tube
from tests import models, tiny

GEOMETRY = square_geometry(100, 50, 336, "pad")
ORIGINAL = RegionFormat("shikra", "original")


def test_texts():
    box, tube = (10, 0, 50, 50), ((0.5, 10, 0, 50, 50), (1.26, 20, 5, 60, 50))
    assert ORIGINAL.render(Region(0, box=box, time_s=1.5), GEOMETRY) == "@1.5s[0.100,0.000,0.500,1.000]"
    assert ORIGINAL.render(Region(0, point=(50, 25), time_s=0.04), GEOMETRY, 2) == "#2@0.0s[0.500,0.500]"
    text = "{0.5s[0.100,0.000,0.500,1.000];1.3s[0.200,0.100,0.600,1.000]}"
    assert ORIGINAL.render(Region(0, tube=tube), GEOMETRY) == text
    assert ORIGINAL.render(Region(0, tube=tube), GEOMETRY, 3) == f"#3{text}"
    finer = RegionFormat("loc", "original", time_decimals=2)
    loc = "{0.50s<loc0000><loc0102><loc1023><loc0512>;1.26s<loc0102><loc0205><loc1023><loc0614>}"
    assert finer.render(Region(0, tube=tube), GEOMETRY) == loc
    assert RegionFormat(time_decimals=0).render(Region(0, point=(0, 0), time_s=3.0), GEOMETRY).startswith("@3s[")


def _random_region(rng: random.Random, form: RegionFormat) -> Region:
    """On the form's own grid of places and times, so that the round trip must be exact."""

    def box() -> tuple[float, float, float, float]:
        x, y = rng.randint(0, 60), rng.randint(0, 20)
        return x, y, x + rng.randint(2, 40), y + rng.randint(2, 30)

    times = sorted(rng.sample(range(200), rng.randint(1, form.tube_boxes)))
    times_s = [time / 10**form.time_decimals for time in times]
    kind = rng.choice(("box", "point", "tube"))
    if kind == "tube":
        return Region(0, tube=tuple((time_s, *box()) for time_s in times_s))
    if kind == "point":
        return Region(0, point=box()[:2], time_s=times_s[0])
    return Region(0, box=box(), time_s=times_s[0])


@pytest.mark.parametrize("dialect", get_args(Dialect))
@pytest.mark.parametrize("frame", ["original", "padded_square"])
def test_round_trip(dialect, frame):
    rng = random.Random(7)
    form = RegionFormat(dialect, frame, 3 if dialect != "loc" else None, time_decimals=rng.choice((1, 2)))
    for _ in range(200):
        region = _random_region(rng, form)
        text = form.render(region, GEOMETRY, number=1)
        said = f"It moves {text} and stops. 5s[x] @1.5s"
        found = form.parse(said, [GEOMETRY])
        assert found.num_failed == 0 and len(found.regions) == 1, said
        got = found.regions[0]
        # Seconds exactly; pixels to half of the last digit; and what was read is written alike.
        assert got.time_s == region.time_s
        assert [box[0] for box in got.tube or ()] == [box[0] for box in region.tube or ()]
        slack = [size / 2 + 1e-6 for size in form.unit(GEOMETRY)]
        for mine, right in zip(_places(got), _places(region), strict=True):
            assert all(abs(a - b) <= slack[i % 2] for i, (a, b) in enumerate(zip(mine, right, strict=True)))
        assert form.render(got, GEOMETRY, number=1) == text
        assert found.parts == in_place(said, found.regions, 0) == ["It moves ", got, " and stops. 5s[x] @1.5s"]


def _places(region: Region) -> list[tuple[float, ...]]:
    return [box[1:] for box in region.tube] if region.tube else [region.box or region.point or ()]


@pytest.mark.parametrize(
    ("text", "num_failed"),
    [
        ("@1.5[0.1,0.2,0.3,0.4]", 1),  # no unit
        ("@1.5.2s[0.1,0.2,0.3,0.4]", 1),
        ("@1.s[0.1,0.2,0.3,0.4]", 1),
        ("@9999999s[0.1,0.2,0.3,0.4]", 1),  # longer than any video
        (f"@{'9' * 400}s[0.1,0.2]", 1),
        ("@1.5s[0.1,0.2,0.3]", 1),
        ("@1.5s[0.3,0.2,0.1,0.4]", 1),
        ("@1.5s[0.1,0.2,0.3,0.4", 1),
        ("#2@1.5s[0.1,0.2]", 1),  # a picture that is not here
        ("{0.5s[0.1,0.2,0.3,0.4];1.0s[0.1,0.2,0.3,0.4]", 1),  # cut off behind a whole box
        ("{0.5s[0.1,0.2,0.3,0.4];1.0s[0.1,0.2", 1),
        ("{0.5s[0.1,0.2,0.3,0.4];1.", 1),
        ("{0.5s[", 1),
        ("{0.5s", 1),
        ("{0.5s[0.1,0.2,0.3,0.4];1.0s[0.1,0.2,0.3,0.4] then", 1),
        ("{1.0s[0.1,0.2,0.3,0.4];0.5s[0.1,0.2,0.3,0.4]}", 1),  # backwards
        ("{0.5s[0.1,0.2,0.3,0.4];0.5s[0.1,0.2,0.3,0.4]}", 1),  # twice at one time
        ("{0.5s[0.1,0.2];1.0s[0.1,0.2]}", 1),  # points
        ("{0.5s[0.1,0.2,0.3,0.4;0.1,0.2,0.3,0.4]}", 1),
        ("{0.5[0.1,0.2,0.3,0.4]}", 1),
        ("{0.5s[0.1,0.2,0.3,0.4] 1.0s[0.1,0.2,0.3,0.4]}", 1),
        ("{0.5s[0.1,0.2,0.3,1.4]}", 1),
        ("#3{0.5s[0.1,0.2,0.3,0.4]}", 1),
        ("{a} {} {1, 2} {3", 0),
        ("it ends @1.5s, at 2s", 0),
    ],
)
def test_what_is_no_place_in_time(text, num_failed):
    found = RegionFormat().parse(text, [square_geometry(10, 10, 336, "pad")])
    assert (found.regions, found.num_failed) == ([], num_failed)
    assert in_place(text, [], num_failed) in (found.parts, None)


def test_marks_among_each_other():
    geometry = square_geometry(10, 10, 336, "pad")
    text = "a @1.5s[0.1,0.2;0.5,0.5] b {0.5s[0.1,0.2,0.3,0.4]; 1s[0,0,1,1]} [0.3,0.3] @[0.3,0.3]"
    found = RegionFormat().parse(text, [geometry])
    first, second, tube, plain, other = found.regions
    assert found.num_failed == 0 and first.time_s == second.time_s == 1.5 and second.point == (5, 5)
    assert tube.tube is not None and [box[0] for box in tube.tube] == [0.5, 1.0] and tube.tube[1][1:] == (0, 0, 10, 10)
    assert plain.time_s is None and plain.point == other.point == (3, 3)  # an @ without digits is no time
    assert found.parts == in_place(text, found.regions, 0)


@pytest.mark.parametrize("most", [2, 3, 5, 8, 40])
def test_a_long_tube_keeps_its_ends_and_its_own_boxes(most):
    tube = tuple((i * 0.04, i, 0, i + 10, 10) for i in range(101))
    kept = sampled_tube(tube, most, 2)
    assert len(kept) == most and kept[0] == tube[0] and kept[-1] == tube[-1] and set(kept) <= set(tube)
    gaps = {tube.index(b) - tube.index(a) for a, b in pairwise(kept)}
    assert max(gaps) - min(gaps) <= 1  # evenly
    assert sampled_tube(tube[:2], most, 2) == list(tube[:2]) and sampled_tube(tube[:1], most, 2) == [tube[0]]
    # Written to tenths, 0.04 s is another time, 0.08 s the next one, and 0.12 s reads as that.
    assert [box[0] for box in sampled_tube(tube[:5], 8, 1)] == [0.0, 0.08, 0.16]
    with pytest.raises(ValueError, match="wanted 2 at least"):
        sampled_tube(tube, 1, 1)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region(0, box=(0, 0, 9, 9), time_s=-0.1), "impossible time"),
        (Region(0, point=(0, 0), time_s=float("nan")), "region not finite"),
        (Region(0, box=(0, 0, 9, 9), time_s=MAX_TIME_S * 2), "impossible time"),
        (Region(0, tube=((1, 0, 0, 9, 9), (1, 0, 0, 9, 9))), "impossible time"),
        (Region(0, tube=((2, 0, 0, 9, 9), (1, 0, 0, 9, 9))), "impossible time"),
    ],
)
def test_a_time_that_cannot_be_is_refused(region, reason):
    with pytest.raises(SampleError) as caught:
        check_region(region, 100, 50)
    assert caught.value.reason == reason


@pytest.fixture(scope="module")
def template(tiny_folder):
    from mmchat.data.build import build_template

    return build_template(models.config())


def test_a_dialogue_about_a_video_is_read_back(template):
    """Through the template, behind a picture: the clip is the second thing that is seen."""
    picture, clip = MediaRef("image", tiny.picture("red", random.Random(0))), MediaRef("video", tiny.clip("right"))
    tube = Region(1, tube=((0.0, 0, 8, 16, 24), (0.5, 24, 8, 40, 24), (0.9, 48, 8, 64, 24)))
    at = Region(1, box=(24, 8, 40, 24), time_s=0.5)
    turns = (
        Turn("user", (picture, clip, "What moves at ", at, "?")),
        Turn("assistant", ("The square ", tube, ", not ", Region(0, point=(3, 4)), ".")),
    )
    text = template.tokenizer.decode(template.render(Conversation(turns)).token_ids)
    assert "What moves at #2@0.5s[" in text and "The square #2{0.0s[" in text
    found = template.read_regions(text.partition("assistant\n")[2], Conversation(turns[:1]))
    assert found.num_failed == 0 and [one.media for one in found.regions] == [1, 0]
    assert found.regions[0].tube is not None and tube.tube is not None
    for got, right in zip(found.regions[0].tube, tube.tube, strict=True):
        assert got[0] == right[0] and got[1:] == pytest.approx(right[1:], abs=0.04)
    broken = template.read_regions(
        "#1@0.5s[0.1,0.2] #1{0.5s[0.1,0.2,0.3,0.4]} #2@0.5s[0.5,0.5]", Conversation(turns[:1])
    )
    assert broken.num_failed == 2 and [one.media for one in broken.regions] == [1]
    with pytest.raises(SampleError, match="time in a still picture"):
        template.render(Conversation((Turn("user", (picture, replace(at, media=0))),)))
