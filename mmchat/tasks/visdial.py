"""Dialogue about a picture or a video in questions and answers: Visual Dialog (arXiv 1611.08669) and AVSD.

Facts: {"caption": "...", "rounds": [{"question": "...", "answer": "...", "options": [...], "gt_index": 7,
"relevance": [...]}], "summary": "...", "image_id": 185565}. A last round without an answer is what a test set asks for.

Where rounds have options, each is a question of its own behind the true history, and its options are ranked. So it is
in every dialogue of Visual Dialog, which its image_id tells, a number: a round without options cannot be ranked there.
Any other dialogue without options, as those of AVSD, has its last answer generated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.cider import cider_d
from mmchat.metrics.ranking import CUTS, Place, integer_ranks, ndcg, place_of, ranking_scores
from mmchat.metrics.text import normalised, score_chat, score_texts, token_f1
from mmchat.tasks.facts import text_of
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.vqa import asked

OPENINGS = (
    "Here is what is known: {}",
    "It was described so: {}",
    "The caption says: {}",
    "Caption: {}",
    "Somebody wrote about this: {}",
    "This is said about it: {}",
    "In short: {}",
    "What is shown: {}",
    "A description to begin with: {}",
    "We start from this: {}",
    "One person summed it up so: {}",
    "Described in a sentence: {}",
    "You know this much: {}",
    "I was told: {}",
)

_OF_RANKS = ("options", "gt_index", "relevance")  # what only a round has whose options are ranked


class VisDial:
    """History as turns: the caption stands in front of the first question."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return Conversation(_turns(record, _rounds(record), rng))

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One for every round, or for the last where its answer is not published or nothing is to be ranked.

        A round that cannot be ranked is a question without candidates, and its problem says why; a dense annotation
        that cannot be used is its warning. `protocol.history` False leaves out the caption and all rounds before the
        one that is asked.
        """
        rounds = _listed(record)
        if not _has_ranks(record, rounds):
            return [_generated(record, protocol)]
        num_readable = next((i for i in range(len(rounds)) if _fault(rounds, i)), len(rounds))
        turns = _turns(record, rounds[:num_readable], protocol.rng(record.key))
        is_test = _is_test(rounds)
        questions = []
        for i in range(len(rounds) - 1 if is_test else 0, len(rounds)):
            facts = {"image_id": record.facts.get("image_id"), "round": i + 1, "is_test": is_test}
            own = Record(f"{record.key}#{i + 1}", facts, record.media)
            if i < num_readable:
                question = _ranked(own, rounds[i], turns[: 2 * i + 1], protocol)
            else:
                problem = _fault(rounds, i) or f"unreadable history: round {num_readable + 1}"
                question = Question(own, Conversation((Turn("user", record.media),)), problem=problem)
            if isinstance(rounds[i], dict) and "relevance" in rounds[i]:
                if fault := _relevance_fault(rounds[i]["relevance"], len(question.candidates)):
                    question = replace(question, warning=fault)
                else:
                    facts["relevance"] = rounds[i]["relevance"]
            questions.append(question)
        return questions

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Reciprocal rank of the right candidate; token F1 of a generated answer. 0 where none is known."""
        if _is_ranked(question):
            place = _place(answer, question)
            return place.reciprocal_rank if place else 0.0
        return token_f1(answer.said, [_text(question)]) if question.reference else 0.0

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """MRR, R@1, R@5, R@10, mean rank and NDCG; of generated answers what chat is scored by, exact match, CIDEr-D.

        Whatever is not answered has the last of `num_candidates` ranks, and an NDCG of 0. Rounds without a published
        answer are not scored. NDCG is over the rounds with a dense annotation; those where nothing is relevant are left
        out of it and counted, as are annotations that cannot be used. In a set with both kinds of question either is
        scored by itself, `num_generated` counts the generated ones, and what could not be read counts in both.
        """
        pairs = list(zip(answers, questions, strict=True))
        generated = [pair for pair in pairs if pair[1] is None or not _is_ranked(pair[1])]
        ranked = [pair for pair in pairs if pair[1] is None or _is_ranked(pair[1])]
        if all(question is None for _, question in generated):
            return _scored_ranks(ranked, protocol)
        scores = _scored_texts(generated)
        if all(question is None for _, question in ranked):
            return scores
        return scores | {"num_generated": scores["num_scored"]} | _scored_ranks(ranked, protocol)

    def submission(self, answers: Sequence[Answer], questions: Sequence[Question | None]) -> list[dict[str, Any]]:
        """What EvalAI's Visual Dialog challenge takes: for every round the rank, 1 the best, of each candidate.

        Ties are broken at random, a round that was not answered is one tie, and one without candidates is left out.
        """
        rows = []
        for answer, question in zip(answers, questions, strict=True):
            if question is None or not question.candidates:
                continue
            facts, num = question.record.facts, len(question.candidates)
            scores = answer.likelihoods if _is_answered(answer, question) else (0.0,) * num
            ranks = integer_ranks(scores, question.record.key)
            rows.append({"image_id": facts.get("image_id"), "round_id": facts["round"], "ranks": ranks})
        return rows


# ---- rounds ---------------------------------------------------------------------------------------------------------


def _listed(record: Record) -> list[Any]:
    rounds = record.facts.get("rounds")
    if not isinstance(rounds, list) or not rounds:
        raise SampleError("no rounds", f"{record.key}: wanted a list of rounds, found {rounds!r:.200}")
    return rounds


def _rounds(record: Record) -> list[dict[str, Any]]:
    """Rounds in order; only the last may lack its answer. Raises SampleError."""
    rounds = _listed(record)
    for number in range(len(rounds)):
        if fault := _fault(rounds, number):
            reason, _, found = fault.partition(": ")
            raise SampleError(reason, f"{record.key} round {number + 1}: {found}")
    return rounds


def _fault(rounds: Sequence[Any], number: int) -> str:
    """Why a round cannot be phrased; "" where it can."""
    match one := rounds[number]:
        case {"question": str(question), "answer": str(answer)} if question.strip() and answer.strip():
            return ""
        case {"question": str(question)} if question.strip() and "answer" not in one and number == len(rounds) - 1:
            return ""
    return f"unreadable round: {one!r:.200}"


def _turns(record: Record, rounds: Sequence[dict[str, Any]], rng: random.Random) -> tuple[Turn, ...]:
    opening = rng.choice(OPENINGS).format(text_of(record, "caption").strip()) + "\n"
    turns = []
    for number, one in enumerate(rounds):
        question = asked(one["question"])  # VisDial's questions have no mark
        turns.append(Turn("user", (*record.media, opening + question) if number == 0 else (question,)))
        if "answer" in one:
            turns.append(Turn("assistant", (one["answer"],)))
    return tuple(turns)


def _is_test(rounds: Sequence[Any]) -> bool:
    """Whether the right answer of the last round is not published. Where another's is, that of the last is missing."""
    if not all(isinstance(one, dict) for one in rounds):
        return False
    return "answer" not in rounds[-1] and not any("gt_index" in one for one in rounds)


# ---- questions ------------------------------------------------------------------------------------------------------


def _has_ranks(record: Record, rounds: Sequence[Any]) -> bool:
    """Whether the rounds are ranked; without options that cannot be done, and is said of each."""
    is_visdial = type(record.facts.get("image_id")) is int
    return is_visdial or any(isinstance(one, dict) and not one.keys().isdisjoint(_OF_RANKS) for one in rounds)


def _ranked(own: Record, one: dict[str, Any], turns: tuple[Turn, ...], protocol: Protocol) -> Question:
    """The question that turns end with. Adds to the facts what the score needs, or why there is nothing to rank."""
    facts = own.facts
    if not protocol.history:
        turns = (Turn("user", (*own.media, asked(one["question"]))),)
    question = Question(own, Conversation(turns), (one["answer"],) if "answer" in one else ())
    if problem := _candidates_fault(one, facts["is_test"], protocol):
        return replace(question, problem=problem)
    if not facts["is_test"]:
        facts["gt_index"] = one["gt_index"]
    return replace(question, candidates=tuple(one["options"]))


def _candidates_fault(one: dict[str, Any], is_test: bool, protocol: Protocol) -> str:
    """Why the options of a round cannot be ranked; "" where they can."""
    options, right, answer = one.get("options"), one.get("gt_index"), one.get("answer")
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        return f"no candidates: wanted texts under 'options', found {options!r:.100}"
    if len(options) < protocol.num_candidates:
        return f"too few candidates: {len(options)}, the protocol wants {protocol.num_candidates}"
    if is_test:
        return ""
    if type(right) is not int or not 0 <= right < len(options):
        return f"no right candidate: gt_index is {right!r:.100}, there are {len(options)} candidates"
    if answer is not None and normalised(options[right]) != normalised(answer):
        return f"gt_index names another answer: {options[right]!r:.100}, the round's own is {answer!r:.100}"
    return ""


def _relevance_fault(relevance: Any, num_candidates: int) -> str:
    """Why a dense annotation cannot be used. That of a round without candidates is any list: it counts, as 0."""
    if not isinstance(relevance, list):
        return f"unusable dense annotation: wanted a list of relevances, found {relevance!r:.100}"
    if num_candidates and len(relevance) != num_candidates:
        return f"unusable dense annotation: {len(relevance)} relevances of {num_candidates} candidates"
    for found in relevance:
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < math.inf:
            return f"unusable dense annotation: wanted relevances of 0 or more, found {found!r:.100}"
    return ""


def _generated(record: Record, protocol: Protocol) -> Question:
    """The last question of a dialogue without candidates."""
    rounds = _rounds(record)
    turns = _turns(record, rounds, protocol.rng(record.key))[: 2 * len(rounds) - 1]
    if not protocol.history:
        turns = (Turn("user", (*record.media, asked(rounds[-1]["question"]))),)
    # Facts of the record's own must not be taken for those of a ranked round.
    own = Record(record.key, {"image_id": record.facts.get("image_id")}, record.media)
    return Question(own, Conversation(turns), (rounds[-1]["answer"],) if "answer" in rounds[-1] else ())


# ---- scores ---------------------------------------------------------------------------------------------------------

_Pairs = Sequence[tuple[Answer, Question | None]]


def _scored_texts(pairs: _Pairs) -> dict[str, float]:
    """Scores of generated answers. A question of a test set has no reference; one that could not be read counts."""
    pairs = [(answer, question) for answer, question in pairs if question is None or question.reference]
    if not pairs:
        return {"num_scored": 0}
    said = [answer.said for answer, _ in pairs]
    wanted = [[] if question is None else [_text(question)] for _, question in pairs]
    ciders = {"cider_d": sum(cider_d(said, wanted)) / len(said)}
    return score_texts(said, wanted) | score_chat(said, wanted) | ciders | {"num_scored": len(said)}


def _scored_ranks(pairs: _Pairs, protocol: Protocol) -> dict[str, float]:
    known = [question for _, question in pairs if question is not None]
    if known and all(map(_is_unpublished, known)):
        return {"num_scored": 0}
    pairs = [(answer, one) for answer, one in pairs if one is None or not _is_unpublished(one)]
    places = [None if one is None else _place(answer, one) for answer, one in pairs]
    gains = [_gain(answer, one) for answer, one in pairs if one is not None and "relevance" in one.record.facts]
    used = [gain for gain in gains if gain is not None]
    left_out = len(gains) - len(used) + sum(bool(one.warning) for one in known)
    worst = Place(max(protocol.num_candidates - 1, *CUTS))  # in no R@k, however few candidates there are
    return (
        ranking_scores([place or worst for place in places])
        | ({"ndcg": math.fsum(used) / len(used)} if used else {})
        | {"num_ndcg_rounds": len(used), "num_ndcg_left_out": left_out}
        | {"num_scored": len(places), "num_not_answered": places.count(None)}
    )


def _is_ranked(question: Question) -> bool:
    return "round" in question.record.facts


def _is_unpublished(question: Question) -> bool:
    return bool(question.record.facts.get("is_test"))


def _is_answered(answer: Answer, question: Question) -> bool:
    return not answer.error and len(answer.likelihoods) == len(question.candidates) > 0


def _place(answer: Answer, question: Question) -> Place | None:
    """Where the right candidate stands; None where it is not known or there is no answer."""
    right = question.record.facts.get("gt_index")
    return None if right is None or not _is_answered(answer, question) else place_of(answer.likelihoods, right)


def _gain(answer: Answer, question: Question) -> float | None:
    """NDCG of a round with a dense annotation; None where nothing is relevant."""
    relevance = question.record.facts["relevance"]
    if not any(relevance):
        return None
    return ndcg(answer.likelihoods, relevance) if _is_answered(answer, question) else 0.0


def _text(question: Question) -> str:
    return "".join(part for part in question.reference if isinstance(part, str))
