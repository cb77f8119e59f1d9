"""Scores of short texts against references: exact match after normalisation, and token F1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from mmchat.conversation import Record
from mmchat.errors import SampleError


def score_texts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and token F1 of each answer with its best reference, averaged over all records.

    Raises ValueError where there is not one answer a record, or no record.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} records; there must be one for each")
    exact = f1 = 0.0
    for answer, texts in zip(answers, references, strict=True):
        exact += any(normalised(answer) == normalised(text) for text in texts)
        f1 += max((_token_f1(answer, text) for text in texts), default=0.0)
    return {"exact_match": exact / len(answers), "token_f1": f1 / len(answers)}


def references(record: Record, read: Callable[[Record], list[str]]) -> list[str]:
    """The right texts of a record; none for facts that cannot be read, so that it counts, and counts as wrong."""
    try:
        return read(record)
    except SampleError:
        return []


def normalised(text: str) -> str:
    """Lower case, without outer space, trailing punctuation and a leading article."""
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", re.sub(r"[\s.,;:!?]+$", "", text.strip().lower()))


def _token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words in common (SQuAD's measure, arXiv 1606.05250)."""
    said, wanted = (Counter(re.findall(r"\w+", normalised(text))) for text in (answer, reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())
