"""Boxes and points as text and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.conversation import Region
from mmchat.regions import Geometry, RegionFormat

DIALECTS = ["shikra", "norm1000", "pixels", "loc", "percent"]


def _geometry(width: int, height: int, size: int = 336) -> Geometry:
    scale = size / max(width, height)
    return Geometry(width, height, size, size, scale, scale, (size - width * scale) / 2, (size - height * scale) / 2)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("frame", ["original", "padded_square"])
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 2000), st.integers(20, 2000)),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    extent=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.5)),
)
def test_box_round_trip_within_half_a_digit(dialect, frame, size, corner, extent):
    geometry, regions = _geometry(*size), RegionFormat(dialect, frame)
    x, y = corner[0] * size[0], corner[1] * size[1]
    box = (x, y, x + extent[0] * size[0], y + extent[1] * size[1])
    (found,) = regions.parse(f"It is here: {regions.render(Region(0, box=box), geometry)} .", geometry)
    square = max(size)
    limits = {
        "pixels": (0.5 / geometry.scale_x, 0.5 / geometry.scale_y),
    }.get(
        dialect,
        tuple(0.5 * regions.unit * (square if frame == "padded_square" else side) for side in size),
    )
    for i, (a, b) in enumerate(zip(found.box, box, strict=True)):
        assert abs(a - b) <= limits[i % 2] * (1 + 1e-9) + 1e-9


def test_shikra_text_is_the_papers():
    # 100 x 50 padded to 100 x 100: y gains 25 pixels before it is divided.
    geometry = _geometry(100, 50, 224)
    regions = RegionFormat("shikra", "padded_square")
    assert regions.render(Region(0, box=(10, 0, 50, 50)), geometry) == "[0.100,0.250,0.500,0.750]"
    assert regions.render(Region(0, point=(50, 25)), geometry) == "[0.500,0.500]"


def test_loc_text_is_y_first():
    assert RegionFormat("loc", "original").render(Region(0, box=(0, 10, 100, 50)), _geometry(100, 50)) == (
        "<loc0205><loc0000><loc1023><loc1023>"
    )


@pytest.mark.parametrize("text", ["no box", "[0.1,0.2,0.3]", "[0.1,0.2", "[a,b,c,d]", "[]"])
def test_half_a_box_is_no_box(text):
    assert RegionFormat().parse(text, _geometry(10, 10)) == []


def test_several_boxes_and_spaces():
    found = RegionFormat().parse("[0.1, 0.2, 0.3, 0.4] and [0.5,0.5]", _geometry(100, 100))
    assert [r.box is not None for r in found] == [True, False]
    assert found[0].box == pytest.approx((10, 20, 30, 40))
