"""Boxes and points: what is refused, the formats and units that are read, and the dialects that are written."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from mmchat.config import ChatConfig
from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.modalities.image import square_geometry
from mmchat.regions import Geometry, RegionFormat, check_region, in_place, read_box, read_point
from mmchat.tasks import TASKS
from tests import models, tiny


def _geometry(width: int, height: int, size: int = 336) -> Geometry:
    return square_geometry(width, height, size, "pad")


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region(0, box=(-1.01, 0, 10, 10)), "region outside the picture"),
        (Region(0, box=(0, 0, 101.5, 10)), "region outside the picture"),
        (Region(0, box=(0, 0, 10, 51.5)), "region outside the picture"),
        (Region(0, box=(200, 200, 210, 210)), "region outside the picture"),
        (Region(0, point=(50, 52)), "region outside the picture"),
        (Region(0, box=(20, 10, 10, 30)), "inverted region"),
        (Region(0, box=(10, 30, 20, 10)), "inverted region"),
        (Region(0, box=(10, 10, 10, 30)), "empty region"),
        (Region(0, box=(100.2, 10, 100.9, 30)), "region outside the picture"),  # within the tolerance, but beside it
        (Region(0, box=(math.nan, 0, 10, 10)), "region not finite"),
        (Region(0, box=(0, 0, math.inf, 10)), "region not finite"),
        (Region(0, point=(math.nan, 0)), "region not finite"),
        (Region(0, tube=((0, 1, 1, 9, 9), (1, 9, 1, 1, 9))), "inverted region"),
        (Region(0, tube=((math.nan, 1, 1, 9, 9),)), "region not finite"),
        (Region(0, tube=()), "empty region"),
    ],
)
def test_a_bad_region_is_refused(region, reason):
    with pytest.raises(SampleError) as caught:
        check_region(region, 100, 50)
    assert caught.value.reason == reason


def test_one_pixel_past_the_picture_is_clamped():
    assert check_region(Region(2, box=(-1, -0.5, 101, 51), label="all"), 100, 50) == Region(
        2, box=(0, 0, 100, 50), label="all"
    )
    assert check_region(Region(0, point=(-0.5, 50.5), time_s=2), 100, 50) == Region(0, point=(0, 50), time_s=2)
    tube = Region(1, tube=((0.5, -1, 0, 10, 10), (1.5, 0, 0, 10, 51)))
    assert check_region(tube, 100, 50).tube == ((0.5, 0, 0, 10, 10), (1.5, 0, 0, 10, 50))
    inside = Region(0, box=(0.25, 3, 9.5, 12))
    assert check_region(inside, 100, 50) == inside


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region(0, box=(10, 0, 150, 50)), "region outside the picture"),
        (Region(0, tube=((0, 1, 1, 9, 9),)), "time in a still picture"),
    ],
)
def test_the_chat_template_names_the_sample(tiny_folder, region, reason):
    from mmchat.data.build import build_template

    template = build_template(models.config())
    picture = MediaRef("image", tiny.picture("red", random.Random(0), (100, 50)))
    with pytest.raises(SampleError, match="sample-7: found") as caught:
        template.render(Conversation((Turn("user", (picture, region)),)), key="sample-7")
    assert caught.value.reason == reason
    edge = Turn("user", (picture, Region(0, box=(-1, 0, 101, 50))))
    assert "[0.000,0.250,1.000,0.750]" in template.tokenizer.decode(template.render(Conversation((edge,))).token_ids)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ((20, 10, 60, 40), {}),
        ((20, 10, 40, 30), {"box_format": "xywh"}),
        ((40, 25, 40, 30), {"box_format": "cxcywh"}),
        ((10, 20, 40, 60), {"box_format": "yxyx"}),
        ((0.1, 0.1, 0.3, 0.4), {"unit": "norm1"}),
        ((10, 10, 20, 30), {"unit": "norm100", "box_format": "xywh"}),
        ((100, 100, 300, 400), {"unit": "norm1000"}),
        ((102.3, 102.3, 409.2, 306.9), {"unit": "norm1024", "box_format": "yxyx"}),
        # In the square of 200 x 200 the picture begins at y = 50.
        ((0.1, 0.3, 0.3, 0.45), {"unit": "norm1", "frame": "padded_square"}),
        ((20, 60, 60, 90), {"frame": "padded_square"}),
    ],
)
def test_box_formats_and_units(values, settings):
    assert read_box(values, width=200, height=100, **settings) == pytest.approx((20, 10, 60, 40))


def test_of_several_pictures_each_mark_names_one():
    small, large = _geometry(10, 10), _geometry(1000, 1000)
    found = RegionFormat().parse("see #2[0.1,0.2] and #1[0.1,0.2;0.5,0.5]", [small, large])
    assert [(one.media, one.point) for one in found.regions] == [(1, (100, 200)), (0, (1, 2)), (0, (5, 5))]
    # None is named, one is not here, the size of one is not known.
    for text in ("[0.1,0.2]", "#3[0.1,0.2]", "# 1[0.1,0.2]", "#2 [0.1,0.2]"):
        assert RegionFormat().parse(text, [small, large]).num_failed == 1
    assert RegionFormat().parse("#1[0.1,0.2] #2[0.1,0.2]", [None, large]).num_failed == 1
    assert RegionFormat().parse("[0.1,0.2]", []).num_failed == 1
    found = RegionFormat("loc").parse("#2<loc0000><loc0000>#1<loc1023><loc1023>", [small, large])
    assert [one.media for one in found.regions] == [1, 0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a cup [0.1,0.1,0.2,0.2] here", ["a cup ", 0, " here"]),
        ("[0.1,0.1,0.2,0.2;0.3,0.3,0.4,0.4] two", [0, 1, " two"]),
        ("a [0.1,0.1,0.2] b [0.3,0.3,0.4,0.4", ["a [0.1,0.1,0.2] b [0.3,0.3,0.4,0.4"]),
        ("a [0.4,0.1,0.2,0.2] b #1[0.3,0.3]", ["a [0.4,0.1,0.2,0.2] b ", 0]),
        ("a [7,7] b [0.3,0.3]", None),  # which one is none, only the dialect knows
        ("", []),
    ],
)
def test_regions_in_their_places_whatever_the_dialect(text, wanted):
    parsed = RegionFormat().parse(text, [_geometry(10, 10)])
    found = in_place(text, parsed.regions, parsed.num_failed)
    if wanted is None:
        assert found is None
    else:
        assert found == parsed.parts == [parsed.regions[one] if isinstance(one, int) else one for one in wanted]


def test_regions_in_their_places_in_loc():
    text = "a [1] <loc0001><loc0002><loc0003><loc0004>"
    parsed = RegionFormat("loc").parse(text, [_geometry(10, 10)])
    assert in_place(text, parsed.regions, parsed.num_failed) == ["a [1] ", parsed.regions[0]]


def test_points_and_upright_squares():
    assert read_point((500, 250), "norm1000", 200, 100) == (100, 25)
    assert read_point((0.5, 0.25), "norm1", 100, 200, "padded_square") == (50, 50)
    assert read_point((3, 4)) == (3, 4)


@pytest.mark.parametrize(
    ("values", "settings", "message"),
    [
        ((1, 2, 3), {}, "4 finite numbers"),
        ((1, 2, 3, 4, 5), {}, "4 finite numbers"),
        ((1, 2, 3, math.nan), {}, "4 finite numbers"),
        ((1, 2, 3, 4), {"box_format": "ltrb"}, "ltrb"),
        ((1, 2, 3, 4), {"unit": "inches"}, "inches"),
        ((1, 2, 3, 4), {"unit": "norm1000"}, "no picture size"),
        ((1, 2, 3, 4), {"frame": "padded_square"}, "no picture size"),
        ((1, 2, 3, 4), {"unit": "norm1", "width": 0, "height": 5}, "no picture size"),
    ],
)
def test_what_read_box_refuses(values, settings, message):
    with pytest.raises(ValueError, match=message):
        read_box(values, **settings)


def test_shikra_text_is_the_papers():
    # 100 x 50 padded to 100 x 100: y gains 25 pixels before it is divided.
    geometry = _geometry(100, 50, 224)
    regions = RegionFormat("shikra", "padded_square")
    assert regions.render(Region(0, box=(10, 0, 50, 50)), geometry) == "[0.100,0.250,0.500,0.750]"
    assert regions.render(Region(0, point=(50, 25)), geometry) == "[0.500,0.500]"
    # Its square pads by whole pixels: (1000 - 501) // 2 = 249.
    assert regions.render(Region(0, point=(0, 0)), _geometry(1000, 501)) == "[0.000,0.249]"


def test_loc_text_is_y_first():
    loc = RegionFormat("loc", "original")
    assert loc.render(Region(0, box=(0, 10, 100, 50)), _geometry(100, 50)) == "<loc0205><loc0000><loc1023><loc1023>"
    found = loc.parse("<loc0000><loc1023> <loc0205><loc0000><loc1023><loc1023> cup", [_geometry(100, 50)])
    assert found.regions[0].point == (100, 0)
    assert found.regions[1].box == pytest.approx((0, 10, 100, 50), abs=0.05) and found.num_failed == 0


@pytest.mark.parametrize(
    ("text", "num_points", "num_failed"),
    [
        ("<loc0307><loc0102><loc08", 0, 1),
        ("<loc0307><loc0102><loc", 0, 1),
        ("<loc0307><loc0102><", 0, 1),
        ("#1<loc0307><loc0102><loc0818", 0, 1),
        ("<loc0307><loc0102><loc08> and <loc0307><loc0102>", 1, 1),
        ("<loc0307><loc0102><loc0818>", 0, 1),
        ("<loc0307", 0, 1),
        ("<loc0307><loc0102> < 3", 1, 0),
        ("a <location> or <loc", 0, 0),
    ],
)
def test_half_a_loc_box_is_no_point(text, num_points, num_failed):
    found = RegionFormat("loc").parse(text, [_geometry(100, 50)])
    assert (len(found.regions), found.num_failed) == (num_points, num_failed)
    assert in_place(text, found.regions, found.num_failed) == found.parts


@pytest.mark.parametrize(
    ("dialect", "decimals"),
    [(name, number) for name in ("norm1000", "pixels", "loc", "percent") for number in (None, 0, 1, 2)]
    + [("shikra", None), ("shikra", 2)],
)
def test_the_unit_is_what_the_last_digit_is_worth(dialect, decimals):
    regions, geometry = RegionFormat(dialect, "original", decimals), _geometry(640, 480)
    across, down = regions.unit(geometry)
    points = ((101, 103), (101 + 30 * across, 103 + 30 * down))
    texts = [regions.render(Region(0, point=point), geometry) for point in points]
    # The digits alone, without the point among them: thirty further in the last place, give or take the rounding.
    before, after = ([int(digits) for digits in re.findall("[0-9]+", text.replace(".", ""))] for text in texts)
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([30, 30], abs=1)


def test_loc_has_no_decimals():
    with pytest.raises(ValueError, match="Leave region_decimals out"):
        ChatConfig(region_dialect="loc", region_decimals=1)
    assert ChatConfig(region_dialect="loc").regions == RegionFormat("loc", "padded_square")
    assert ChatConfig(region_dialect="percent", region_decimals=0).regions.decimals == 0


@pytest.mark.parametrize(
    ("text", "num_failed"),
    [
        ("no box [a,b,c,d] [] [ , ]", 0),
        ("[0.1,0.2,0.3]", 1),
        ("[0.1,0.2,0.3,0.4,0.5]", 1),
        ("it is at [0.1,0.2", 1),
        ("it is at [0.1,0.2 and", 1),
        ("[0.1,0.2 [0.1,0.2", 2),
        ("[3 cups] [2024 or so", 0),
        ("[0.1,,0.2]", 1),
        ("[0.1,0.2,0.3,0.4;0.5]", 1),
        ("[100,200,300,400]", 1),  # of another dialect
        ("[-0.1,0.2,0.3,0.4]", 1),
        ("[0.3,0.2,0.1,0.4]", 1),  # corners swapped
        ("#2[0.1,0.2,0.3,0.4] #0[0.1,0.2]", 2),  # of pictures that are not here
        ("[" + "9" * 400 + ",1]", 1),
    ],
)
def test_half_a_box_is_no_box(text, num_failed):
    found = RegionFormat().parse(text, [_geometry(10, 10)])
    assert (found.regions, found.num_failed) == ([], num_failed)


def test_several_boxes_and_spaces():
    found = RegionFormat().parse(
        "[0.1, 0.2 ,0.3, 0.4] #1[0.5,0.5][0,0,1,1; 0.5,0.5,1.0,1 ] [0.1]", [_geometry(100, 100)]
    )
    assert found.num_failed == 1 and {region.media for region in found.regions} == {0}
    assert [part for part in found.parts if isinstance(part, str)] == [" ", " [0.1]"]
    assert [region.box for region in found.regions] == [
        pytest.approx((10, 20, 30, 40)),
        None,
        (0, 0, 100, 100),
        (50, 50, 100, 100),
    ]
    assert found.regions[1].point == (50, 50)


@pytest.fixture(scope="module")
def template(tiny_folder):
    from mmchat.data.build import build_template

    return build_template(models.config())


def _talk_about_several():
    """A dialogue with boxes and points in questions and answers: a picture, then a sound, another picture, a clip."""
    rng = random.Random(1)
    media = (
        MediaRef("image", tiny.picture("red", rng, (100, 50))),
        MediaRef("audio", tiny.tone(440.0, 0.5)),
        MediaRef("image", tiny.picture("blue", rng, (40, 80))),
        MediaRef("video", tiny.clip("left")),
    )

    def turn(role, *parts):
        keys = {str: "text", int: "media", dict: "region"}
        return {"role": role, "parts": [{keys[type(part)]: part} for part in parts]}

    one, other = {"media": 0, "box": [10, 0, 50, 50]}, {"media": 2, "point": [20, 40]}
    facts = [
        turn("user", 0, "What is at ", one, "?"),
        turn("assistant", "A circle, its middle is ", {"media": 0, "point": [30, 25]}, "."),
        turn("user", 1, 2, "Compare ", one, " with ", other, "."),
        turn("assistant", other, " is blue, ", one, " is red."),
        turn("user", 3, "And the clip?"),
        turn("assistant", "There: ", {"media": 3, "box": [1, 2, 30, 20]}, other),
    ]
    return TASKS["instruct"].conversation(Record("k", {"turns": facts}, media), random.Random(0))


def test_a_dialogue_over_several_pictures_is_read_back(template):
    conversation = _talk_about_several()
    sample = template.render(conversation)
    text = template.tokenizer.decode(sample.token_ids)
    assert "What is at [0.100,0.250,0.500,0.750]?" in text and "its middle is [0.300,0.500]." in text
    assert "Compare #1[0.100,0.250,0.500,0.750] with #2[0.500,0.500]." in text  # the sound is not counted
    assert "There: #3[" in text
    turns = conversation.turns
    for i in (1, 3, 5):
        before = Conversation(turns[:i])
        # What is shown later changes nothing of what was said: an answer stands in training as it is asked for.
        asked = template.render(before, answer=True).token_ids
        assert sample.token_ids[: len(asked)] == asked
        through = template.render(Conversation(turns[: i + 1])).token_ids
        answer = template.tokenizer.decode(through[len(asked) :]).replace("<|im_end|>", "")
        found = template.read_regions(answer, before)
        wanted = [part for part in turns[i].parts if isinstance(part, Region)]
        assert found.num_failed == 0 and [one.media for one in found.regions] == [one.media for one in wanted]
        for got, one in zip(found.regions, wanted, strict=True):
            assert (got.box or got.point) == pytest.approx(one.box or one.point, abs=0.05)
        assert [part for part in found.parts if isinstance(part, Region)] == found.regions


def test_two_pictures_and_a_region_that_names_neither(template):
    conversation = Conversation(_talk_about_several().turns[:3])
    found = template.read_regions("[0.1,0.2] #3[0.1,0.2] #1[0.1,0.2,0.3 #2[0.5,0.5]", conversation)
    assert found.num_failed == 3 and found.regions == [Region(2, point=(20, 40))]
    text = template.read_regions("Nothing [here].", Conversation(())).parts
    assert text == ["Nothing [here]."]
    with pytest.raises(SampleError, match="unreadable facts"):
        facts = [{"role": "user", "parts": [{"media": 0}, {"media": 1}, {"region": {"box": [1, 1, 2, 2]}}]}]
        TASKS["instruct"].conversation(Record("k", {"turns": facts}, conversation.media), random.Random(0))


def test_an_absent_picture_keeps_its_number(template):
    turns = _talk_about_several().turns
    for header, num_failed in ((MediaHeader(100, 50), 0), (None, 1)):
        gone = replace(turns[0], parts=(MediaRef("image", None, header), *turns[0].parts[1:]))
        found = template.read_regions("#1[0.5,0.5] #2[0.5,0.5]", Conversation((gone, *turns[1:3])))
        assert found.num_failed == num_failed and found.regions[-1] == Region(2, point=(20, 40))


def test_left_out_pictures_are_not_counted(template):
    turns = _talk_about_several().turns
    late = replace(turns[5], parts=(Region(3, box=(1, 2, 30, 20)),))
    whole = template.tokenizer.decode(template.render(Conversation((*turns[:5], late))).token_ids)
    rest = template.tokenizer.decode(template.render(Conversation((*turns[:5], late)), skip_turns=4).token_ids)
    assert "#3[" in whole and "#" not in rest and "[" in rest
