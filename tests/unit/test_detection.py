"""Error rates of detection: lists by hand, ties among them, and a slow computation on a thousand random cases each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from mmchat.metrics.detection import det_points, eer, far_at_frr

CASES = 1000
Point = tuple[Fraction, Fraction]


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "nontargets", "equal", "far_10"),
    [
        ([3.0, 2.0, 1.0], [0.0, -1.0], 0.0, 0.0),
        ([0.0, -1.0], [3.0, 2.0, 1.0], 1.0, 1.0),
        ([0.5] * 7, [0.5] * 3, 0.5, 0.9),  # one line from (0, 1) to (1, 0)
        ([0.9, 0.8, 0.7, 0.3], [0.6, 0.4, 0.2, 0.1], 0.25, 0.5),
        # (0, 1), (1/4, 1/2), (1, 0): FAR = 1/4 + 3s/4 meets FRR = 1/2 - s/2 at s = 1/5.
        ([1, 1, 0, 0], [1, 0, 0, 0], 0.4, 0.85),
        # (0, 1), (0, 1/2), (1/2, 1/2): the crossing is a point.
        ([2, 0], [1, -1], 0.5, 0.5),
        # Three targets and a non-target in a tie: (0, 1), (1/2, 1/4), (1, 0); FAR s/2 meets 1 - 3s/4 at s = 4/5.
        ([1, 1, 1, 0], [1, -1], 0.4, 0.5),
        ([math.inf, -math.inf, -math.inf], [0.0, 0.0], 2 / 3, 1.0),
        ([1.0], [math.inf, 0.0], 0.5, 0.5),
    ],
)
def test_by_hand(targets: list[float], nontargets: list[float], equal: float, far_10: float) -> None:
    assert eer(targets, nontargets) == pytest.approx(equal, abs=1e-12)
    assert far_at_frr(targets, nontargets) == pytest.approx(far_10, abs=1e-12)


def test_points_stand_behind_each_distinct_score() -> None:
    assert det_points([2, 1, 1], [1, 0]) == [(0.0, 1.0), (0.0, 2 / 3), (0.5, 0.0), (1.0, 0.0)]


def test_false_accepts_at_other_rates() -> None:
    targets, nontargets = [4.0, 3.0, 2.0, 1.0], [3.5, 1.5, 1.5, 0.5]
    rates = [far_at_frr(targets, nontargets, frr) for frr in (0.0, 0.25, 0.5, 0.75, 0.8, 1.0)]
    assert rates == [0.75, 0.25, 0.25, 0.0, 0.0, 0.0]


def test_kinds_of_nontarget_are_taken_at_one_threshold() -> None:
    rng = random.Random(0)
    for _ in range(200):
        targets = [rng.randint(0, 9) for _ in range(rng.randint(1, 20))]
        kinds = [[rng.randint(-3, 6) for _ in range(rng.randint(1, 9))] for _ in range(3)]
        together = [score for kind in kinds for score in kind]
        mean = sum(far_at_frr(targets, kind) * len(kind) for kind in kinds) / len(together)
        assert far_at_frr(targets, together) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("targets", "nontargets", "message"),
    [
        ([], [1.0], "0 scores of targets"),
        ([1.0], [], "0 scores of non-targets"),
        ([1.0, math.nan], [0.0], "1 of 2 scores of targets are NaN"),
        ([1.0], [math.nan], "1 of 1 scores of non-targets are NaN"),
    ],
)
def test_what_has_no_error_rate_is_refused(targets: list[float], nontargets: list[float], message: str) -> None:
    for measure in (eer, far_at_frr, det_points):
        with pytest.raises(ValueError, match=message):
            measure(targets, nontargets)


def test_a_rate_that_is_no_share_is_refused() -> None:
    for frr in (-0.1, 10, math.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            far_at_frr([1.0], [0.0], frr)


# ---- by counting ----------------------------------------------------------------------------------------------------


def scores(rng: random.Random) -> tuple[list[float], list[float]]:
    """Few or many distinct values, so that ties are common, rare or everything; either kind may be the better one."""
    grain = rng.choice([1, 2, 5, 50, 10**6])
    shift = rng.uniform(-1, 1.5)

    def drawn(mean: float) -> list[float]:
        return [round(rng.gauss(mean, 1) * grain) / grain for _ in range(rng.randint(1, 25))]

    return drawn(shift), drawn(0.0)


def counted(targets: list[float], nontargets: list[float]) -> list[Point]:
    """Operating points by going through all scores at every threshold, in exact fractions."""
    points = [(Fraction(0), Fraction(1))]
    for threshold in sorted({*targets, *nontargets}, reverse=True):
        far = Fraction(sum(score >= threshold for score in nontargets), len(nontargets))
        frr = Fraction(sum(score < threshold for score in targets), len(targets))
        points.append((far, frr))
    return points


def walked(points: list[Point], way: Fraction) -> Point:
    """The point after `way` lines of the curve."""
    i = min(int(way), len(points) - 2)
    share = way - i
    (far, frr), (next_far, next_frr) = points[i : i + 2]
    return far + share * (next_far - far), frr + share * (next_frr - frr)


def first_where(points: list[Point], is_there: Callable[[Fraction, Fraction], bool]) -> Point:
    """The first point of the curve for which `is_there`, which holds from some place on, by halving."""
    low, high = Fraction(0), Fraction(len(points) - 1)
    if is_there(*points[0]):
        return points[0]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_there(*walked(points, middle)) else (middle, high)
    return walked(points, high)


def test_equal_error_rate_as_counted() -> None:
    rng = random.Random(1)
    for _ in range(CASES):
        targets, nontargets = scores(rng)
        far, frr = first_where(counted(targets, nontargets), lambda far, frr: far >= frr)
        found = eer(targets, nontargets)
        assert found == pytest.approx(float(far), abs=1e-9) and found == pytest.approx(float(frr), abs=1e-9)


def test_false_accepts_as_counted() -> None:
    rng = random.Random(2)
    for _ in range(CASES):
        targets, nontargets = scores(rng)
        wanted = rng.choice([0.1, 0.05, 0.25, rng.random()])
        far, _ = first_where(counted(targets, nontargets), lambda _, frr, rate=wanted: float(frr) <= rate)
        assert far_at_frr(targets, nontargets, wanted) == pytest.approx(float(far), abs=1e-9)


def test_points_as_counted() -> None:
    rng = random.Random(3)
    for _ in range(CASES):
        targets, nontargets = scores(rng)
        wanted = [(float(far), float(frr)) for far, frr in counted(targets, nontargets)]
        assert det_points(targets, nontargets) == wanted


def test_what_must_hold_of_any_scorer() -> None:
    """Order alone counts; turning the scores round and exchanging the kinds changes nothing; ties cost no more."""
    rng = random.Random(4)
    for _ in range(200):
        targets, nontargets = scores(rng)
        found = eer(targets, nontargets)
        squeezed = [[math.atan(score) for score in kind] for kind in (targets, nontargets)]
        assert eer(*squeezed) == found
        turned = eer([-score for score in nontargets], [-score for score in targets])
        assert turned == pytest.approx(found, abs=1e-12)
        worst = eer(targets, [score + 1e-9 for score in nontargets])
        best = eer(targets, [score - 1e-9 for score in nontargets])
        assert best - 1e-12 <= found <= worst + 1e-12
