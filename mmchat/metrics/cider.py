"""CIDEr-D: how near captions are to what several people wrote (Vedantam et al., CVPR 2015, arXiv 1411.5726).

The reference implementation cuts words with a Java program, the Stanford tokenizer, in its Penn Treebank manner, and
drops its punctuation. Here a regular expression does that: lower case; words with inner hyphens, stops and commas are
one token ("t-shirt", "3.5"), "n't" and "'s" are tokens of their own, marks are dropped. It differs on abbreviations
("u.s." loses its last stop), on slashes and on rare contractions ("cannot" stays one token); on COCO-like sentences the
tokens are mostly the same, but figures should be compared with figures of the same tokenizer.

One difference is a fault put right: the reference counts a caption's length in pairs of words, so that captions of no
word and of one are equally long. Here words are counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from mmchat.metrics.text import WORD, composed

MAX_N = 4
SIGMA = 6.0  # of the Gaussian penalty, in words of difference

_ENDING = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))\b")
_TOKEN = regex.compile(rf"n't\b|'(?:s|m|d|re|ve|ll)\b|{WORD}(?:[-.,']{WORD})*")
_NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Vector:
    """A text as tf-idf weights: weights[n - 1] by n-gram, norms[n - 1] their length; `length` in words."""

    weights: tuple[dict[_NGram, float], ...]
    norms: tuple[float, ...]
    length: int


def cider_d(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, 0 to 10; the score of a set is their mean, which papers print times 100.

    The weights of n-grams come from these references, an item with all its references being one document. So a score
    depends on the set that it is computed on, and one item alone gets 0. An answer without references gets 0 and is no
    document; None stands for a question without an answer.

    Raises ValueError where there is not one list of references an answer, or no answer.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} records; there must be one for each")
    counted = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in counted for ngram in set().union(*texts))
    num_documents = sum(bool(texts) for texts in counted)
    idf: defaultdict[_NGram, float] = defaultdict(lambda: math.log(max(num_documents, 1)))
    idf.update({ngram: math.log(num_documents / found) for ngram, found in frequency.items()})
    scores: list[float] = []
    for answer, texts in zip(answers, counted, strict=True):
        said = _weighted(_ngrams(answer or ""), idf)
        near = [_similarity(said, _weighted(text, idf)) for text in texts]
        scores.append(sum(near) / len(near) if near else 0.0)
    return scores


def caption_tokens(text: str) -> list[str]:
    """The words of a caption, as the module's text says."""
    return _TOKEN.findall(_ENDING.sub(r" \1", composed(text).replace("\u2019", "'")))


def _ngrams(text: str) -> Counter[_NGram]:
    words = caption_tokens(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _weighted(counts: Counter[_NGram], idf: defaultdict[_NGram, float]) -> _Vector:
    weights: tuple[dict[_NGram, float], ...] = tuple({} for _ in range(MAX_N))
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf[ngram]
    norms = tuple(math.hypot(*order.values()) for order in weights)
    return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 1))


def _similarity(said: _Vector, wanted: _Vector) -> float:
    """10 times the mean over n of the clipped cosine, less for another length."""
    total = 0.0
    for n in range(MAX_N):
        if norm := said.norms[n] * wanted.norms[n]:
            both = said.weights[n].keys() & wanted.weights[n].keys()
            total += sum(min(said.weights[n][g], wanted.weights[n][g]) * wanted.weights[n][g] for g in both) / norm
    penalty = math.exp(-((said.length - wanted.length) ** 2) / (2 * SIGMA**2))
    return 10 * penalty * total / MAX_N
