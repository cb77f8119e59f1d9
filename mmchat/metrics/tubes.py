"""Places in time compared: intervals in seconds and tubes in original pixels, by tIoU and vIoU.

tIoU and vIoU are those of VidSTG (arXiv 2001.06891) and HC-STVG (arXiv 2011.05049). There a tube has a box on every
frame of its span. With S_i the frames that both tubes are on, and S_u those that either is on:

    tIoU = |S_i| / |S_u|        vIoU = (sum over S_i of the IoU of the two boxes) / |S_u|

A tube here is a list of boxes at times, so this is how it gets a box on every frame: frames are at k / fps seconds, for
whole k; a tube is on the frames from that nearest to its first time to that nearest to its last one (half a frame
counts up), so always on one at least; between two given boxes each of the four numbers moves evenly (linear
interpolation), and a frame outside of the given times, by rounding, has the nearest given box. Spans that do not touch
have a union without the gap between them. Nothing is rounded but the ends to frames.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from mmchat.metrics.boxes import Box, iou

# (seconds, x1, y1, x2, y2) at rising times
Tube = Sequence[tuple[float, float, float, float, float]]
Interval = tuple[float, float]

FPS = 25.0  # frames a second that tubes are compared on where their set names no other number
VIOU_THRESHOLDS = (0.3, 0.5)  # of HC-STVG
INTERVAL_THRESHOLDS = (0.3, 0.5, 0.7)  # of moment retrieval (Charades-STA, arXiv 1705.02101)


def interval_iou(a: Interval, b: Interval) -> float:
    """tIoU of two intervals (start, end) in seconds: shared seconds over those of either. 0 where one is empty."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    if both <= 0:
        return 0.0
    return both / ((a[1] - a[0]) + (b[1] - b[0]) - both)


def span(tube: Tube) -> Interval:
    """First and last time of a tube in seconds."""
    times_s = [box[0] for box in tube]
    return min(times_s), max(times_s)


def box_at(tube: Tube, time_s: float) -> Box:
    """Where a tube is at a time: between two given boxes evenly on the way, outside of them the nearest one."""
    after = bisect_right([box[0] for box in tube], time_s)
    if after in (0, len(tube)):
        _, x1, y1, x2, y2 = tube[min(after, len(tube) - 1)]
        return x1, y1, x2, y2
    (start, *first), (end, *second) = tube[after - 1], tube[after]
    share = (time_s - start) / (end - start)
    x1, y1, x2, y2 = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return x1, y1, x2, y2


def tube_ious(a: Tube, b: Tube, fps: float = FPS) -> tuple[float, float]:
    """tIoU and vIoU of two tubes of at least one box each, on frames at `fps`; see the module for what they are."""
    (start_a, end_a), (start_b, end_b) = _frames(a, fps), _frames(b, fps)
    shared = range(max(start_a, start_b), min(end_a, end_b) + 1)
    either = (end_a - start_a + 1) + (end_b - start_b + 1) - len(shared)
    overlap = math.fsum(iou(box_at(a, frame / fps), box_at(b, frame / fps)) for frame in shared)
    return len(shared) / either, overlap / either


def _frames(tube: Tube, fps: float) -> tuple[int, int]:
    """First and last frame that a tube is on."""
    start_s, end_s = span(tube)
    return math.floor(start_s * fps + 0.5), math.floor(end_s * fps + 0.5)


def score_tubes(ious: Sequence[tuple[float, float]]) -> dict[str, float]:
    """mean_tiou, mean_viou, and viou_0.3 and viou_0.5, the share of questions with a vIoU strictly above.

    Args:
        ious: tIoU and vIoU of each question; (0, 0) where there is no answer.
    """
    scores = {"mean_tiou": _mean([tiou for tiou, _ in ious]), "mean_viou": _mean([viou for _, viou in ious])}
    return scores | {f"viou_{least}": _mean([float(viou > least) for _, viou in ious]) for least in VIOU_THRESHOLDS}


def score_intervals(ious: Sequence[float]) -> dict[str, float]:
    """mean_interval_iou, and interval_0.3, _0.5 and _0.7, the share of questions with a tIoU strictly above.

    Args:
        ious: tIoU of each question; 0 where there is no answer.
    """
    scores = {"mean_interval_iou": _mean(ious)}
    return scores | {f"interval_{least}": _mean([float(one > least) for one in ious]) for least in INTERVAL_THRESHOLDS}


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("found no answers; wanted at least one to score")
    return math.fsum(values) / len(values)
