"""VQAv2, ActivityNet-QA, MSRVTT-QA, MSVD-QA, Visual Dialog, AVSD and Image-Chat."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmchat.conversation import MediaHeader, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from mmchat.tasks.question import Answer, Protocol
from tests.sources.fixtures_dialogues import FIXTURES
from tests.sources.made import records_of


@pytest.mark.parametrize("name", FIXTURES)
def test_good_records_are_read_and_others_are_counted(tmp_path: Path, name: str) -> None:
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert len(good) == fixture.num_samples and bad == fixture.skipped
    assert len({record.key for record in good}) == len(good)
    assert all(item.read() for record in good for item in record.media)


def test_vqa2_joins_by_number_in_any_order(tmp_path: Path) -> None:
    FIXTURES["vqa2"](tmp_path)
    found = read_source("vqa2", Files(tmp_path), "train", {"grouped": "no"})
    good = [one for one in found if isinstance(one, Record)]
    first = good[0]
    assert first.facts["answers"] == ["red", "dark red", *["red"] * 9] and first.facts["answer_type"] == "other"
    assert [record.facts["question"] for record in good] == ["What colour is it?", "Is it round?", "How many?"]
    asked = TASKS["vqa"].conversation(first, random.Random(0))
    assert asked.turns[1].parts == ("red",)
    (question,) = TASKS["vqa"].questions(first, Protocol())
    said = [Answer("Dark red"), Answer("blue")]
    assert TASKS["vqa"].score(said, [question] * 2, Protocol())["exact_match"] == 0.5
    # Ten annotators: nine said red, one dark red; the commonest answer in front of them is no vote.
    official = TASKS["vqa"].score(said, [question] * 2, Protocol(match="vqa_v2"))
    assert official == {"accuracy": pytest.approx(0.3 / 2)}


def test_questions_about_one_picture_are_one_record_in_training(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["vqa2"](tmp_path), "vqa2")
    assert [one["question"] for one in good[0].facts["more"]] == ["Is it round?"] and "more" not in good[1].facts
    turns = TASKS["vqa"].conversation(good[0], random.Random(0)).turns
    assert len(turns) == 4 and str(turns[2].parts[0]).startswith("What colour is it?") and len(turns[0].parts) == 2
    with pytest.raises(ValueError, match="grouped is yes or no"):
        list(read_source("vqa2", Files(tmp_path), "train", {"grouped": "maybe"}))


def test_vqa2_test_sets_have_nothing_to_learn(tmp_path: Path) -> None:
    FIXTURES["vqa2"](tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text('{"questions": []}')
    with pytest.raises(ValueError, match="test sets have no answers"):
        list(read_source("vqa2", Files(tmp_path), "test"))


def test_video_questions_get_their_mark_and_type(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["activitynet_qa"](tmp_path), "activitynet_qa")
    assert good[0].facts == {
        "question": "is it moving?", "answers": ["yes"], "question_type": 3, "video_name": "1QIUV7WYKXg"
    }  # fmt: skip


def test_visdial_rounds_are_history(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["visdial"](tmp_path), "visdial")
    first, second = (record.facts["rounds"] for record in good)
    assert first[1]["options"][first[1]["gt_index"]] == first[1]["answer"] == "answer 8"
    assert "relevance" not in first[1] and "relevance" not in second[0] and second[1]["relevance"][99] == 0.4
    turns = TASKS["visdial"].conversation(good[0], random.Random(0)).turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2
    assert "a circle of kind 0" in str(turns[0].parts[1]) and str(turns[0].parts[1]).endswith("is it red?")
    assert turns[2].parts == ("how many are there?",) and turns[3].parts == ("answer 8",)


def test_visdial_keeps_candidates_as_told(tmp_path: Path) -> None:
    FIXTURES["visdial"](tmp_path)
    found = list(read_source("visdial", Files(tmp_path), "val", {"candidates": "no"}))
    assert isinstance(found[0], Record) and "options" not in found[0].facts["rounds"][0]


def test_a_last_round_may_lack_its_answer(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["avsd"](tmp_path), "avsd")
    turns = TASKS["visdial"].conversation(good[0], random.Random(0)).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    broken = Record("k", good[0].facts | {"rounds": good[0].facts["rounds"][::-1]}, good[0].media)
    with pytest.raises(SampleError, match="unreadable round"):
        TASKS["visdial"].conversation(broken, random.Random(0))


def test_image_chat_is_asked_turn_by_turn(tmp_path: Path) -> None:
    good, _ = records_of(FIXTURES["image_chat"](tmp_path), "image_chat")
    assert len(good[0].facts["candidates"][1]) == 100
    turns = TASKS["image_chat"].conversation(good[0], Protocol().rng("")).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert "sweet" in str(turns[0].parts[1]) and turns[3].parts == ("It is to me.",)
    two = Record("k", good[0].facts | {"turns": good[0].facts["turns"][:2]}, good[0].media)
    turns = TASKS["image_chat"].conversation(two, Protocol().rng("")).turns
    assert [turn.role for turn in turns] == ["user", "assistant"] and "skeptical" in str(turns[0].parts[1])
    assert "What a lovely circle!" in str(turns[0].parts[1])
    problems = [one.problem for one in TASKS["image_chat"].questions(good[0], Protocol())]
    assert [text.partition(":")[0] for text in problems] == ["", "no right candidate"] * 3


def test_pointing_asks_with_boxes_and_answers_with_one() -> None:
    task, boxes = TASKS["point"], [[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [20, 20, 30, 30]]
    media = (MediaRef("image", b"", MediaHeader(40, 40)),)
    record = Record("k", {"question": "Which is top left?", "candidates": boxes, "answer": 0}, media)
    orders = set()
    for seed in range(20):
        asked, answered = task.conversation(record, random.Random(seed)).turns
        regions = [part.box for part in asked.parts if isinstance(part, Region)]
        orders.add(tuple(map(boxes.index, map(list, regions))))
        assert sorted(map(list, regions)) == sorted(boxes) and answered.parts == (Region(0, box=(0, 0, 10, 10)),)
    assert len(orders) > 5


@pytest.mark.parametrize(
    ("task", "facts", "reason"),
    [
        ("vqa", {"question": "", "answers": ["a"]}, "no question"),
        ("vqa", {"question": "What?", "answers": []}, "no answer"),
        (
            "vqa",
            {"question": "?", "answers": ["a"], "regions": [{"media": 0, "box": [1, 2]}]},
            "unreadable regions",
        ),
        ("point", {"question": "Which?", "candidates": [[0, 0, 1]], "answer": 0}, "unreadable candidates"),
        ("point", {"question": "Which?", "candidates": [[0, 0, 1, 1]], "answer": 1}, "no answer"),
        ("visdial", {"caption": "x", "rounds": []}, "no rounds"),
        ("visdial", {"rounds": [{"question": "a", "answer": "b"}]}, "no caption"),
        ("image_chat", {"turns": [{"text": "x"}]}, "unreadable turn"),
        ("transcribe", {"text": "..."}, "no text"),
    ],
)
def test_facts_that_cannot_be_phrased(task: str, facts: dict, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        TASKS[task].conversation(Record("k", facts, (MediaRef("image", b""),)), random.Random(0))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("name", "file", "split"),
    [
        ("vqa2", "v2_OpenEnded_mscoco_train2014_questions.json", "train"),
        ("activitynet_qa", "val_q.json", "val"),
        ("msvd_qa", "test_qa.json", "test"),
        ("visdial", "visdial_1.0_val.json", "val"),
    ],
)
def test_what_belongs_to_the_annotation_file_is_found_beside(tmp_path: Path, name: str, file: str, split: str) -> None:
    task = FIXTURES[name](tmp_path).task
    files = Files(tmp_path / file, [tmp_path / "videos"] if name == "activitynet_qa" else [])
    assert choose_source(task, files, split) == name
    found = list(read_source(name, files, split))
    assert sum(isinstance(one, Record) for one in found) >= 2
    if name == "visdial":
        assert any("relevance" in said for one in found if isinstance(one, Record) for said in one.facts["rounds"])


@pytest.mark.parametrize(
    ("name", "missing", "split"),
    [("activitynet_qa", "val_a.json", "val"), ("msvd_qa", "youtube_mapping.txt", "test")],
)
def test_what_is_missing_beside_is_named(tmp_path: Path, name: str, missing: str, split: str) -> None:
    FIXTURES[name](tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing} beside"):
        list(read_source(name, Files(tmp_path), split))


def test_a_mapping_of_three_words_is_named(tmp_path: Path) -> None:
    FIXTURES["msvd_qa"](tmp_path)
    (tmp_path / "youtube_mapping.txt").write_text("a vid1\n\na b vid2\n")
    with pytest.raises(ValueError, match=r"youtube_mapping.txt line 3: wanted NAME vidN, found 'a b vid2'"):
        list(read_source("msvd_qa", Files(tmp_path), "test"))


def test_visdial_candidates_are_yes_or_no(tmp_path: Path) -> None:
    FIXTURES["visdial"](tmp_path)
    with pytest.raises(ValueError, match="candidates is yes or no, not maybe"):
        list(read_source("visdial", Files(tmp_path), "val", {"candidates": "maybe"}))


@pytest.mark.parametrize(
    ("question", "text"),
    [("is it red", "is it red?"), ("Is it red ?", "Is it red?"), ("How old is it .", "How old is it."), ("?", "?")],
)
def test_questions_end_with_one_mark(question: str, text: str) -> None:
    media = (MediaRef("image", b""),)
    record = Record("k", {"caption": "c", "rounds": [{"question": question, "answer": "a"}]}, media)
    assert str(TASKS["visdial"].conversation(record, random.Random(0)).turns[0].parts[1]).endswith(f"\n{text}")
    record = Record("k", {"question": question, "answers": ["a"]}, media)
    for seed in range(9):
        said = str(TASKS["vqa"].conversation(record, random.Random(seed)).turns[0].parts[-1])
        assert said == text or said.startswith(f"{text} ")


def test_regions_of_a_question_are_a_blank_apart() -> None:
    regions = [{"media": 0, "point": [1, 2]}, {"media": 0, "box": [0, 0, 5, 5]}]
    record = Record("k", {"question": "Which?", "answers": ["a"], "regions": regions}, (MediaRef("image", b""),))
    parts = TASKS["vqa"].conversation(record, random.Random(0)).turns[0].parts
    assert [isinstance(part, Region) or part for part in parts[2:5]] == [True, " ", True]
