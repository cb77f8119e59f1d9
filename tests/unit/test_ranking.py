"""Ranks, reciprocal ranks, recall and NDCG: by hand, and by slow ways of another kind."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from mmchat.metrics.ranking import Place, integer_ranks, ndcg, place_of, ranking_scores

HUNDRED = list(range(100))


def test_without_ties() -> None:
    scores = [-3.0, -1.0, -2.0, -9.0]
    assert [place_of(scores, i).mean_rank for i in range(4)] == [3, 1, 2, 4] and integer_ranks(scores, "k") == [
        3,
        1,
        2,
        4,
    ]
    found = ranking_scores([place_of(scores, 1), place_of(scores, 0)])
    assert found == {"mrr": pytest.approx(2 / 3), "r@1": 0.5, "r@5": 1.0, "r@10": 1.0, "mean_rank": 2.0}


def test_a_tie_is_its_expectation() -> None:
    place = place_of([5.0, 5.0, 7.0, 5.0, 1.0], 3)  # ranks 2, 3 and 4, each as likely
    assert place == Place(1, 3) and place.mean_rank == 3
    assert place.reciprocal_rank == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert [place.recall(cut) for cut in (1, 2, 3, 4, 5)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_a_constant_scorer_is_a_random_order() -> None:
    for right in (0, 42, 99):
        found = ranking_scores([place_of([-1.5] * 100, right)])
        harmonic = math.fsum(1 / i for i in range(1, 101))
        assert found["mean_rank"] == 50.5 and found["mrr"] == pytest.approx(harmonic / 100)
        assert (found["r@1"], found["r@5"], found["r@10"]) == (0.01, 0.05, 0.1)


def test_one_candidate() -> None:
    assert ranking_scores([place_of([-7.0], 0)]) == {"mrr": 1, "r@1": 1, "r@5": 1, "r@10": 1, "mean_rank": 1}
    assert ndcg([-7.0], [0.2]) == 1.0 and integer_ranks([-7.0], "k") == [1]


def test_what_is_no_number_is_last() -> None:
    scores = [math.nan, -1.0, -math.inf]
    assert [place_of(scores, i).mean_rank for i in range(3)] == [2.5, 1, 2.5]


def test_ndcg_by_hand() -> None:
    # Two are relevant, so only the first two positions count: 0.5 / log2(2) + 0 over 1 / log2(2) + 0.5 / log2(3).
    assert ndcg([3.0, 2.0, 1.0], [0.5, 0.0, 1.0]) == pytest.approx(0.5 / (1 + 0.5 / math.log2(3)))
    assert ndcg([1.0, 2.0, 3.0], [0.0, 0.5, 1.0]) == 1.0
    assert ndcg([3.0, 2.0, 1.0], [0.0, 0.0, 1.0]) == 0.0
    assert ndcg([1.0, 1.0], [1.0, 0.0]) == 0.5  # either order, each as likely


def test_ndcg_of_nothing_relevant_is_none() -> None:
    assert ndcg([3.0, 2.0], [0.0, 0.0]) is None and ndcg([], []) is None


@pytest.mark.parametrize("relevance", [[1.0], [1.0, -0.5], [1.0, math.nan], [1.0, math.inf]])
def test_unusable_relevance_is_refused(relevance: list[float]) -> None:
    with pytest.raises(ValueError, match=f"2 scores and {len(relevance)} relevances"):
        ndcg([1.0, 2.0], relevance)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no ranked question"):
        ranking_scores([])
    for right in (-1, 2):
        with pytest.raises(IndexError, match=f"number {right} of 2"):
            place_of([1.0, 2.0], right)


def test_integer_ranks_are_a_permutation_that_favours_no_position() -> None:
    keys = [f"{i}#1" for i in range(400)]
    given = [integer_ranks([0.0] * 100, key) for key in keys]
    assert all(sorted(ranks) == list(range(1, 101)) for ranks in given)
    for position in (0, 50, 99):
        assert abs(sum(ranks[position] for ranks in given) / len(given) - 50.5) < 5
    assert integer_ranks([0.0] * 100, "a") == integer_ranks([0.0] * 100, "a") != integer_ranks([0.0] * 100, "b")
    ranks = integer_ranks([1.0, 2.0, 1.0, 3.0], "k")
    assert ranks[3] == 1 and ranks[1] == 2 and {ranks[0], ranks[2]} == {3, 4}


def _orders(scores: list[float]) -> list[list[int]]:
    """Every order of the candidates that the scores allow."""
    values = sorted(set(scores), reverse=True)
    groups = [[i for i, score in enumerate(scores) if score == value] for value in values]
    return [list(itertools.chain(*one)) for one in itertools.product(*(itertools.permutations(g) for g in groups))]


def _dcg(order: list[int], relevance: list[float], k: int) -> float:
    return math.fsum(relevance[i] / math.log2(rank + 2) for rank, i in enumerate(order[:k]))


def test_a_thousand_cases_equal_the_mean_over_all_orders() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        size = rng.randint(1, 6)
        scores = [float(rng.randint(-3, 0)) for _ in range(size)]
        relevance = [rng.choice([0.0, 0.0, 0.2, 0.4, 1.0]) for _ in range(size)]
        right = rng.randrange(size)
        orders = _orders(scores)
        ranks = [order.index(right) + 1 for order in orders]
        found = ranking_scores([place_of(scores, right)])
        mean = math.fsum(ranks) / len(ranks)
        assert found["mean_rank"] == pytest.approx(mean)
        assert found["mrr"] == pytest.approx(math.fsum(1 / rank for rank in ranks) / len(ranks))
        for cut in (1, 5, 10):
            assert found[f"r@{cut}"] == pytest.approx(sum(rank <= cut for rank in ranks) / len(ranks))
        given = integer_ranks(scores, str(rng.random()))
        assert sorted(range(size), key=given.__getitem__) in orders
        k = sum(one != 0 for one in relevance)
        if k == 0:
            assert ndcg(scores, relevance) is None
            continue
        best = _dcg(sorted(range(size), key=lambda i: -relevance[i]), relevance, k)
        expected = math.fsum(_dcg(order, relevance, k) for order in orders) / len(orders) / best
        assert ndcg(scores, relevance) == pytest.approx(expected)


def test_a_thousand_hundreds_equal_a_plain_loop() -> None:
    rng = random.Random(1)
    places, wanted = [], []
    for _ in range(1000):
        scores = [rng.gauss(0, 1) for _ in HUNDRED]  # no ties
        relevance = [rng.choice([0.0] * 8 + [0.5, 1.0]) for _ in HUNDRED]
        right = rng.randrange(100)
        order = sorted(HUNDRED, key=lambda i: -scores[i])
        rank = order.index(right) + 1
        places.append(place_of(scores, right))
        wanted.append(rank)
        assert integer_ranks(scores, "k")[right] == rank == places[-1].mean_rank
        k = sum(one != 0 for one in relevance)
        best = _dcg(sorted(HUNDRED, key=lambda i: -relevance[i]), relevance, k)
        assert ndcg(scores, relevance) == pytest.approx(_dcg(order, relevance, k) / best)
    found = ranking_scores(places)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in wanted) / 1000)
    assert found["mean_rank"] == pytest.approx(sum(wanted) / 1000)
    for cut in (1, 5, 10):
        assert found[f"r@{cut}"] == pytest.approx(sum(rank <= cut for rank in wanted) / 1000)
