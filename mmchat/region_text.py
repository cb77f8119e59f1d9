"""Regions inside the texts of other models' data sets, read in the dialect that each family writes.

`split_regions` takes the coordinates and their tags out of a text and leaves its words; `to_region` brings what was
found to original pixels. What only looks like a region (half a box, five numbers, a number beyond the range) stays
text. Sources of the formats: transformers' processors (Kosmos-2, Qwen2-VL), big_vision (PaliGemma), and for the others
the READMEs, data formatters and graders of their own repositories. LLaVA-1.5's mixture is reported to divide some sets
by the padded square and others by the picture (issues 606 and 822 of its repository), so its frame must be said.
GLM-V's tracks in videos are read box by box; their times stay text.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mmchat.conversation import Region
from mmchat.region_marks import NUMBER, NUMBERS
from mmchat.regions import FULL_SCALE, BoxFormat, Frame, Unit, read_box, read_point

TextFrame = Frame | Literal["resized"] | None


@dataclass(frozen=True)
class FoundRegion:
    """A region as a text has it, not yet in pixels.

    Attributes:
        frame: what `unit` is a share of, or counts the pixels of; `resized` is the picture as the other model's resize
            made it; None where the dialect leaves it open, so that whoever reads the data must say it.
        step: the size of the last digit that was written, in `unit`.
    """

    kind: Literal["box", "point"]
    numbers: tuple[float, ...]
    box_format: BoxFormat
    unit: Unit
    frame: TextFrame
    step: float
    label: str | None = None


def split_regions(text: str, dialect: str) -> list[str | FoundRegion]:
    """The text in order, cut where regions of `dialect` stand in it. No part is empty.

    The words that name a region stay text and are its label as well. Raises ValueError for an unknown dialect.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"found region dialect {dialect!r}; wanted one of {', '.join(DIALECTS)}")
    parts: list[str | FoundRegion] = []
    end = 0
    for match in re.finditer(DIALECTS[dialect].pattern, text):
        if found := _found(match, DIALECTS[dialect]):
            said = match.groupdict().get("said") or ""
            # The tags that kept words and coordinates apart are gone.
            blank = " " if said and not said[-1].isspace() else ""
            parts += [text[end : match.start()] + said + blank, *found]
            end = match.end()
    return [part for part in (*parts, text[end:]) if part != ""]


def to_region(
    found: FoundRegion,
    media: int,
    width: int,
    height: int,
    frame: Frame | None = None,
    input_size: tuple[int, int] | None = None,
) -> Region:
    """The region in original pixels of media item `media`; `mmchat.regions.check_region` judges it.

    Args:
        width, height: of the original picture after EXIF rotation.
        frame: for dialects that leave it open (`llava`).
        input_size: width and height that the picture had for the other model (`qwen25_vl`; see `smart_resize`).
    Raises ValueError: a frame or an input size that is needed and was not given.
    """
    numbers, divides_by = found.numbers, found.frame or frame
    if divides_by is None:
        raise ValueError("this dialect does not say what it divides by; wanted frame: original or padded_square")
    if divides_by == "resized":
        if input_size is None:
            raise ValueError("this dialect counts pixels of the resized picture; wanted input_size, as of smart_resize")
        numbers = tuple(n * (width, height)[i % 2] / input_size[i % 2] for i, n in enumerate(numbers))
        divides_by = "original"
    values: tuple[float, ...]
    if found.kind == "point":
        values = read_point(numbers, found.unit, width, height, divides_by)
    else:
        values = read_box(numbers, found.box_format, found.unit, width, height, divides_by)
    if divides_by == "padded_square":
        # An edge of the picture lies inside the square, so that rounding may have put it into the padding.
        slack = found.step / 2 / FULL_SCALE.get(found.unit, 1.0) * max(width, height) + 1e-6
        values = tuple(_snap(value, (width, height)[i % 2], slack) for i, value in enumerate(values))
    if found.kind == "point":
        return Region(media, point=(values[0], values[1]), label=found.label)
    return Region(media, box=(values[0], values[1], values[2], values[3]), label=found.label)


def _snap(value: float, far: int, slack: float) -> float:
    """Onto the picture's edge where it lies behind it by no more than `slack`."""
    return min(max(value, 0.0), float(far)) if -slack <= value <= far + slack else value


def smart_resize(
    width: int, height: int, factor: int = 28, min_pixels: int = 4 * 28 * 28, max_pixels: int = 16384 * 28 * 28
) -> tuple[int, int]:
    """Width and height to which Qwen2-VL and Qwen2.5-VL resize a picture (qwen_vl_utils, transformers).

    Sides are rounded to multiples of `factor`, then scaled to lie within the numbers of pixels. The defaults are
    qwen_vl_utils'; many runs lower `max_pixels`, and coordinates only fit with the value their data was made with.
    Raises ValueError for sides whose ratio is above 200, which the models refuse.
    """
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"found {width} x {height} pixels; wanted an aspect of 200 at most")
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new_width, new_height = (max(factor, math.floor(n / shrink / factor) * factor) for n in (width, height))
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        new_width, new_height = (math.ceil(n * grow / factor) * factor for n in (width, height))
    return new_width, new_height


@dataclass(frozen=True)
class TextDialect:
    """How one family writes regions.

    Attributes:
        pattern: one mark-up. Its groups: `body`, the coordinates of one or several regions; `said`, words inside the
            mark-up, which stay text; `label`, what the regions are called.
        unit, box_format, frame: as those of FoundRegion.
        number: one number in the body, in a group.
        separator: what stands between two regions of a body.
        convert: makes the numbers of `unit` out of those written.
    """

    pattern: str
    unit: Unit = "norm1000"
    box_format: BoxFormat = "xyxy"
    frame: TextFrame = "original"
    number: str = f"({NUMBER})"
    separator: str = ";"
    convert: Callable[[list[float]], list[float]] | None = None


def _found(match: re.Match[str], dialect: TextDialect) -> list[FoundRegion]:
    """The regions of one mark-up; none where one of them is none."""
    label = (match.groupdict().get("label") or "").strip() or None
    found = []
    for chunk in re.split(dialect.separator, match["body"]):
        written: list[str] = re.findall(dialect.number, chunk)
        numbers = [float(number) for number in written]
        if dialect.convert:
            numbers = dialect.convert(numbers)
        full = FULL_SCALE.get(dialect.unit, sys.float_info.max)
        if len(numbers) not in (2, 4) or not all(0 <= number <= full for number in numbers):
            return []
        kind: Literal["box", "point"] = "box" if len(numbers) == 4 else "point"
        step = 10.0 ** -max(len(number.partition(".")[2]) for number in written)
        found.append(FoundRegion(kind, tuple(numbers), dialect.box_format, dialect.unit, dialect.frame, step, label))
    return found


def _patches(indices: list[float]) -> list[float]:
    """Kosmos-2: upper left and lower right cell of a grid of 32 x 32, as 0-1 corners.

    A corner is the centre of its cell; where both cells lie in one row or column, their outer edges.
    """
    (top, left), (bottom, right) = (divmod(int(index), 32) for index in indices)
    near, far = (0.0, 1.0) if top == bottom or left == right else (0.5, 0.5)
    return [(left + near) / 32, (top + near) / 32, (right + far) / 32, (bottom + far) / 32]


_LABEL = r"(?P<said>(?P<label>[^<]*))"
_BRACKETS = rf"\[(?P<body>{NUMBERS})\]"
_PATCHES = r"<patch_index_\d{4}><patch_index_\d{4}>"
_SEVERAL = "</delimiter_of_multi_objects/>"
_PAIRS = rf"\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)(?:\s*,\s*\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\))?\s*"
_BINS = r"(?:\s*<bin_\d{1,4}>)"
# A member of a JSON object up to its array: the key says how many numbers there must be.
_JSON = (
    r'(?P<said>\{(?:(?=[^{}]*"label"\s*:\s*"(?P<label>(?:[^"\\]|\\.)*)")|)[^{}]*'
    r'"(?:bbox_2d"\s*:\s*(?=\[(?:[^],]*,){3}[^],]*\])|point_2d"\s*:\s*(?=\[[^],]*,[^],]*\])))'
)
_OPEN, _CLOSE = r"[\[({<]", r"[\])}>]"  # GLM-V: the style of brackets may vary
_NEXT = rf"{_CLOSE}\s*(?:[,;]\s*)?{_OPEN}"
_BOXES = rf"{_OPEN}{NUMBERS}(?:{_NEXT}{NUMBERS})*{_CLOSE}"

DIALECTS: dict[str, TextDialect] = {
    "kosmos2": TextDialect(
        rf"(?:<phrase>{_LABEL}</phrase>)?<object>(?P<body>{_PATCHES}(?:{_SEVERAL}{_PATCHES})*)</object>",
        unit="norm1",
        number=r"patch_index_(\d{4})",
        separator=_SEVERAL,
        convert=_patches,
    ),
    "qwen_vl": TextDialect(
        rf"(?:<ref>{_LABEL}</ref>)?<box>(?P<body>{_PAIRS}(?:</box>\s*<box>{_PAIRS})*)</box>",
        separator=r"</box>\s*<box>",
    ),
    "qwen2_vl": TextDialect(
        rf"(?:<\|object_ref_start\|>{_LABEL}<\|object_ref_end\|>)?"
        rf"<\|box_start\|>(?P<body>{_PAIRS}(?:<\|box_end\|>\s*<\|box_start\|>{_PAIRS})*)<\|box_end\|>",
        separator=r"<\|box_end\|>\s*<\|box_start\|>",
    ),
    "qwen25_vl": TextDialect(_JSON + _BRACKETS, unit="px", frame="resized"),
    "qwen3_vl": TextDialect(_JSON + _BRACKETS),
    "internvl": TextDialect(
        rf"(?:<ref>{_LABEL}</ref>\s*)?<box>\s*\[?\s*\[(?P<body>{NUMBERS}(?:\]\s*,\s*\[{NUMBERS})*)\]\s*\]?\s*</box>",
        separator=r"\]\s*,\s*\[",
    ),
    "ferret": TextDialect(_BRACKETS),
    "cogvlm": TextDialect(rf"\[{_BRACKETS}\]"),
    "minigpt_v2": TextDialect(
        rf"(?:<p>{_LABEL}</p>\s*)?(?P<body>\{{(?:<\d{{1,3}}>){{4}}\}}(?:<delim>\{{(?:<\d{{1,3}}>){{4}}\}})*)",
        unit="norm100",
        number=r"<(\d+)>",
        separator="<delim>",
    ),
    "paligemma": TextDialect(
        r"(?<!<loc\d{4}>)(?P<body>(?:<loc\d{4}>){4})(?!<loc)(?=\s*(?P<label>[^;<]*))",
        unit="norm1024",
        box_format="yxyx",
        number=r"<loc(\d{4})>",
    ),
    "molmo": TextDialect(
        rf'<points?\s+(?P<body>(?:x\d*="\s*{NUMBER}"\s+y\d*="\s*{NUMBER}"\s*)+)'
        r'(?:alt="(?P<label>[^"]*)"\s*)?>(?P<said>[^<]*)</points?>',
        unit="norm100",
        number=rf'="\s*({NUMBER})"',
        separator=r"\s+(?=x)",
    ),
    "glm_v": TextDialect(
        rf"(?:<\|begin_of_box\|>\s*|{_JSON}|(?=\[\[))(?P<body>{_OPEN}\s*{_BOXES}\s*{_CLOSE}|{_BOXES})(?:\s*<\|end_of_box\|>)?",
        separator=rf"{_NEXT}|;",
    ),
    "llava": TextDialect(rf"(?=\[[^][]*\.){_BRACKETS}", unit="norm1", frame=None),
    "shikra": TextDialect(rf"(?=\[[^][]*\.){_BRACKETS}", unit="norm1", frame="padded_square"),
    "shikra_tokens": TextDialect(
        rf"(?P<body><b_st>{_BINS}{{4}}(?:<b_sep>{_BINS}{{4}})*<b_ed>|<p_st>{_BINS}{{2}}(?:<p_sep>{_BINS}{{2}})*<p_ed>)",
        frame="padded_square",
        number=r"<bin_(\d+)>",
        separator="<[bp]_sep>",
    ),
}
