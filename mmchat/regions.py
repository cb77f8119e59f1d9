"""Regions as text and back: one invertible geometry, and the coordinate dialects of the field.

A region is kept in original pixels and becomes text last, because its text depends on what the preprocessing did to
the picture. Formats: Shikra (arXiv 2306.15195) three decimals of the padded square; Qwen-VL, InternVL and Ferret
integers 0-1000; Qwen2.5-VL pixels of the resized picture; PaliGemma <locNNNN> in y, x order; Molmo percent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmchat.conversation import Region

Dialect = Literal["shikra", "norm1000", "pixels", "loc", "percent"]
Frame = Literal["original", "padded_square"]


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


@dataclass(frozen=True)
class RegionFormat:
    """How coordinates are written: a dialect, and the frame that the normalised dialects divide by.

    `padded_square` is Shikra's: the picture is centred in a square of its longer side. `pixels` ignores the frame: it
    counts pixels of the encoder's input.
    """

    dialect: Dialect = "shikra"
    frame: Frame = "padded_square"

    def render(self, region: Region, geometry: Geometry) -> str:
        """The text of a box or point. Raises ValueError for a tube: tubes have a format of their own."""
        if region.box is not None:
            points = [(region.box[0], region.box[1]), (region.box[2], region.box[3])]
        elif region.point is not None:
            points = [region.point]
        else:
            raise ValueError("a tube cannot be written as one box or point")
        numbers = [self._number(*self._project(x, y, geometry)) for x, y in points]
        if self.dialect == "loc":
            return "".join(y + x for x, y in numbers)
        return "[" + ",".join(value for pair in numbers for value in pair) + "]"

    def parse(self, text: str, geometry: Geometry, media: int = 0) -> list[Region]:
        """Every box and point in `text`, in reading order and original pixels; an empty list where none parses.

        Brackets with another count of numbers than two or four are skipped: half a box is no box.
        """
        regions = []
        for numbers in self._numbers(text):
            if self.dialect == "loc":
                numbers = [numbers[i + 1 - 2 * (i % 2)] for i in range(len(numbers))]  # y, x pairs to x, y
            pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
            points = [self._unproject(x, y, geometry) for x, y in pairs]
            if len(points) == 1:
                regions.append(Region(media, point=points[0]))
            else:
                regions.append(Region(media, box=(*points[0], *points[1])))
        return regions

    @property
    def unit(self) -> float:
        """Size of the last digit, in the unit that is written divided by the full range (pixels: one pixel)."""
        return {"shikra": 1e-3, "norm1000": 1e-3, "pixels": 1.0, "loc": 1 / 1023, "percent": 1e-3}[self.dialect]

    def _square(self, geometry: Geometry) -> tuple[float, float, float, float]:
        """Width, height, left and top padding of the frame in original pixels."""
        if self.frame == "original":
            return geometry.width, geometry.height, 0.0, 0.0
        side = max(geometry.width, geometry.height)
        return side, side, (side - geometry.width) / 2, (side - geometry.height) / 2

    def _project(self, x: float, y: float, geometry: Geometry) -> tuple[float, float]:
        if self.dialect == "pixels":
            return geometry.to_input(x, y)
        width, height, left, top = self._square(geometry)
        return min(max((x + left) / width, 0.0), 1.0), min(max((y + top) / height, 0.0), 1.0)

    def _unproject(self, x: float, y: float, geometry: Geometry) -> tuple[float, float]:
        if self.dialect == "pixels":
            return geometry.to_original(x, y)
        full = {"shikra": 1.0, "norm1000": 1000.0, "loc": 1023.0, "percent": 100.0}[self.dialect]
        width, height, left, top = self._square(geometry)
        return x / full * width - left, y / full * height - top

    def _number(self, x: float, y: float) -> tuple[str, str]:
        match self.dialect:
            case "shikra":
                return f"{x:.3f}", f"{y:.3f}"
            case "norm1000":
                return str(round(x * 1000)), str(round(y * 1000))
            case "pixels":
                return str(round(x)), str(round(y))
            case "loc":
                return f"<loc{round(x * 1023):04d}>", f"<loc{round(y * 1023):04d}>"
            case "percent":
                return f"{x * 100:.1f}", f"{y * 100:.1f}"

    def _numbers(self, text: str) -> Sequence[list[float]]:
        if self.dialect == "loc":
            found = [re.findall(r"<loc(\d{4})>", run) for run in re.findall(r"(?:<loc\d{4}>)+", text)]
        else:
            found = [
                re.split(r"\s*,\s*", inner.strip())
                for inner in re.findall(r"\[(\s*-?\d+(?:\.\d*)?(?:\s*,\s*-?\d+(?:\.\d*)?)*\s*)\]", text)
            ]
        return [[float(number) for number in numbers] for numbers in found if len(numbers) in (2, 4)]
