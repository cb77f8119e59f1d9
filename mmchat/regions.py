"""Regions as text and back: one invertible geometry, the units of the field, and the dialects a model here speaks.

A region is kept in original pixels and becomes text last, because its text depends on what the preprocessing did to
the picture. Formats: Shikra (arXiv 2306.15195) three decimals of the padded square; Qwen-VL, InternVL and Ferret
integers 0-1000; Qwen2.5-VL pixels of the resized picture; PaliGemma <locNNNN> in y, x order; Molmo percent.
None of them says when; the times of places in videos are this project's own notation (see `RegionFormat`).
How other models' data sets write regions in their texts is read by `mmchat.region_text`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

from mmchat.conversation import Box, Region
from mmchat.errors import SampleError
from mmchat.region_marks import MAX_TIME_S, Mark, marks

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

# How far a region may reach past its picture: annotations count the last pixel or the line behind it.
TOLERANCE_PX = 1.0
# A time may lie so far behind the end that a video's header tells.
END_SLACK_S = 0.5


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

    def to_shares(self, box: Box) -> Box:
        """A box in original pixels as shares of the encoder's input, of what is not cropped away: x0 >= x1 or y0 >= y1
        where nothing is left."""
        (x0, y0), (x1, y1) = self.to_input(*box[:2]), self.to_input(*box[2:])
        shares = (x0 / self.input_width, y0 / self.input_height, x1 / self.input_width, y1 / self.input_height)
        x0, y0, x1, y1 = (min(max(share, 0.0), 1.0) for share in shares)
        return x0, y0, x1, y1


def check_region(region: Region, width: int, height: int, duration_s: float | None = None) -> Region:
    """The region within a picture of this size; what reaches past it by a pixel at most is clamped.

    Raises SampleError: "region not finite", "inverted region", "region outside the picture", "empty region", or
    "impossible time" for one before the first frame, for a tube whose times do not rise, and as `check_end` does.
    """
    if region.time_s is not None:
        _check_times([region.time_s], region)
        check_end([region.time_s], duration_s)
    if region.box is not None:
        return replace(region, box=_inside(region.box, region, width, height))
    if region.point is not None:
        x, y, _, _ = _inside((*region.point, *region.point), region, width, height)
        return replace(region, point=(x, y))
    if not region.tube:
        raise SampleError("empty region", "found a tube without boxes; wanted one at least")
    times_s = [time_s for time_s, *_ in region.tube]
    _check_times(times_s, region)
    check_end(times_s, duration_s)
    tube = [(time_s, *_inside((a, b, c, d), region, width, height)) for time_s, a, b, c, d in region.tube]
    return replace(region, tube=tuple(tube))


def check_end(times_s: Sequence[float], duration_s: float | None) -> None:
    """Refuses rising times that cannot be of a video of this length; None where that is not known.

    Headers and annotations round, so a little behind the end is let pass: beginning half a second behind it, and ending
    at twice the length.

    Raises SampleError: "impossible time".
    """
    if duration_s is None or (times_s[0] <= duration_s + END_SLACK_S and times_s[-1] <= 2 * duration_s + END_SLACK_S):
        return
    raise SampleError(
        "impossible time",
        f"found {times_s[0]:g} to {times_s[-1]:g} s in a video of {duration_s:g} s; wanted seconds from its first "
        "frame on. Are they numbers of frames, or of another clip?",
    )


def _check_times(times_s: Sequence[float], region: Region) -> None:
    if not all(map(math.isfinite, times_s)):
        raise SampleError("region not finite", f"found {_shown(region)}; wanted times in seconds")
    if times_s[0] < 0 or times_s[-1] > MAX_TIME_S or not _rises(times_s):
        raise SampleError(
            "impossible time",
            f"found {_shown(region)} at {', '.join(f'{time_s:g}' for time_s in times_s[:8])} s; wanted seconds from "
            "the first frame on, rising within a tube",
        )


def _inside(box: Box, region: Region, width: int, height: int) -> Box:
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


def _rises(times_s: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(times_s))


def _shown(region: Region) -> str:
    kind = "box" if region.box is not None else "point" if region.point is not None else "tube"
    return f"{kind} {region.box or region.point or region.tube}"[:300]


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

    A place at a time has the seconds in front, behind an @ that keeps them apart from that number:
    `@1.5s[0.100,0.250,0.500,0.750]`, `#2@1.5s[...]`. A tube is its boxes in braces, each behind its time:
    `{0.5s[...];1.0s[...];1.5s[...]}`; the closing brace tells a whole one from one that was cut off. In every dialect
    it is only the box that changes.

    Attributes:
        time_decimals: of seconds; a time is read back within half of its last digit.
        tube_boxes: how many boxes of a tube are written at most, see `sampled_tube`.
    """

    dialect: Dialect = "shikra"
    frame: Frame = "padded_square"
    decimals: int | None = None
    time_decimals: int = 1
    tube_boxes: int = 8

    def render(self, region: Region, geometry: Geometry, number: int | None = None) -> str:
        """The text of a region, as `check_region` left it.

        number: of the region's picture, from one; None where only one is shown.
        """
        which = "" if number is None else f"#{number}"
        if region.tube is not None:
            boxes = [
                self.time_text(time_s) + self._place([(a, b), (c, d)], geometry)
                for time_s, a, b, c, d in sampled_tube(region.tube, self.tube_boxes, self.time_decimals)
            ]
            return which + "{" + ";".join(boxes) + "}"
        if region.box is not None:
            points = [(region.box[0], region.box[1]), (region.box[2], region.box[3])]
        else:
            assert region.point is not None, "a region is exactly one of box, point and tube"
            points = [region.point]
        when = "" if region.time_s is None else f"@{self.time_text(region.time_s)}"
        return which + when + self._place(points, geometry)

    def time_text(self, time_s: float) -> str:
        """Seconds as they stand before places and frames: `1.5s`."""
        return f"{time_s:z.{self.time_decimals}f}s"

    def _place(self, points: Sequence[tuple[float, float]], geometry: Geometry) -> str:
        """Coordinates of a point, or of the two corners of a box."""
        pairs = [self._written(x, y, geometry) for x, y in points]
        if self.dialect == "loc":
            return "".join(f"<loc{round(y):04d}><loc{round(x):04d}>" for x, y in pairs)
        return "[" + ",".join(f"{value:z.{self._decimals}f}" for pair in pairs for value in pair) + "]"

    def parse(
        self, text: str, geometries: Sequence[Geometry | None], is_video: Sequence[bool] | None = None
    ) -> ParsedRegions:
        """Every region in `text`, in original pixels; also Shikra's several in one bracket, `[..;..]`.

        A mark is counted as failed where it has another count of numbers than two or four a region, is beyond the
        dialect's range, has its corners swapped, or is cut off by the end of the text: half a box is no box. So is one
        whose picture is not there, or that names none of several; one whose time is no number of seconds, or that has a
        time and lies in a still picture; and a whole tube where one of its boxes fails, its times do not rise or its
        closing brace is missing.

        Args:
            geometries: of the pictures and videos that are shown, in order; None for one whose size is not known.
                `Region.media` counts through them, from zero.
            is_video: which of them are videos; None where times are good in each.
        """
        parts: list[str | Region] = []
        num_failed = rest = 0
        for mark in marks(text, self.dialect == "loc"):
            media = (int(mark.which) if mark.which else 1) - 1
            is_named = bool(mark.which) or len(geometries) == 1
            geometry = geometries[media] if is_named and 0 <= media < len(geometries) else None
            if geometry is not None and mark.times_s and is_video is not None and not is_video[media]:
                geometry = None
            regions = self._regions(mark, geometry, media) if geometry is not None else []
            if regions:
                parts += [*([text[rest : mark.start]] if mark.start > rest else []), *regions]
                rest = mark.end
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

    def _regions(self, mark: Mark, geometry: Geometry, media: int) -> list[Region]:
        """The regions of a mark; none where one of them is none."""
        found = [self._region(numbers, geometry, media) for numbers in mark.groups]
        regions = [region for region in found if region is not None]
        if len(regions) < len(found):
            return []
        if mark.is_tube:
            boxes = [region.box for region in regions if region.box is not None]
            is_whole = len(boxes) == len(regions) and _rises(mark.times_s)
            timed = zip(mark.times_s, boxes, strict=True) if is_whole else ()
            tube = tuple((time_s, *box) for time_s, box in timed)
            return [Region(media, tube=tube)] if tube else []
        return [replace(region, time_s=mark.times_s[0]) for region in regions] if mark.times_s else regions

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


def sampled_tube(
    tube: Sequence[tuple[float, float, float, float, float]], most: int, time_decimals: int
) -> list[tuple[float, float, float, float, float]]:
    """At most `most` boxes of a tube: its first, its last, and those between at equal distances in its list.

    So the tube keeps its extent in time, every box is one that was annotated, and the same tube is always written
    alike. A box whose time would read as that of the box before it is left out.
    """
    if most < 2:
        raise ValueError(f"found tube_boxes {most}; wanted 2 at least, for its first and last box")
    last = len(tube) - 1
    chosen = (
        range(len(tube)) if len(tube) <= most else [(2 * i * last + most - 1) // (2 * (most - 1)) for i in range(most)]
    )
    kept: dict[str, tuple[float, float, float, float, float]] = {}
    for i in chosen:
        kept.setdefault(f"{tube[i][0]:.{time_decimals}f}", tube[i])
    return list(kept.values())


def in_place(text: str, regions: Sequence[Region], num_failed: int) -> list[str | Region] | None:
    """The text with the regions in place that were read from it, whatever the dialect; marks that failed stay in it.

    None where it is not clear which of the marks failed.
    """
    parts: list[str | Region] = []
    left = list(regions)
    rest = failed = 0
    for mark in marks(text, is_loc="<loc" in text):
        lengths = (4,) if mark.is_tube else (2, 4)
        is_region = all(len(numbers) in lengths for numbers in mark.groups) and _rises(mark.times_s)
        if mark.groups and is_region and all(len(numbers) == 2 or _in_order(*numbers) for numbers in mark.groups):
            count = 1 if mark.is_tube else len(mark.groups)
            parts += [text[rest : mark.start], *left[:count]]
            del left[:count]
            rest = mark.end
        else:
            failed += 1
    if left or failed != num_failed or sum(isinstance(part, Region) for part in parts) != len(regions):
        return None
    return [part for part in (*parts, text[rest:]) if part]


def _in_order(x1: float, y1: float, x2: float, y2: float) -> bool:
    """Whether these are corners of a box; so they are with x and y exchanged."""
    return x1 <= x2 and y1 <= y2
