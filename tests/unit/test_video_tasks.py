"""Questions about videos by type, expressions in time, and dialogues with places at a time."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mmchat.conversation import MediaHeader, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.regions import check_region
from mmchat.sources import read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from mmchat.tasks.question import Answer, Protocol, Question
from mmchat.tasks.track import TRACK, WHEN, interval_text, read_interval
from tests import tiny

FIRST = Protocol()
CLIP = (MediaRef("video", b"x", MediaHeader(64, 32, 32, 8.0, 4.0)),)
TUBE = [[0.0, 0, 8, 16, 24], [0.8, 44, 8, 60, 24]]


def asked(task: str, facts: dict[str, Any], key: str = "k") -> Question:
    (question,) = TASKS[task].questions(Record(key, facts, CLIP), FIRST)
    return question


# ---- video_qa -------------------------------------------------------------------------------------------------------


def _qa(kind: int | None, answer: str, **more: Any) -> Question:
    types = {} if kind is None else {"question_type": kind}
    return asked("video_qa", {"question": "What is it?", "answers": [answer], **types, **more})


def test_accuracy_for_each_type_equals_the_sets_own_count() -> None:
    """As ActivityNet-QA counts: right ones of a type over all of it, and types 3 to 8 together as free."""
    rng = random.Random(3)
    truths = [(rng.randrange(9), rng.choice(("yes", "no", "red", "2"))) for _ in range(300)]
    said = [rng.choice(("yes", "no", "red", "2")) for _ in truths]
    counts, right = [0] * 9, [0] * 9
    for (kind, truth), text in zip(truths, said, strict=True):
        counts[kind] += 1
        right[kind] += text == truth
    questions = [_qa(kind, truth) for kind, truth in truths]
    scores = TASKS["video_qa"].score([Answer(text) for text in said], questions, FIRST)
    names = ("motion", "spatial", "temporal", "yes_no", "colour", "object", "location", "number", "other")
    for i, name in enumerate(names):
        assert scores[f"accuracy_{name}"] == pytest.approx(right[i] / counts[i])
    assert scores["accuracy_free"] == pytest.approx(sum(right[3:]) / sum(counts[3:]))
    assert scores["accuracy"] == pytest.approx(sum(right) / 300)


def test_what_is_not_answered_stays_in_the_denominator() -> None:
    task = TASKS["video_qa"]
    gone = _qa(0, "run", missing_video="v_gone")
    assert gone.problem == "missing video: v_gone"
    questions = [_qa(0, "run"), _qa(0, "run"), gone, None, _qa(4, "red")]
    answers = [Answer("Run."), Answer(error="undecodable video: x"), Answer(error=gone.problem), Answer(error="y"),
               Answer("the answer is Red")]  # fmt: skip
    scores = task.score(answers, questions, FIRST)
    # Of three motion questions and one of no known type one is right; of one colour question and that one, one.
    wanted = {"accuracy": 2 / 5, "token_f1": 2 / 5, "accuracy_motion": 1 / 4, "accuracy_colour": 1 / 2}
    assert scores == pytest.approx(wanted | {"accuracy_free": 1 / 2})
    assert [task.judge(a, q, FIRST) for a, q in zip(answers, questions, strict=True) if q] == [1, 0, 0, 1]
    # An answer to a question that cannot be asked is wrong, even a right guess.
    assert task.score([Answer("run")], [gone], FIRST)["accuracy"] == 0
    assert task.score([Answer()], [None], FIRST) == {"accuracy": 0, "token_f1": 0}


def test_sets_without_types_have_one_accuracy() -> None:
    scores = TASKS["video_qa"].score([Answer("a man"), Answer("dog")], [_qa(None, "man"), _qa(None, "cat")], FIRST)
    assert scores == {"accuracy": 0.5, "token_f1": 0.5}
    assert _qa(9, "x").problem.startswith("unknown question type: k: found 9")
    assert TASKS["video_qa"].score([Answer("x")], [_qa(9, "x")], FIRST)["accuracy"] == 0


def _activitynet(folder: Path) -> Files:
    (folder / "v_a.mp4").write_bytes(tiny.clip("left"))
    rows = [{"video_name": name, "question": "what", "question_id": name} for name in ("a", "gone1", "gone2")]
    answers = [{"answer": "x", "type": 0, "question_id": row["question_id"]} for row in rows]
    for split in ("test", "train"):
        (folder / f"{split}_q.json").write_text(json.dumps(rows))
        (folder / f"{split}_a.json").write_text(json.dumps(answers))
    return Files(folder)


def test_missing_videos_are_counted_in_evaluations_and_skipped_in_training(tmp_path: Path) -> None:
    files = _activitynet(tmp_path)
    found = [one for one in read_source("activitynet_qa", files, "test") if isinstance(one, Record)]
    assert [one.facts.get("missing_video") for one in found] == [None, "gone1", "gone2"]
    assert [one.media[0].data is None for one in found] == [False, True, True]
    for split, options in (("train", {}), ("test", {"missing": "skip"})):
        kept = list(read_source("activitynet_qa", files, split, options))
        assert sorted(isinstance(one, Record) for one in kept) == [False, False, True]
    for options, message in (
        ({"missing": "keep"}, "skip or count, not keep"),
        ({"missing": "count", "grouped": "yes"}, "grouped=no"),
        ({"sound": "maybe"}, "sound is yes or no, not maybe"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_source("activitynet_qa", files, "test", options))


# ---- track ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [TRACK, WHEN])
def test_there_are_a_dozen_prompts_and_none_twice(prompts: tuple[str, ...]) -> None:
    assert len(set(prompts)) == len(prompts) >= 12 and all(prompt.count("{}") == 1 for prompt in prompts)


def test_a_tube_is_asked_for_and_an_interval() -> None:
    question = asked("track", {"expressions": ["the square."], "tube": TUBE})
    assert question.conversation.turns[0].parts[1] == "When and where in the video is this: the square"
    assert question.reference == (Region(0, tube=tuple(map(tuple, TUBE))),)
    question = asked("track", {"expressions": ["it moves"], "interval": [0.25, 0.75]})
    assert question.conversation.turns[0].parts[1] == "When in the video is this: it moves"
    assert question.reference == ("@0.2s-0.8s",)  # to the nearest even tenth, as everywhere in Python


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("@1.5s-4.0s", (1.5, 4.0)),
        ("From @1s - @2.25s.", (1.0, 2.25)),
        ("@1.5-4s", (1.5, 4.0)),
        ("@4.0s-1.5s", None),
        ("@1s-2s or @3s-4s", None),
        ("1.5s-4.0s", None),
        ("@1.5s", None),
        ("", None),
        ("@1s-9999999999s", None),
    ],
)
def test_intervals_are_read(text: str, interval: tuple[float, float] | None) -> None:
    assert read_interval(text) == interval
    if interval:
        assert read_interval(interval_text(interval)) == pytest.approx(interval, abs=0.05)


def test_tracks_are_scored() -> None:
    task, tube = TASKS["track"], tuple(map(tuple, TUBE))
    question = asked("track", {"expressions": ["it"], "tube": TUBE, "fps": 10})
    when = asked("track", {"expressions": ["it"], "interval": [1.0, 3.0]})
    late = tuple((t + 0.4, *box) for t, *box in tube)
    whole, wrong = Answer("{}", (Region(0, tube=tube),)), Answer("{}", (Region(0, tube=late),))
    # Frames 0 to 8 and 4 to 12: 5 of 13; the box is 22 pixels behind, and is 16 wide: no overlap.
    assert task.score([whole, wrong], [question] * 2, FIRST) == pytest.approx(
        {"mean_tiou": (1 + 5 / 13) / 2, "mean_viou": 0.5, "viou_0.3": 0.5, "viou_0.5": 0.5, "parse_failures": 0}
    )
    assert task.judge(whole, question, FIRST) == 1 and task.judge(wrong, question, FIRST) == 0
    none = (
        Answer("nothing"),
        Answer("[..]", (Region(0, box=tube[0][1:]),)),  # a box is no tube
        Answer("{}{}", (Region(0, tube=tube),) * 2),  # two are not one
        Answer("{} {", (Region(0, tube=tube),), num_failed=1),
        Answer("#2{}", (Region(1, tube=tube),)),
    )
    scores = task.score(none, [question] * 5, FIRST)
    assert scores["mean_tiou"] == scores["mean_viou"] == 0 and scores["parse_failures"] == 1
    # One interval of one right; a tube where an interval is wanted; two questions that could not be read.
    answers = [Answer("@2.0s-4.0s"), Answer("{}", (Region(0, tube=tube),)), Answer(error="x"), Answer(error="y")]
    broken = asked("track", {"expressions": ["it"], "interval": [3, 1]})
    assert broken.problem.startswith("impossible time")
    assert task.score(answers, [when, when, None, broken], FIRST) == pytest.approx(
        {"mean_interval_iou": 1 / 3 / 4, "interval_0.3": 1 / 4, "interval_0.5": 0, "interval_0.7": 0}
        | {"parse_failures": 1 / 4}
    )
    assert task.score([Answer(error="x")], [None], FIRST)["mean_viou"] == 0


def test_one_expression_of_a_tube_is_asked_in_a_conversation() -> None:
    own = {"expressions": ["own"], "tube": TUBE}
    other = {"expressions": ["other"], "interval": [0.1, 0.2]}
    facts = own | {"more": [{"expressions": ["again"], "tube": TUBE}, other, other | {"expressions": ["twice"]}]}
    for seed in range(10):
        turns = TASKS["track"].conversation(Record("k", facts, CLIP), random.Random(seed)).turns
        said = [str(turn.parts[-1]) for turn in turns[::2]]
        assert len(said) == 2 and "own" in said[-1] and ("other" in said[0] or "twice" in said[0])
    assert len(TASKS["track"].questions(Record("k", facts, CLIP), FIRST)) == 4


@pytest.mark.parametrize(
    ("facts", "media", "reason"),
    [
        ({"expressions": ["a"]}, CLIP, "no tube"),
        ({"expressions": ["a"], "tube": []}, CLIP, "no tube"),
        ({"expressions": ["a"], "tube": [[0, 1, 2, 3]]}, CLIP, "no tube"),
        ({"expressions": ["a"], "tube": [TUBE[1], TUBE[0]]}, CLIP, "no tube"),
        ({"expressions": ["a"], "interval": [1]}, CLIP, "no tube"),
        ({"expressions": ["a"], "interval": [1, 1]}, CLIP, "impossible time"),
        ({"expressions": ["a"], "interval": [5, 6]}, CLIP, "impossible time"),
        ({"expressions": ["a"], "interval": [0, 9]}, CLIP, "impossible time"),
        ({"expressions": [], "tube": TUBE}, CLIP, "no expression"),
        ({"expressions": ["a"], "tube": TUBE}, (MediaRef("image", b""),), "no video"),
        ({"expressions": ["a"], "tube": TUBE}, (), "no media"),
    ],
)
def test_facts_that_cannot_be_phrased(facts: dict[str, Any], media: tuple[MediaRef, ...], reason: str) -> None:
    with pytest.raises(SampleError) as error:
        TASKS["track"].conversation(Record("k", facts, media), random.Random(0))
    assert error.value.reason == reason


@pytest.mark.parametrize(("times_s", "can_be"), [((3, 5), True), ((5, 6), False), ((0, 90), False)])
def test_times_behind_the_end_of_a_clip(times_s: tuple[float, float], can_be: bool) -> None:
    """Such as numbers of frames: the question is not asked and counts as wrong, and nothing is learned from it."""
    facts: dict[str, Any] = {"expressions": ["a"], "tube": [[time_s, 0, 0, 8, 8] for time_s in times_s]}
    assert asked("track", facts).problem.partition(":")[0] == ("" if can_be else "impossible time")
    with nullcontext() if can_be else pytest.raises(SampleError, match="impossible time"):
        check_region(Region(0, tube=tuple(map(tuple, facts["tube"]))), 64, 32, 4.0)


# ---- instruct -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "said", "found"),
    [
        ({"box": [0, 0, 10, 10], "time_s": 1.0}, Region(0, box=(0, 0, 10, 9), time_s=1.4), True),
        ({"box": [0, 0, 10, 10], "time_s": 1.0}, Region(0, box=(0, 0, 10, 9), time_s=1.6), False),
        ({"box": [0, 0, 10, 10], "time_s": 1.0}, Region(0, box=(0, 0, 10, 9)), False),
        ({"box": [0, 0, 10, 10], "time_s": 1.0}, Region(0, box=(0, 0, 10, 4), time_s=1.0), False),
        ({"box": [0, 0, 10, 10]}, Region(0, box=(0, 0, 10, 9), time_s=1.0), False),
        ({"point": [5, 5], "time_s": 1.0}, Region(0, point=(5, 5), time_s=1.0), True),
        ({"tube": TUBE}, Region(0, tube=tuple(map(tuple, TUBE))), True),
        ({"tube": TUBE}, Region(0, tube=(tuple(TUBE[0]),)), False),
        ({"tube": TUBE}, Region(0, box=(0, 8, 16, 24), time_s=0.0), False),
    ],
)
def test_places_in_time_are_found(right: dict[str, Any], said: Region, found: bool) -> None:
    turns = [
        {"role": "user", "parts": [{"media": 0}, {"text": "Where?"}]},
        {"role": "assistant", "parts": [{"region": {"media": 0, **right}}]},
    ]
    question = asked("instruct", {"turns": turns})
    answer = Answer("[0.1,0.1]", (said,))
    assert TASKS["instruct"].score([answer], [question], FIRST)["exact_match"] == float(found)
    assert TASKS["instruct"].judge(answer, question, FIRST) == float(found)
