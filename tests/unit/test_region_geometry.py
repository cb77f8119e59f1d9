"""A box keeps its place: through every dialect, frame and resize, and through the EXIF rotation of its picture."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmchat.conversation import Region
from mmchat.modalities.image import ImageConfig, ImagePreprocess, square_geometry
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.region_text import DIALECTS, smart_resize, split_regions, to_region
from mmchat.regions import RegionFormat, check_region, in_place

INPUT = 336
SHARE = st.floats(0, 1)
SIZES = st.tuples(st.integers(2, 3000), st.integers(2, 3000))
BOXES = st.tuples(SHARE, SHARE, SHARE, SHARE)


def in_pixels(size: tuple[int, int], shares: tuple[float, ...]) -> tuple[float, ...]:
    """x1, y1, x2, y2 within the picture, in order; a point where there are two shares."""
    x = sorted(share * size[0] for share in shares[::2])
    y = sorted(share * size[1] for share in shares[1::2])
    return tuple(value for pair in zip(x, y, strict=True) for value in pair)


def assert_within(found: tuple[float, ...], wanted: tuple[float, ...], limit: tuple[float, float]) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert abs(a - b) <= limit[i % 2] * (1 + 1e-9) + 1e-6, (found, wanted, limit)


# The number of steps that the last digit divides the frame's side into, from each format's own description.
STEPS = {"shikra": 1000, "norm1000": 1000, "loc": 1023, "percent": 1000}


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize("frame", ["original", "padded_square"])
@pytest.mark.parametrize("dialect", ["shikra", "norm1000", "loc", "percent", "pixels"])
@settings(max_examples=40, deadline=None)
@example(size=(3000, 2), shares=(0, 0, 1, 1))
@example(size=(3, 2999), shares=(0, 0, 1, 1))
@example(size=(1001, 502), shares=(0.1, 0.1))
@given(size=SIZES, shares=BOXES | st.tuples(SHARE, SHARE))
def test_region_to_text_and_back(dialect, frame, resize, size, shares):
    geometry, regions = square_geometry(*size, INPUT, resize), RegionFormat(dialect, frame)
    wanted = in_pixels(size, shares)
    region = Region(0, box=wanted) if len(wanted) == 4 else Region(0, point=wanted)
    parsed = regions.parse(f"It is here: {regions.render(region, geometry)} .", [geometry])
    assert parsed.num_failed == 0
    (found,) = parsed.regions
    if dialect == "pixels":
        x, y = geometry.to_input(1, 1)
        x0, y0 = geometry.to_input(0, 0)
        unit = (1 / (x - x0), 1 / (y - y0))  # one pixel of the input, in pixels of the original
    else:
        sides = (max(size), max(size)) if frame == "padded_square" else size
        unit = (sides[0] / STEPS[dialect], sides[1] / STEPS[dialect])
    assert regions.unit(geometry) == pytest.approx(unit)
    assert_within(found.box or found.point, wanted, (unit[0] / 2, unit[1] / 2))


# None: a picture whose size is not known.
PICTURES = st.lists(st.none() | SIZES, min_size=1, max_size=4)
NAMED = st.tuples(st.integers(0, 3), BOXES | st.tuples(SHARE, SHARE), st.sampled_from(["", " ", " and a cup, ", "7"]))


@pytest.mark.parametrize("frame", ["original", "padded_square"])
@pytest.mark.parametrize("dialect", ["shikra", "norm1000", "loc", "percent", "pixels"])
@settings(max_examples=60, deadline=None)
@given(sizes=PICTURES, named=st.lists(NAMED, max_size=5))
def test_regions_of_several_pictures_to_text_and_back(dialect, frame, sizes, named):
    regions = RegionFormat(dialect, frame)
    geometries = [size and square_geometry(*size, INPUT, "pad") for size in sizes]
    text, wanted = "It is", []
    for media, shares, words in named:
        if media < len(sizes) and sizes[media]:
            place = in_pixels(sizes[media], shares)
            region = Region(media, box=place) if len(place) == 4 else Region(media, point=place)
            wanted.append((region, geometries[media]))
            if dialect == "loc":
                words = words or " "  # two points without anything between them are four tokens, as a box is
            text += words + regions.render(region, geometries[media], media + 1 if len(sizes) > 1 else None)
    parsed = regions.parse(text, geometries)
    assert parsed.num_failed == 0 and len(parsed.regions) == len(wanted)
    assert [part for part in parsed.parts if isinstance(part, Region)] == parsed.regions
    assert in_place(text, parsed.regions, 0) == parsed.parts
    for found, (region, geometry) in zip(parsed.regions, wanted, strict=True):
        assert found.media == region.media
        across, down = regions.unit(geometry)
        assert_within(found.box or found.point, region.box or region.point, (across / 2, down / 2))
    if len(sizes) > 1 and wanted:  # without the numbers, nobody knows where
        unnamed = "".join(part if isinstance(part, str) else "[0.1,0.2]" for part in parsed.parts)
        assert regions.parse(unnamed, geometries).regions == []


# How each family writes 0-1 shares of its frame, from its own description: (writer, steps of the frame's side).
Writer = Callable[[list[float]], str]


def _thousand(form: str, sep: str = ",") -> Writer:
    return lambda shares: form.format(sep.join(str(round(share * 1000)) for share in shares))


def _qwen(start: str, end: str) -> Writer:
    def write(shares: list[float]) -> str:
        numbers = [round(share * 1000) for share in shares]
        return start + ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True)) + end

    return write


def _json(shares: list[float]) -> str:
    key = "bbox_2d" if len(shares) == 4 else "point_2d"
    return f'[{{"{key}": {[round(share * 1000) for share in shares]}, "label": "cup"}}]'


def _molmo(shares: list[float]) -> str:
    return f'<point x="{shares[0] * 100:.1f}" y="{shares[1] * 100:.1f}" alt="cup">cup</point>'


def _loc(shares: list[float]) -> str:
    return "".join(f"<loc{round(shares[i] * 1023):04d}>" for i in (1, 0, 3, 2)) + " cup"


def _bins(shares: list[float]) -> str:
    kind = "b" if len(shares) == 4 else "p"
    return f"<{kind}_st>" + " ".join(f"<bin_{round(share * 1000)}>" for share in shares) + f"<{kind}_ed>"


def _decimals(digits: int) -> Writer:
    return lambda shares: "[" + ",".join(f"{share:.{digits}f}" for share in shares) + "]"


def _minigpt(shares: list[float]) -> str:
    return "<p>cup</p> {" + "".join(f"<{round(share * 100)}>" for share in shares) + "}"


FAMILIES: dict[str, tuple[Writer, int, tuple[int, ...]]] = {
    "qwen_vl": (_qwen("<ref>cup</ref><box>", "</box>"), 1000, (2, 4)),
    "qwen2_vl": (_qwen("<|box_start|>", "<|box_end|>"), 1000, (2, 4)),
    "qwen3_vl": (_json, 1000, (2, 4)),
    "internvl": (_thousand("<ref>cup</ref><box>[[{}]]</box>", ", "), 1000, (2, 4)),
    "ferret": (_thousand("a cup [{}]", ", "), 1000, (2, 4)),
    "cogvlm": (_thousand("[[{}]]"), 1000, (2, 4)),
    "glm_v": (_thousand("<|begin_of_box|>[[{}]]<|end_of_box|>"), 1000, (2, 4)),
    "minigpt_v2": (_minigpt, 100, (4,)),
    "paligemma": (_loc, 1023, (4,)),
    "molmo": (_molmo, 1000, (2,)),
    "llava": (_decimals(2), 100, (2, 4)),
    "shikra": (_decimals(3), 1000, (2, 4)),
    "shikra_tokens": (_bins, 1000, (2, 4)),
}


def test_every_dialect_is_tried():
    assert FAMILIES.keys() | {"kosmos2", "qwen25_vl"} == DIALECTS.keys()


@pytest.mark.parametrize("dialect", FAMILIES)
@settings(max_examples=60, deadline=None)
@example(size=(2999, 1000), shares=(0, 0, 1, 1), frame="padded_square")
@example(size=(1, 3000), shares=(0, 0, 1, 1), frame="padded_square")
@given(size=SIZES, shares=BOXES, frame=st.sampled_from(["original", "padded_square"]))
def test_the_text_of_another_family_to_a_region(dialect, size, shares, frame):
    write, steps, counts = FAMILIES[dialect]
    own = DIALECTS[dialect].frame or frame
    sides = (max(size), max(size)) if own == "padded_square" else size
    # Shikra's square (Expand2square): the picture is pasted at (side - width) // 2, (side - height) // 2.
    shift = ((sides[0] - size[0]) // 2, (sides[1] - size[1]) // 2)
    for count in counts:
        wanted = in_pixels(size, shares[:count])
        text = write([(value + shift[i % 2]) / sides[i % 2] for i, value in enumerate(wanted)])
        (found,) = (part for part in split_regions(f"See {text}.", dialect) if not isinstance(part, str))
        region = to_region(found, 0, *size, frame=frame)
        place = region.box or region.point
        assert_within(place, wanted, (sides[0] / steps / 2, sides[1] / steps / 2))
        # Rounding in the square does not push a region out of its picture.
        assert all(-1e-6 <= value <= size[i % 2] + 1e-6 for i, value in enumerate(place))


@settings(max_examples=100, deadline=None)
@given(size=st.tuples(st.integers(20, 3000), st.integers(20, 3000)), shares=BOXES)
def test_pixels_of_the_resized_picture(size, shares):
    """Qwen2.5-VL: within half a pixel of what its resize makes."""
    resized = smart_resize(*size)
    wanted = in_pixels(size, shares)
    numbers = [round(value * resized[i % 2] / size[i % 2]) for i, value in enumerate(wanted)]
    _, found, _ = split_regions(f'[{{"bbox_2d": {numbers}, "label": "cup"}}]', "qwen25_vl")
    region = to_region(found, 0, *size, input_size=resized)
    assert_within(region.box, wanted, (size[0] / resized[0] / 2, size[1] / resized[1] / 2))


@settings(max_examples=100, deadline=None)
@given(size=SIZES, shares=BOXES)
def test_patches_of_kosmos2(size, shares):
    """Within half a cell of the grid of 32; within one where the box lies in one row or column."""
    wanted = in_pixels(size, shares)
    cells = [min(int(value / size[i % 2] * 32), 31) for i, value in enumerate(wanted)]
    text = f"<object><patch_index_{cells[1] * 32 + cells[0]:04d}><patch_index_{cells[3] * 32 + cells[2]:04d}></object>"
    (found,) = split_regions(text, "kosmos2")
    in_one = cells[0] == cells[2] or cells[1] == cells[3]
    region = check_region(to_region(found, 0, *size), *size)
    assert_within(region.box, wanted, tuple(side / 32 * (1 if in_one else 0.5) for side in size))


# Where the stored picture's first row and first column are in the displayed one (EXIF 2.3, tag 0x0112).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
FORMATS = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
SPEC = ImageSpec(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 4, 4, 8)


def stored(displayed: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as a camera held that way writes them."""
    row, column = ORIENTATIONS[orientation]
    pixels = displayed if row in ("top", "bottom") else displayed.transpose(1, 0, 2)
    pixels = pixels[::-1] if row in ("bottom", "right") else pixels
    return pixels[:, ::-1] if column in ("bottom", "right") else pixels


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@settings(max_examples=6, deadline=None)
@given(
    size=st.tuples(st.integers(60, 180), st.integers(60, 180)),
    corner=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
)
def test_a_picture_and_its_box_agree_after_rotation(orientation, format, resize, size, corner):
    width, height = size
    left, top = int(corner[0] * width), int(corner[1] * height)
    region = Region(0, box=(left, top, left + width // 2, top + height // 2))
    displayed = np.full((height, width, 3), (0, 0, 255), np.uint8)
    displayed[top : top + height // 2, left : left + width // 2] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    pixels = np.ascontiguousarray(stored(displayed, orientation))
    Image.fromarray(pixels).save(file, format, exif=exif, **FORMATS[format])

    config = {"encoder": {"kind": "timm", "model": "test_vit", "pretrained": False}, "resize": resize}
    preprocess = ImagePreprocess(ImageConfig.model_validate(config), SPEC)
    header = preprocess.header(file.getvalue())
    assert (header.width, header.height) == size
    plan = preprocess.plan(header)
    picture = preprocess(file.getvalue(), plan)[0]
    is_red = picture[0] - picture[2] > 0.5  # of -2 (blue) to 2 (red); the padding is 0, and a little more beside blue

    box = check_region(region, header.width, header.height).box
    (x1, y1), (x2, y2) = plan.geometry.to_input(*box[:2]), plan.geometry.to_input(*box[2:])
    centres = torch.arange(64) + 0.5

    def box_mask(margin: float) -> torch.Tensor:
        across = (centres > x1 - margin) & (centres < x2 + margin)
        return across[None] & ((centres > y1 - margin) & (centres < y2 + margin))[:, None]

    assert box_mask(-1).sum() > 50  # at least a part of the box is seen
    assert bool(is_red[box_mask(-1)].all()), "the box holds what is not the rectangle"
    assert not bool(is_red[~box_mask(1)].any()), "the rectangle reaches out of its box"
