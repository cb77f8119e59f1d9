"""Boxes compared in original pixels: overlap, pairs of found and true boxes, and the scores that are made of them.

How this differs from Shikra's own evaluation (arXiv 2306.15195): that compares in the padded square, times a thousand,
and its true box is the text's, rounded to three decimals. Here the true box is the annotation's and only the answer
is rounded, by half of its last digit at most: a pixel of a picture whose longer side is 2,000. Both count an answer
as right where IoU is strictly above a half, one that names no box or several as wrong, and every question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmchat.conversation import Box, Region


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one has no area or its corners are swapped."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / (area(a) + area(b) - both)


def area(box: Box) -> float:
    """In square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def centre(box: Box) -> tuple[float, float]:
    """The point in the middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def is_inside(point: tuple[float, float], box: Box) -> bool:
    """Whether a point is in a box or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def merged(boxes: Sequence[Box]) -> Box:
    """The smallest box around at least one box."""
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def matched(found: Sequence[Box], wanted: Sequence[Box], threshold: float) -> list[tuple[int, int]]:
    """As many pairs (i of found, j of wanted) of IoU strictly above `threshold` as there can be, each box in one."""
    return assigned([[j for j, b in enumerate(wanted) if iou(a, b) > threshold] for a in found])


def assigned(fits: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """As many pairs (i, j of fits[i]) as there can be, each i and each j in one at most.

    Taking the nearest pair first, as the code of generalised grounding does (gRefCOCO, arXiv 2308.16182), may leave a
    box alone that another choice would have paired; augmenting paths (Kuhn) do not.
    """
    owner: dict[int, int] = {}  # of each j that is taken, its i

    def place(i: int, tried: set[int]) -> bool:
        for j in fits[i]:
            if j not in tried:
                tried.add(j)
                if j not in owner or place(owner[j], tried):
                    owner[j] = i
                    return True
        return False

    for i in range(len(fits)):
        place(i, set())
    return sorted((i, j) for j, i in owner.items())


def best_candidate(region: Region, candidates: Sequence[Box]) -> Box | None:
    """Which of the candidates a box or point means; None where that is not clear. Equal boxes are one candidate.

    A box means the candidate that it overlaps most, by IoU and strictly; a point the only one that it is inside of.
    """
    if region.point is not None:
        meant = {box for box in candidates if is_inside(region.point, box)}
    else:
        overlaps = {box: iou(region.box, box) for box in candidates} if region.box is not None else {}
        best = max(overlaps.values(), default=0.0)
        meant = {box for box, overlap in overlaps.items() if overlap == best > 0}
    return meant.pop() if len(meant) == 1 else None


@dataclass(frozen=True)
class Located:
    """What an answer names, and what it should have named.

    Attributes:
        boxes: that the answer names in the right picture.
        num_other: broken marks, points where boxes were asked for, boxes in another picture.
        wanted: the true boxes; there may be none.
        is_answered: False where there is no answer, which is wrong whatever was wanted.
    """

    boxes: tuple[Box, ...]
    num_other: int
    wanted: tuple[Box, ...]
    is_answered: bool = True

    def num_matched(self, threshold: float) -> int:
        return len(matched(self.boxes, self.wanted, threshold))

    def is_exact(self, threshold: float) -> bool:
        """Each wanted box is found and nothing else is named: F1 = 1, and for one target the accuracy of REC."""
        num = self.num_matched(threshold)
        return self.is_answered and num == len(self.wanted) == len(self.boxes) and not self.num_other

    def f1(self, threshold: float) -> float:
        """Harmonic mean of precision and recall of the boxes; 1 where none was wanted and none is named."""
        if not self.is_answered:
            return 0.0
        total = len(self.boxes) + self.num_other + len(self.wanted)
        return 2 * self.num_matched(threshold) / total if total else 1.0

    def only_iou(self) -> float:
        """IoU of the one box with the one that is wanted; 0 where not exactly one is named."""
        is_one = len(self.boxes) == len(self.wanted) == 1 and not self.num_other
        return iou(self.boxes[0], self.wanted[0]) if is_one else 0.0


def score_boxes(located: Sequence[Located | None], threshold: float) -> dict[str, float]:
    """Scores of answers that name boxes; None stands for a question that could not be read.

    accuracy: share of answers that are exact (see `Located.is_exact`).
    mean_iou: over the questions with one target; no_target_accuracy (gRefCOCO's N-acc): share of those without a
    target that are answered without a box. Each is there where such questions are.
    box_precision, box_recall, box_f1: over all boxes together; whatever else is named counts as a box found in error.
    A question that could not be read is wrong in each of them, and counts as one box that is not found.
    Raises ValueError where there is nothing to score.
    """
    if not located:
        raise ValueError("found no answers; wanted at least one to score")
    readable = [one for one in located if one is not None]
    num_unread = len(located) - len(readable)
    one_target = [one for one in readable if len(one.wanted) == 1]
    no_target = [one for one in readable if not one.wanted]
    scores = {"accuracy": sum(one.is_exact(threshold) for one in readable) / len(located)}
    if one_target:
        scores["mean_iou"] = sum(one.only_iou() for one in one_target) / (len(one_target) + num_unread)
    if no_target:
        right = sum(one.is_exact(threshold) for one in no_target)
        scores["no_target_accuracy"] = right / (len(no_target) + num_unread)
    num_found = sum(len(one.boxes) + one.num_other for one in readable)
    num_wanted = sum(len(one.wanted) for one in readable) + num_unread
    num_matched = sum(one.num_matched(threshold) for one in readable)
    scores["box_precision"] = num_matched / num_found if num_found else 0.0
    scores["box_recall"] = num_matched / num_wanted if num_wanted else 0.0
    scores["box_f1"] = 2 * num_matched / (num_found + num_wanted) if num_found + num_wanted else 0.0
    return scores
