"""Conversations of LLaVA, Qwen-VL, LLaMA-Factory, ms-swift, OpenAI, TRL, Hugging Face datasets and Video-ChatGPT."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmchat.conversation import Conversation, MediaRef, Record, Region
from mmchat.errors import SampleError
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS
from mmchat.tasks.question import Protocol
from tests.sources.fixtures_conversations import FIXTURES, picture
from tests.sources.made import records_of


def said(record: Record) -> list[tuple[str, list[Any]]]:
    """Role and parts of each turn; an item as its modality, a region as its label and numbers."""
    turns = TASKS["instruct"].conversation(record, random.Random(0)).turns
    return [(turn.role, [_shown(part) for part in turn.parts]) for turn in turns]


def _shown(part: Any) -> Any:
    if isinstance(part, MediaRef):
        return part.modality
    if isinstance(part, Region):
        return (part.media, part.label, part.box or part.point)
    return f"'{part}'"


def made(name: str, folder: Path) -> list[Record]:
    return records_of(FIXTURES[name](folder), name)[0]


def one(folder: Path, row: dict[str, Any], **options: str) -> Record:
    """The record of a row. Raises SampleError."""
    (folder / "one.jsonl").write_text(json.dumps(row))
    (found,) = read_source("chat", Files(folder / "one.jsonl"), "train", options)
    if isinstance(found, SampleError):
        raise found
    return found


@pytest.mark.parametrize("name", FIXTURES)
def test_what_is_written_and_what_is_skipped(tmp_path: Path, name: str) -> None:
    fixture = FIXTURES[name](tmp_path)
    good, bad = records_of(fixture, name)
    assert (len(good), dict(bad)) == (fixture.num_samples, fixture.skipped)
    assert len({record.key for record in good}) == len(good)


def test_llava(tmp_path: Path) -> None:
    behind, absent, text, later = made("chat", tmp_path)[1:]
    assert said(behind)[0] == ("user", ["'Is it round?'", "image"])
    assert said(absent)[0] == ("user", ["image", "'Who wrote this?'"])
    assert said(text)[0] == ("user", ["'What does <image> mean in HTML?'"]) and text.facts["id"] == "wgByO4Y_0"
    assert [parts for _, parts in said(later)] == [
        ["'Hello'"], ["'Hi.'"], ["image", "'Describe the region.'"], ["'A disc.'"]
    ]  # fmt: skip


def test_lcs_558k_is_read_inside_its_zip(tmp_path: Path) -> None:
    good = made("chat:lcs_558k", tmp_path)
    assert [record.media[0].read() for record in good] == [picture(i) for i in (0, 1, 2, 4)]
    assert said(good[0]) == [("user", ["'Render a summary.'", "image"]), ("assistant", ["'a circle'"])]


def test_llava_with_other_media(tmp_path: Path) -> None:
    pair, image_tag, video_tag, both = (said(record)[0][1] for record in made("chat:more_media", tmp_path))
    assert pair == ["image", "image", "'Which is red?'"]
    assert image_tag == ["video", "'Where does it move?'"] and video_tag == ["'What moves?'", "video"]
    assert both == ["audio", "image", "'Both?'"]


def test_qwen_vl(tmp_path: Path) -> None:
    _, boxed, two, pointed = made("chat:qwen_vl", tmp_path)
    assert said(boxed)[0][1] == ["'Picture 1: '", "image", "'What is it?'"]
    assert said(boxed)[3][1] == ["'circle '", (0, "circle", (12.0, 16.0, 36.0, 32.0))]
    assert said(two)[0][1] == ["'Picture 1: '", "image", "'Picture 2: '", "image", "'Which is red?'"]
    assert said(pointed)[1][1] == [(0, None, (24.0, 16.0)), "'.'"]


def test_regions_stay_text_unless_asked_for(tmp_path: Path) -> None:
    FIXTURES["chat:qwen_vl"](tmp_path)
    found = [one for one in read_source("chat", Files(tmp_path), "train") if isinstance(one, Record)]
    assert said(found[1])[3][1] == ["'<ref>circle</ref><box>(250,500),(750,1000)</box>'"]


def test_packed_rows_become_records_of_their_own(tmp_path: Path) -> None:
    keys = [record.key for record in made("chat:qwen_packed", tmp_path)]
    assert keys == ["00000000-000", "00000000-001", "00000001-000", "00000002-000"]


def test_llama_factory(tmp_path: Path) -> None:
    turned, tools, _, chosen = made("chat:llama_factory", tmp_path)
    assert said(turned)[2][1] == ["'And this?'", "image"]
    assert [role for role, _ in said(tools)] == ["system", "user", "assistant", "user", "assistant"]
    assert tools.facts["tools"] == '[{"name": "weather"}]'
    assert said(chosen)[1] == ("assistant", ["'Hello.'"]) and "No." not in str(chosen.facts)


def test_llama_factory_reads_alpaca_and_the_columns_that_are_named(tmp_path: Path) -> None:
    FIXTURES["chat:llama_factory"](tmp_path)
    by_file = list(read_source("chat", Files(tmp_path / "identity.json"), "train"))
    by_name = list(read_source("chat", Files(tmp_path), "train", {"dataset": "identity"}))
    assert by_file == by_name and isinstance(by_name[1], Record)
    assert said(by_name[1]) == [("user", ["'Add.\n1 2'"]), ("assistant", ["'3'"])]
    assert isinstance(by_name[0], Record) and len(said(by_name[0])) == 2  # history is a column that is not named
    undescribed = one(tmp_path, json.loads((tmp_path / "identity.json").read_text())[0])
    assert [parts for _, parts in said(undescribed)] == [["'Hi'"], ["'Hello.'"], ["'Who are you?'"], ["'A model.'"]]


def test_several_files_are_named(tmp_path: Path) -> None:
    FIXTURES["chat:llama_factory"](tmp_path)
    assert choose_source("instruct", Files(tmp_path), "train") == "chat"
    with pytest.raises(ValueError, match=r"2 files \*.json: identity.json, mllm_demo.json.*--set dataset=NAME"):
        list(read_source("chat", Files(tmp_path), "train"))
    with pytest.raises(ValueError, match="no local data set elsewhere; it has identity, mllm_demo"):
        list(read_source("chat", Files(tmp_path), "train", {"dataset": "elsewhere"}))


def test_ms_swift(tmp_path: Path) -> None:
    losses, pair, shares, second, unplaced = made("chat:ms_swift", tmp_path)
    assert [turn.is_learned for turn in conversation(losses).turns] == [False, False, False, True]
    assert "3" not in str(losses.facts)
    assert said(pair)[1][1] == [
        "'a dog'", (0, None, (4.5, 6.0, 12.0, 20.0)), "' and '", "'a woman'", (0, None, (20.0, 10.0, 40.0, 30.0)),
        "' are here'",
    ]  # fmt: skip
    assert said(shares)[0][1] == ["image", "'Find the '", "'sheep'"]
    assert said(shares)[1][1] == [(0, None, (12.0, 16.0, 36.0, 32.0)), (0, None, (24.0, 16.0))]
    assert said(second)[1][1] == ["'Here: '", (1, None, (1.0, 2.0))]
    assert said(unplaced)[0][1] == ["image", "image", "'Two pictures?'"]
    assert said(unplaced)[1][1] == ["'Yes, a <bbox> is text here.'"]


def conversation(record: Record) -> Conversation:
    return TASKS["instruct"].conversation(record, random.Random(0))


def test_openai_and_trl(tmp_path: Path) -> None:
    parts, tools, prompt, preferred, text, whole = made("chat:openai", tmp_path)
    assert [item.modality for item in parts.media] == ["image", "audio"] and parts.media[0].read() == picture(1)
    assert [turn.is_learned for turn in conversation(parts).turns] == [False, False, False, False, True]
    assert said(tools)[1] == ("assistant", ["""'[{"name": "look", "arguments": "{}"}]'"""])
    assert said(tools)[2] == ("user", ["'Nothing.'"])
    assert said(prompt) == [("user", ["image", "'What?'"]), ("assistant", ["'A circle.'"])]
    assert said(preferred) == [("user", ["image", "'What is it?'"]), ("assistant", ["'A circle.'"])]
    assert said(text) == [("user", ["'The sky is'"]), ("assistant", ["' blue.'"])]
    assert said(whole) == [("user", ["'2+2?'"]), ("assistant", ["'4'"])]


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image", "image": "a.jpg"}, "image"),
        ({"type": "image", "image": "file://{folder}/a.jpg"}, "image"),
        ({"type": "image", "url": "a.jpg", "image": None}, "image"),
        ({"type": "image", "base64": "/9j/"}, "image"),
        ({"type": "video_url", "video_url": {"url": "a.jpg"}}, "video"),
        ({"type": "audio", "path": "a.jpg"}, "audio"),
    ],
)
def test_content_parts(tmp_path: Path, part: dict[str, Any], modality: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    part = json.loads(json.dumps(part).replace("{folder}", str(tmp_path)))
    record = one(tmp_path, {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "!"}]})
    assert record.media[0].modality == modality and record.media[0].read() == b"\xff\xd8\xff"


def test_pairs(tmp_path: Path) -> None:
    pairs = [{"human": "1?", "assistant": "One."}, {"human": "2?", "assistant": "Two."}]
    record = one(tmp_path, {"system": "Count.", "conversation": pairs})
    assert [role for role, _ in said(record)] == ["system", "user", "assistant", "user", "assistant"]


def test_the_facts_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    parts = [{"media": 1}, {"media": 0}, {"region": {"media": 0, "point": [1, 2], "time_s": 0.5}}]
    turns = [{"role": "user", "parts": parts}, {"role": "assistant", "parts": [{"text": "Yes."}]}]
    media = [{"modality": "image", "path": "a.jpg"}, {"modality": "audio", "path": None}]
    record = one(tmp_path, {"turns": turns, "media": media})
    assert said(record)[0][1] == ["audio", "image", (1, None, (1.0, 2.0))] and record.media[1].data is None


BOXED = [{"from": "human", "value": "<image>\nWhere?"}]


@pytest.mark.parametrize(
    ("text", "options", "box"),
    [
        ("[0.250, 0.500, 0.750, 1.000]", {"regions": "llava", "frame": "original"}, (12, 16, 36, 32)),
        ("[0.250,0.333,0.750,0.667]", {"regions": "llava", "frame": "padded_square"}, (12, 7.984, 36, 24.016)),
        # 48 x 32 pixels become 84 x 56
        ('{"bbox_2d": [21, 28, 63, 56]}', {"regions": "qwen25_vl", "max_pixels": "12845056"}, (12, 16, 36, 32)),
    ],
)
def test_regions_of_other_dialects(tmp_path: Path, text: str, options: dict[str, str], box: tuple[float, ...]) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    turns = [*BOXED, {"from": "gpt", "value": text}]
    record = one(tmp_path, {"image": "a.jpg", "conversations": turns}, **options)
    (region,) = (part for part in conversation(record).turns[1].parts if isinstance(part, Region))
    assert region.box == pytest.approx(box)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": ["a.jpg", "a.jpg"]}, "region in one of several pictures"),
        ({"image": [None]}, "region in an absent picture"),
        ({"image": "broken.jpg"}, "undecodable image"),
    ],
)
def test_regions_without_their_picture(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    question = {"from": "human", "value": "<image>" * (len(row["image"]) if isinstance(row["image"], list) else 1)}
    turns = [question, {"from": "gpt", "value": "<box>(1,2),(3,4)</box>"}]
    with pytest.raises(SampleError) as caught:
        one(tmp_path, row | {"conversations": turns}, regions="qwen_vl")
    assert caught.value.reason == reason
    assert one(tmp_path, {"conversations": turns}, regions="qwen_vl").media == ()  # without a picture it is text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"regions": "klingon"}, "is none of kosmos2"),
        ({"regions": "llava"}, "needs frame="),
        ({"regions": "llava", "frame": "round"}, "is none of original"),
        ({"regions": "qwen25_vl", "max_pixels": "many"}, "no number of pixels"),
        ({"region": "qwen_vl"}, "has no option region"),
    ],
)
def test_options(tmp_path: Path, options: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        one(tmp_path, {}, **options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "!", "loss": "no"}]}, "unreadable turn"),
        ({"instruction": "?", "output": "!", "history": [["?"]]}, "unreadable history"),
        ({"instruction": "?"}, "no answer"),
        ({"turns": [], "media": [{"modality": "smell", "path": "x"}]}, "unreadable media"),
        ({"conversations": "hello"}, "no turns"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}], "objects": 3},
         "unreadable objects"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<bbox>"}],
          "objects": {"ref": [], "bbox": [[1, 2]]}}, "objects mismatch"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<bbox>"}],
          "objects": {"ref": ["a"], "bbox": [[1, 2]]}}, "objects mismatch"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<bbox>"}],
          "objects": {"bbox": [[1, 2]], "bbox_type": "norm7"}}, "unreadable objects"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        one(tmp_path, row)
    assert caught.value.reason == reason


MANGLED = [
    None,
    True,
    False,
    0,
    -1,
    3.5,
    "",
    "x",
    "<image>",
    "<bbox>",
    [],
    {},
    [[]],
    [{}],
    "data:,x",
    "<box>(1,2)</box>",
]


def mangled(value: Any, rng: random.Random) -> Any:
    """The value with an eighth of what is in it replaced by something else."""
    if rng.random() < 0.12:
        return copy.deepcopy(rng.choice(MANGLED))
    if isinstance(value, dict):
        return {name: mangled(one, rng) for name, one in value.items()}
    return [mangled(one, rng) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["chat", "chat:more_media", "chat:qwen_vl", "chat:ms_swift", "chat:openai"])
def test_a_mangled_row_is_refused_and_stops_nothing(tmp_path: Path, name: str) -> None:
    FIXTURES[name](tmp_path)
    (file,) = (path for path in tmp_path.glob("*.json*"))
    rows, rng = list(Files(file).rows(file.name)), random.Random(0)
    many = [mangled(row, rng) for _ in range(30) for row in rows]
    file.with_name("many.jsonl").write_text("\n".join(map(json.dumps, many)))
    found = list(read_source("chat", Files(file.with_name("many.jsonl")), "train", {"regions": "qwen_vl"}))
    assert any(isinstance(one, Record) for one in found) and any(isinstance(one, SampleError) for one in found)


@pytest.mark.parametrize("name", ["hf_dataset", "hf_dataset:parquet"])
def test_hf_dataset(tmp_path: Path, name: str) -> None:
    good = made(name, tmp_path)
    assert [record.media[-1].read() for record in good] == [picture(i) for i in range(4)]
    assert said(good[2])[0][1] == ["audio", "image", "'What is it?'"]
    assert len(list(read_source("hf_dataset", Files(tmp_path), "test"))) == (1 if name == "hf_dataset" else 2)
    with pytest.raises(ValueError, match=r"holds none of other/state\.json|of the splits test, train; wanted other"):
        list(read_source("hf_dataset", Files(tmp_path), "other"))


def test_hf_dataset_alone(tmp_path: Path) -> None:
    FIXTURES["hf_dataset"](tmp_path)
    assert len(list(read_source("hf_dataset", Files(tmp_path / "test"), "test"))) == 1
    state = tmp_path / "test" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_split": "test"}))
    with pytest.raises(ValueError, match="is the split test, not train"):
        list(read_source("hf_dataset", Files(tmp_path / "test"), "train"))
    next((tmp_path / "test").glob("data-*")).unlink()
    with pytest.raises(ValueError, match="no whole data set"):
        list(read_source("hf_dataset", Files(tmp_path / "test"), "test"))


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    FIXTURES["hf_dataset:parquet"](tmp_path)
    file = tmp_path / "data/train-00001-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-00001-of-00002.parquet in .* is no whole Parquet file"):
        list(read_source("hf_dataset", Files(tmp_path), "train"))


def test_video_instruct(tmp_path: Path) -> None:
    good = made("video_instruct", tmp_path)
    assert [said(record)[0][1] for record in good[:2]] == [
        ["'What is said 0?'", "video"],
        ["video", "'What is said 1?'"],
    ]
    assert [record.facts["id"] for record in good][2] == "v_d-RWukGol4Q"
    with pytest.raises(ValueError, match="wanted split train"):
        list(read_source("video_instruct", Files(tmp_path), "test"))


def test_video_instruct_grouped_by_video(tmp_path: Path) -> None:
    FIXTURES["video_instruct"](tmp_path)
    found = list(read_source("video_instruct", Files(tmp_path), "train", {"grouped": "yes"}))
    assert sorted(error.reason for error in found if isinstance(error, SampleError)) == [
        "missing media",
        "unreadable row",
    ]
    first, *others = (record for record in found if isinstance(record, Record))
    assert [parts for _, parts in said(first)][::2] == [["'What is said 0?'", "video"], ["'What is said 3?'"]]
    assert len(others) == 2


def test_the_tests_of_video_chatgpt_have_pairs_and_keep_missing_videos(tmp_path: Path) -> None:
    good = made("video_chatgpt_tests", tmp_path)
    questions = [TASKS["instruct"].questions(record, Protocol()) for record in good]
    assert [one.record.key for one in questions[0]] == ["00000000", "00000000#1"]
    assert [one.conversation.turns[-1].parts[1] for one in questions[0]] == ["What moves?", "Which thing is moving?"]
    assert {one.reference for pair in questions for one in pair} == {("A square.",)}
    assert [one.problem for one in questions[0]] == ["", ""]
    assert [one.problem for one in questions[2]] == ["missing video: v_gone0000000"] * 2
    with pytest.raises(ValueError, match="generic, temporal, consistency"):
        list(read_source("video_chatgpt_tests", Files(tmp_path), "train"))


def test_a_broken_description_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"dataset_info.json beside .* is no JSON"):
        list(read_source("chat", Files(tmp_path), "train"))
