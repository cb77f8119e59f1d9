"""VQAv2's comparison of answers: its normalisation, and its accuracy against ten annotators.

arXiv 1505.00468 and 1612.00837; written after the rules of the set's evaluation page and code. It differs where that
code has a fault:

* It normalises nothing for a question whose ten answers agree, so that "Yes." is wrong where all say "yes". Here every
  answer is normalised.
* Its contractions with a capital ("Im", "Ive") are looked up in lower-cased text and never found, and "somebody'd" is
  turned into "somebodyd". Here both sides are lower case, and that pair stands the right way round.
* It removes the first 32 full stops of an answer only, because a flag stands in the place of a count. Here all go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmchat.metrics.text import composed

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_ARTICLES = ("a", "an", "the")


def _contractions() -> dict[str, str]:
    """Contractions with an apostrophe left out, by how they are written with all of them."""
    table = {"im": "i'm", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    table |= {form: "'ow's'at" for form in ("ow's'at", "'ows'at", "'ow'sat")}
    nots = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
    table |= {f"{stem}nt": f"{stem}n't" for stem in nots.split()}
    for stem in ["could", "had", "might", "should", "would"]:
        table |= dict.fromkeys((f"{stem}n'tve", f"{stem}nt've"), f"{stem}n't've")
    for stem in ["he", "i", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you"]:
        table |= dict.fromkeys((f"{stem}d've", f"{stem}'dve"), f"{stem}'d've")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    # Only what is no word of its own without the apostrophe: not "shed", "well", "its".
    for end, stems in {
        "d": "he how it somebody someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "he how somebody someone that there what when where who why",
        "re": "there they what why you",
        "ve": "could i might must not should they we what where who would you",
    }.items():
        table |= {stem + end: f"{stem}'{end}" for stem in stems.split()}
    return table


_CONTRACTIONS = _contractions()


def normalised_vqa(answer: str) -> str:
    """An answer as VQAv2 compares it.

    Punctuation goes, or becomes a blank where it stands between letters of an answer; a full stop stays before a
    digit; then lower case, number words up to ten as digits, no articles, contractions with their apostrophe.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        is_outer = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_outer or has_thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in composed(text).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str | None, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1: an answer that three annotators gave is right.

    With ten answers the mean over the ten ways to leave one of them out of min(matches / 3, 1), as the set defines it;
    with another number min(matches / 3, 1) of all of them; 0 where there are none, or no answer (None).
    """
    if answer is None:
        return 0.0
    said = normalised_vqa(answer)
    matches = sum(normalised_vqa(text) == said for text in answers)
    if len(answers) != 10:
        return min(matches / 3, 1.0)
    # `matches` of the ten subsets lack one match, the others have them all.
    return (matches * min(max(matches - 1, 0) / 3, 1.0) + (10 - matches) * min(matches / 3, 1.0)) / 10
