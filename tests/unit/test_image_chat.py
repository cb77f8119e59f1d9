"""Image-Chat: every turn is generated and ranked, with and without a picture, under early and late fusion."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.tasks import TASKS
from mmchat.tasks.image_chat import OPENINGS, OPENINGS_IN_WORDS, STYLES
from mmchat.tasks.question import Answer, Protocol, Question
from tests import models, tiny

TASK = TASKS["image_chat"]
SAID = ["What a lovely circle!", "Is it round at all?", "It is to me."]
TURNS = [{"style": style, "text": text} for style, text in zip(["Sweet", "Skeptical", "Sweet"], SAID, strict=True)]
PICTURE = (MediaRef("image", b"x"),)
OTHERS = [f"candidate {i}" for i in range(99)]


def record(*media: MediaRef, **facts: Any) -> Record:
    return Record("k", {"turns": TURNS, **facts}, media)


def ranked() -> Record:
    return record(*PICTURE, candidates=[[*OTHERS[:50], text, *OTHERS[50:]] for text in SAID])


def words(question: Question) -> list[tuple[str, str]]:
    return [(turn.role, str(turn.parts[-1])) for turn in question.conversation.turns]


@pytest.mark.parametrize("prompts", [OPENINGS, OPENINGS_IN_WORDS, STYLES], ids=lambda p: p[0])
def test_there_are_a_dozen_prompts_and_none_twice(prompts: tuple[str, ...]) -> None:
    assert len(prompts) >= 12 and len(set(prompts)) == len(prompts)


def test_the_model_learns_to_be_either_speaker() -> None:
    learned = set()
    for seed in range(50):
        turns = TASK.conversation(record(*PICTURE), random.Random(seed)).turns
        assert turns[0].parts[0] == PICTURE[0] and turns[-1].role == "assistant"
        learned.add(tuple(str(turn.parts[-1]) for turn in turns if turn.is_learned))
        assert ("sweet" if len(turns) == 4 else "skeptical") in str(turns[0].parts[-1])
    assert learned == {(SAID[0], SAID[2]), (SAID[1],)}


def test_every_turn_is_asked_with_those_before_it() -> None:
    questions = TASK.questions(record(*PICTURE), Protocol())
    assert [one.record.key for one in questions] == ["k#1", "k#2", "k#3"]
    assert [one.reference for one in questions] == [(text,) for text in SAID]
    opening = f"Your style: sweet. {OPENINGS[0]}"
    assert words(questions[0]) == [("user", opening)]
    assert words(questions[1]) == [("user", f"Your style: skeptical.\n{SAID[0]}")]
    assert words(questions[2]) == [("user", opening), ("assistant", SAID[0]), ("user", SAID[1])]
    assert all(one.conversation.media == one.record.media == PICTURE for one in questions)


def test_without_history_no_turn_is_told() -> None:
    questions = TASK.questions(record(*PICTURE), Protocol(history=False))
    assert [one.reference for one in questions] == [(text,) for text in SAID]
    for one, style in zip(questions, ["sweet", "skeptical", "sweet"], strict=True):
        assert words(one) == [("user", f"Your style: {style}. {OPENINGS[0]}")]


def test_a_chat_without_a_picture_does_not_speak_of_one() -> None:
    for seed in range(30):
        turns = TASK.conversation(record(), random.Random(seed)).turns
        assert not TASK.conversation(record(), random.Random(seed)).media
        assert len(turns) != 4 or any(str(turns[0].parts[0]).endswith(opening) for opening in OPENINGS_IN_WORDS)


def test_candidates_are_a_question_of_their_own() -> None:
    questions = TASK.questions(ranked(), Protocol())
    assert [one.record.key for one in questions][:3] == ["k#1", "k#1/candidates", "k#2"]
    assert [len(one.candidates) for one in questions] == [0, 100] * 3
    assert questions[2].conversation == questions[3].conversation
    assert questions[3].reference == (SAID[1],) and questions[3].candidates[50] == SAID[1]


def test_a_second_copy_of_the_right_text_is_no_rival() -> None:
    lists = [[text, *OTHERS, f" {text}"] for text in SAID]
    (_, question, *_) = TASK.questions(record(*PICTURE, candidates=lists), Protocol())
    assert question.candidates == (SAID[0], *OTHERS) and not question.problem


def test_copies_of_the_right_text_do_not_count_as_candidates() -> None:
    (_, question, *_) = TASK.questions(record(*PICTURE, candidates=[[text] * 100 for text in SAID]), Protocol())
    assert question.candidates == ()
    assert question.problem == "too few candidates: wanted 100 for turn 1, found 1 and 99 copies of the right one"


@pytest.mark.parametrize("bad", [None, {"style": "Sweet"}, {"style": "Sweet", "text": " "}])
def test_a_turn_that_cannot_be_read_costs_itself_and_those_behind_it(bad: Any) -> None:
    for facts, num in (({}, 1), ({"candidates": ranked().facts["candidates"]}, 2)):
        one = Record("k", {"turns": [TURNS[0], bad, TURNS[2]], **facts}, PICTURE)
        questions = TASK.questions(one, Protocol())
        assert [q.record.key for q in questions] == [
            q.record.key for q in TASK.questions(record(*PICTURE, **facts), Protocol())
        ]
        reasons = [q.problem.partition(":")[0] for q in questions]
        assert reasons == [""] * num + ["unreadable turn"] * num + ["unreadable history"] * num
        answers = [Answer(SAID[0]), Answer(likelihoods=tuple(1.0 * (i == 50) for i in range(100)))][:num]
        scores = TASK.score([*answers, *[Answer(error="x")] * 2 * num], questions, Protocol())
        assert scores["token_f1"] == pytest.approx(1 / 3) and scores.get("r@1", 1 / 3) == pytest.approx(1 / 3)
        assert TASK.judge(Answer(error="x"), questions[-1], Protocol()) < 0.02
    with pytest.raises(SampleError, match="unreadable turn"):
        TASK.conversation(one, random.Random(0))


def test_a_record_that_names_a_problem_or_a_rank_of_its_own_is_asked() -> None:
    questions = TASK.questions(record(*PICTURE, problem="x: y", warning="x: y", ranked=True), Protocol())
    assert all(one.problem == one.warning == "" for one in questions)
    assert "r@1" not in TASK.score([Answer("x")] * 3, questions, Protocol())


@pytest.mark.parametrize(
    ("candidates", "problem"),
    [
        ([[*OTHERS, "x"]] * 3, "no right candidate"),
        ([[SAID[0], *OTHERS[:50]]] * 3, "too few candidates"),
        ([[text, *OTHERS[:98], f" {text}"] for text in SAID], "too few candidates"),
        ([], "no candidates"),
        ([None, None, None], "no candidates"),
        ([[1] * 100] * 3, "no candidates"),
        ("many", "no candidates"),
    ],
)
def test_candidates_that_cannot_be_ranked_count_as_not_answered(candidates: Any, problem: str) -> None:
    questions = TASK.questions(record(*PICTURE, candidates=candidates), Protocol())
    found = [one.problem for one in questions]
    assert len(questions) == 6 and found[0] == "" and found[1].startswith(problem)
    assert questions[1].candidates == ()
    answers = [
        Answer(text) if i % 2 == 0 else Answer(error="x") for i, text in enumerate(t for t in SAID for _ in "ab")
    ]
    scores = TASK.score(answers, questions, Protocol())
    assert scores["token_f1"] == 1.0 and scores["r@1"] == 0.0 and scores["mean_rank"] == 100.0


def test_what_is_not_answered_is_not_among_the_first_ten_of_ten() -> None:
    protocol = Protocol(num_candidates=10)
    questions = TASK.questions(record(*PICTURE, candidates=[[text, *OTHERS[:9]] for text in SAID]), protocol)
    scores = TASK.score([Answer(error="x")] * 6, questions, protocol)
    assert scores["r@10"] == 0.0


def test_scores_by_hand() -> None:
    questions = TASK.questions(ranked(), Protocol())
    best = [1.0 if i == 50 else 0.0 for i in range(100)]
    answers = [
        Answer("a lovely circle, what", reference_likelihood=(4 * math.log(1 / 2), 4)),
        Answer(likelihoods=tuple(best)),
        Answer("no", reference_likelihood=(4 * math.log(1 / 8), 4)),
        Answer(likelihoods=(0.0,) * 100),  # a constant scorer: a random rank
        Answer(error="not read"),
        Answer(likelihoods=(1.0,) * 3),  # not one for each: last
    ]
    scores = TASK.score(answers, questions, Protocol())
    assert scores["token_f1"] == pytest.approx(1 / 3)
    assert scores["rouge_l"] == pytest.approx((2 * 3 / 8) / 3)  # "a lovely circle" of 4 and 4 words
    assert scores["perplexity"] == pytest.approx(4.0) and scores["perplexity_share"] == pytest.approx(2 / 3)
    assert scores["r@1"] == pytest.approx((1 + 0.01 + 0) / 3) and scores["mean_rank"] == pytest.approx(
        251.5 / 3 - 100 / 3
    )
    judged = [TASK.judge(a, q, Protocol()) for a, q in zip(answers, questions, strict=True)]
    harmonic = sum(1 / i for i in range(1, 101)) / 100
    assert judged == pytest.approx([1.0, 1.0, 0.0, harmonic, 0.0, 0.01])


def test_an_unread_record_counts_in_both() -> None:
    questions = TASK.questions(ranked(), Protocol())[:2]
    answers = [Answer(SAID[0]), Answer(likelihoods=tuple(1.0 * (i == 50) for i in range(100)))]
    whole = TASK.score(answers, questions, Protocol())
    assert whole["token_f1"] == whole["mrr"] == 1.0
    halved = TASK.score([*answers, Answer(error="x")], [*questions, None], Protocol())
    assert halved["token_f1"] == 0.5 and halved["r@1"] == 0.5 and halved["mean_rank"] == 50.5
    assert halved["bleu_4"] == pytest.approx(whole["bleu_4"] / 2)
    alone = TASK.score([Answer(error="x")], [None], Protocol())
    assert set(alone) == {"token_f1", "bleu_4", "rouge_l"} and not any(alone.values())


@pytest.mark.parametrize("fusion", [{"kind": "early"}, {"kind": "late", "num_heads": 4}], ids=["early", "late"])
def test_it_trains_with_and_without_a_picture(tiny_folder: Path, fusion: dict[str, Any]) -> None:
    model, template = models.build(models.config(fusion=fusion))
    rng = random.Random(0)
    shown = record(MediaRef("image", tiny.picture("red", rng)))
    chats = [TASK.conversation(one, rng) for one in (shown, record())]
    batch, in_words = models.pack(template, chats), models.pack(template, chats[1:])
    with torch.no_grad():
        before = float(model(in_words).sum)
    late = fusion["kind"] == "late"
    models.wake(model)
    parts = [model.connectors, *([model.late] if late else [])]
    learned = [parameter for part in parts for parameter in part.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learned, lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(batch)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.sum.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert float(model(in_words).sum) == before  # the no-image path is the same model, untouched
        absent = replace(shown, media=(MediaRef("image", None),))
        assert math.isfinite(float(model(models.pack(template, [TASK.conversation(absent, rng)])).sum))
