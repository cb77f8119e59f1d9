"""Ranking of candidates by a score: reciprocal rank, recall, mean rank and NDCG, fair in ties.

Candidates with equal scores stand in random order, and every measure is its expectation over those orders, in closed
form. So a constant scorer gets what a random order of 100 gets: mean rank 50.5, R@1 of 0.01, MRR of H(100) / 100.
The common scripts break ties by the position in the list, which can favour or punish the right one. A score that is
not a number counts as the lowest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CUTS = (1, 5, 10)


@dataclass(frozen=True)
class Place:
    """Where the right candidate stands: below `num_above` others, in a tie of `num_tied`, itself included."""

    num_above: int
    num_tied: int = 1

    @property
    def mean_rank(self) -> float:
        """1 is the best."""
        return self.num_above + (self.num_tied + 1) / 2

    @property
    def reciprocal_rank(self) -> float:
        """Mean of 1 / rank over the ranks of the tie; not 1 / mean_rank."""
        ranks = np.arange(self.num_above + 1, self.num_above + self.num_tied + 1)
        return float((1 / ranks).mean())

    def recall(self, cut: int) -> float:
        """Chance to be among the first `cut`."""
        return min(max(cut - self.num_above, 0), self.num_tied) / self.num_tied


def place_of(scores: Sequence[float], right: int) -> Place:
    """The place of candidate number `right`; a higher score is better. Raises IndexError where there is none."""
    found = _numbers(scores)
    if not 0 <= right < len(found):
        raise IndexError(f"the right candidate is number {right} of {len(found)}")
    return Place(int((found > found[right]).sum()), int((found == found[right]).sum()))


def ranking_scores(places: Sequence[Place]) -> dict[str, float]:
    """MRR, R@1, R@5, R@10 and mean rank over questions. Raises ValueError where there is none."""
    if not places:
        raise ValueError("no ranked question to score; wanted at least one")
    scores = {"mrr": [place.reciprocal_rank for place in places]}
    scores |= {f"r@{cut}": [place.recall(cut) for place in places] for cut in CUTS}
    scores["mean_rank"] = [place.mean_rank for place in places]
    return {name: float(np.mean(values)) for name, values in scores.items()}


def integer_ranks(scores: Sequence[float], key: str) -> list[int]:
    """Ranks 1, 2, ... of every candidate, each given once: what evaluation servers ask for.

    Ties are broken at random from `key`, the question's name: the same in every run, and whatever place the right
    candidates have in their lists.
    """
    found = _numbers(scores)
    order = list(range(len(found)))
    random.Random(key).shuffle(order)
    order.sort(key=lambda i: -found[i])  # stable: tied ones stay as they were shuffled
    ranks = [0] * len(order)
    for rank, i in enumerate(order, 1):
        ranks[i] = rank
    return ranks


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float | None:
    """Normalised discounted cumulative gain as Visual Dialog defines it (arXiv 1611.08669, challenge of 2018).

    The sum of relevance / log2(rank + 1) over the first k candidates, k being the number of those with a relevance
    above 0, divided by that sum in the best order. None where nothing is relevant, which would be 0 / 0.
    Raises ValueError where the two lengths differ, or a relevance is negative or not finite.
    """
    found, wanted = _numbers(scores), np.asarray(relevance, np.float64)
    if found.shape != wanted.shape or not np.isfinite(wanted).all() or (wanted < 0).any():
        raise ValueError(
            f"{found.size} scores and {wanted.size} relevances; wanted as many, and each relevance 0 or more"
        )
    k = int((wanted > 0).sum())
    if k == 0:
        return None
    discounts = np.zeros(len(found))
    discounts[:k] = 1 / np.log2(np.arange(2, k + 2))
    order = np.argsort(-found, kind="stable")
    # Every tied candidate gets the mean discount of the positions that its tie takes.
    _, tie, sizes = np.unique(-found[order], return_inverse=True, return_counts=True)
    shared = (np.bincount(tie, weights=discounts) / sizes)[tie]
    return float((wanted[order] * shared).sum() / (np.sort(wanted)[::-1] * discounts).sum())


def _numbers(scores: Sequence[float]) -> np.ndarray:
    found = np.asarray(scores, np.float64)
    return np.where(np.isnan(found), -np.inf, found)
