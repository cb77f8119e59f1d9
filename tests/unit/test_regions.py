"""Boxes and points: what is refused, the formats and units that are read, and the dialects that are written."""

from __future__ import annotations

import math
import random

import pytest

from mmchat.conversation import Conversation, MediaRef, Region, Turn
from mmchat.errors import SampleError
from mmchat.modalities.image import square_geometry
from mmchat.regions import Geometry, RegionFormat, check_region, read_box, read_point
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
        (Region(0, tube=((0, 1, 1, 9, 9),)), "region without a text"),
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
    found = loc.parse("<loc0000><loc1023> <loc0205><loc0000><loc1023><loc1023> cup", _geometry(100, 50))
    assert found.regions[0].point == (100, 0)
    assert found.regions[1].box == pytest.approx((0, 10, 100, 50), abs=0.05) and found.num_failed == 0


def test_a_tube_has_no_text():
    with pytest.raises(SampleError, match="region without a text"):
        RegionFormat().render(Region(0, tube=((0, 1, 1, 2, 2),)), _geometry(10, 10))


@pytest.mark.parametrize(
    ("text", "num_failed"),
    [
        ("no box [a,b,c,d] [] [ , ]", 0),
        ("[0.1,0.2,0.3]", 1),
        ("[0.1,0.2,0.3,0.4,0.5]", 1),
        ("it is at [0.1,0.2", 1),
        ("[0.1,,0.2]", 1),
        ("[0.1,0.2,0.3,0.4;0.5]", 1),
        ("[100,200,300,400]", 1),  # of another dialect
        ("[-0.1,0.2,0.3,0.4]", 1),
        ("[" + "9" * 400 + ",1]", 1),
    ],
)
def test_half_a_box_is_no_box(text, num_failed):
    found = RegionFormat().parse(text, _geometry(10, 10))
    assert (found.regions, found.num_failed) == ([], num_failed)


def test_several_boxes_and_spaces():
    found = RegionFormat().parse(
        "[0.1, 0.2 ,0.3, 0.4] [0.5,0.5][0,0,1,1; 0.5,0.5,1.0,1 ] [0.1]", _geometry(100, 100), 3
    )
    assert found.num_failed == 1 and {region.media for region in found.regions} == {3}
    assert [region.box for region in found.regions] == [
        pytest.approx((10, 20, 30, 40)),
        None,
        (0, 0, 100, 100),
        (50, 50, 100, 100),
    ]
    assert found.regions[1].point == (50, 50)
