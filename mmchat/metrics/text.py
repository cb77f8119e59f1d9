"""Scores of texts against references: exact match, token F1, BLEU-4, ROUGE-L, perplexity.

Everywhere `references` has one list of right texts for each answer. An empty list stands for a record that could not
be read, and None among the answers for a question without an answer: they count, and count as wrong.

Texts are compared in Unicode's composed form (NFC): an accent may be stored as a sign of its own.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import regex

from mmchat.conversation import Region

# The signature of `bleu_4` as sacrebleu writes it, but for the number of references and the version.
BLEU_SIGNATURE = "case:lc|eff:no|tok:13a|smooth:exp"

# A word of any script, for `regex`: letters and digits with their marks, which many scripts write vowels with.
WORD = r"(?:[\p{L}\p{N}]\p{M}*)+"

_PARLAI_PUNCTUATION = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']")


def score_texts(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match (see `normalised`) and token F1 of each answer with its best reference, averaged over all answers.

    Raises ValueError where there is not one list of references an answer, or no answer.
    """
    _check(answers, references)
    exact = f1 = 0.0
    for answer, texts in zip(answers, references, strict=True):
        exact += answer is not None and any(normalised(answer) == normalised(text) for text in texts)
        f1 += token_f1(answer, texts)
    return {"exact_match": exact / len(answers), "token_f1": f1 / len(answers)}


def score_chat(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Token F1, BLEU-4 and ROUGE-L: what open-domain chat is scored by (arXiv 2010.01082).

    Raises ValueError where there is not one list of references an answer, or no answer.
    """
    return {
        "token_f1": score_texts(answers, references)["token_f1"],
        "bleu_4": bleu_4(answers, references),
        "rouge_l": rouge_l(answers, references),
    }


def normalised(text: str) -> str:
    """Lower case, without outer space, trailing punctuation and a leading article."""
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", re.sub(r"[\s.,;:!?]+$", "", composed(text.strip())))


def composed(text: str) -> str:
    """Lower case, and NFC: a letter with its accent is one sign where there is one."""
    return unicodedata.normalize("NFC", text.lower())


def words_alone(parts: Iterable[object]) -> str:
    """A text without the regions in it and the blank before each; runs of space become a blank."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
        elif isinstance(part, Region):
            text = text.rstrip()
    return " ".join(text.split())


def token_f1(answer: str | None, references: Sequence[str]) -> float:
    """Harmonic mean of the shares of words in common, with the best reference; 0 where no word is left to compare.

    Words are normalised as ParlAI does, whose figures dialogue papers report: lower case, ASCII punctuation becomes a
    blank, the articles a, an and the are left out.
    """
    said = Counter(_parlai_words(answer or ""))
    return max((_overlap(said, Counter(_parlai_words(text))) for text in references), default=0.0)


def bleu_4(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of sacrebleu, 0 to 1: lower case, 13a tokens, exponential smoothing (`BLEU_SIGNATURE`).

    Texts are brought to NFC first. Dialogue papers that score with ParlAI report the mean of sentence scores over words
    split at blanks, which is another number. The score of the answers that have references is multiplied by their
    share.

    Raises ValueError where there is not one list of references an answer, or no answer.
    """
    from sacrebleu.metrics.bleu import BLEU  # here: loader workers import tasks, and never score

    _check(answers, references)
    both = [(answer or "", texts) for answer, texts in zip(answers, references, strict=True) if texts]
    pairs = [(composed(answer), [composed(text) for text in texts]) for answer, texts in both]
    if not pairs:
        return 0.0
    # sacrebleu wants streams: every answer's first reference, every answer's second, ... One twice changes nothing.
    num_streams = max(len(texts) for _, texts in pairs)
    streams = [[texts[min(i, len(texts) - 1)] for _, texts in pairs] for i in range(num_streams)]
    score = BLEU(lowercase=True).corpus_score([answer for answer, _ in pairs], streams).score
    return score / 100 * len(pairs) / len(answers)


def rouge_l(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F1 (rouge-score), 0 to 1, each answer with its best reference, no stemming.

    rouge-score's own tokens drop all letters but a to z; ours are words of any script, the same for plain English.

    Raises ValueError where there is not one list of references an answer, or no answer.
    """
    from rouge_score.rouge_scorer import RougeScorer  # here: nltk comes with it

    _check(answers, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    total = 0.0
    for answer, texts in zip(answers, references, strict=True):
        total += max((scorer.score(text, answer or "")["rougeL"].fmeasure for text in texts), default=0.0)
    return total / len(answers)


def perplexity(likelihoods: Sequence[tuple[float, int]]) -> float:
    """exp of minus all log-likelihoods (nats) over all tokens: never a mean of the texts' own perplexities.

    Args:
        likelihoods: of each text the summed log-likelihood and the number of tokens.
    Raises:
        ValueError: there is no token.
    """
    count = sum(tokens for _, tokens in likelihoods)
    if count <= 0:
        raise ValueError(f"{len(likelihoods)} texts have {count} tokens; a perplexity needs at least one")
    mean = -sum(likelihood for likelihood, _ in likelihoods) / count
    return math.exp(mean) if mean < 700 else math.inf  # beyond, a float overflows


class _Words:
    """rouge-score's idea of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return regex.findall(WORD, composed(text))


def _parlai_words(text: str) -> list[str]:
    return regex.sub(r"\b(?:an?|the)\b", " ", _PARLAI_PUNCTUATION.sub(" ", composed(text))).split()


def _overlap(said: Counter[str], wanted: Counter[str]) -> float:
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def _check(answers: Sequence[str | None], references: Sequence[Sequence[str]]) -> None:
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} records; there must be one for each")
