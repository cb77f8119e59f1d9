"""Where a text looks as if it named regions: numbers of pictures, times, boxes, points and tubes, not yet judged.

A mark is `[x1,y1,x2,y2]` or `[x,y]` (in the dialect `loc` four or two of `<locNNNN>`), perhaps several in one bracket
with semicolons between them. `@1.5s` in front says when; a tube is timed boxes in braces, `{1.0s[...];1.5s[...]}`; `#2`
before all of it says in which picture. `mmchat.regions` gives them their meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

NUMBER = r"-?\d+(?:\.\d*)?"
# Numbers of one or several regions: commas inside a region, semicolons between regions (Shikra's form).
NUMBERS = rf"\s*{NUMBER}(?:\s*[,;]\s*{NUMBER})*\s*"

# The number of a region's picture. ASCII: int() reads every script's digits, but only these are ever written.
WHICH = r"(?:#([0-9]{1,3}))?"

# When a region is there: what looks like a time before a mark, and what is one.
_WHEN = r"(?:@([0-9][0-9.]*s?))?"
_SECONDS = r"([0-9]+(?:\.[0-9]+)?)s"
# Eleven days. What says more is no time: its frames could not be counted.
MAX_TIME_S = 1e6
# What looks like a tube: a brace, a time and the beginning of a box, up to where no part of a tube follows.
_TUBE = r"\{(?=\s*@?[0-9][0-9.]*s?\s*(?:\[|<l)|\s*@?[0-9][0-9.]*s\Z)([\s0-9.,;:s@\[\]<>loc-]*)(\}?)"


def number_groups(text: str) -> list[list[float]]:
    """The numbers of what matches NUMBERS, one list for each region."""
    return [[float(number) for number in group.split(",")] for group in text.split(";")]


@dataclass(frozen=True)
class Mark:
    """Something that looks like regions, text[start:end].

    Attributes:
        which: the number of its picture, where it has one.
        groups: the numbers of each region, or of each box of a tube; none where the mark is malformed.
        times_s: of each box of a tube; of other marks one time, or none.
    """

    start: int
    end: int
    which: str | None
    groups: list[list[float]]
    times_s: list[float]
    is_tube: bool = False


def marks(text: str, is_loc: bool) -> Iterator[Mark]:
    """Each mark in order."""
    # In loc also "<loc0307><loc08": a number that is cut off makes what stands before it half a box, not a point.
    place = r"((?:<loc[0-9]+>?)+(?:<(?:l(?:oc?)?)?$)?)" if is_loc else r"\[([\s\d.,;-]+)(\]?)"
    for match in re.finditer(rf"{WHICH}(?:{_TUBE}|{_WHEN}{place})", text):
        which, body, closing, when = match.group(1, 2, 3, 4)
        if body is not None:
            yield _tube_mark(match, which, body if closing else "", is_loc)
            continue
        if is_loc:
            groups = _loc_groups(match[5])
        else:
            is_cut = not match[6] and match.end() < len(text)  # "[0.1,0.2 and" is half a box, "[3 cups" is none
            if not re.search(r"\d\s*," if is_cut else r"\d", match[5]):
                continue
            is_whole = match[6] and re.fullmatch(NUMBERS, match[5])
            groups = number_groups(match[5]) if is_whole else []
        time_s = None if when is None else _time(when)
        is_good = when is None or time_s is not None
        yield Mark(match.start(), match.end(), which, groups if is_good else [], [] if time_s is None else [time_s])


def _time(text: str) -> float | None:
    """Seconds of "1.5s"; None where it is no time."""
    found = re.fullmatch(_SECONDS, text)
    time_s = float(found[1]) if found else math.inf
    return time_s if time_s <= MAX_TIME_S else None


def _tube_mark(match: re.Match[str], which: str | None, body: str, is_loc: bool) -> Mark:
    """A tube from what stands between its braces."""
    place = r"((?:<loc[0-9]{4}>)+)" if is_loc else r"\[([^\[\];]+)\]"
    times_s: list[float] = []
    groups: list[list[float]] = []
    for chunk in body.split(";"):
        box = re.fullmatch(rf"\s*@?([0-9.]+s)\s*{place}\s*", chunk)
        time_s = None if box is None else _time(box[1])
        if box is None or time_s is None or not (is_loc or re.fullmatch(NUMBERS, box[2])):
            return Mark(match.start(), match.end(), which, [], [], is_tube=True)
        times_s.append(time_s)
        groups += _loc_groups(box[2]) if is_loc else number_groups(box[2])
    return Mark(match.start(), match.end(), which, groups, times_s, is_tube=True)


def _loc_groups(text: str) -> list[list[float]]:
    """The numbers of one region; none where the text is malformed."""
    is_whole = re.fullmatch(r"(?:<loc[0-9]{4}>)+", text)
    return [[float(number) for number in re.findall(r"[0-9]+", text)]] if is_whole else []
