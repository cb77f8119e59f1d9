"""tIoU and vIoU: by hand, and against a computation that goes frame by frame."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mmchat.metrics.tubes import box_at, interval_iou, score_intervals, score_tubes, tube_ious

STILL = ((0.0, 0, 0, 10, 10), (1.0, 0, 0, 10, 10))


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ((0, 4), (0, 4), 1.0),
        ((0, 4), (2, 6), 2 / 6),
        ((0, 4), (1, 2), 1 / 4),
        ((0, 2), (2, 4), 0.0),
        ((0, 1), (5, 9), 0.0),
        ((3, 3), (3, 3), 0.0),  # a moment has no length
    ],
)
def test_intervals(a, b, wanted):
    assert interval_iou(a, b) == interval_iou(b, a) == pytest.approx(wanted)


def test_a_box_moves_evenly_between_two_and_stays_outside():
    tube = ((1.0, 0, 0, 10, 10), (2.0, 20, 0, 30, 40), (4.0, 20, 0, 30, 40))
    assert box_at(tube, 1.5) == (10, 0, 20, 25) and box_at(tube, 1.25) == (5, 0, 15, 17.5)
    assert box_at(tube, 2.0) == box_at(tube, 3.3) == (20, 0, 30, 40)
    assert box_at(tube, 0.0) == (0, 0, 10, 10) and box_at(tube, 9.0) == (20, 0, 30, 40)


@pytest.mark.parametrize(
    ("a", "b", "fps", "tiou", "viou"),
    [
        (STILL, STILL, 10, 1.0, 1.0),
        # Frames 0 to 10 and 5 to 15: 6 shared of 16. The boxes are equal, or share a third.
        (STILL, ((0.5, 0, 0, 10, 10), (1.5, 0, 0, 10, 10)), 10, 6 / 16, 6 / 16),
        (STILL, ((0.5, 5, 0, 15, 10), (1.5, 5, 0, 15, 10)), 10, 6 / 16, 6 / 16 / 3),
        # A gap between them is in neither: 11 and 11 frames.
        (STILL, ((5.0, 0, 0, 10, 10), (6.0, 0, 0, 10, 10)), 10, 0.0, 0.0),
        # Of frames 0, 1, 2 the box has moved by 0, 5 and 10 pixels: IoU 1, 1/3 and 0.
        (((0, 0, 0, 10, 10), (2, 10, 0, 20, 10)), ((0, 0, 0, 10, 10), (2, 0, 0, 10, 10)), 1, 1.0, (1 + 1 / 3) / 3),
        # One box is on one frame.
        (((0.5, 0, 0, 10, 10),), STILL, 10, 1 / 11, 1 / 11),
        (((0.52, 0, 0, 10, 10),), ((0.48, 0, 0, 10, 10),), 10, 1.0, 1.0),
        # Half a frame counts up: 0.25 s at 10 a second is frame 3, 0.24 s is frame 2.
        (((0.25, 0, 0, 10, 10),), ((0.34, 0, 0, 10, 10),), 10, 1.0, 1.0),
        (((0.24, 0, 0, 10, 10),), ((0.34, 0, 0, 10, 10),), 10, 0.0, 0.0),
    ],
)
def test_tubes_by_hand(a, b, fps, tiou, viou):
    assert tube_ious(a, b, fps) == tube_ious(b, a, fps) == pytest.approx((tiou, viou))


def test_more_boxes_of_the_same_movement_change_nothing():
    few = ((0.0, 0, 0, 10, 10), (4.0, 40, 20, 50, 30))
    many = tuple((t / 10, t, t / 2, t + 10, t / 2 + 10) for t in range(41))
    other = ((1.0, 12, 3, 25, 20), (3.5, 30, 15, 41, 29))
    assert tube_ious(few, many) == pytest.approx((1, 1))
    assert tube_ious(few, other) == pytest.approx(tube_ious(many, other))


def _tube(rng: random.Random) -> tuple[tuple[float, ...], ...]:
    times = sorted({round(rng.uniform(0, 6), rng.choice((1, 2))) for _ in range(rng.randint(1, 6))})
    boxes = []
    for time_s in times:
        x, y = rng.uniform(0, 60), rng.uniform(0, 60)
        boxes.append((time_s, x, y, x + rng.uniform(1, 60), y + rng.uniform(1, 60)))
    return tuple(boxes)


def _slow(a, b, fps):
    """Every frame of the whole video in turn, boxes by numpy, areas counted as they come."""

    def boxes(tube):
        times = np.array([box[0] for box in tube])
        frames = np.arange(0, 20 * fps)
        is_on = (frames >= np.floor(times[0] * fps + 0.5)) & (frames <= np.floor(times[-1] * fps + 0.5))
        sides = np.stack([np.interp(frames / fps, times, [box[i] for box in tube]) for i in range(1, 5)], axis=1)
        return {int(frame): sides[frame] for frame in frames[is_on]}

    one, other = boxes(a), boxes(b)
    union, both = one.keys() | other.keys(), one.keys() & other.keys()
    total = 0.0
    for frame in both:
        p, q = one[frame], other[frame]
        shared = max(0, min(p[2], q[2]) - max(p[0], q[0])) * max(0, min(p[3], q[3]) - max(p[1], q[1]))
        total += shared / ((p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - shared)
    return len(both) / len(union), total / len(union)


def test_a_thousand_random_tubes_frame_by_frame():
    rng, overlaps = random.Random(0), []
    for _ in range(1000):
        a, b, fps = _tube(rng), _tube(rng), rng.choice((1, 4, 8, 25))
        found = tube_ious(a, b, fps)
        assert found == pytest.approx(_slow(a, b, fps), abs=1e-9), (a, b, fps)
        assert 0 <= found[1] <= found[0] <= 1
        overlaps.append(found[1])
    assert sum(overlap > 0 for overlap in overlaps) > 300


def test_means_and_shares_are_strict_and_count_every_question():
    scores = score_tubes([(1.0, 0.5), (0.8, 0.4), (0.0, 0.0), (0.6, 0.3)])
    assert scores == pytest.approx({"mean_tiou": 0.6, "mean_viou": 0.3, "viou_0.3": 0.5, "viou_0.5": 0.0})
    scores = score_intervals([0.3, 0.31, 0.6, 0.71, 0.0])
    wanted = {"mean_interval_iou": 1.92 / 5, "interval_0.3": 0.6, "interval_0.5": 0.4, "interval_0.7": 0.2}
    assert scores == pytest.approx(wanted)
    for score in (score_tubes, score_intervals):
        with pytest.raises(ValueError, match="at least one"):
            score([])
