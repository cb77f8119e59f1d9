"""Metrics of texts: by hand, and against slow computations of their definitions on a thousand random cases."""

from __future__ import annotations

import itertools
import math
import random
import string

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from mmchat.conversation import Region
from mmchat.metrics.cider import caption_tokens, cider_d
from mmchat.metrics.text import (
    BLEU_SIGNATURE,
    bleu_4,
    normalised,
    perplexity,
    rouge_l,
    score_chat,
    score_texts,
    token_f1,
    words_alone,
)
from mmchat.metrics.vqa import normalised_vqa, vqa_accuracy

CASES = 1000
WORDS = ("red", "dog", "runs", "on", "grass", "big", "cat", "sits")


def sentence(rng: random.Random, shortest: int = 0, longest: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))


def corpus(rng: random.Random) -> tuple[list[str], list[list[str]]]:
    """Answers that are near to one of their references, and references."""
    answers, references = [], []
    for _ in range(rng.randint(1, 5)):
        texts = [sentence(rng, 1) for _ in range(rng.randint(1, 3))]
        words = rng.choice(texts).split()
        for _ in range(rng.randint(0, 3)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        answers.append(" ".join(words[: rng.randint(0, len(words) + 3)]))
        references.append(texts)
    return answers, references


# ---- exact match and token F1 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Dog.", ["a dog"], 1.0, 1.0),
        ("theory", ["ory"], 0.0, 0.0),
        ("the", ["a"], 0.0, 0.0),  # nothing is left to compare
        ("a big red dog", ["red dog", "cat"], 0.0, 0.8),
        ("dog dog", ["dog"], 0.0, 2 / 3),
        ("it's", ["its"], 0.0, 0.0),  # ParlAI makes "it s" of it
        ("well-known", ["well known"], 0.0, 1.0),
        ("dog the cat", ["dog cat"], 0.0, 1.0),  # articles go everywhere
        ("", ["dog"], 0.0, 0.0),
        ("dog", [], 0.0, 0.0),
        ("červený pes", ["Červený Pes."], 1.0, 1.0),
    ],
)
def test_exact_match_and_token_f1(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert score_texts([answer], [references]) == {"exact_match": exact, "token_f1": pytest.approx(f1)}


def test_every_answer_counts() -> None:
    references = [["dog"], ["cat"], [], ["ox"]]
    assert score_texts(["dog", "", "cow", "ox"], references) == {"exact_match": 0.5, "token_f1": 0.5}
    for answers, some in ((["dog"], references), ([], [])):
        for metric in (score_texts, score_chat, bleu_4, rouge_l, cider_d):
            with pytest.raises(ValueError, match="one for each"):
                metric(answers, some)


def test_token_f1_is_the_overlap_of_bags_of_words() -> None:
    rng = random.Random(1)
    for _ in range(CASES):
        said = rng.choices([*WORDS, "a", "The", "red,", "-", "(dog)"], k=rng.randint(0, 7))
        wanted = rng.choices([*WORDS, "an", "DOG!"], k=rng.randint(0, 7))
        left = [plain for word in wanted if (plain := word.strip("!").lower()) not in ("a", "an", "the")]
        kept = [plain for word in said if (plain := word.strip("(),-").lower()) not in ("", "a", "an", "the")]
        common, rest = 0, list(left)
        for word in kept:
            if word in rest:
                rest.remove(word)
                common += 1
        slow = 0.0
        if common:
            precision, recall = common / len(kept), common / len(left)
            slow = 2 * precision * recall / (precision + recall)
        assert token_f1(" ".join(said), [" ".join(wanted)]) == pytest.approx(slow)


def test_words_alone_and_normalised() -> None:
    place = Region(0, point=(1.0, 2.0))
    assert words_alone(["A man ", place, " ", place, " rides\n", place, "."]) == "A man rides."
    assert words_alone(["a list [1, 2, 3]\nstays"]) == "a list [1, 2, 3] stays"
    assert normalised("  The dog?! ") == "dog" and normalised("the") == "the"


def test_a_question_without_an_answer_is_wrong_whatever_is_right() -> None:
    for right in ("", "!", "the", "..."):
        assert score_texts([None], [[right]]) == {"exact_match": 0.0, "token_f1": 0.0}
        assert set(score_chat([None], [[right]]).values()) == {0.0} and cider_d([None], [[right]]) == [0.0]
        assert vqa_accuracy(None, [right] * 10) == 0.0
    assert token_f1(None, ["dog"]) == 0.0
    assert score_texts([None, "dog"], [["..."], ["dog"]]) == {"exact_match": 0.5, "token_f1": 0.5}


# ---- scripts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [("\u0915\u093f", "\u0915\u0940"), ("\u0e01\u0e34", "\u0e01\u0e35")])
def test_vowels_that_are_written_as_marks_tell_words_apart(one: str, other: str) -> None:
    """Devanagari and Thai: the same consonant with two vowels."""
    references = [[f"{other} b"], ["c d"]]
    assert rouge_l([f"{one} b"], references[:1]) == 0.5 and rouge_l([f"{other} b"], references[:1]) == 1.0
    assert caption_tokens(f"{one} b") == [one, "b"]
    assert cider_d([f"{one} b", "x"], references)[0] < cider_d([f"{other} b", "x"], references)[0]
    assert score_texts([one], [[other]]) == {"exact_match": 0.0, "token_f1": 0.0}


def test_a_letter_and_its_accent_may_be_one_sign_or_two() -> None:
    one, two = "the CAF\u00c9 is a\u0331 b", "the CAFE\u0301 is a\u0331 b"
    assert score_texts([one], [[two]]) == {"exact_match": 1.0, "token_f1": 1.0}
    assert score_chat([one], [[two]]) == {"token_f1": 1.0, "bleu_4": pytest.approx(1.0), "rouge_l": 1.0}
    assert caption_tokens(one) == caption_tokens(two) == ["the", "caf\u00e9", "is", "a\u0331", "b"]
    assert vqa_accuracy("caf\u00e9", ["cafe\u0301"] * 3) == 1.0
    assert token_f1("a\u0331", ["a"]) == token_f1("a\u0331", ["b"]) == 0.0 and token_f1("a\u0331", ["a\u0331"]) == 1.0


# ---- BLEU-4 and ROUGE-L ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "references", "bleu"),
    [
        (["a b c d e"], [["a b c d e"]], 1.0),
        (["A B C D e"], [["a b c d f"]], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        (["a b c d"], [["a b c d e"]], math.exp(1 - 5 / 4)),
        (["a b c d", "x"], [["a b c d"], ["y"]], (4 / 5 * 1 * 1 * 1) ** 0.25),
        (["a b c x"], [["a b c d"]], (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25),  # no 4-gram: half a match instead
        (["a b c"], [["a b c"]], 0.0),  # no 4-gram at all
        (["x x x x"], [["a b c d"]], 0.0),
        (["a b c d", "e f g h"], [["a b c d", "e"], []], 0.5),  # what could not be read halves it
        (["a"], [[]], 0.0),
    ],
)
def test_bleu_by_hand(answers: list[str], references: list[list[str]], bleu: float) -> None:
    assert bleu_4(answers, references) == pytest.approx(bleu)


def test_the_signature_is_what_sacrebleu_says() -> None:
    scorer = BLEU(lowercase=True)
    scorer.corpus_score(["a"], [["a"]])
    assert BLEU_SIGNATURE in str(scorer.get_signature())


def slow_bleu(answers: list[str], references: list[list[str]]) -> float:
    logs, halves, any_right = [], 1, False
    for n in range(1, 5):
        right = total = 0
        for answer, texts in zip(answers, references, strict=True):
            said = [answer.split()[i : i + n] for i in range(len(answer.split()) - n + 1)]
            total += len(said)
            for ngram in {tuple(one) for one in said}:
                most = max(
                    sum(text.split()[i : i + n] == list(ngram) for i in range(len(text.split()))) for text in texts
                )
                right += min(said.count(list(ngram)), most)
        if total == 0:
            return 0.0
        any_right |= right > 0
        if right == 0:
            halves *= 2
        logs.append(math.log(right / total if right else 1 / (halves * total)))
    if not any_right:
        return 0.0
    said_length = sum(len(answer.split()) for answer in answers)
    wanted_length = 0
    for answer, texts in zip(answers, references, strict=True):
        wanted_length += min((abs(len(t.split()) - len(answer.split())), len(t.split())) for t in texts)[1]
    penalty = math.exp(1 - wanted_length / said_length) if said_length < wanted_length else 1.0
    return penalty * math.exp(sum(logs) / 4)


def slow_rouge(answer: str, text: str) -> float:
    """The longest common subsequence by trying all subsequences, the longest first."""
    said, wanted = answer.split(), text.split()
    for length in range(min(len(said), len(wanted)), 0, -1):
        if set(itertools.combinations(said, length)) & set(itertools.combinations(wanted, length)):
            return 2 * length / (len(said) + len(wanted))
    return 0.0


def test_bleu_is_its_definition() -> None:
    rng = random.Random(2)
    for _ in range(CASES):
        answers, references = corpus(rng)
        assert bleu_4(answers, references) == pytest.approx(slow_bleu(answers, references), abs=1e-9)


def test_rouge_is_its_definition() -> None:
    rng = random.Random(3)
    for _ in range(CASES):
        answer, texts = sentence(rng, 0, 7), [sentence(rng, 0, 7) for _ in range(rng.randint(1, 3))]
        slow = max(slow_rouge(answer, text) for text in texts)
        assert rouge_l([answer], [texts]) == pytest.approx(slow)


def test_rouge_by_hand_and_in_any_script() -> None:
    assert rouge_l(["The cat!", "dog"], [["the black cat"], []]) == pytest.approx(0.8 / 2)
    assert rouge_l(["ČERVENÝ pes"], [["červený pes"]]) == 1.0
    assert rouge_l(["красная собака"], [["красная кошка"]]) == 0.5
    scores = score_chat(["a b c d e"], [["a b c d e"]])
    assert scores == {"token_f1": 1.0, "bleu_4": pytest.approx(1.0), "rouge_l": 1.0}


# ---- perplexity -----------------------------------------------------------------------------------------------------


def test_perplexity_is_over_all_tokens() -> None:
    # One token of probability 1/2 and three of 1/8: the geometric mean, not the mean of 2 and 8.
    assert perplexity([(math.log(1 / 2), 1), (3 * math.log(1 / 8), 3)]) == pytest.approx((2 * 8**3) ** (1 / 4))
    assert perplexity([(-1e6, 1)]) == math.inf
    with pytest.raises(ValueError, match="at least one"):
        perplexity([])


def test_perplexity_is_the_inverse_geometric_mean() -> None:
    rng = random.Random(4)
    for _ in range(CASES):
        texts = [[rng.uniform(0.01, 1) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 5))]
        likelihoods = [(sum(map(math.log, text)), len(text)) for text in texts]
        probabilities = [p for text in texts for p in text]
        assert perplexity(likelihoods) == pytest.approx(math.prod(probabilities) ** (-1 / len(probabilities)))


# ---- CIDEr-D --------------------------------------------------------------------------------------------------------


def test_caption_tokens() -> None:
    text = "A man's T-shirt isn't 3.5 metres (really)! They\u2019re \"fine\", don't worry..."
    assert caption_tokens(text) == [
        *("a", "man", "'s", "t-shirt", "is", "n't", "3.5", "metres", "really", "they", "'re", "fine", "do", "n't"),
        "worry",
    ]
    assert caption_tokens(" .,; ") == []


def test_cider_by_hand() -> None:
    # Exact: cosines of 1 for the two lengths of n-gram that there are, 0 for the others.
    assert cider_d(["a b", "c d"], [["a b"], ["c d"]]) == pytest.approx([5.0, 5.0])
    # Two references, one of them another word: the mean.
    assert cider_d(["a b", "x"], [["a b"], ["c d", "x"]]) == pytest.approx([5.0, 1.25])
    # Repeated words: clipped at the reference's count, and one word longer.
    shared = 10 * math.exp(-1 / 72) / 4
    assert cider_d(["a a", "b"], [["a"], ["b"]]) == pytest.approx([shared / 2, 2.5])
    # A word that every document has weighs nothing; so does everything in a set of one.
    assert cider_d(["a", "a"], [["a b"], ["a c"]]) == [0.0, 0.0]
    assert cider_d(["a b"], [["a b"]]) == [0.0]
    # No answer, no references; these are no document.
    assert cider_d(["", "c", "a b"], [["a"], ["c"], []]) == pytest.approx([0.0, 2.5, 0.0])


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def slow_cider(answers: list[str], references: list[list[str]]) -> list[float]:
    """With whole vectors over the vocabulary of each n."""
    documents = [texts for texts in references if texts]
    scores = np.zeros(len(answers))
    for n in range(1, 5):
        everything = [*answers, *(text for texts in references for text in texts)]
        vocabulary = sorted({gram for text in everything for gram in ngrams(text, n)})

        def vector(text: str, n: int = n, vocabulary: list = vocabulary) -> np.ndarray:
            return np.array([ngrams(text, n).count(gram) for gram in vocabulary], float)

        found = sum((sum(vector(text) for text in texts) > 0).astype(float) for texts in documents)
        weight = np.log(len(documents)) - np.log(np.maximum(found, 1))
        for i, (answer, texts) in enumerate(zip(answers, references, strict=True)):
            for text in texts:
                a, b = vector(answer) * weight, vector(text) * weight
                if a.any() and b.any():
                    cosine = np.minimum(a, b) @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    difference = len(answer.split()) - len(text.split())
                    scores[i] += 10 / 4 / len(texts) * cosine * math.exp(-(difference**2) / 72)
    return scores.tolist()


def test_cider_is_its_definition() -> None:
    rng = random.Random(5)
    for _ in range(CASES):
        answers, references = corpus(rng)
        if rng.random() < 0.2 and len(references) > 1:
            references[0] = []
        assert cider_d(answers, references) == pytest.approx(slow_cider(answers, references), abs=1e-9)


# ---- VQAv2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The two dogs.", "2 dogs"),
        ("none", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("I'm", "i'm"),
        ("Im", "i'm"),
        ("they'dve", "they'd've"),
        ("somebodyd", "somebody'd"),
        ("shed", "shed"),
        ("its", "its"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, it is", "yes it is"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("u.s.a.", "usa"),
        ("t-shirt", "t shirt"),
        ("red\nand\tblue ", "red and blue"),
        ("a", ""),
        ("." * 40 + "x", "x"),
        ("", ""),
    ],
)
def test_vqa_normalisation(answer: str, plain: str) -> None:
    assert normalised_vqa(answer) == plain


def slow_vqa(answer: str) -> str:
    """Letter by letter."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    digits = string.digits
    thousands = any(f"{a},{b}" in answer for a in digits for b in digits)
    letters = []
    for letter in answer:
        if letter in set(';/[]"{}()=+\\_-><@`,?!'):
            outer = letter + " " in answer or " " + letter in answer
            letters += [] if outer or thousands else [" "]
        else:
            letters.append(letter)
    kept = [x for x, after in itertools.zip_longest(letters, letters[1:], fillvalue=" ") if x != "." or after in digits]
    words = []
    for word in "".join(kept).lower().split():
        if word in ("a", "an", "the"):
            continue
        numbers = {"none": "0", "two": "2", "ten": "10"}
        words.append({"dont": "don't", "isnt": "isn't", "im": "i'm"}.get(word, numbers.get(word, word)))
    return " ".join(words)


def test_vqa_normalisation_is_its_rules() -> None:
    rng = random.Random(6)
    pieces = ["two", "The", "a", "dont", "Isnt", "Im", "isn't", "3.5", "1,000", "blue", "None", "ten", "x", "7"]
    for _ in range(CASES):
        text = "".join(rng.choice([*pieces, *pieces, " ", " ", " ", *";/[]{}=+_-><@,?!.\n"]) for _ in range(9))
        assert normalised_vqa(text) == slow_vqa(text), text


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_with_ten_annotators(matches: int, accuracy: float) -> None:
    assert vqa_accuracy("Yes.", ["yes"] * matches + ["no"] * (10 - matches)) == pytest.approx(accuracy)


def test_vqa_accuracy_with_another_number() -> None:
    assert vqa_accuracy("yes", ["yes"]) == pytest.approx(1 / 3)
    assert vqa_accuracy("yes", ["yes"] * 3) == 1.0
    assert vqa_accuracy("yes", []) == 0.0


def test_vqa_accuracy_is_the_mean_over_those_left_out() -> None:
    rng = random.Random(7)
    for _ in range(CASES):
        answers = rng.choices(["red", "Red!", "the blue", "two"], weights=[rng.random() + 0.1 for _ in range(4)], k=10)
        said = rng.choice(["red", "blue", "2", "green"])
        shares = []
        for left_out in range(10):
            others = answers[:left_out] + answers[left_out + 1 :]
            shares.append(min(1.0, sum(slow_vqa(other) == said for other in others) / 3))
        assert vqa_accuracy(said, answers) == pytest.approx(sum(shares) / 10)
