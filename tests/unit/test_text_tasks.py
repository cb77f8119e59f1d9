"""Caption, instruct, transcribe and VQA in an evaluation: what is asked, and how answers are scored."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from mmchat.conversation import MediaHeader, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.tasks import TASKS
from mmchat.tasks.caption import PROMPTS
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.transcribe import PROMPTS as TRANSCRIBE_PROMPTS
from mmchat.tasks.vqa import ABOUT, IN_WORDS, SHORT, WITH_PLACES, final_answer

FIRST = Protocol()
PICTURE = (MediaRef("image", b"x"),)
BOX = {"media": 0, "box": [1, 2, 3, 4]}


def questions_of(task: str, *facts: dict[str, Any], protocol: Protocol = FIRST) -> list[Question]:
    records = [Record(f"k{i}", one, PICTURE) for i, one in enumerate(facts)]
    return [question for record in records for question in TASKS[task].questions(record, protocol)]


def score(task: str, answers: Sequence[str], questions: Sequence[Question | None], **protocol: Any) -> dict[str, float]:
    said = [Answer(text) if text else Answer(error="no answer") for text in answers]
    return TASKS[task].score(said, questions, Protocol(**protocol))


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"turns": [{"role": role, "parts": parts} for role, parts in pairs]}


@pytest.mark.parametrize(
    "prompts", [*PROMPTS.values(), TRANSCRIBE_PROMPTS, SHORT, ABOUT, WITH_PLACES, IN_WORDS], ids=lambda p: p[0]
)
def test_there_are_a_dozen_prompts_and_none_twice(prompts: tuple[str, ...]) -> None:
    assert len(prompts) >= 12 and len(set(prompts)) == len(prompts)


def test_first_prompts_are_fixed_and_drawn_ones_depend_on_the_key_alone() -> None:
    facts = [{"captions": ["One.", "Two."]}] * 20
    prompts = {str(one.conversation.turns[-1].parts[-1]) for one in questions_of("caption", *facts)}
    assert prompts == {"What is in this picture?"}
    drawn = questions_of("caption", *facts, protocol=Protocol(phrasing="drawn"))
    assert len({str(one.conversation.turns[-1].parts[-1]) for one in drawn}) > 5
    assert drawn == questions_of("caption", *facts, protocol=Protocol(phrasing="drawn"))
    assert drawn != questions_of("caption", *facts, protocol=Protocol(phrasing="drawn", seed=1))


# ---- caption --------------------------------------------------------------------------------------------------------


def test_captions_are_compared_with_all_references() -> None:
    facts = [{"captions": ["a dog on the grass", "the dog"]}, {"caption": "two cats sleep in a bed"}]
    questions = questions_of("caption", *facts)
    assert [one.reference for one in questions] == [("a dog on the grass",), ("two cats sleep in a bed",)]
    best = score("caption", ["The dog.", "Two cats sleep in a bed."], questions)
    assert best["exact_match"] == best["token_f1"] == best["rouge_l"] == 1.0
    assert best["cider"] == pytest.approx((10 + cider_of_a_short_answer()) / 2)
    halved = score("caption", ["The dog.", "Two cats sleep in a bed."] * 2, [*questions, None, None])
    for name in ("exact_match", "token_f1", "rouge_l", "cider", "bleu_4"):
        assert halved[name] == pytest.approx(best[name] / 2), name
    assert set(score("caption", ["", ""], questions).values()) == {0.0}
    assert TASKS["caption"].judge(Answer("dog"), questions[0], FIRST) == 1.0
    with pytest.raises(ValueError, match="one for each"):
        score("caption", ["x"], questions)


def cider_of_a_short_answer() -> float:
    """Of "the dog" beside "a dog on the grass" and "the dog", in a set of two; all but "a" weigh log 2.

    The first reference has both words among four that weigh, not the pair, and is three words longer.
    """
    first = 10 * 2 / (2**0.5 * 4**0.5) / 4 * math.exp(-9 / 72)
    second = 10 * 2 / 4
    return (first + second) / 2


# ---- instruct -------------------------------------------------------------------------------------------------------


def test_instruct_asks_for_the_last_answer_and_compares_words() -> None:
    shown = turns(
        ("user", [{"media": 0}, {"text": "?"}]),
        ("assistant", [{"text": "first"}]),
        ("user", [{"text": "And?"}]),
        ("assistant", [{"text": "The man "}, {"region": BOX}, {"text": " waves."}]),
    )
    (question,) = questions_of("instruct", shown)
    assert len(question.conversation.turns) == 3 and question.reference[1] == Region(0, box=(1.0, 2.0, 3.0, 4.0))
    said = "The man [0.1,0.2,0.3,0.4] waves."
    assert placed(question, said, (0.9, 2.0, 3.0, 4.0)) == {"exact_match": 1.0, "token_f1": 1.0}
    assert placed(question, said, (5.0, 6.0, 7.0, 8.0)) == {"exact_match": 0.0, "token_f1": 1.0}
    assert placed(question, "The man waves.") == {"exact_match": 0.0, "token_f1": 1.0}
    judge = TASKS["instruct"].judge
    right = (Region(0, box=(1.0, 2.0, 3.0, 4.0)),)
    assert judge(Answer("man [0.1,0.2,0.3,0.4]", right), question, FIRST) == pytest.approx((2 / 3 + 1) / 2)
    assert judge(Answer("man [0.5,0.5]", (Region(0, point=(2.0, 3.0)),)), question, FIRST) == pytest.approx(1 / 3)
    (question,) = questions_of("instruct", turns(("user", [{"text": "?"}])))
    assert question.problem.startswith("no question")


def placed(
    question: Question, said: str, *boxes: tuple[float, float, float, float], iou: float = 0.5
) -> dict[str, float]:
    regions = tuple(Region(0, box=box) for box in boxes)
    return TASKS["instruct"].score([Answer(said, regions)], [question], Protocol(iou=iou))


def test_an_answer_of_places_alone_is_right_where_they_are() -> None:
    (question,) = questions_of("instruct", turns(("user", [{"media": 0}]), ("assistant", [{"region": BOX}])))
    right, other = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 9.0, 9.0)
    assert placed(question, "[0.1,0.2,0.3,0.4]", right)["exact_match"] == 1.0
    assert placed(question, "[0.9,0.9,1.0,1.0]", other)["exact_match"] == 0.0
    assert placed(question, "[0.1,0.2,0.3,0.4] [0.9,0.9,1.0,1.0]", right, other)["exact_match"] == 0.0
    assert placed(question, "[0.1,0.2,0.3,0.4]", (1.0, 2.0, 3.0, 5.0), iou=0.7)["exact_match"] == 0.0
    assert placed(question, "")["exact_match"] == 0.0
    judge = TASKS["instruct"].judge
    assert judge(Answer("[0.1,0.2,0.3,0.4]", (Region(0, box=right),)), question, FIRST) == 1.0
    assert judge(Answer("[0.9,0.9,1.0,1.0]", (Region(0, box=other),)), question, FIRST) == 0.0
    in_another = Answer("#2[0.1,0.2,0.3,0.4]", (Region(1, box=right),))
    assert TASKS["instruct"].score([in_another], [question], FIRST)["exact_match"] == 0.0


def test_a_point_is_found_where_it_is_near() -> None:
    picture = (MediaRef("image", b"x", MediaHeader(100, 50)),)
    facts = turns(("user", [{"media": 0}]), ("assistant", [{"region": {"media": 0, "point": [40, 20]}}]))
    (question,) = TASKS["instruct"].questions(Record("k", facts, picture), FIRST)
    for x, exact in ((42.0, 1.0), (44.0, 0.0)):  # squares of 10 pixels: an IoU of 8 / 12, and of 6 / 14
        said = Answer("[0.4,0.4]", (Region(0, point=(x, 20.0)),))
        assert TASKS["instruct"].score([said], [question], FIRST)["exact_match"] == exact


@pytest.mark.parametrize(
    ("right", "said", "exact"),
    [("[1, 2, 3]", "[4]", 0.0), ("It is [1-5].", "It is [7].", 0.0), ("[1, 2,  3]", "[1, 2, 3]", 1.0)],
)
def test_numbers_in_brackets_are_no_regions(right: str, said: str, exact: float) -> None:
    (question,) = questions_of("instruct", turns(("user", [{"text": "?"}]), ("assistant", [{"text": right}])))
    assert TASKS["instruct"].score([Answer(said, num_failed=1)], [question], FIRST)["exact_match"] == exact
    with_place = [{"text": right + " "}, {"region": BOX}]
    (question,) = questions_of("instruct", turns(("user", [{"media": 0}]), ("assistant", with_place)))
    answer = Answer(f"{said} [0.1,0.2,0.3,0.4]", (Region(0, box=(1.0, 2.0, 3.0, 4.0)),), num_failed=1)
    assert TASKS["instruct"].score([answer], [question], FIRST)["exact_match"] == exact


# ---- questions without an answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "facts"),
    [
        ("instruct", turns(("user", [{"media": 0}]), ("assistant", [{"region": BOX}]))),
        ("instruct", turns(("user", [{"media": 0}]), ("assistant", [{"text": "."}]))),
        ("caption", {"caption": "!"}),
        ("vqa", {"question": "What?", "answers": ["..."]}),
        ("vqa", {"question": "What?", "answers": ["the"] * 10}),
        ("transcribe", {"text": "one"}),
    ],
)
def test_an_answer_with_an_error_is_wrong_whatever_is_right(task: str, facts: dict[str, Any]) -> None:
    questions = questions_of(task, facts)
    text = "".join(part for part in questions[0].reference if isinstance(part, str))
    for answer in (Answer(error="unreadable media: x"), Answer(text, error="unreadable media: x")):
        assert TASKS[task].judge(answer, questions[0], FIRST) == 0.0
        for match in ("exact", "vqa_v2"):
            scores = TASKS[task].score([answer], questions, Protocol(match=match))
            assert scores.pop("word_error_rate", 1.0) == scores.pop("character_error_rate", 1.0) == 1.0
            assert scores and set(scores.values()) == {0.0}


# ---- transcribe -----------------------------------------------------------------------------------------------------


def test_an_unread_recording_counts_as_one_of_mean_length_all_wrong() -> None:
    questions = questions_of("transcribe", {"text": "ONE TWO THREE"}, {"text": "It's four."})
    assert questions[0].reference == ("one two three",)
    scores = score("transcribe", ["one too three", "It\u2019s four", ""], [*questions, None])
    wanted = {"word_error_rate": (1 + 2.5) / 7.5, "character_error_rate": (1 + 11) / 33, "exact_match": 1 / 3}
    assert scores == pytest.approx(wanted)
    nothing = {"word_error_rate": 1.0, "character_error_rate": 1.0, "exact_match": 0.0}
    assert score("transcribe", ["", ""], questions) == score("transcribe", ["x"], [None]) == nothing
    judge = TASKS["transcribe"].judge
    assert judge(Answer("one too three"), questions[0], FIRST) == pytest.approx(2 / 3)
    assert judge(Answer("a b c d e f g"), questions[0], FIRST) == 0.0


def test_wrong_vowels_are_wrong_words() -> None:
    """Devanagari writes vowels as marks; a letter with its accent may be one sign or two."""
    questions = questions_of("transcribe", {"text": "\u0915\u0940 \u092e\u093e"}, {"text": "le caf\u00e9"})
    scores = score("transcribe", ["\u0915\u093f \u092e\u0940", "Le cafe\u0301."], questions)
    assert scores == {"word_error_rate": 0.5, "character_error_rate": pytest.approx(2 / 12), "exact_match": 0.5}


# ---- VQA ------------------------------------------------------------------------------------------------------------


def test_each_question_is_asked_alone() -> None:
    more = [{"question": "Who", "answers": ["a man"]}, {"question": "Where?", "answers": ["here"]}]
    questions = questions_of("vqa", {"question": "What", "answers": ["dog"], "more": more})
    assert [one.record.key for one in questions] == ["k0", "k0#1", "k0#2"]
    assert [one.reference for one in questions] == [("dog",), ("a man",), ("here",)]
    for one, text in zip(questions, ["What?", "Who?", "Where?"], strict=True):
        assert [turn.parts for turn in one.conversation.turns] == [(*PICTURE, f"{text}{SHORT[0]}")]


def test_a_bad_question_costs_itself_alone() -> None:
    good = {"question": "Who", "answers": ["a man"]}
    questions = questions_of("vqa", good | {"more": [{"question": "Where?", "answers": []}, good, 3, good]})
    assert [one.record.key for one in questions] == ["k0", "k0#1", "k0#2", "k0#3", "k0#4"]
    assert [one.problem.partition(":")[0] for one in questions] == ["", "no answer", "", "no question", ""]
    assert "k0#1" in questions[1].problem and questions[1].record.media == PICTURE
    for match, name in (("exact", "exact_match"), ("vqa_v2", "accuracy")):
        right = score("vqa", ["a man", "", "a man", "", "a man"], questions, match=match)[name]
        assert right == pytest.approx(0.6 if match == "exact" else 0.2)
    assert TASKS["vqa"].judge(Answer(error="x"), questions[1], FIRST) == 0.0
    first_bad = questions_of("vqa", {"question": "?", "answers": [], "more": [good]})
    assert [bool(one.problem) for one in first_bad] == [True, False]
    assert [bool(one.problem) for one in questions_of("vqa", good | {"more": "x"})] == [False, True]


def test_a_place_that_cannot_be_is_a_problem_where_the_size_is_known() -> None:
    def problem(box: list[float], size: tuple[int, int] | None) -> str:
        picture = MediaRef("image", b"x", MediaHeader(*size) if size else None)
        facts = {"question": "What", "answers": ["dog"], "regions": [{"media": 0, "box": box}]}
        (question,) = TASKS["vqa"].questions(Record("k", facts, (picture,)), FIRST)
        assert question.reference == ("dog",)
        return question.problem.partition(":")[0]

    assert problem([1, 1, 400, 20], (48, 32)) == "region outside the picture"
    assert (
        problem([20, 1, 10, 20], (48, 32)) == "inverted region" and problem([1, 1, 1, 20], (48, 32)) == "empty region"
    )
    assert problem([1, 1, 48.5, 20], (48, 32)) == problem([1, 1, 400, 20], None) == ""


def test_answers_match_as_the_protocol_says() -> None:
    facts = {"question": "How many?", "answers": ["two", "2", "two", "three"]}
    questions = [*questions_of("vqa", facts), None]
    assert score("vqa", ["two dogs", "two"], questions) == {"exact_match": 0.0, "token_f1": pytest.approx(1 / 3)}
    assert score("vqa", ["2.", "two"], questions) == {"exact_match": 0.5, "token_f1": 0.5}
    assert score("vqa", ["Two", "two"], questions, match="vqa_v2") == {"accuracy": 0.5}
    assert score("vqa", ["3", "3"], questions, match="vqa_v2") == {"accuracy": pytest.approx(1 / 6)}
    assert score("vqa", ["", ""], questions, match="vqa_v2") == {"accuracy": 0.0}
    judge = TASKS["vqa"].judge
    assert judge(Answer("3"), questions[0], Protocol(match="vqa_v2")) == pytest.approx(1 / 3)
    assert judge(Answer("two dogs"), questions[0], FIRST) == pytest.approx(2 / 3)


REASONS = [{"text": "The man "}, {"region": BOX}, {"text": " holds a cup "}, {"region": BOX}, {"text": "."}]
THOUGHT = {"question": "What is held", "answers": ["A cup."], "cot": REASONS}


def test_a_chain_of_thought_with_its_places() -> None:
    place = Region(0, box=(1.0, 2.0, 3.0, 4.0))
    (question,) = questions_of("vqa", THOUGHT)
    assert question.conversation.turns[-1].parts == (*PICTURE, f"What is held?{WITH_PLACES[0]}")
    assert question.reference == ("The man ", place, " holds a cup ", place, ".", " The answer is A cup.")
    said = "The man [0.1,0.2,0.3,0.4] holds a cup. So the answer is a cup ."
    assert score("vqa", [said], [question]) == {"exact_match": 1.0, "token_f1": 1.0}
    assert score("vqa", [said.replace("a cup .", "a hat.")], [question])["exact_match"] == 0.0


def test_a_chain_of_thought_in_words_alone() -> None:
    record = Record("k", THOUGHT, PICTURE)
    seen = set()
    for seed in range(200):
        asked, answered = TASKS["vqa"].conversation(record, random.Random(seed)).turns
        manner = str(asked.parts[-1]).removeprefix("What is held?")
        seen.add(manner)
        if manner in IN_WORDS:
            assert answered.parts == ("The man holds a cup.", " The answer is A cup.")
        else:
            assert manner in WITH_PLACES and len(answered.parts) == 6
    assert seen == {*WITH_PLACES, *IN_WORDS}
    plain = Record("k", THOUGHT | {"cot": [{"text": "It is held."}]}, PICTURE)
    asked, answered = TASKS["vqa"].conversation(plain, random.Random(0)).turns
    assert str(asked.parts[-1]).removeprefix("What is held?") in IN_WORDS
    assert answered.parts == ("It is held.", " The answer is A cup.")


@pytest.mark.parametrize(
    ("cot", "reason"),
    [
        ([{"region": BOX}], "no cot"),
        ([{"text": " "}], "no cot"),
        ([], "no cot"),
        (None, "unreadable cot"),
        ("words", "unreadable cot"),
        ([{"text": 3}], "unreadable cot"),
        ([{"text": "x"}, {"region": {"media": 0, "box": [1, 2]}}], "unreadable cot"),
        ([{"text": "x"}, {"region": {"box": [1, 2, 3, 4]}}], "unreadable cot"),
    ],
)
def test_a_chain_of_thought_that_cannot_be_read(cot: Any, reason: str) -> None:
    record = Record("k", THOUGHT | {"cot": cot}, PICTURE)
    with pytest.raises(SampleError) as error:
        TASKS["vqa"].conversation(record, random.Random(0))
    assert error.value.reason == reason
    (question,) = TASKS["vqa"].questions(record, FIRST)
    assert question.problem == str(error.value)


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("red", "red"),
        ("The answer is red.", "red"),
        ("THE ANSWER IS: red dog\n", "red dog"),
        ("The answer is a guess. The answer is 3.5 .", "3.5"),
        ("I see it.\nSo the answer is\nno.", "no"),
        ("The answer is", "The answer is"),
        ("", ""),
    ],
)
def test_the_final_answer(text: str, final: str) -> None:
    assert final_answer(text) == final
