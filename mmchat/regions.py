"""Regions as text and back: one invertible geometry, the units of the field, and the dialects a model here speaks.

A region is kept in original pixels and becomes text last, because its text depends on what the preprocessing did to
the picture. Formats: Shikra (arXiv 2306.15195) three decimals of the padded square; Qwen-VL, InternVL and Ferret
integers 0-1000; Qwen2.5-VL pixels of the resized picture; PaliGemma <locNNNN> in y, x order; Molmo percent.
How other models' data sets write regions in their texts is read by `mmchat.region_text`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from mmchat.conversation import Region
from mmchat.errors import SampleError

Dialect = Literal["shikra", "norm1000", "pixels", "loc", "percent"]
Frame = Literal["original", "padded_square"]
BoxFormat = Literal["xyxy", "xywh", "cxcywh", "yxyx"]
Unit = Literal["px", "norm1", "norm100", "norm1000", "norm1024"]

# What the far side of the frame is in each unit. PaliGemma's 1024 places are round(1023 * share) (big_vision).
FULL_SCALE: dict[Unit, float] = {"norm1": 1.0, "norm100": 100.0, "norm1000": 1000.0, "norm1024": 1023.0}

# Unit and number of decimals in which each dialect writes.
WRITTEN: dict[Dialect, tuple[Unit, int]] = {
    "shikra": ("norm1", 3),
    "norm1000": ("norm1000", 0),
    "pixels": ("px", 0),
    "loc": ("norm1024", 0),
    "percent": ("norm100", 1),
}

NUMBER = r"-?\d+(?:\.\d*)?"
# Numbers of one or several regions: commas inside a region, semicolons between regions (Shikra's form).
NUMBERS = rf"\s*{NUMBER}(?:\s*[,;]\s*{NUMBER})*\s*"

# The number of a region's picture. ASCII: int() reads every script's digits, but only these are ever written.
WHICH = r"(?:#([0-9]{1,3}))?"

# How far a region may reach past its picture: annotations count the last pixel or the line behind it.
TOLERANCE_PX = 1.0


@dataclass(frozen=True)
class Geometry:
    """An invertible map from original pixels (after EXIF) to encoder input: input = original * scale + offset."""

    width: int
    height: int
    input_width: int
    input_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale_x + self.offset_x, y * self.scale_y + self.offset_y

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        return (x - self.offset_x) / self.scale_x, (y - self.offset_y) / self.scale_y


def check_region(region: Region, width: int, height: int) -> Region:
    """The region within a picture of this size; what reaches past it by a pixel at most is clamped.

    Raises SampleError: "region not finite", "inverted region", "region outside the picture" or "empty region".
    """
    if region.box is not None:
        return replace(region, box=_inside(region.box, region, width, height))
    if region.point is not None:
        x, y, _, _ = _inside((*region.point, *region.point), region, width, height)
        return replace(region, point=(x, y))
    tube = []
    for time_s, *box in region.tube or ():
        if not math.isfinite(time_s):
            raise SampleError("region not finite", f"found {_shown(region)}; wanted times in seconds")
        tube.append((time_s, *_inside((box[0], box[1], box[2], box[3]), region, width, height)))
    if not tube:
        raise SampleError("empty region", "found a tube without boxes; wanted one at least")
    return replace(region, tube=tuple(tube))


def _inside(
    box: tuple[float, float, float, float], region: Region, width: int, height: int
) -> tuple[float, float, float, float]:
    found = f"found {_shown(region)} in a picture of {width} x {height} pixels"
    if not all(map(math.isfinite, box)):
        raise SampleError("region not finite", f"{found}; wanted numbers")
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        raise SampleError("inverted region", f"{found}; wanted x1, y1, x2, y2. Is it x, y, width, height or y first?")
    if min(x1, y1) < -TOLERANCE_PX or x2 > width + TOLERANCE_PX or y2 > height + TOLERANCE_PX:
        raise SampleError(
            "region outside the picture",
            f"{found}; wanted original pixels after EXIF rotation. Is it of another unit, format or picture?",
        )
    x1, x2 = (min(max(x, 0.0), float(width)) for x in (x1, x2))
    y1, y2 = (min(max(y, 0.0), float(height)) for y in (y1, y2))
    if region.point is None and (x1 == x2 or y1 == y2):
        if box[0] < box[2] and box[1] < box[3]:
            raise SampleError("region outside the picture", f"{found}; the box lies beside the picture")
        raise SampleError("empty region", f"{found}; wanted a box with an area, or a point")
    return x1, y1, x2, y2


def _shown(region: Region) -> str:
    kind = "box" if region.box is not None else "point" if region.point is not None else "tube"
    return f"{kind} {region.box or region.point or region.tube}"


def read_box(
    values: Sequence[float],
    box_format: BoxFormat = "xyxy",
    unit: Unit = "px",
    width: int | None = None,
    height: int | None = None,
    frame: Frame = "original",
) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) in original pixels of a box in any of the field's formats; `check_region` judges it.

    Args:
        unit: pixels, or shares of the frame's sides in 0-1, 0-100, 0-1000 or PaliGemma's 0-1023.
        width, height: of the original picture; needed for everything but pixels of the original frame.
        frame: the picture itself, or Shikra's square: the picture in the middle of a square of its longer side.
    Raises ValueError: another count of numbers, one that is not finite, an unknown format, no size.
    """
    a, b, c, d = _finite(values, 4, "a box")
    match box_format:
        case "xyxy":
            x1, y1, x2, y2 = a, b, c, d
        case "xywh":
            x1, y1, x2, y2 = a, b, a + c, b + d
        case "cxcywh":
            x1, y1, x2, y2 = a - c / 2, b - d / 2, a + c / 2, b + d / 2
        case "yxyx":
            x1, y1, x2, y2 = b, a, d, c
        case _:
            raise ValueError(f"found box format {box_format!r}; wanted one of {', '.join(get_args(BoxFormat))}")
    return *read_point((x1, y1), unit, width, height, frame), *read_point((x2, y2), unit, width, height, frame)


def read_point(
    values: Sequence[float],
    unit: Unit = "px",
    width: int | None = None,
    height: int | None = None,
    frame: Frame = "original",
) -> tuple[float, float]:
    """(x, y) in original pixels; arguments and errors as those of `read_box`."""
    x, y = _finite(values, 2, "a point")
    if unit not in get_args(Unit) or frame not in get_args(Frame):
        raise ValueError(f"found unit {unit!r} and frame {frame!r}; wanted {get_args(Unit)} and {get_args(Frame)}")
    if unit == "px" and frame == "original":
        return x, y
    if not width or not height:
        raise ValueError(f"found no picture size; wanted width and height to read {unit} of the {frame} frame")
    full_width, full_height, left, top = _frame(width, height, frame)
    if unit != "px":
        x, y = x / FULL_SCALE[unit] * full_width, y / FULL_SCALE[unit] * full_height
    return x - left, y - top


def _finite(values: Sequence[float], count: int, name: str) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"found {list(values)}; wanted {count} finite numbers for {name}")
    return numbers


def _frame(width: int, height: int, frame: Frame) -> tuple[int, int, int, int]:
    """Width, height, left and top padding of the frame in original pixels. The square pads by whole pixels."""
    if frame == "original":
        return width, height, 0, 0
    side = max(width, height)
    return side, side, (side - width) // 2, (side - height) // 2


def number_groups(text: str) -> list[list[float]]:
    """The numbers of what matches NUMBERS, one list for each region."""
    return [[float(number) for number in group.split(",")] for group in text.split(";")]


@dataclass(frozen=True)
class ParsedRegions:
    """What an answer held: its regions in reading order, and how many more marks looked like regions but were none.

    parts: the text with its regions in place; marks that failed stay in it as text.
    """

    regions: list[Region]
    num_failed: int
    parts: list[str | Region] = field(default_factory=list)


@dataclass(frozen=True)
class RegionFormat:
    """How coordinates are written: a dialect, the frame that the normalised dialects divide by, and how many decimals
    are written where that is not the dialect's own number; `loc` has whole numbers only.

    `padded_square` is Shikra's: the picture is centred in a square of its longer side. `pixels` ignores the frame: it
    counts pixels of the encoder's input. Where several pictures are shown, a mark starts with the number of its
    picture, from one: `#2[0.100,0.250,0.500,0.750]`.
    """

    dialect: Dialect = "shikra"
    frame: Frame = "padded_square"
    decimals: int | None = None

    def render(self, region: Region, geometry: Geometry, number: int | None = None) -> str:
        """The text of a box or point, as `check_region` left it. Raises SampleError for a tube, which has no text.

        number: of the region's picture, from one; None where only one is shown.
        """
        if region.box is not None:
            points = [(region.box[0], region.box[1]), (region.box[2], region.box[3])]
        elif region.point is not None:
            points = [region.point]
        else:
            raise SampleError("region without a text", "found a tube; wanted a box or a point. Take one of its boxes")
        pairs = [self._written(x, y, geometry) for x, y in points]
        which = "" if number is None else f"#{number}"
        if self.dialect == "loc":
            return which + "".join(f"<loc{round(y):04d}><loc{round(x):04d}>" for x, y in pairs)
        return which + "[" + ",".join(f"{value:z.{self._decimals}f}" for pair in pairs for value in pair) + "]"

    def parse(self, text: str, geometries: Sequence[Geometry | None]) -> ParsedRegions:
        """Every box and point in `text`, in original pixels; also Shikra's several in one bracket, `[..;..]`.

        A mark is counted as failed where it has another count of numbers than two or four a region, is beyond the
        dialect's range, has its corners swapped, or is cut off by the end of the text: half a box is no box. So is one
        whose picture is not there, or that names none of several.

        Args:
            geometries: of the pictures and videos that are shown, in order; None for one whose size is not known.
                `Region.media` counts through them, from zero.
        """
        parts: list[str | Region] = []
        num_failed = rest = 0
        for match, which, groups in _marks(text, self.dialect == "loc"):
            media = (int(which) if which else 1) - 1
            is_named = bool(which) or len(geometries) == 1
            geometry = geometries[media] if is_named and 0 <= media < len(geometries) else None
            found = [self._region(numbers, geometry, media) for numbers in groups] if geometry is not None else []
            regions = [region for region in found if region is not None]
            if regions and len(regions) == len(found):
                parts += [*([text[rest : match.start()]] if match.start() > rest else []), *regions]
                rest = match.end()
            else:
                num_failed += 1
        parts += [text[rest:]] if rest < len(text) else []
        return ParsedRegions([part for part in parts if isinstance(part, Region)], num_failed, parts)

    def unit(self, geometry: Geometry) -> tuple[float, float]:
        """Size of the last digit across and down, in original pixels; text is at most half of it off."""
        digit = 10.0**-self._decimals
        if self.dialect == "pixels":
            return digit / geometry.scale_x, digit / geometry.scale_y
        width, height, _, _ = _frame(geometry.width, geometry.height, self.frame)
        share = digit / FULL_SCALE[WRITTEN[self.dialect][0]]
        return width * share, height * share

    @property
    def _decimals(self) -> int:
        return WRITTEN[self.dialect][1] if self.decimals is None or self.dialect == "loc" else self.decimals

    def _written(self, x: float, y: float, geometry: Geometry) -> tuple[float, float]:
        """The numbers that are written for a point in original pixels, before they are rounded."""
        if self.dialect == "pixels":
            return geometry.to_input(x, y)
        width, height, left, top = _frame(geometry.width, geometry.height, self.frame)
        full = FULL_SCALE[WRITTEN[self.dialect][0]]
        return min(max((x + left) / width, 0.0), 1.0) * full, min(max((y + top) / height, 0.0), 1.0) * full

    def _region(self, numbers: list[float], geometry: Geometry, media: int) -> Region | None:
        """The region of these numbers; None where they are none."""
        full = FULL_SCALE.get(WRITTEN[self.dialect][0])
        in_range = all(map(math.isfinite, numbers)) if full is None else all(0 <= number <= full for number in numbers)
        if len(numbers) not in (2, 4) or not in_range:
            return None
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        if self.dialect == "pixels":
            points = [geometry.to_original(x, y) for x, y in pairs]
        else:
            pairs = [(x, y) for y, x in pairs] if self.dialect == "loc" else pairs
            place = (WRITTEN[self.dialect][0], geometry.width, geometry.height, self.frame)
            points = [read_point(pair, *place) for pair in pairs]
        if len(points) == 1:
            return Region(media, point=points[0])
        (x1, y1), (x2, y2) = points
        return Region(media, box=(x1, y1, x2, y2)) if _in_order(x1, y1, x2, y2) else None


def in_place(text: str, regions: Sequence[Region], num_failed: int) -> list[str | Region] | None:
    """The text with the regions in place that were read from it, whatever the dialect; marks that failed stay in it.

    None where it is not clear which of the marks failed.
    """
    parts: list[str | Region] = []
    left = list(regions)
    rest = failed = 0
    for match, _, groups in _marks(text, is_loc="<loc" in text):
        if groups and all(len(numbers) == 2 or (len(numbers) == 4 and _in_order(*numbers)) for numbers in groups):
            parts += [text[rest : match.start()], *left[: len(groups)]]
            del left[: len(groups)]
            rest = match.end()
        else:
            failed += 1
    if left or failed != num_failed or sum(isinstance(part, Region) for part in parts) != len(regions):
        return None
    return [part for part in (*parts, text[rest:]) if part]


def _in_order(x1: float, y1: float, x2: float, y2: float) -> bool:
    """Whether these are corners of a box; so they are with x and y exchanged."""
    return x1 <= x2 and y1 <= y2


def _marks(text: str, is_loc: bool) -> Iterator[tuple[re.Match[str], str | None, list[list[float]]]]:
    """Each mark that looks like a region, its picture's number, and its numbers; none where it is malformed."""
    if is_loc:
        # Also "<loc0307><loc08": a number that is cut off makes what stands before it half a box, not a point.
        for match in re.finditer(rf"{WHICH}((?:<loc[0-9]+>?)+(?:<(?:l(?:oc?)?)?$)?)", text):
            numbers = [float(number) for number in re.findall(r"[0-9]+", match[2])]
            yield match, match[1], [numbers] if re.fullmatch(r"(?:<loc[0-9]{4}>)+", match[2]) else []
        return
    for match in re.finditer(rf"{WHICH}\[([\s\d.,;-]+)(\]?)", text):
        is_cut = not match[3] and match.end() < len(text)  # "[0.1,0.2 and" is half a box, "[3 cups" is none
        if re.search(r"\d\s*," if is_cut else r"\d", match[2]):
            is_whole = match[3] and re.fullmatch(NUMBERS, match[2])
            yield match, match[1], number_groups(match[2]) if is_whole else []
