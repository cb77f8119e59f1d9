"""Detection by a score: equal error rate, false accepts at a fixed rate of false rejects, and the DET curve.

A target is what should be accepted, and a score at or above the threshold accepts. FAR is the share of the non-targets
that are accepted, FRR that of the targets that are rejected. The curve is made of straight lines between neighbouring
operating points, one behind each distinct score: no threshold parts equal scores, so a tie is one line, and a constant
scorer has an equal error rate of 0.5. The convex hull of the points, which some tools take, is not formed.

Infinite scores are in order: minus infinity is a target that no finite threshold accepts. The picture of a curve is
`mmchat/inference/det_plot.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def det_points(targets: Sequence[float], nontargets: Sequence[float]) -> list[tuple[float, float]]:
    """(FAR, FRR) from nothing accepted, (0, 1), to everything accepted, (1, 0); a point behind each distinct score.

    Raises ValueError where a list is empty or a score is NaN.
    """
    wanted, others = _scores("targets", targets), _scores("non-targets", nontargets)
    thresholds = np.unique(np.concatenate([wanted, others]))[::-1]
    # At or above a threshold is whatever does not stand before it: [thresholds] counts of either kind.
    rejected = np.searchsorted(np.sort(wanted), thresholds)
    accepted = len(others) - np.searchsorted(np.sort(others), thresholds)
    fars, frrs = accepted / len(others), rejected / len(wanted)
    return [(0.0, 1.0), *zip(fars.tolist(), frrs.tolist(), strict=True)]


def eer(targets: Sequence[float], nontargets: Sequence[float]) -> float:
    """Equal error rate, 0 to 1: where the curve has FAR equal to FRR. Raises ValueError as `det_points` does."""
    points = det_points(targets, nontargets)
    # FAR - FRR grows with every point, from -1 to 1.
    i = next(i for i, (far, frr) in enumerate(points) if far >= frr)
    (far, frr), (next_far, next_frr) = points[i - 1], points[i]
    share = (frr - far) / ((frr - far) + (next_far - next_frr))
    return far + share * (next_far - far)


def far_at_frr(targets: Sequence[float], nontargets: Sequence[float], frr: float = 0.1) -> float:
    """The lowest FAR on the curve at which no more than `frr` of the targets are rejected, 0 to 1.

    Of several kinds of non-target, each one's by itself is at the same threshold: it depends on the targets alone.

    Raises ValueError as `det_points` does, and for an `frr` that is no share.
    """
    if not 0 <= frr <= 1:
        raise ValueError(f"frr is a share of the targets, 0 to 1; found {frr:g}")
    points = det_points(targets, nontargets)
    i = next(i for i, (_, rejected) in enumerate(points) if rejected <= frr)
    if i == 0:  # nothing needs to be accepted
        return 0.0
    (far, before), (next_far, after) = points[i - 1], points[i]
    return far + (before - frr) / (before - after) * (next_far - far)


def _scores(name: str, found: Sequence[float]) -> np.ndarray:
    """[scores] in float64. Raises ValueError where there is none, or one is NaN."""
    scores = np.asarray(found, np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"found {len(scores)} scores of {name}; error rates need targets and non-targets")
    if num := int(np.isnan(scores).sum()):
        raise ValueError(f"{num} of {len(scores)} scores of {name} are NaN; give what has no score an infinite one")
    return scores
