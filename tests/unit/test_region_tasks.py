"""The referential tasks: all boxes of the facts are phrased, no prompt tells the answer, scores count what they say."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Part, Record, Region
from mmchat.errors import SampleError
from mmchat.regions import Geometry, RegionFormat
from mmchat.tasks import TASKS, facts, prompts, rec
from mmchat.tasks.question import Answer, Protocol, Question
from tests import tiny

REC, REG, SPOT, GROUND, POINT, REFER = (TASKS[name] for name in ("rec", "reg", "spot", "ground", "point", "refer"))
FIRST, DRAWN = Protocol(), Protocol(phrasing="drawn")
WIDTH, HEIGHT = 200, 100
IDENTITY = Geometry(WIDTH, HEIGHT, WIDTH, HEIGHT, 1, 1, 0, 0)


def record(facts: dict[str, Any]) -> Record:
    return Record("k", facts, (MediaRef("image", b"", MediaHeader(WIDTH, HEIGHT)),))


def regions(conversation: Conversation, role: str) -> list[list[tuple[float, ...]]]:
    """Boxes of each turn of a role."""
    return [
        [part.box for part in turn.parts if isinstance(part, Region) and part.box]
        for turn in conversation.turns
        if turn.role == role
    ]


def said(parts: tuple[Part, ...]) -> str:
    """Parts as a model in the default dialect writes them."""
    return "".join(RegionFormat().render(one, IDENTITY) if isinstance(one, Region) else str(one) for one in parts)


def read(text: str) -> Answer:
    """An answer as an evaluation hands it on."""
    parsed = RegionFormat().parse(text, [IDENTITY])
    return Answer(text, tuple(parsed.regions), parsed.num_failed)


def ask(task: str, facts: dict[str, Any], protocol: Protocol = FIRST) -> list[Question]:
    return TASKS[task].questions(record(facts), protocol)


def score(task: str, answers: list[str], questions: list[Question | None]) -> dict[str, float]:
    return TASKS[task].score([read(text) for text in answers], questions, FIRST)


boxes = st.tuples(
    st.integers(0, WIDTH - 12), st.integers(0, HEIGHT - 12), st.integers(10, WIDTH), st.integers(10, HEIGHT)
).map(lambda b: [b[0], b[1], min(b[0] + b[2], WIDTH), min(b[1] + b[3], HEIGHT)])
targets = st.fixed_dictionaries(
    {
        "expressions": st.lists(st.sampled_from(["man", "{} on {0}", "a [0.1,0.2]", "café"]), min_size=1, max_size=3),
        "boxes": st.lists(boxes, max_size=4),
    }
)


@settings(max_examples=150, deadline=None)
@given(main=targets, more=st.lists(targets, max_size=12), seed=st.integers(0, 99))
def test_rec_phrases_all_boxes_and_nothing_else(main: dict[str, Any], more: list[dict[str, Any]], seed: int) -> None:
    one = record({**main, "more": more})
    conversation = REC.conversation(one, random.Random(seed))
    answers = regions(conversation, "assistant")
    assert answers[-1] == [tuple(box) for box in main["boxes"]]
    wanted = [[tuple(box) for box in target["boxes"]] for target in more]
    assert all(answer in wanted for answer in answers[:-1])
    told = set().union(*answers)
    assert sum(len(set(answer)) for answer in answers) == len(told), "no box is said twice"
    # As many as there may be: each other one has a box in common with one that is asked for.
    assert len(answers) == facts.MAX_ASKED or all(other in answers or told & set(other) for other in wanted)
    assert not any(regions(conversation, "user")), "a question does not tell the box"
    assert conversation.media == one.media, "the picture is shown once"
    assert any(text in str(conversation.turns[-2].parts[-1]) for text in main["expressions"])
    answer = conversation.turns[-1]
    assert answer.is_learned and (main["boxes"] or answer.parts == (rec.NOTHING,))
    assert REC.conversation(one, random.Random(seed)) == conversation


def test_rec_writes_one_full_stop() -> None:
    one = record({"expressions": ["a man."], "boxes": []})
    asked = {str(REC.conversation(one, random.Random(seed)).turns[0].parts[-1]) for seed in range(60)}
    assert "Find a man." in asked and not any(".." in text for text in asked)


@settings(max_examples=100, deadline=None)
@given(main=targets.filter(lambda one: one["boxes"]), more=st.lists(targets, max_size=4), seed=st.integers(0, 99))
def test_reg_shows_all_boxes_and_answers_with_an_expression(
    main: dict[str, Any], more: list[dict[str, Any]], seed: int
) -> None:
    one = record({**main, "more": more})
    conversation = REG.conversation(one, random.Random(seed))
    assert regions(conversation, "user")[-1] == [tuple(box) for box in main["boxes"]]
    assert all(regions(conversation, "user")), "a question without a box asks for nothing"
    assert not any(regions(conversation, "assistant"))
    assert conversation.turns[-1].parts[0] in main["expressions"]
    assert conversation.media == one.media


def a_caption(words: list[tuple[str, list[list[float]]]]) -> dict[str, Any]:
    """Facts of phrases and their boxes, one phrase after the other."""
    caption, phrases = "", []
    for text, found in words:
        phrases.append({"start": len(caption), "end": len(caption) + len(text), "boxes": found})
        caption += f"{text} "
    return {"caption": caption.strip(), "phrases": phrases}


WORDS = st.lists(st.tuples(st.sampled_from(["a man", "it's", "man", "café"]), st.lists(boxes, max_size=3)), min_size=1)


@pytest.mark.parametrize("name", ["spot", "ground"])
@settings(max_examples=100, deadline=None)
@given(words=WORDS, seed=st.integers(0, 9))
def test_spot_puts_boxes_behind_their_phrases(name: str, words: list[tuple[str, list[list[float]]]], seed: int) -> None:
    facts, task = a_caption(words), TASKS[name]
    shuffled = random.Random(seed).sample(facts["phrases"], len(words))
    conversation = task.conversation(record(facts | {"phrases": shuffled}), random.Random(seed))
    wanted = [tuple(box) for _, found in words for box in found]
    assert regions(conversation, "assistant") == [wanted] and regions(conversation, "user") == [[]]
    asked = str(conversation.turns[0].parts[-1])
    assert facts["caption"] in asked or name == "spot"
    answer = said(conversation.turns[-1].parts)
    assert re.sub(r" \[[^\]]*\]", "", answer) == facts["caption"]
    (question,) = ask(name, facts)
    # Shikra's three decimals move a side by a pixel in ten: the boxes are found again, and behind their phrases.
    assert score(name, [answer], [question]) == {
        "exact_match": 1.0,
        "token_f1": 1.0,
        "phrase_recall_any": 1.0 if wanted else 0.0,
        "phrase_recall_merged": 1.0 if wanted else 0.0,
        "box_recall": 1.0 if wanted else 0.0,
        "parse_failures": 0.0,
    }


@pytest.mark.parametrize("name", ["LOCATE", "DESCRIBE", "AT_POINT", "POINT_TO", "SPOT", "GROUND", "CHOOSE"])
def test_no_prompt_tells_an_answer(name: str) -> None:
    found = getattr(prompts, name)
    assert len(set(found)) == len(found) >= 10
    for prompt in found:
        assert not re.search(r"[\[\]<>\d#]", prompt) and rec.NOTHING.lower() not in prompt.lower()
        assert prompt.count("{}") == (0 if name == "SPOT" else 1)


# In the padded square of 200, y moves down by 50: [0.1, 0.3, 0.6, 0.7] is (20, 10, 120, 90) in pixels.
ONE = [[20, 10, 120, 90]]
TWO = [[20, 10, 120, 90], [150, 0, 200, 50]]


@pytest.mark.parametrize(
    ("wanted", "answer", "right", "failed"),
    [
        (ONE, "[0.100,0.300,0.600,0.700]", True, False),
        (ONE, "It is at [0.1, 0.3, 0.6, 0.7].", True, False),
        (ONE, "[0.1,0.3,0.6,0.501]", True, False),  # 81 of 160: just above a half
        (ONE, "[0.1,0.3,0.6,0.5]", False, False),  # exactly a half is not enough
        (ONE, "[0.1,0.3,0.6,0.7] [0.1,0.3,0.6,0.7]", False, False),
        (ONE, "[0.1,0.3,0.6", False, True),
        (ONE, "[0.1,0.3,0.6,0.7] [0.1,0.3,0.6", False, True),
        (ONE, "[0.35,0.5]", False, True),  # a point where a box is wanted
        (ONE, "[0.1,0.3,0.6,0.7] [0.35,0.5]", False, False),
        (ONE, "There is none.", False, True),
        (ONE, "", False, True),
        ([], "There is none.", True, False),
        ([], "[0.1,0.3,0.6,0.7]", False, False),
        ([], "[0.1,0.3,0.6", False, True),
        (TWO, "[0.75,0.25,1.0,0.5] and [0.1,0.3,0.6,0.7]", True, False),
        (TWO, "[0.75,0.25,1.0,0.5;0.1,0.3,0.6,0.7]", True, False),
        (TWO, "[0.1,0.3,0.6,0.7] [0.1,0.3,0.6,0.7]", False, False),
        (TWO, "[0.1,0.3,0.6,0.7]", False, False),
    ],
)
def test_rec_score(wanted: list[list[float]], answer: str, right: bool, failed: bool) -> None:
    questions = ask("rec", {"expressions": ["x"], "boxes": wanted})
    scores = score("rec", [answer], [*questions])
    assert scores["accuracy"] == right and scores["parse_failures"] == failed
    judged = REC.judge(read(answer), questions[0], FIRST)
    assert 0 <= judged <= 1 and (judged > 0.5) >= right


def test_rec_reads_the_first_picture_only() -> None:
    (question,) = ask("rec", {"expressions": ["x"], "boxes": ONE})
    elsewhere = Answer("#2[0.1,0.3,0.6,0.7]", (Region(1, box=(20, 10, 120, 90)),))
    assert REC.score([elsewhere], [question], FIRST)["accuracy"] == 0 == REC.judge(elsewhere, question, FIRST)


def test_each_target_is_a_question_of_its_own() -> None:
    more = [{"expressions": ["the cat"], "boxes": []}, {"expressions": ["both"], "boxes": TWO}]
    facts = {"expressions": ["the dog", "it"], "boxes": ONE, "more": more}
    asked = ask("rec", facts)
    assert [one.record.key for one in asked] == ["k", "k#1", "k#2"]
    assert [one.conversation.turns[0].parts[-1] for one in asked] == [
        "Where is this: the dog",
        "Where is this: the cat",
        "Where is this: both",
    ]
    assert [said(one.reference) for one in asked][1:] == [
        rec.NOTHING,
        "[0.100,0.300,0.600,0.700] [0.750,0.250,1.000,0.500]",
    ]
    assert score("rec", [said(one.reference) for one in asked], [*asked])["accuracy"] == 1
    assert [one.record.key for one in ask("reg", facts)] == ["k", "k#2"]
    assert [one.record.key for one in ask("reg", {**facts, "boxes": []})] == ["k#2"]
    assert len({str(one.conversation) for one in ask("rec", facts, DRAWN)}) == 3
    assert ask("rec", facts, DRAWN) == ask("rec", facts, DRAWN)


def test_every_record_counts() -> None:
    (good,) = ask("rec", {"expressions": ["the dog", "it"], "boxes": ONE})
    answers = ["[0.1,0.3,0.6,0.7]"] * 2
    assert score("rec", answers, [good, None]) == {
        "accuracy": 0.5,
        "mean_iou": 0.5,
        "box_precision": 1.0,
        "box_recall": 0.5,
        "box_f1": pytest.approx(2 / 3),
        "parse_failures": 0.0,
    }
    no_answer = REC.score([Answer(error="no media")], ask("rec", {"expressions": ["x"], "boxes": []}), FIRST)
    assert no_answer["no_target_accuracy"] == no_answer["accuracy"] == no_answer["parse_failures"] == 0
    (described,) = ask("reg", {"expressions": ["the dog", "it"], "boxes": ONE})
    scores = score("reg", ["Dog", "dog"], [described, None])
    assert (scores["exact_match"], scores["token_f1"]) == (0.5, 0.5)
    (spotted,) = ask("spot", {"caption": "A dog", "phrases": [{"start": 0, "end": 1, "boxes": TWO}]})
    assert score("spot", ["A [0.1,0.3,0.6,0.7] dog", "cat"], [spotted, None]) == {
        "exact_match": 0.5,
        "token_f1": 0.5,
        "phrase_recall_any": 0.5,
        "phrase_recall_merged": 0.0,
        "box_recall": pytest.approx(1 / 3),
        "parse_failures": 0.0,
    }


CAPTION = a_caption([("An old man", ONE), ("sees", []), ("a man", TWO), ("and", []), ("a dog", [TWO[1]])])
FIRST_BOX, SECOND_BOX = "[0.1,0.3,0.6,0.7]", "[0.75,0.25,1,0.5]"


@pytest.mark.parametrize(
    ("answer", "by_any", "by_merged", "failed"),
    [
        (f"An old man {FIRST_BOX} sees a man {FIRST_BOX} {SECOND_BOX} and a dog {SECOND_BOX}", 3, 3, 0),
        # The first box alone counts by any, all of them together by merged.
        (f"An old man {FIRST_BOX} sees a man {SECOND_BOX} and a dog {FIRST_BOX} {SECOND_BOX}", 2, 1, 0),
        # Behind other words than the phrase's, and before the phrase.
        (f"An old man there {FIRST_BOX} sees {FIRST_BOX} a man and {SECOND_BOX} a dog", 0, 0, 0),
        # 'a man' does not take the box of 'old man', whatever the order; each run is for one phrase.
        (f"a man {FIRST_BOX}, AN OLD MAN: {FIRST_BOX}", 2, 1, 0),
        (f"An old man {FIRST_BOX}", 1, 1, 0),
        # The mark that is cut off is no box, and the others stay where they are.
        (f"An old man {FIRST_BOX} sees a man [0.1,0.3", 1, 1, 1),
        ("An old man sees a man and a dog", 0, 0, 1),
        ("", 0, 0, 1),
    ],
)
def test_phrases_are_found_by_what_follows_them(answer: str, by_any: int, by_merged: int, failed: int) -> None:
    questions = ask("ground", CAPTION)
    scores = score("ground", [answer], [*questions])
    assert scores["phrase_recall_any"] == pytest.approx(by_any / 3)
    assert scores["phrase_recall_merged"] == pytest.approx(by_merged / 3)
    assert scores["parse_failures"] == failed
    assert GROUND.judge(read(answer), questions[0], FIRST) == pytest.approx(by_any / 3)


CHOICE = {"question": "Which is red?", "candidates": [TWO[0], TWO[1], [150, 0, 200, 60], [0, 95, 5, 100]], "answer": 1}


@pytest.mark.parametrize(
    ("answer", "right", "failed"),
    [
        (SECOND_BOX, True, False),
        ("[0.75,0.25,1,0.55]", False, False),  # the third
        ("[0.8,0.26,0.99,0.45]", True, False),
        (FIRST_BOX, False, False),
        ("[0.0,0.25,0.05,0.3]", False, False),  # near none
        ("[0.9,0.3]", False, False),  # in two candidates
        (f"{SECOND_BOX} {SECOND_BOX}", False, False),
        (f"{SECOND_BOX} [0.1", False, True),
        ("the red one", False, True),
    ],
)
def test_pointing_at_a_candidate(answer: str, right: bool, failed: bool) -> None:
    questions = ask("point", CHOICE)
    assert score("point", [answer, ""], [*questions, None]) == {"accuracy": right / 2, "parse_failures": failed / 2}


def test_a_candidate_that_is_there_twice() -> None:
    for right in (1, 2):
        questions = ask("point", CHOICE | {"candidates": [TWO[0], TWO[1], TWO[1]], "answer": right})
        for answer, accuracy in ((SECOND_BOX, 1), ("[0.9,0.3]", 1), (FIRST_BOX, 0)):
            assert score("point", [answer], [*questions])["accuracy"] == accuracy


def test_the_right_candidate_is_not_the_first_one() -> None:
    """Also with one phrasing, whose generator draws what comes first."""
    firsts = []
    for i in range(40):
        one = Record(f"k{i}", CHOICE | {"answer": 0}, record({}).media)
        (asked,) = POINT.questions(one, FIRST)
        shown = [part.box for part in asked.conversation.turns[0].parts if isinstance(part, Region)]
        assert sorted(shown) == sorted(map(tuple, CHOICE["candidates"]))
        firsts.append(shown[0] == asked.reference[0].box)
    assert 2 <= sum(firsts) <= 20


REFERRED = {
    "expressions": ["the dog"],
    "boxes": ONE,
    "more": [
        {"expressions": ["the ear"], "boxes": [[60, 40, 80, 60]]},  # over the centre of the dog
        {"expressions": ["the cat"], "boxes": [TWO[1]]},
        {"expressions": ["both"], "boxes": TWO},
        {"expressions": ["a cow"], "boxes": []},
    ],
}


@settings(max_examples=200, deadline=None)
@given(main=targets, more=st.lists(targets, max_size=9), seed=st.integers(0, 99))
def test_refer_asks_for_places_words_and_points(main: dict[str, Any], more: list[dict[str, Any]], seed: int) -> None:
    one = record({**main, "more": more})
    conversation = REFER.conversation(one, random.Random(seed))
    everything = [tuple(box) for target in (main, *more) for box in target["boxes"]]
    turns = conversation.turns
    assert conversation.media == one.media and 2 <= len(turns) <= 2 * facts.MAX_ASKED
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        shown, named = ([part for part in turn.parts if isinstance(part, Region)] for turn in (asked, answered))
        assert not (shown and named), "a question with its answer in it"
        assert shown or named or answered.parts == (rec.NOTHING,)
        for region in (*shown, *named):
            if region.point is not None:
                x, y = region.point
                (around,) = {b for b in everything if b[0] <= x <= b[2] and b[1] <= y <= b[3]}
                assert (around[0] + around[2], around[1] + around[3]) == (2 * x, 2 * y)
            else:
                assert region.box in everything
    assert TASKS["refer"].conversation(one, random.Random(seed)) == conversation


def test_a_point_in_a_larger_box_means_two_things() -> None:
    on_a_table = {"expressions": ["the cup"], "boxes": [[60, 40, 80, 60]]}
    table = {"expressions": ["the table"], "boxes": ONE}
    named_twice = {"expressions": ["it"], "boxes": [[60, 40, 80, 60]]}
    for more, has_points in (([table], False), ([named_twice], True)):
        one = record({**on_a_table, "more": more})
        turns = [turn for seed in range(80) for turn in REFER.conversation(one, random.Random(seed)).turns[-2:]]
        shown = [part for turn in turns for part in turn.parts if isinstance(part, Region)]
        assert any(region.point for region in shown) == has_points and len(shown) == 80


DESCRIBED = {"expressions": ["the thing left of the goat", "the fox"], "descriptions": ["the red fox"], "boxes": ONE}


@pytest.mark.parametrize("task", ["reg", "refer"])
def test_descriptions_are_answered_and_expressions_are_asked(task: str) -> None:
    said_words, asked_words = set(), set()
    for seed in range(80):
        (question,) = ask(task, DESCRIBED, Protocol(phrasing="drawn", seed=seed))
        if not isinstance(question.reference[0], Region):
            said_words.add(question.reference[0])
            scores = score(task, ["The thing left of the goat", "the red fox", "a fox", "fish"], [question] * 4)
            assert scores[{"reg": "exact_match", "refer": "describe_exact_match"}[task]] == 0.75
            assert TASKS[task].judge(Answer("the fox"), question, FIRST) == 1
        else:
            asked = str(question.conversation.turns[0].parts[-1])
            asked_words |= {text for text in DESCRIBED["expressions"] if text in asked}
            assert "red" not in asked
    assert said_words == {"the red fox"}
    assert asked_words == (set(DESCRIBED["expressions"]) if task == "refer" else set())
    (question,) = ask(task, DESCRIBED | {"descriptions": []}, Protocol(phrasing="drawn"))
    assert question.problem.startswith("no description: ")


@pytest.mark.parametrize("task", ["rec", "reg", "refer"])
def test_turns_do_not_tell_each_other(task: str) -> None:
    """Several targets with one box: one alone is asked for, and the record's own before all."""
    cat = {"expressions": ["the cat"], "boxes": [TWO[1]]}
    both, pet = {"expressions": ["both"], "boxes": TWO}, {"expressions": ["the pet"], "boxes": [TWO[1]]}
    seen = set()
    for seed in range(40):
        one = record({"expressions": ["the dog"], "boxes": ONE, "more": [cat, both, pet]})
        conversation = TASKS[task].conversation(one, random.Random(seed))
        text = " ".join(str(part) for turn in conversation.turns for part in turn.parts if isinstance(part, str))
        assert "both" not in text and len(conversation.turns) == 4, "it holds the dog, which is asked last"
        assert ("the cat" in text) != ("the pet" in text)
        seen.add("the cat" in text)
    assert seen == {True, False}


def test_equal_questions_are_asked_once() -> None:
    more = [
        {"question": "what colour is it", "answers": ["blue"]},
        {"question": "How many?", "answers": ["two"]},
        {"question": "how many? ", "answers": ["2"]},
        # The same words about other places are another question.
        {"question": "How many?", "answers": ["three"], "regions": [{"media": 0, "box": ONE[0]}]},
    ]
    for seed in range(20):
        one = record({"question": "What colour is it?", "answers": ["red"], "more": more})
        turns = TASKS["vqa"].conversation(one, random.Random(seed)).turns
        answers = [turn.parts[0] for turn in turns if turn.role == "assistant"]
        assert answers[-1] == "red" and sorted(answers) in (["red", "three", "two"], ["2", "red", "three"])


@pytest.mark.parametrize("task", ["rec", "reg", "refer", "spot", "ground", "point"])
def test_places_lie_in_the_first_picture_whatever_stands_before_it(task: str) -> None:
    caption = {"caption": "A dog", "phrases": [{"start": 0, "end": 5, "boxes": ONE}]}
    facts = {"expressions": ["the dog"], "boxes": ONE, **(CHOICE if task == "point" else caption)}
    sound, clip = MediaRef("audio", b""), MediaRef("video", b"", MediaHeader(WIDTH, HEIGHT))
    for seed in range(30):
        (question,) = TASKS[task].questions(Record("k", facts, (sound, clip)), Protocol(phrasing="drawn", seed=seed))
        parts = [*question.conversation.turns[0].parts, *question.reference]
        assert {part.media for part in parts if isinstance(part, Region)} == {1}
        places = tuple(part for part in question.reference if isinstance(part, Region))
        answer = Answer(said(question.reference), places)
        assert TASKS[task].judge(answer, question, FIRST) == 1
        assert max(TASKS[task].score([answer], [question], FIRST).values()) >= 1
        in_the_sound = Answer(answer.text, tuple(replace(place, media=0) for place in places))
        assert not places or TASKS[task].judge(in_the_sound, question, FIRST) == 0
    with pytest.raises(SampleError) as caught:
        TASKS[task].conversation(Record("k", facts, (sound,)), random.Random(0))
    assert caught.value.reason == "no media"


PIGS = {"caption": "A pig and a pig and a cow.", "phrases": [
    {"start": 0, "end": 5, "boxes": ONE},
    {"start": 10, "end": 15, "boxes": [TWO[1]]},
    {"start": 20, "end": 25, "boxes": ONE},
]}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (f"A pig {FIRST_BOX} and a pig {SECOND_BOX} and a cow {FIRST_BOX}.", 3),
        (f"A pig {SECOND_BOX} and a pig {FIRST_BOX} and a cow {FIRST_BOX}.", 3),
        (f"A pig {SECOND_BOX} and a pig {SECOND_BOX} and a cow {FIRST_BOX}.", 2),
        (f"A pig {SECOND_BOX} and a cow {FIRST_BOX}.", 2),
        # The third pig is none of the caption's, wherever it is.
        (f"A pig [0,0.9,0.1,1] and a pig {SECOND_BOX} and a pig {FIRST_BOX}.", 1),
        (f"A pig {SECOND_BOX} and a pig and a cow {SECOND_BOX}.", 1),
    ],
)
def test_equal_phrases_are_found_in_any_order(answer: str, found: int) -> None:
    (question,) = ask("spot", PIGS)
    scores = score("spot", [answer], [question])
    assert scores["phrase_recall_any"] == scores["phrase_recall_merged"] == pytest.approx(found / 3)
    assert SPOT.judge(read(answer), question, FIRST) == pytest.approx(found / 3)


def test_refer_scores_each_kind_alone() -> None:
    kinds: dict[str, list[Question]] = {"locate": [], "describe": [], "point": []}
    for seed in range(60):
        for one in ask("refer", REFERRED, Protocol(phrasing="drawn", seed=seed)):
            region = next((part for part in one.reference if isinstance(part, Region)), None)
            told = one.reference != (rec.NOTHING,)
            kinds["point" if region and region.point else "locate" if region or not told else "describe"].append(one)
    sizes = {name: len(found) for name, found in kinds.items()}
    assert sum(sizes.values()) == 300 and all(sizes.values())
    asked = [one for found in kinds.values() for one in found]
    scores = score("refer", [said(one.reference) for one in asked], [*asked])
    assert {name for name, value in scores.items() if value == 1.0} >= {
        "locate_accuracy", "locate_no_target_accuracy", "describe_exact_match", "point_accuracy",
    }  # fmt: skip
    assert all(REFER.judge(read(said(one.reference)), one, FIRST) > 0.9 for one in asked)
    point = kinds["point"][:1]
    for wrong in ("", "[0,0.25]", "[0.1,0.3,0.6,0.7]", f"{said(point[0].reference)} [0.1"):
        assert score("refer", [wrong], [*point])["point_accuracy"] == 0
    right = said(point[0].reference)
    assert score("refer", [right, ""], [*point, None]) == {"point_accuracy": 0.5, "point_parse_failures": 0.0}
    assert score("refer", ["x"], [None])["locate_accuracy"] == 0
    # With one phrasing, everything is asked for its place.
    assert all(str(one.conversation.turns[0].parts[-1]).startswith("Where is this: ") for one in ask("refer", REFERRED))


@pytest.mark.parametrize(
    ("task", "facts", "reason"),
    [
        ("rec", {}, "no expression"),
        ("rec", {"expressions": ["x"]}, "unreadable boxes"),
        ("rec", {"expressions": [" "], "boxes": []}, "no expression"),
        ("rec", {"expressions": ["x"], "boxes": [[1, 2, 3]]}, "unreadable boxes"),
        ("rec", {"expressions": ["x"], "boxes": [], "more": [3]}, "unreadable facts"),
        ("rec", {"expressions": ["x"], "boxes": [], "more": [{}]}, "no expression"),
        ("reg", {"expressions": ["x"], "boxes": []}, "no box"),
        ("refer", {"expressions": ["x"], "boxes": [], "more": [{"expressions": ["y"]}]}, "unreadable boxes"),
        ("point", {"question": "x", "candidates": [], "answer": 0}, "no answer"),
        ("ground", {"caption": "x"}, "unreadable phrases"),
        ("spot", {"caption": "x"}, "unreadable phrases"),
        ("spot", {"phrases": []}, "no caption"),
        ("spot", {"caption": "abc", "phrases": [{"start": 0, "end": 4, "boxes": []}]}, "unreadable phrases"),
        ("spot", {"caption": "abc", "phrases": [{"start": 0, "end": 2, "boxes": [[1]]}]}, "unreadable boxes"),
        (
            "spot",
            {"caption": "abc", "phrases": [{"start": 0, "end": 2, "boxes": []}, {"start": 1, "end": 3, "boxes": []}]},
            "unreadable phrases",
        ),
    ],
)
def test_facts_that_cannot_be_phrased(task: str, facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        TASKS[task].conversation(record(facts), random.Random(0))
    assert caught.value.reason == reason
    if task in ("rec", "reg", "refer"):
        assert ask(task, facts)[-1].problem
    else:
        with pytest.raises(SampleError, match=f"^{reason}: "):
            ask(task, facts)


def regions_in(question: Question) -> list[Region]:
    return [part for part in question.reference if isinstance(part, Region) and part.box is not None]


@pytest.mark.parametrize("phrasing", [FIRST, DRAWN], ids=["first", "drawn"])
@pytest.mark.parametrize("task", ["rec", "reg", "refer"])
def test_a_bad_target_costs_itself_alone(task: str, phrasing: Protocol) -> None:
    good, bad = {"expressions": ["the dog"], "boxes": ONE}, {"expressions": ["the cat"], "boxes": [[1, 2]]}
    questions = ask(task, good | {"more": [bad, good, 3, {"expressions": [], "boxes": []}, good]}, phrasing)
    reasons = [one.problem.partition(":")[0] for one in questions]
    lost = ["unreadable boxes", "", "no expression", *(["no expression"] if task != "reg" else []), ""]
    assert reasons == ["", *lost], "what has no box is nothing to describe"
    answers = [Answer(error=one.problem) if one.problem else read(said(one.reference)) for one in questions]
    scores = TASKS[task].score(answers, questions, phrasing)
    name = {"rec": "accuracy", "reg": "exact_match", "refer": "locate_accuracy"}[task]
    # Of several kinds, what could not be asked is wrong in each.
    num_asked = sum(not one.problem and (task != "refer" or bool(regions_in(one))) for one in questions)
    num_lost = sum(bool(one.problem) for one in questions)
    assert scores.get(name, 0.0) == pytest.approx(num_asked / (num_asked + num_lost))
    assert {TASKS[task].judge(Answer(error="x: y"), one, phrasing) for one in questions} == {0.0}


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([1, 1, 400, 20], "region outside the picture"),
        ([20, 1, 10, 20], "inverted region"),
        ([5, 5, 5, 20], "empty region"),
    ],
)
@pytest.mark.parametrize("task", ["rec", "reg", "refer", "spot", "ground", "point"])
def test_a_place_that_cannot_be_is_a_problem_where_the_size_is_known(task: str, box: list[float], reason: str) -> None:
    caption = {"caption": "A dog", "phrases": [{"start": 0, "end": 5, "boxes": [box]}]}
    choice = {"question": "Which?", "candidates": [*ONE, box], "answer": 0}
    facts = {"expressions": ["the dog"], "boxes": [box], **(choice if task == "point" else caption)}
    (question,) = ask(task, facts)
    assert question.problem.startswith(f"{reason}: ")
    scores = TASKS[task].score([Answer(error=question.problem)], [question], FIRST)
    assert not any(scores.values()), scores
    (unknown,) = TASKS[task].questions(Record("k", facts, (MediaRef("image", b""),)), FIRST)
    assert not unknown.problem


@pytest.mark.parametrize("task", ["reg", "spot", "ground"])
def test_an_answer_with_an_error_is_wrong_where_the_right_one_has_no_word(task: str) -> None:
    (question,) = ask(task, {"expressions": ["."], "boxes": ONE, "caption": ".", "phrases": []})
    for answer in (Answer(error="x: y"), Answer(".", error="x: y")):
        assert not any(TASKS[task].score([answer], [question], FIRST).values())
        assert TASKS[task].judge(answer, question, FIRST) == 0.0
    assert TASKS[task].score([Answer(".")], [question], FIRST)["exact_match"] == 1.0


def test_phrases_are_told_apart_by_their_vowels() -> None:
    """Devanagari writes vowels as marks."""
    facts = {"caption": "\u0915\u093f", "phrases": [{"start": 0, "end": 2, "boxes": ONE}]}
    (question,) = ask("spot", facts)
    place = said(question.reference).partition(" ")[2]
    assert SPOT.judge(read(f"\u0915\u093f {place}"), question, FIRST) == 1.0
    assert SPOT.judge(read(f"\u0915\u0940 {place}"), question, FIRST) == 0.0


@pytest.mark.parametrize("task", ["rec", "reg", "refer", "spot", "ground", "point"])
def test_a_region_needs_its_picture(task: str) -> None:
    facts = {"expressions": ["x"], "boxes": ONE, "caption": "x", "phrases": [], **CHOICE}
    with pytest.raises(SampleError, match="no media"):
        TASKS[task].conversation(Record("k", facts), random.Random(0))


@pytest.mark.parametrize("name", ["refcoco", "flickr30k_grounding", "visual7w", "pointqa"])
def test_protocols_of_the_papers(name: str) -> None:
    found = Protocol.model_validate(yaml.safe_load((tiny.ROOT / f"configs/protocols/{name}.yaml").read_text()))
    # A box of Shikra's is 25 characters, and as many tokens where every digit is one.
    assert found.phrasing == "first" and found.iou == 0.5 and found.max_new_tokens >= 30
