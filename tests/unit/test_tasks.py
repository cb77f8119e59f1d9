"""Tasks: public formats become facts, facts become conversations, answers become scores."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmchat.conversation import Conversation, MediaRef, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS

INSTRUCT, CAPTION = TASKS["instruct"], TASKS["caption"]
HI = {"from": "gpt", "value": "Hi."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "v.mp4", "s.wav"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def read(task: str, source: Path, split: str = "train") -> list[Record | SampleError]:
    """Records that the task can phrase, as make_shards.py writes them."""
    files = Files(source)
    found: list[Record | SampleError] = []
    for record in read_source(choose_source(task, files, split), files, split):
        try:
            if isinstance(record, Record):
                TASKS[task].conversation(record, random.Random(0))
            found.append(record)
        except SampleError as error:
            found.append(error)
    return found


def rows_of(task: str, folder: Path, *rows: Any, name: str = "train.jsonl") -> list[Record | SampleError]:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read(task, folder)


def instruct(folder: Path, row: dict[str, Any]) -> Record:
    (record,) = rows_of("instruct", folder, row)
    assert isinstance(record, Record), record
    return record


def refusal(folder: Path, row: Any, task: str = "instruct", name: str = "train.jsonl") -> str:
    (error,) = rows_of(task, folder, row, name=name)
    assert isinstance(error, SampleError)
    assert "row 0" in error.detail or "00000000" in error.detail
    return error.reason


def shown(conversation: Conversation) -> list[tuple[str, list[Any]]]:
    """Roles and parts, media as their bytes."""
    return [
        (
            turn.role,
            [part.read() if isinstance(part, MediaRef) and part.data else part for part in turn.parts],
        )
        for turn in conversation.turns
    ]


def test_llava_rows(folder: Path) -> None:
    row = {
        "id": "x/1",
        "image": ["a.jpg", "b.jpg"],
        "video": "v.mp4",
        "conversations": [
            {"from": "human", "value": "<image>\nThis or <image>?"},
            {"from": "gpt", "value": "This."},
            {"from": "human", "value": "And <video>"},
            {"from": "gpt", "value": "No."},
        ],
    }
    record = instruct(folder, row)
    assert record.key == "00000000" and record.facts["id"] == "x/1"
    conversation = INSTRUCT.conversation(record, random.Random(0))
    assert shown(conversation) == [
        ("user", [b"a.jpg", "This or ", b"b.jpg", "?"]),
        ("assistant", ["This."]),
        ("user", ["And ", b"v.mp4"]),
        ("assistant", ["No."]),
    ]
    assert [turn.is_learned for turn in conversation.turns] == [False, True, False, True]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train/instruct.jsonl"])
def test_files_of_a_folder_and_media_beside_them(folder: Path, name: str) -> None:
    row = {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}, HI]}
    (record,) = rows_of("instruct", folder, [row] if name.endswith(".json") else row, name=name)
    assert isinstance(record, Record) and record.media[0].read() == b"a.jpg"
    assert read("instruct", folder / name, "other") if name == "train.jsonl" else True


def test_an_item_without_a_placeholder_comes_first(folder: Path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What?"}, HI]
    record = instruct(folder, {"image": "a.jpg", "audio": "s.wav", "conversations": turns})
    parts = shown(INSTRUCT.conversation(record, random.Random(0)))
    assert parts[:2] == [("system", ["Be brief."]), ("user", [b"a.jpg", b"s.wav", "What?"])]
    assert [item.modality for item in record.media] == ["image", "audio"]


def test_a_placeholder_in_a_later_turn_stays_there(folder: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, HI, {"from": "human", "value": "And <image>"}, HI]
    record = instruct(folder, {"image": "a.jpg", "conversations": turns})
    assert shown(INSTRUCT.conversation(record, random.Random(0)))[2] == ("user", ["And ", b"a.jpg"])


def test_placeholders_are_text_where_the_row_has_no_such_media(folder: Path) -> None:
    text = "What is <image> in <video>?"
    for row in ({}, {"image": None}, {"images": []}):
        record = instruct(folder, row | {"conversations": [{"from": "human", "value": text}, HI]})
        assert shown(INSTRUCT.conversation(record, random.Random(0)))[0] == ("user", [text])
    record = instruct(folder, {"image": "a.jpg", "conversations": [{"from": "human", "value": text}, HI]})
    assert record.facts["turns"][0]["parts"] == [{"text": "What is "}, {"media": 0}, {"text": " in <video>?"}]


def test_a_null_in_a_list_is_an_absent_item(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>"}, HI]
    record = instruct(folder, {"image": [None, "b.jpg"], "conversations": turns})
    assert [item.data is None for item in record.media] == [True, False]


def test_chat_messages(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"png").decode()
    content = [
        {"type": "image", "path": "a.jpg"},
        {"type": "text", "text": "with <image> and"},
        {"type": "video", "video": "v.mp4"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "audio", "audio": "s.wav"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}], "learn": False},
    ]
    record = instruct(folder, {"messages": messages})
    conversation = INSTRUCT.conversation(record, random.Random(0))
    assert shown(conversation) == [
        ("system", ["Be brief."]),
        ("user", [b"a.jpg", "with <image> and", b"v.mp4", b"png", b"s.wav"]),
        ("assistant", ["Yes."]),
    ]
    assert conversation.turns[2].learn is False


def test_chat_messages_with_media_in_a_column(folder: Path) -> None:
    content = [{"type": "text", "text": "Which <image>?"}, {"type": "image"}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "One."}]
    record = instruct(folder, {"images": ["b.jpg", "a.jpg"], "messages": messages})
    assert shown(INSTRUCT.conversation(record, random.Random(0)))[0][1] == [
        "Which <image>?",
        b"b.jpg",
        b"a.jpg",
    ]


ASK = {"from": "human", "value": "<image>"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg", "conversations": [ASK, HI, ASK, HI]}, "too many placeholders"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": [ASK, HI]}, "too few placeholders"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": [HI]}, "too few placeholders"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "too many placeholders"),
        ({"image": "c.jpg", "conversations": [ASK, HI]}, "missing media"),
        ({"image": "../a.jpg", "conversations": [ASK, HI]}, "media outside of the source"),
        ({"image": "/etc/passwd", "conversations": [ASK, HI]}, "media outside of the source"),
        ({"image": "http://x.org/a.jpg", "conversations": [ASK, HI]}, "media not local"),
        ({"image": "data:image/png;base64,!", "conversations": [ASK, HI]}, "unreadable media path"),
        ({"image": "a\0.jpg", "conversations": [ASK, HI]}, "missing media"),
        ({"image": "x" * 5000, "conversations": [ASK, HI]}, "unreadable media path"),
        ({"image": 7, "conversations": [ASK, HI]}, "unreadable media path"),
        ({"conversations": [{"from": "human", "value": "?"}]}, "no answer"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": " "}]}, "no answer"),
        ({"conversations": [{"from": "robot", "value": "?"}, HI]}, "unknown role"),
        ({"conversations": [{"from": ["human"], "value": "?"}, HI]}, "unknown role"),
        ({"conversations": [{"from": "human", "value": None}, HI]}, "unreadable turn"),
        ({"conversations": ["hello"]}, "unreadable turn"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "unreadable turn"),
        ({"conversations": []}, "no turns"),
        ({}, "no turns"),
        ("[", "unreadable row"),
        ("3", "unreadable row"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(folder: Path, row: Any, reason: str) -> None:
    assert refusal(folder, row if row != "[" else '{"a": ') == reason


def test_a_byte_order_mark_and_empty_lines_are_passed_over(folder: Path) -> None:
    row = json.dumps({"conversations": [{"from": "human", "value": "?"}, HI]})
    (folder / "train.jsonl").write_text(f"\ufeff{row}\n\n{row}\n")
    assert all(isinstance(one, Record) for one in read("instruct", folder))


def test_one_bad_row_does_not_hide_the_others(folder: Path) -> None:
    good = {"conversations": [{"from": "human", "value": "?"}, HI]}
    found = rows_of("instruct", folder, good, "{", good, {}, good)
    assert [type(one).__name__ for one in found] == [
        "Record",
        "SampleError",
        "Record",
        "SampleError",
        "Record",
    ]
    assert [one.key for one in found if isinstance(one, Record)] == ["00000000", "00000002", "00000004"]


def test_a_missing_or_broken_file_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no format of task instruct.*chat: train.json, train.jsonl"):
        list(read("instruct", folder))
    (folder / "train.json").write_text('[{"a": 1}, ')
    with pytest.raises(ValueError, match=r"train.json in .* is no whole JSON"):
        list(read("instruct", folder))


def test_regions_count_media_as_the_conversation_shows_them() -> None:
    media = (MediaRef("image", b"first"), MediaRef("image", b"second"))
    parts = [
        {"media": 1},
        {"media": 0},
        {"region": {"media": 0, "box": [1, 2, 3, 4], "label": "dog"}},
        {"region": {"media": 1, "point": [5, 6], "time_s": 2}},
        {"region": {"media": 1, "tube": [[0, 1, 2, 3, 4]]}},
    ]
    facts = {"turns": [{"role": "user", "parts": parts}, {"role": "assistant", "parts": [{"text": "x"}]}]}
    conversation = INSTRUCT.conversation(Record("k", facts, media), random.Random(0))
    assert conversation.turns[0].parts[2:] == (
        Region(1, box=(1.0, 2.0, 3.0, 4.0), label="dog"),
        Region(0, point=(5.0, 6.0), time_s=2.0),
        Region(0, tube=((0.0, 1.0, 2.0, 3.0, 4.0),)),
    )


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"turns": [{"role": "user"}]},
        {"turns": [{"role": "robot", "parts": []}]},
        {"turns": [{"role": "user", "parts": [], "learn": "yes"}]},
        {"turns": [{"role": "user", "parts": [{"media": 1}]}]},
        {"turns": [{"role": "user", "parts": [{"media": -1}]}]},
        {"turns": [{"role": "user", "parts": [{"text": 3}]}]},
        {"turns": [{"role": "user", "parts": [{"region": {"media": 0, "box": [1, 2, 3, 4]}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "box": [1, 2, 3]}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "point": [1, "x"]}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "pt": [1, 2]}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "box": [10**400, 0, 1, 1]}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "box": "1239"}}]}]},
        {"turns": [{"role": "user", "parts": [{"media": 0}, {"region": {"media": 0, "point": [1, 2], "time_s": []}}]}]},
        {"turns": "hello"},
    ],
)
def test_facts_that_cannot_be_phrased(facts: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="unreadable facts"):
        INSTRUCT.conversation(Record("k", facts, (MediaRef("image", b""),)), random.Random(0))


def test_captions(folder: Path) -> None:
    objects = [{"label": "dog", "box": [1, 2, 3, 4.5]}]
    found = rows_of(
        "caption",
        folder,
        {"image": "a.jpg", "caption": "A dog.", "objects": objects},
        {"video": "v.mp4", "audio": "s.wav", "captions": ["One.", "Two."]},
        {"audio": "s.wav", "caption": "Noise."},
        name="train/captions.jsonl",
    )
    picture, clip, sound = (one for one in found if isinstance(one, Record))
    assert picture.facts == {"caption": "A dog.", "objects": objects}
    user, answer = CAPTION.conversation(picture, random.Random(0)).turns
    assert user.parts[0] == picture.media[0] and isinstance(user.parts[1], str)
    assert answer == Turn("assistant", ("A dog.",))

    phrased = [CAPTION.conversation(clip, random.Random(seed)) for seed in range(30)]
    assert {one.turns[1].parts for one in phrased} == {("One.",), ("Two.",)}
    assert all(one.media == clip.media and "picture" not in str(one.turns[0].parts[-1]) for one in phrased)
    assert len({one.turns[0].parts for one in phrased}) > 2
    assert CAPTION.conversation(clip, random.Random(3)) == phrased[3]
    heard = {str(CAPTION.conversation(sound, random.Random(seed)).turns[0].parts[-1]) for seed in range(30)}
    assert not any("see" in prompt or "picture" in prompt for prompt in heard)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "c.jpg", "caption": "x"}, "missing media"),
        ({"image": "a.jpg"}, "no caption"),
        ({"image": "a.jpg", "caption": "  "}, "no caption"),
        ({"image": "a.jpg", "captions": []}, "no caption"),
        ({"image": "a.jpg", "captions": ["x", None]}, "no caption"),
        ({"caption": "x"}, "no media"),
        (
            {"image": "a.jpg", "caption": "x", "objects": [{"label": "dog", "box": [1, 2]}]},
            "unreadable objects",
        ),
        ({"image": "a.jpg", "caption": "x", "objects": 3}, "unreadable objects"),
    ],
)
def test_captions_that_cannot_be_used(folder: Path, row: dict[str, Any], reason: str) -> None:
    assert refusal(folder, row, "caption", "train/captions.jsonl") == reason


def test_an_absent_picture_is_a_legal_caption() -> None:
    record = Record("k", {"caption": "x"}, (MediaRef("image", None),))
    assert CAPTION.conversation(record, random.Random(0)).media == record.media
