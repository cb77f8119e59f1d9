"""Boxes in answers, compared with the right ones in original pixels.

An answer is read in the default dialect of a run, Shikra's decimals of the padded square, with the picture's size
from the shard's header.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmchat.conversation import Record
from mmchat.regions import Geometry, RegionFormat

Box = tuple[float, float, float, float]


def parsed_boxes(answer: str, record: Record) -> list[Box]:
    """The boxes that an answer names, in pixels of the record's picture; none where its size is not known."""
    header = record.media[0].header if record.media else None
    if header is None or header.width is None or header.height is None:
        return []
    identity = Geometry(header.width, header.height, header.width, header.height, 1.0, 1.0, 0.0, 0.0)
    return [region.box for region in RegionFormat().parse(answer, identity).regions if region.box is not None]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def num_matched(found: Sequence[Box], wanted: Sequence[Box]) -> int:
    """How many pairs of a found and a wanted box overlap by an IoU above 0.5, each box in one pair at most.

    The nearest are paired first.
    """
    pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted)), reverse=True)
    taken: tuple[set[int], set[int]] = set(), set()
    for overlap, i, j in pairs:
        if overlap > 0.5 and i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
    return len(taken[0])
