"""Tasks about speech: device-directed speech, spoken dialogue with attributes, spoken questions about pictures."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from mmchat.conversation import Conversation, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.tasks import TASKS
from mmchat.tasks.directed import QUESTIONS, TRANSCRIPTS
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.spoken import NAMING, PROMPTS, read_reply
from mmchat.tasks.vqa import SHORT

FIRST = Protocol()
PICTURE, OTHER = MediaRef("image", b"p"), MediaRef("image", b"o")
SOUNDS = tuple(MediaRef("audio", f"s{i}".encode()) for i in range(4))


@pytest.mark.parametrize("prompts", [QUESTIONS, TRANSCRIPTS, PROMPTS, NAMING], ids=lambda p: p[0])
def test_there_are_a_dozen_prompts_and_none_twice(prompts: tuple[str, ...]) -> None:
    assert len(prompts) >= 12 and len(set(prompts)) == len(prompts)
    assert len({prompt.count("{}") for prompt in prompts}) == 1


def parts(conversation: Conversation) -> list[tuple[str, tuple]]:
    return [(turn.role, turn.parts) for turn in conversation.turns]


# ---- device-directed speech -----------------------------------------------------------------------------------------


def speech(directed: Any, kind: str = "", key: str = "k", text: str = "dim the {light}") -> Record:
    facts = {"text": text, "directed": directed} | ({"kind": kind} if kind else {})
    return Record(key, facts, (SOUNDS[0],))


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("directed", (SOUNDS[0], f"Somebody says: dim the {{light}}\n{QUESTIONS[0]}")),
        ("directed_audio", (SOUNDS[0], QUESTIONS[0])),
        ("directed_text", (f"Somebody says: dim the {{light}}\n{QUESTIONS[0]}",)),
    ],
)
def test_what_is_given_of_the_speech(task: str, asked: tuple) -> None:
    for directed, answer in ((True, "yes"), (False, "no")):
        (question,) = TASKS[task].questions(speech(directed), FIRST)
        assert parts(question.conversation) == [("user", asked)]
        assert question.candidates == ("yes", "no") and question.reference == (answer,)
        trained = TASKS[task].conversation(speech(directed), random.Random(7))
        assert trained.turns[1].parts == (answer,) and trained.turns[1].is_learned


@pytest.mark.parametrize(
    ("task", "record", "reason"),
    [
        ("directed", speech(None), "no label"),
        ("directed_audio", speech("yes"), "no label"),
        ("directed_text", speech(True, text=" "), "no text"),
        ("directed_audio", Record("k", {"directed": True}), "no recording"),
    ],
)
def test_facts_that_say_too_little(task: str, record: Record, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        TASKS[task].questions(record, FIRST)
    assert error.value.reason == reason
    TASKS["directed_audio"].questions(speech(True, text=" "), FIRST)  # no words are wanted of it


def asked_about(*records: Record) -> list[Question | None]:
    return [question for record in records for question in TASKS["directed"].questions(record, FIRST)]


def answered(*scores: float | None) -> list[Answer]:
    return [Answer(error="unreadable media: x") if s is None else Answer(likelihoods=(s - 5.0, -5.0)) for s in scores]


def test_scores_of_directed_speech() -> None:
    records = [speech(True, "command", f"t{i}") for i in range(4)]
    records += [speech(False, "to_person", "a"), speech(False, "to_person", "b"), speech(False, "dialogue", "c")]
    questions = asked_about(*records, speech(False, "dialogue", "d"))
    # The list by hand of test_detection.py: 0.9, 0.8, 0.7, 0.3 against 0.6, 0.4, 0.2, 0.1, a half taken off.
    scores = TASKS["directed"].score(answered(0.4, 0.3, 0.2, -0.2, 0.1, -0.1, -0.3, -0.4), questions, FIRST)
    assert scores == pytest.approx({
        "eer": 0.25, "far_at_frr_10": 0.5, "accuracy": 6 / 8,
        "num_command": 4, "accuracy_command": 0.75,
        "num_dialogue": 2, "accuracy_dialogue": 1.0, "far_at_frr_10_dialogue": 0.0,
        "num_to_person": 2, "accuracy_to_person": 0.5, "far_at_frr_10_to_person": 1.0,
    })  # fmt: skip


def test_what_has_no_answer_counts_against_the_model() -> None:
    questions = asked_about(*(speech(i < 4, key=f"{i}") for i in range(8)))
    task = TASKS["directed"]
    perfect = answered(1, 2, 3, 4, -1, -2, -3, -4)
    assert task.score(perfect, questions, FIRST)["eer"] == 0.0
    for i in range(8):
        scores = task.score([*perfect[:i], *answered(None), *perfect[i + 1 :]], questions, FIRST)
        # One of four is a reject, or an accept, at every threshold.
        assert scores["accuracy"] == 7 / 8 and scores["eer"] == 0.25, i
        assert scores["far_at_frr_10"] == pytest.approx(1.0 if i < 4 else 0.25), i
    unread = task.score([*perfect, Answer(error="x")], [*questions, None], FIRST)
    assert unread["eer"] == pytest.approx(0.2) and unread["accuracy"] == 8 / 9 and unread["num_other"] == 4
    nothing = task.score(answered(*[None] * 8), questions, FIRST)
    assert (nothing["eer"], nothing["far_at_frr_10"], nothing["accuracy"]) == (1.0, 1.0, 0.0)
    not_finite = task.score([*perfect[:7], Answer(likelihoods=(-math.inf, -math.inf))], questions, FIRST)
    assert not_finite["eer"] == 0.25 and task.judge(Answer(likelihoods=(math.nan, 0.0)), questions[0], FIRST) == 0.0


def test_a_scorer_that_knows_nothing_is_at_chance() -> None:
    questions = asked_about(*(speech(i % 3 == 0, key=f"{i}") for i in range(30)))
    scores = TASKS["directed"].score(answered(*[0.0] * 30), questions, FIRST)
    assert (scores["eer"], scores["far_at_frr_10"], scores["accuracy"]) == (0.5, pytest.approx(0.9), 0.0)


def test_one_side_alone_has_no_error_rates() -> None:
    scores = TASKS["directed"].score(answered(1, -1), asked_about(speech(True), speech(True)), FIRST)
    assert math.isnan(scores["eer"]) and math.isnan(scores["far_at_frr_10"]) and scores["accuracy"] == 0.5


def test_the_judge_is_the_probability_of_the_right_word() -> None:
    yes, no = asked_about(speech(True), speech(False))
    judge = TASKS["directed"].judge
    for score, wanted in ((0.0, 0.5), (math.log(3), 0.75), (-math.log(3), 0.25), (2000.0, 1.0), (-2000.0, 0.0)):
        (answer,) = answered(score)
        assert judge(answer, yes, FIRST) == pytest.approx(wanted)
        assert judge(answer, no, FIRST) == pytest.approx(1 - wanted)


# ---- spoken dialogue ------------------------------------------------------------------------------------------------


def turn(text: str | None = None, media: int | None = None, **attributes: str) -> dict[str, Any]:
    given = {"text": text, "media": media, "attributes": attributes or None}
    return {name: value for name, value in given.items() if value is not None}


def dialogue(*turns: dict[str, Any]) -> Record:
    return Record("k", {"turns": list(turns)}, SOUNDS)


TALK = dialogue(
    turn("I lost my keys.", 0, sentiment="negative"),
    turn("Oh no.", sentiment="neutral", emotion="sad"),
    turn("They were  new.", 1),
    turn("A pity."),
)


@pytest.mark.parametrize(
    ("task", "first", "second"),
    [
        ("spoken", (SOUNDS[0], "I lost my keys."), (SOUNDS[1], "They were new.")),
        ("spoken_audio", (SOUNDS[0],), (SOUNDS[1],)),
        ("spoken_text", ("I lost my keys.",), ("They were new.",)),
    ],
)
def test_attributes_stand_before_each_reply(task: str, first: tuple, second: tuple) -> None:
    opening = "Listen, and reply. Before each reply, name the emotion and sentiment.\n"
    reply = "heard sentiment: negative\nreply emotion: sad\nreply sentiment: neutral\nOh no."
    said = [("user", (opening, *first)), ("assistant", (reply,)), ("user", second), ("assistant", ("A pity.",))]
    assert parts(TASKS[task].conversation(TALK, FIRST.rng("k"))) == said
    one, two = TASKS[task].questions(TALK, FIRST)
    assert (one.record.key, parts(one.conversation), one.reference) == ("k#1", said[:1], (reply,))
    assert (two.record.key, parts(two.conversation), two.reference) == ("k#2", said[:3], ("A pity.",))
    _, alone = TASKS[task].questions(TALK, Protocol(history=False))
    opening = "Listen, and reply. Before each reply, name the"
    (asked,) = alone.conversation.turns
    assert asked.parts[1:] == second and not str(asked.parts[0]).startswith(opening)


def test_a_reply_that_opens_the_talk_is_neither_learned_nor_asked() -> None:
    record = dialogue(turn("Hello."), turn(media=2), turn("Go on."))
    conversation = TASKS["spoken"].conversation(record, FIRST.rng("k"))
    assert [one.is_learned for one in conversation.turns] == [False, False, False, True]
    assert parts(conversation)[:2] == [("user", ("Listen, and reply.",)), ("assistant", ("Hello.",))]
    (question,) = TASKS["spoken"].questions(record, FIRST)
    assert len(question.conversation.turns) == 3 and question.reference == ("Go on.",)


def test_replies_and_attributes_are_scored_apart() -> None:
    questions: list[Question | None] = [*TASKS["spoken"].questions(TALK, FIRST)]
    full = "heard sentiment: Negative.\nreply emotion: angry\nreply sentiment: neutral\n\nOh no."
    scores = TASKS["spoken"].score([Answer(full), Answer("reply sentiment: new\nA pity.")], questions, FIRST)
    accuracies = {"heard_sentiment_accuracy": 1.0, "reply_emotion_accuracy": 0.0, "reply_sentiment_accuracy": 1.0}
    assert {name: scores[name] for name in accuracies} == accuracies and scores["num_heard_sentiment"] == 1
    # Nothing is asked of the second reply's attributes, so that what looks like one is its text.
    assert scores["token_f1"] == pytest.approx((1 + 2 * 1 / (1 + 4)) / 2)
    assert 0 < scores["bleu_4"] < 1 and 0 < scores["rouge_l"] < 1
    perfect = TASKS["spoken"].score([Answer(full), Answer("A pity.")], questions, FIRST)
    assert perfect["token_f1"] == perfect["rouge_l"] == pytest.approx(1.0)
    halved = TASKS["spoken"].score(
        [Answer(full), Answer("A pity."), Answer(error="x"), Answer(error="x")], [*questions, None, None], FIRST
    )
    assert halved["heard_sentiment_accuracy"] == 1 / 3 and halved["token_f1"] == 0.5
    silent = TASKS["spoken"].score([Answer(full, error="x"), Answer("A pity.")], questions, FIRST)
    assert silent["heard_sentiment_accuracy"] == 0.0 and silent["token_f1"] == 0.5
    judge = TASKS["spoken"].judge
    assert judge(Answer(full), questions[0], FIRST) == pytest.approx((1 + 2 / 3) / 2)
    assert judge(Answer(full, error="x"), questions[0], FIRST) == 0.0
    assert judge(Answer("A pity."), questions[1], FIRST) == 1.0


@pytest.mark.parametrize(
    ("answer", "found", "text"),
    [
        ("heard sentiment: negative\nOh no.", {"heard sentiment": "negative"}, "Oh no."),
        ("Oh no.\nheard sentiment: negative", {}, "Oh no.\nheard sentiment: negative"),
        ("heard sentiment: a\nheard sentiment: b\nx: y", {"heard sentiment": "a"}, "x: y"),
        ("heard sentiment:", {"heard sentiment": ""}, ""),
        ("heard age: old\nOh no.", {}, "heard age: old\nOh no."),
        ("", {}, ""),
    ],
)
def test_reading_a_reply(answer: str, found: dict[str, str], text: str) -> None:
    question = TASKS["spoken"].questions(TALK, FIRST)[0]
    assert read_reply(answer, question) == (found, text)


@pytest.mark.parametrize(
    ("task", "turns", "reason"),
    [
        ("spoken", (), "no turns"),
        ("spoken", (turn("Hi."),), "no turns"),
        ("spoken", (turn(media=0), turn(media=1)), "no reply"),
        ("spoken", (turn(media=9), turn("Hi.")), "no recording"),
        ("spoken", ({"media": "0"}, turn("Hi.")), "no recording"),
        ("spoken", ({}, turn("Hi.")), "empty turn"),
        ("spoken", ("Hello.", turn("Hi.")), "unreadable turn"),
        ("spoken", ({"text": 3}, turn("Hi.")), "unreadable turn"),
        ("spoken", (turn("Hi.", mood="so: so"), turn("Hi.")), "unreadable turn"),
        ("spoken", (turn("Hi."), {"text": "x", "attributes": {"mood": 3}}), "unreadable turn"),
        ("spoken_text", (turn(media=0), turn("Hi.")), "empty turn"),
    ],
)
def test_dialogues_that_cannot_be_read(task: str, turns: tuple, reason: str) -> None:
    for ask in (lambda r: TASKS[task].conversation(r, random.Random(0)), lambda r: TASKS[task].questions(r, FIRST)):
        with pytest.raises(SampleError) as error:
            ask(dialogue(*turns))
        assert error.value.reason == reason


# ---- spoken questions about pictures --------------------------------------------------------------------------------


def spoken(number: int, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": {"media": number, "text": "What colour?"}, "answers": [answer], **more}


def test_a_spoken_question_is_asked_alone() -> None:
    facts = spoken(2, "red") | {"more": [spoken(1, "a disc"), {"question": "Where", "answers": ["here"]}]}
    record = Record("k", facts, (PICTURE, *SOUNDS[:2]))
    manner = SHORT[0].strip()
    asked = [one.conversation.turns[-1].parts for one in TASKS["vqa"].questions(record, FIRST)]
    assert asked == [(PICTURE, SOUNDS[1], manner), (PICTURE, SOUNDS[0], manner), (PICTURE, f"Where?{SHORT[0]}")]
    trained = TASKS["vqa"].conversation(record, FIRST.rng("k"))
    assert [one.parts for one in trained.turns] == [
        (PICTURE, SOUNDS[0], manner), ("a disc",), (f"Where?{SHORT[0]}",), ("here",), (SOUNDS[1], manner), ("red",),
    ]  # fmt: skip
    questions = TASKS["vqa"].questions(record, FIRST)
    answers = [Answer("Red."), Answer("ring"), Answer(error="x")]
    assert TASKS["vqa"].score(answers, questions, FIRST)["exact_match"] == pytest.approx(1 / 3)


def test_places_and_reasons_with_a_spoken_question() -> None:
    place = {"media": 1, "box": [1, 2, 3, 4]}
    facts = spoken(2, "red", regions=[place], cot=[{"text": "It is "}, {"region": place}, {"text": "."}])
    (question,) = TASKS["vqa"].questions(Record("k", facts, (PICTURE, OTHER, SOUNDS[0])), FIRST)
    found = question.conversation.turns[0].parts
    assert found[:2] == (PICTURE, OTHER) and found[-2] == SOUNDS[0] and str(found[-1]).startswith("Explain with")
    assert Region(1, box=(1.0, 2.0, 3.0, 4.0)) in found and question.conversation.media[1] == OTHER


def test_a_spoken_question_that_cannot_be_asked() -> None:
    for number in (0, 5, -1):  # the picture, and nothing
        (question,) = TASKS["vqa"].questions(Record("k", spoken(number, "red"), (PICTURE, SOUNDS[0])), FIRST)
        assert question.problem.startswith("no question")
    with pytest.raises(SampleError, match="must stand last"):
        TASKS["vqa"].questions(Record("k", spoken(0, "red"), (SOUNDS[0], PICTURE)), FIRST)
