"""Visual Dialog's protocol: what is asked, what is ranked, what counts, and what a server gets."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.cider import cider_d
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.visdial import OPENINGS, VisDial
from tests.sources.fixtures_dialogues import FIXTURES

TASK, PROTOCOL = VisDial(), Protocol()
IMAGE = MediaRef("image", b"", MediaHeader(40, 40))
OPTIONS = [f"answer {i}" for i in range(100)]
NO_ANSWER = Answer(error="unreadable media")


def _round(number: int, **facts: Any) -> dict[str, Any]:
    one = {"question": f"question {number}", "answer": OPTIONS[number], "options": OPTIONS, "gt_index": number}
    return {name: value for name, value in (one | facts).items() if value is not ...}


def _record(*rounds: Any, key: str = "k") -> Record:
    return Record(key, {"caption": "a cat", "rounds": list(rounds), "image_id": 7}, (IMAGE,))


def _free(*rounds: Any, **facts: Any) -> Question:
    """The only question of a dialogue that is not Visual Dialog's."""
    (question,) = TASK.questions(Record("k", {"caption": "a cat", "rounds": list(rounds), **facts}, (IMAGE,)), PROTOCOL)
    return question


def _asked(*rounds: Any, protocol: Protocol = PROTOCOL) -> list[Question]:
    return TASK.questions(_record(*rounds), protocol)


def _best(*best: int) -> Answer:
    """These candidates first, in this order, then the others in theirs."""
    order = [*best, *(i for i in range(100) if i not in best)]
    return Answer(likelihoods=tuple(-float(order.index(i)) for i in range(100)))


def _scores(answers: list[Answer], questions: list[Question | None]) -> dict[str, float]:
    return TASK.score(answers, questions, PROTOCOL)


# ---- what is asked --------------------------------------------------------------------------------------------------


def test_every_round_is_asked_behind_its_true_history() -> None:
    first, second, third = _asked(_round(0), _round(1), _round(2))
    assert [one.record.key for one in (first, second, third)] == ["k#1", "k#2", "k#3"]
    opened = Turn("user", (IMAGE, OPENINGS[0].format("a cat") + "\nquestion 0?"))
    assert first.conversation == Conversation((opened,))  # an empty history: nothing but the caption
    assert third.conversation.turns == (
        opened,
        Turn("assistant", ("answer 0",)),
        Turn("user", ("question 1?",)),
        Turn("assistant", ("answer 1",)),
        Turn("user", ("question 2?",)),
    )
    assert third.reference == ("answer 2",) and third.candidates == tuple(OPTIONS)
    assert third.record.facts == {"image_id": 7, "round": 3, "gt_index": 2, "is_test": False}
    assert second.conversation.turns == third.conversation.turns[:3]


def test_rounds_of_a_dialogue_share_one_drawn_opening() -> None:
    drawn = Protocol(phrasing="drawn")
    said = set()
    for key in map(str, range(40)):
        questions = TASK.questions(_record(_round(0), _round(1), key=key), drawn)
        assert len({one.conversation.turns[0] for one in questions}) == 1
        said.add(questions[0].conversation.turns[0].parts[1])
    assert len(said) > 8


def test_there_are_many_openings_and_the_first_stays() -> None:
    assert len(set(OPENINGS)) >= 12 and OPENINGS[0] == "Here is what is known: {}"
    assert all(one.count("{}") == 1 for one in OPENINGS)


def test_without_history_nothing_said_before_is_there() -> None:
    questions = _asked(_round(0), _round(1), protocol=Protocol(history=False))
    assert [one.conversation.turns for one in questions] == [
        (Turn("user", (IMAGE, "question 0?")),),
        (Turn("user", (IMAGE, "question 1?")),),
    ]
    assert all(one.candidates == tuple(OPTIONS) for one in questions)


def test_the_file_of_the_protocol_is_the_default() -> None:
    assert Protocol(**yaml.safe_load(Path("configs/protocols/visdial.yaml").read_text())) == PROTOCOL


def test_questions_that_need_history_fall_without_it() -> None:
    """A scorer that prefers what it has been told; each right answer has been said two rounds before."""

    def told(question: Question) -> Answer:
        text = " ".join(part for turn in question.conversation.turns for part in turn.parts if isinstance(part, str))
        return Answer(likelihoods=tuple(0.0 if option in text else -1.0 for option in question.candidates))

    names = [f"name {i:02d}" for i in range(100)]
    rng = random.Random(0)
    with_history, without = (
        [
            one
            for key in range(20)
            for right in [rng.randrange(100)]
            for one in TASK.questions(
                _record(
                    {"question": "who", "answer": names[right], "options": names, "gt_index": right},
                    {"question": "again", "answer": names[right], "options": names, "gt_index": right},
                    key=str(key),
                ),
                Protocol(history=history),
            )[1:]
        ]
        for history in (True, False)
    )
    assert _scores([told(one) for one in with_history], [*with_history])["r@1"] == 1.0
    dropped = _scores([told(one) for one in without], [*without])
    assert dropped["r@1"] == pytest.approx(0.01) and dropped["mean_rank"] == 50.5


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    relevance = [1.0, 0.5] + [0.0] * 98
    questions = _asked(_round(0), _round(1, relevance=relevance), _round(6))
    answers = [_best(0), _best(4, 1, 0), _best()]  # ranks 1, 2 and 7
    found = _scores(answers, [*questions])
    assert found == {
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 7) / 3),
        "r@1": pytest.approx(1 / 3),
        "r@5": pytest.approx(2 / 3),
        "r@10": 1.0,
        "mean_rank": pytest.approx(10 / 3),
        "ndcg": pytest.approx(0.5 / math.log2(3) / (1 + 0.5 / math.log2(3))),
        "num_ndcg_rounds": 1,
        "num_ndcg_left_out": 0,
        "num_scored": 3,
        "num_not_answered": 0,
    }
    judged = [TASK.judge(answer, one, PROTOCOL) for answer, one in zip(answers, questions, strict=True)]
    assert judged == pytest.approx([1, 1 / 2, 1 / 7])


def test_a_constant_scorer_gets_the_random_rank() -> None:
    questions = _asked(*(_round(i) for i in range(10)))
    found = _scores([Answer(likelihoods=(-3.0,) * 100)] * 10, [*questions])
    assert found["mean_rank"] == 50.5 and found["r@1"] == pytest.approx(0.01)
    assert found["mrr"] == pytest.approx(math.fsum(1 / i for i in range(1, 101)) / 100)


def test_what_is_not_answered_stays_in_every_denominator() -> None:
    relevance = [1.0] + [0.0] * 99
    questions = [*_asked(_round(0, relevance=relevance), _round(0), _round(0, relevance=relevance)), None]
    too_short = Answer(likelihoods=(0.0,) * 99)
    found = _scores([_best(0), NO_ANSWER, too_short, NO_ANSWER], questions)
    assert found["mrr"] == pytest.approx((1 + 3 / 100) / 4) and found["r@10"] == 0.25
    assert found["mean_rank"] == (1 + 300) / 4 and found["ndcg"] == 0.5
    assert (found["num_scored"], found["num_not_answered"], found["num_ndcg_rounds"]) == (4, 3, 2)
    assert TASK.judge(NO_ANSWER, _asked(_round(0))[0], PROTOCOL) == 0
    assert _scores([NO_ANSWER], [None])["mean_rank"] == 100


def test_nothing_relevant_is_left_out_of_ndcg_and_counted() -> None:
    questions = _asked(_round(0, relevance=[0.0] * 100), _round(1, relevance=[0.0, 1.0] + [0.0] * 98))
    found = _scores([_best(0), _best(1)], [*questions])
    assert (found["ndcg"], found["num_ndcg_rounds"], found["num_ndcg_left_out"]) == (1.0, 1, 1)
    alone = _scores([_best(0)], [questions[0]])
    assert "ndcg" not in alone and alone["num_ndcg_left_out"] == 1 and json.dumps(alone, allow_nan=False)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"options": ...}, "no candidates: wanted texts under 'options', found None"),
        ({"options": ["a"] * 99 + [7]}, "no candidates"),
        ({"options": "abc"}, "no candidates"),
        ({"options": OPTIONS[:3]}, "too few candidates: 3, the protocol wants 100"),
        ({"options": []}, "too few candidates: 0"),
        ({"gt_index": 100}, "no right candidate: gt_index is 100, there are 100 candidates"),
        ({"gt_index": -1}, "no right candidate"),
        ({"gt_index": "7"}, "no right candidate"),
        ({"gt_index": True}, "no right candidate"),
        ({"gt_index": ...}, "no right candidate: gt_index is None"),
        ({"gt_index": 2}, "gt_index names another answer: 'answer 2', the round's own is 'answer 1'"),
    ],
)
def test_a_round_that_cannot_be_ranked_counts_and_says_why(facts: dict[str, Any], problem: str) -> None:
    bad = _round(1, **facts, relevance=[0.0, 1.0] + [0.0] * 98)
    first, second, third = _asked(_round(0), bad, _round(2))
    assert second.candidates == () and second.problem.startswith(problem)
    assert not first.problem and len(third.conversation.turns) == 5  # it is still history
    found = _scores([_best(0), Answer(error=second.problem), _best(2)], [first, second, third])
    assert found["r@1"] == pytest.approx(2 / 3) and found["mean_rank"] == pytest.approx(102 / 3)
    assert (found["num_scored"], found["num_not_answered"]) == (3, 1)
    assert (found["ndcg"], found["num_ndcg_rounds"]) == (0.0, 1)


def test_the_right_candidate_may_be_written_otherwise_than_the_answer() -> None:
    (question,) = _asked(_round(1, answer="Answer 1!"))
    assert not question.problem and question.record.facts["gt_index"] == 1


def test_fewer_candidates_are_enough_where_the_protocol_says_so() -> None:
    (question,) = _asked(_round(1, options=OPTIONS[:3]), protocol=Protocol(num_candidates=3))
    assert len(question.candidates) == 3


@pytest.mark.parametrize("bad", [None, 3, {"answer": "x"}, _round(1, question=" "), _round(1, answer=...)])
def test_an_unreadable_round_counts_with_those_that_it_is_history_of(bad: Any) -> None:
    questions = _asked(_round(0), bad, _round(2))
    problems = [one.problem for one in questions]
    assert problems[0] == "" and problems[1].startswith("unreadable round: ")
    assert problems[2] == "unreadable history: round 2"
    assert _scores([_best(0), NO_ANSWER, NO_ANSWER], [*questions])["r@1"] == pytest.approx(1 / 3)
    with pytest.raises(SampleError, match="unreadable round: k round 2: "):
        TASK.conversation(_record(_round(0), bad, _round(2)), random.Random(0))


def test_a_record_without_rounds_or_caption_cannot_be_read() -> None:
    for facts, reason in (
        ({"caption": "a"}, "no rounds"),
        ({"caption": "a", "rounds": []}, "no rounds"),
        ({"rounds": [_round(0)]}, "no caption"),
    ):
        with pytest.raises(SampleError, match=reason):
            TASK.questions(Record("k", facts, (IMAGE,)), PROTOCOL)


@pytest.mark.parametrize(
    "relevance", [[1.0] * 99, [], {"a": 1}, None, [-1.0] + [0.0] * 99, [math.nan] * 100, ["1"] * 100, [True] * 100]
)
def test_an_unusable_dense_annotation_is_named_and_the_round_is_ranked(relevance: Any) -> None:
    (question,) = _asked(_round(0, relevance=relevance))
    assert question.warning.startswith("unusable dense annotation: ") and question.candidates
    found = _scores([_best(0)], [question])
    assert found["mrr"] == 1.0 and found["num_ndcg_left_out"] == 1 and "ndcg" not in found


def test_a_dense_annotation_for_another_round_is_listed_and_the_dialogue_stays(tmp_path: Path) -> None:
    FIXTURES["visdial"](tmp_path)
    file = tmp_path / "visdial_1.0_val_dense_annotations.json"
    rows = json.loads(file.read_text())
    rows += [
        {"image_id": 284024, "round_id": 3, "gt_relevance": [1.0] * 100},
        {"image_id": 1, "round_id": 1, "gt_relevance": [1.0] * 100},
        {"image_id": 185565, "round_id": 1, "gt_relevance": [1.0] * 99},
    ]
    file.write_text(json.dumps(rows))
    found = list(read_source("visdial", Files(tmp_path), "val"))
    errors = [(one.reason, one.detail) for one in found if isinstance(one, SampleError)]
    assert ("unlike rows", "image 185565 round 1: 99 relevances of 100 candidates") in errors
    unused = [detail for reason, detail in errors if reason == "dense annotation of no round"]
    assert len(unused) == 2 and "round 3 of image 284024" in unused[0] and "round 1 of image 1" in unused[1]
    questions = [q for one in found if isinstance(one, Record) for q in TASK.questions(one, PROTOCOL)]
    assert len(questions) == 4 and [i for i, q in enumerate(questions) if "relevance" in q.record.facts] == [3]
    assert questions[0].record.facts["image_id"] == 185565


def test_candidates_that_name_nothing_do_not_cost_the_dialogue(tmp_path: Path) -> None:
    FIXTURES["visdial"](tmp_path)
    file = tmp_path / "visdial_1.0_val.json"
    content = json.loads(file.read_text())
    first, second = (content["data"]["dialogs"][i]["dialog"][0] for i in range(2))
    first["answer_options"], second["gt_index"] = [*range(99), 999], 100
    file.write_text(json.dumps(content))
    records = [one for one in read_source("visdial", Files(tmp_path), "val") if isinstance(one, Record)]
    problems = [q.problem[:18] for one in records for q in TASK.questions(one, PROTOCOL)]
    assert problems == ["too few candidates", "", "no right candidate", ""]


# ---- other sets -----------------------------------------------------------------------------------------------------


def test_a_test_set_is_ranked_and_not_scored() -> None:
    (question,) = _asked(_round(0, gt_index=...), _round(1, gt_index=..., answer=...))
    assert question.record.key == "k#2" and question.reference == () and len(question.candidates) == 100
    assert _scores([_best(3)], [question]) == {"num_scored": 0} and TASK.judge(_best(3), question, PROTOCOL) == 0
    assert _scores([_best(3), NO_ANSWER], [question, None]) == {"num_scored": 0}
    (row,) = TASK.submission([_best(3, 1)], [question])
    assert (row["image_id"], row["round_id"]) == (7, 2) and row["ranks"][:5] == [3, 2, 4, 1, 5]


def test_the_submission_is_what_the_server_takes() -> None:
    questions = [*_asked(_round(0), _round(1, options=...), _round(2)), None]
    rows = TASK.submission([_best(1), NO_ANSWER, NO_ANSWER, NO_ANSWER], questions)
    assert [(row["image_id"], row["round_id"]) for row in rows] == [(7, 1), (7, 3)]
    assert all(set(row) == {"image_id", "round_id", "ranks"} for row in rows)
    assert all(sorted(row["ranks"]) == list(range(1, 101)) for row in rows)
    assert rows[0]["ranks"][1] == 1 and rows[1]["ranks"] != list(range(1, 101))
    assert json.loads(json.dumps(rows)) == rows


def test_a_dialogue_without_options_is_answered_freely(tmp_path: Path) -> None:
    rounds = [{"question": f"question {i}", "answer": f"It is {i}."} for i in range(3)]
    question = _free(*rounds)
    assert question.record.key == "k" and question.candidates == () and question.reference == ("It is 2.",)
    assert len(question.conversation.turns) == 5
    answers = [Answer("it is 2"), Answer("no"), NO_ANSWER]
    found = _scores(answers, [question, question, None])
    assert found["exact_match"] == pytest.approx(1 / 3) == found["token_f1"] and found["num_scored"] == 3
    assert TASK.judge(answers[0], question, PROTOCOL) == 1 and TASK.judge(answers[1], question, PROTOCOL) == 0
    FIXTURES["avsd"](tmp_path)
    record = next(one for one in read_source("avsd", Files(tmp_path), "test") if isinstance(one, Record))
    (undisclosed,) = TASK.questions(record, PROTOCOL)
    assert undisclosed.reference == () and undisclosed.conversation.turns[-1].parts == ("where does it go?",)
    assert _scores([answers[0]], [undisclosed]) == {"num_scored": 0}
    assert _scores(answers[:2], [question, undisclosed])["num_scored"] == 1


def test_a_dialogue_of_visual_dialog_without_candidates_counts_as_not_answered_and_says_so() -> None:
    bare = _asked({"question": "q", "answer": "a"}, {"question": "q", "answer": "b"})
    assert [one.record.key for one in bare] == ["k#1", "k#2"] and not any(one.candidates for one in bare)
    assert all(one.problem.startswith("no candidates: wanted texts under 'options'") for one in bare)
    found = _scores([_best(0), NO_ANSWER, NO_ANSWER], [*_asked(_round(0)), *bare])
    assert found["mean_rank"] == 67.0 and found["num_not_answered"] == 2
    (lost,) = TASK.questions(Record("k", {"caption": "c", "rounds": [_round(0, options=...)]}, (IMAGE,)), PROTOCOL)
    assert lost.problem.startswith("no candidates")  # its gt_index tells that there were some


def test_generated_and_ranked_questions_are_scored_apart() -> None:
    questions = [*_asked(_round(0)), _free({"question": "q", "answer": "a cat"}), None]
    found = _scores([_best(0), Answer("a cat"), NO_ANSWER], questions)
    assert found["mean_rank"] == 50.5 and found["num_scored"] == 2 and found["num_not_answered"] == 1
    assert found["exact_match"] == found["token_f1"] == 0.5 and found["num_generated"] == 2


def test_facts_of_the_records_own_are_not_taken_for_the_tasks() -> None:
    facts = {"round": 3, "problem": "x: y", "warning": "x: y", "gt_index": 0, "is_test": True, "relevance": [1.0]}
    question = _free({"question": "q", "answer": "a cat"}, **facts)
    assert question.problem == question.warning == "" and question.reference == ("a cat",)
    assert _scores([Answer("a cat")], [question])["exact_match"] == 1.0
    assert TASK.judge(Answer("a cat"), question, PROTOCOL) == 1.0


def test_generated_answers_are_scored_by_cider_d_too() -> None:
    questions = [_free({"question": "q", "answer": text}) for text in ("it is a b", "no it c")]
    found = _scores([Answer("it is a b"), Answer("no")], [*questions])
    assert found["cider_d"] == pytest.approx(sum(cider_d(["it is a b", "no"], [["it is a b"], ["no it c"]])) / 2)
    assert _scores([Answer("it is a b"), NO_ANSWER], [*questions])["cider_d"] < found["cider_d"]


def test_an_answer_with_an_error_is_not_right_where_the_right_one_has_no_word() -> None:
    question = _free({"question": "q", "answer": "?"})
    assert _scores([NO_ANSWER], [question])["exact_match"] == 0.0
    assert _scores([Answer("?")], [question])["exact_match"] == 1.0
