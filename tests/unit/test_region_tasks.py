"""rec, reg and spot: every box of the facts is phrased, no prompt tells the answer, and scores count what they say."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.regions import Geometry, RegionFormat
from mmchat.tasks import TASKS, facts, rec, reg, spot
from mmchat.tasks.box_score import num_matched

REC, REG, SPOT = TASKS["rec"], TASKS["reg"], TASKS["spot"]
WIDTH, HEIGHT = 200, 100


def record(facts: dict[str, Any]) -> Record:
    return Record("k", facts, (MediaRef("image", b"", MediaHeader(WIDTH, HEIGHT)),))


def regions(conversation: Conversation, role: str) -> list[list[tuple[float, ...]]]:
    """Boxes of each turn of a role."""
    return [
        [part.box for part in turn.parts if isinstance(part, Region) and part.box]
        for turn in conversation.turns
        if turn.role == role
    ]


def said(conversation: Conversation) -> str:
    """The last answer as a model in the default dialect would write it."""
    identity = Geometry(WIDTH, HEIGHT, WIDTH, HEIGHT, 1, 1, 0, 0)
    parts = conversation.turns[-1].parts
    return "".join(RegionFormat().render(one, identity) if isinstance(one, Region) else str(one) for one in parts)


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
    assert len(answers) == 1 + min(len(more), facts.MAX_ASKED - 1)
    assert all(answer in wanted for answer in answers[:-1])
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


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.tuples(st.sampled_from(["a man", "it's", "{}"]), st.lists(boxes, max_size=3)), min_size=1),
    seed=st.integers(0, 9),
)
def test_spot_puts_boxes_behind_their_phrases(words: list[tuple[str, list[list[float]]]], seed: int) -> None:
    caption, phrases = "", []
    for text, found in words:
        phrases.append({"start": len(caption), "end": len(caption) + len(text), "boxes": found})
        caption += f"{text} "
    caption = caption.strip()
    one = record({"caption": caption, "phrases": random.Random(seed).sample(phrases, len(phrases))})
    conversation = SPOT.conversation(one, random.Random(seed))
    wanted = [tuple(box) for phrase in phrases for box in phrase["boxes"]]
    assert regions(conversation, "assistant") == [wanted] and regions(conversation, "user") == [[]]
    answer = said(conversation)
    assert re.sub(r" \[[^\]]*\]", "", answer) == caption
    # Shikra's three decimals move a side by a pixel in a thousand at most: the boxes are found again.
    assert SPOT.score([answer], [one]) == {
        "exact_match": 1.0,
        "token_f1": 1.0,
        "box_recall": 1.0 if wanted else 0.0,
    }


@pytest.mark.parametrize("prompts", [rec.PROMPTS, reg.PROMPTS, spot.PROMPTS])
def test_no_prompt_tells_an_answer(prompts: tuple[str, ...]) -> None:
    assert len(set(prompts)) == len(prompts) >= 4
    for prompt in prompts:
        assert not re.search(r"[\[\]<>\d]", prompt) and rec.NOTHING.lower() not in prompt.lower()
        assert prompt.count("{}") == (0 if prompts is spot.PROMPTS else 1)


# In the padded square of 200, y moves down by 50: [0.1, 0.3, 0.6, 0.7] is (20, 10, 120, 90) in pixels.
ONE = [[20, 10, 120, 90]]
TWO = [[20, 10, 120, 90], [150, 0, 200, 50]]


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
    [
        (ONE, "[0.100,0.300,0.600,0.700]", True),
        (ONE, "It is at [0.1, 0.3, 0.6, 0.7].", True),
        (ONE, "[0.1,0.3,0.6,0.501]", True),  # 81 of 160: just above a half
        (ONE, "[0.1,0.3,0.6,0.5]", False),  # exactly a half is not enough
        (ONE, "[0.1,0.3,0.6,0.7] [0.1,0.3,0.6,0.7]", False),
        (ONE, "[0.1,0.3,0.6", False),
        (ONE, "There is none.", False),
        ([], "There is none.", True),
        ([], "[0.1,0.3,0.6,0.7]", False),
        (TWO, "[0.75,0.25,1.0,0.5] and [0.1,0.3,0.6,0.7]", True),
        (TWO, "[0.75,0.25,1.0,0.5;0.1,0.3,0.6,0.7]", True),
        (TWO, "[0.1,0.3,0.6,0.7] [0.1,0.3,0.6,0.7]", False),
        (TWO, "[0.1,0.3,0.6,0.7]", False),
    ],
)
def test_rec_score(wanted: list[list[float]], answer: str, right: bool) -> None:
    assert REC.score([answer], [record({"expressions": ["x"], "boxes": wanted})]) == {"accuracy": float(right)}


def test_every_record_counts() -> None:
    good = record({"expressions": ["the dog", "it"], "boxes": ONE})
    bad = record({"expressions": []})
    unsized = Record("k", good.facts, (MediaRef("image", b""),))
    assert REC.score(["[0.1,0.3,0.6,0.7]"] * 4, [good, bad, unsized, Record("", {})]) == {"accuracy": 0.25}
    assert REG.score(["Dog", "dog"], [good, bad]) == {"exact_match": 0.5, "token_f1": 0.5}
    phrases = [{"start": 0, "end": 1, "boxes": TWO}]
    answers = ["A [0.1,0.3,0.6,0.7] dog", "cat"]
    records = [record({"caption": "A dog", "phrases": phrases}), Record("", {})]
    assert SPOT.score(answers, records) == {"exact_match": 0.5, "token_f1": 0.5, "box_recall": 0.5}


def test_each_box_is_in_one_pair() -> None:
    a, b, c = (0, 0, 10, 10), (1, 0, 11, 10), (50, 50, 60, 60)
    assert num_matched([a, a], [a]) == num_matched([a], [a, b]) == num_matched([c, a], [b]) == 1
    assert num_matched([b, c, a], [a, b]) == 2 and num_matched([], [a]) == num_matched([a], []) == 0


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


@pytest.mark.parametrize("task", ["rec", "reg", "spot"])
def test_a_region_needs_its_picture(task: str) -> None:
    facts = {"expressions": ["x"], "boxes": ONE, "caption": "x", "phrases": []}
    with pytest.raises(SampleError, match="no media"):
        TASKS[task].conversation(Record("k", facts), random.Random(0))
