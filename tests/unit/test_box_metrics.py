"""Box metrics: hand-computed cases, and an independent computation on random ones."""

from __future__ import annotations

import itertools
import random

import pytest

from mmchat.conversation import Region
from mmchat.metrics.boxes import Box, Located, best_candidate, iou, matched, merged, score_boxes

# Two boxes of 10 x 10 with an IoU of exactly 1/2 to the first: half of it, and twice of it.
A: Box = (0, 0, 10, 10)
HALF: Box = (0, 0, 10, 5)
FAR: Box = (50, 50, 60, 60)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (A, A, 1.0),
        (A, HALF, 0.5),
        (A, (5, 0, 15, 10), 1 / 3),
        (A, (5, 5, 15, 15), 25 / 175),
        (A, (10, 0, 20, 10), 0.0),  # they touch
        (A, FAR, 0.0),
        (A, (3, 3, 3, 8), 0.0),  # no area
        ((3, 3, 3, 3), (3, 3, 3, 3), 0.0),
        ((10, 10, 0, 0), A, 0.0),  # corners swapped
    ],
)
def test_iou(a: Box, b: Box, wanted: float) -> None:
    assert iou(a, b) == iou(b, a) == pytest.approx(wanted)


def cells(box: Box) -> set[tuple[int, int]]:
    """A box of whole numbers as the unit squares that it covers."""
    return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}


def cell_iou(a: Box, b: Box) -> float:
    both, either = cells(a) & cells(b), cells(a) | cells(b)
    return len(both) / len(either) if either else 0.0


def random_box(rng: random.Random) -> Box:
    """On a grid so coarse that equal overlaps, and ones of exactly a half, are common."""
    x, y = sorted(rng.sample(range(7), 2)), sorted(rng.sample(range(7), 2))
    return x[0], y[0], x[1], y[1]


def most_pairs(found: list[Box], wanted: list[Box], threshold: float) -> int:
    """The best of all ways to pair, by trying them."""
    short, long = sorted((found, wanted), key=len)
    return max(
        sum(cell_iou(a, b) > threshold for a, b in zip(short, order, strict=True))
        for order in itertools.permutations(long, len(short))
    )


def test_as_many_pairs_as_there_can_be() -> None:
    rng = random.Random(0)
    num_greedy_worse = 0
    for _ in range(1000):
        found, wanted = ([random_box(rng) for _ in range(rng.randrange(5))] for _ in range(2))
        pairs = matched(found, wanted, 0.3)
        assert all(iou(found[i], wanted[j]) > 0.3 for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        assert len(pairs) == most_pairs(found, wanted, 0.3)
        near = sorted(((iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted)), reverse=True)
        taken: list[tuple[int, int]] = []
        for overlap, i, j in near:
            if overlap > 0.3 and all(i != k and j != n for k, n in taken):
                taken.append((i, j))
        num_greedy_worse += len(taken) < len(pairs)
    assert num_greedy_worse, "these cases do not tell the two ways apart"


def test_the_nearest_pair_is_not_always_in_the_best_pairing() -> None:
    first, second = (0.0, 0.0, 10.0, 10.0), (4.0, 0.0, 14.0, 10.0)
    # `near` is nearer to `first` than `only` is, which fits nothing else.
    near, only = (1.0, 0.0, 11.0, 10.0), (0.0, 0.0, 10.0, 8.0)
    assert iou(near, first) > iou(only, first) > 0.5 and iou(near, second) > 0.5 >= iou(only, second)
    assert matched([near, only], [first, second], 0.5) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("region", "wanted"),
    [
        (Region(0, box=A), 0),
        (Region(0, box=(0, 0, 10, 11)), 0),
        (Region(0, box=(0, 0, 14, 10)), 1),
        (Region(0, box=(100, 100, 110, 110)), None),  # near none
        (Region(0, box=(0, 0, 14, 14)), 1),
        (Region(0, point=(1, 1)), None),  # in two
        (Region(0, point=(12, 1)), 1),
        (Region(0, point=(50, 60)), 2),  # on its edge
        (Region(0, point=(30, 30)), None),
        (Region(0, tube=((0.0, *A),)), None),
    ],
)
def test_the_candidate_that_is_meant(region: Region, wanted: int | None) -> None:
    candidates = [A, (0, 0, 15, 10), FAR]
    assert best_candidate(region, candidates) == (None if wanted is None else candidates[wanted])
    assert best_candidate(region, [*candidates, A, FAR]) == best_candidate(region, candidates), "equal ones are one"


def test_two_candidates_equally_near_are_none() -> None:
    assert best_candidate(Region(0, box=(0, 0, 20, 10)), [A, (10, 0, 20, 10)]) is None
    assert best_candidate(Region(0, box=A), []) is None
    assert merged([A, FAR, HALF]) == (0, 0, 60, 60)


def test_scores_by_hand() -> None:
    answers = [
        Located((A,), 0, (A,)),  # right
        Located((HALF,), 0, (A,)),  # exactly a half
        Located((A, FAR), 0, (A,)),  # one too many
        Located((A,), 1, (A,)),  # and half a box
        Located((), 1, (A,)),  # half a box alone
        Located((), 0, ()),  # none, as it should be
        Located((A,), 0, ()),
        Located((), 1, ()),  # a broken mark is not 'none'
        Located((), 0, (), is_answered=False),
        Located((FAR, A), 0, (A, FAR)),  # in any order
        Located((A, A), 0, (A, FAR)),  # one box twice
        Located((A,), 0, (A, FAR)),
        None,
    ]
    assert score_boxes(answers, 0.5) == {
        "accuracy": pytest.approx(3 / 13),
        "mean_iou": pytest.approx(1.5 / 6),  # of five questions with one target, and the one that is not read
        "no_target_accuracy": pytest.approx(1 / 5),
        "box_precision": pytest.approx(7 / 14),
        "box_recall": pytest.approx(7 / 12),
        "box_f1": pytest.approx(14 / 26),
    }
    assert [one.f1(0.5) for one in answers[:6] if one] == pytest.approx([1, 0, 2 / 3, 2 / 3, 0, 1])
    assert Located((), 0, (), is_answered=False).f1(0.5) == 0


def test_empty_and_unread_sets() -> None:
    with pytest.raises(ValueError, match="found no answers"):
        score_boxes([], 0.5)
    zero = {"accuracy": 0.0, "box_precision": 0.0, "box_recall": 0.0, "box_f1": 0.0}
    assert score_boxes([None, None], 0.5) == zero
    only_none = score_boxes([Located((), 0, ())], 0.5)
    assert only_none == {**zero, "accuracy": 1.0, "no_target_accuracy": 1.0}


def test_scores_of_random_sets() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        cases = [
            (
                [random_box(rng) for _ in range(rng.randrange(4))],
                rng.choice([0, 0, 0, 1, 2]),
                [random_box(rng) for _ in range(rng.randrange(4))],
                rng.random() < 0.9,
            )
            for _ in range(rng.randrange(1, 6))
        ]
        cases = [(f if answered else [], o if answered else 0, w, answered) for f, o, w, answered in cases]
        num_unread = rng.choice([0, 0, 1])
        found = score_boxes([*(Located(tuple(f), o, tuple(w), a) for f, o, w, a in cases), *[None] * num_unread], 0.4)
        pairs = [most_pairs(f, w, 0.4) for f, _, w, _ in cases]
        rights = [a and n == len(w) == len(f) + o for (f, o, w, a), n in zip(cases, pairs, strict=True)]
        wanted = {"accuracy": sum(rights) / (len(cases) + num_unread)}
        if ones := [(f, o, w) for f, o, w, _ in cases if len(w) == 1]:
            overlaps = [cell_iou(f[0], w[0]) if len(f) + o == len(f) == 1 else 0.0 for f, o, w in ones]
            wanted["mean_iou"] = sum(overlaps) / (len(ones) + num_unread)
        if nones := [right for (_, _, w, _), right in zip(cases, rights, strict=True) if not w]:
            wanted["no_target_accuracy"] = sum(nones) / (len(nones) + num_unread)
        said, true = sum(len(f) + o for f, o, _, _ in cases), sum(len(w) for _, _, w, _ in cases) + num_unread
        precision, recall = sum(pairs) / max(said, 1), sum(pairs) / max(true, 1)
        wanted |= {"box_precision": precision, "box_recall": recall}
        wanted["box_f1"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert found == pytest.approx(wanted)
