"""Foreign shards: the tars stay as they are, and what their members say becomes facts that a task understands."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data_prep import index_shards
from mmchat.conversation import Record
from mmchat.data.energon import EnergonDataset
from mmchat.data.foreign import AsFormat
from mmchat.data.shard_index import index_shard
from mmchat.data.shards import Shard, index_path
from mmchat.errors import SampleError
from mmchat.tasks import TASKS
from tests import tiny
from tests.unit.test_shards import make_tar


def jpeg(width: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, 24)).save(data, "JPEG")
    return data.getvalue()


def js(value: Any) -> bytes:
    return json.dumps(value).encode()


def records(path: Path) -> list[Record]:
    shard = Shard(path)
    return [shard.record(i) for i in range(shard.num_samples)]


def answer(task: str, record: Record) -> str:
    part = TASKS[task].conversation(record, random.Random(0)).turns[-1].parts[-1]
    assert isinstance(part, str)
    return part


def widths(record: Record) -> list[int]:
    return [Image.open(io.BytesIO(item.read())).width for item in record.media]


def energon(folder: Path, dataset: dict[str, Any], split: dict[str, Any] | None = None, **shards: Any) -> Path:
    """A dataset as `energon prepare` of version 7 leaves it, as far as it is read here."""
    (folder / "shards").mkdir(parents=True)
    for name, members in shards.items():
        make_tar(folder / "shards" / f"{name}.tar", members)
    meta = folder / ".nv-meta"
    meta.mkdir()
    names = [f"shards/{name}.tar" for name in shards]
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": dict.fromkeys(names, 2)}))
    (meta / "split.yaml").write_text(yaml.dump(split or {"split_parts": {"train": names}, "exclude": []}))
    (meta / "dataset.yaml").write_text(yaml.dump(dataset))
    return folder


def sample_type(name: str, **field_map: str) -> dict[str, Any]:
    return {"sample_type": {"__module__": "megatron.energon", "__class__": name}, "field_map": field_map}


def test_a_caption_beside_a_json_without_one(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("a/0.jpg", jpeg()), ("a/0.txt", b"A red car."), ("a/0.json", js({"width": 32, "url": "http://x"})),
            ("a/1.jpg", jpeg()), ("a/1.txt", b"other"), ("a/1.json", js({"caption": "A dog."})),
            ("__meta__/info.json", b"{}"),
            ("a/2.jpg", jpeg()), ("a/2.json", js({"caption": "A cat."})), ("a/2.mp", b"msgpack"),
        ],
    )  # fmt: skip
    report = index_shard(path)
    assert report.num_samples == 3 and not report.problems and report.unread == {"mp": 1}
    assert [record.key for record in records(path)] == ["a/0", "a/1", "a/2"]
    assert records(path)[0].facts == {"width": 32, "url": "http://x", "caption": "A red car."}
    assert [answer("caption", record) for record in records(path)] == ["A red car.", "A dog.", "A cat."]


def test_class_names_are_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("0.jpg", jpeg()), ("0.cls", b"1"), ("1.jpg", jpeg()), ("1.cls", b"0\n"),
            ("2.jpg", jpeg()), ("2.cls", b"2"), ("3.jpg", jpeg()), ("3.cls", b"tabby"),
        ],
    )  # fmt: skip
    assert index_shards.main([str(path)]) == 0
    assert "4 x no facts" in capsys.readouterr().out
    (tmp_path / "names.txt").write_text("goldfish\ntabby cat\n")
    assert index_shards.main([str(path), "--classes", str(tmp_path / "names.txt")]) == 0
    assert "2 x unknown class" in capsys.readouterr().out
    shard = Shard(path)
    assert [answer("caption", shard.record(i)) for i in range(2)] == ["tabby cat", "goldfish"]
    with pytest.raises(SampleError, match="class 2 of 2 named ones"):
        shard.record(2)


LLAVA = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A car."}]


def test_conversations_of_llava_as_they_lie_in_the_json(tmp_path: Path) -> None:
    """The list alone is what NVIDIA's converters write (docs.nvidia.com, energondataprep)."""
    many = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No."}]
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("GCC/1.jpg", jpeg(40)), ("GCC/1.json", js(LLAVA)),
            ("2.img10.jpg", jpeg(50)), ("2.img9.jpg", jpeg(41)), ("2.json", js({"conversations": many})),
            ("3.b.jpg", jpeg(43)), ("3.a.jpg", jpeg(42)),
            ("3.json", js({"conversations": many, "image": ["3.b.jpg", "coco/train2017/000001.jpg"]})),
            ("4.json", js(chat)),
            ("5.json", js({"conversations": many, "images": ["x.jpg", "y.jpg"]})), ("5.jpg", jpeg()),
            ("6.json", js("text")),
            ("7.txt", b"no row"), ("7.jpg", jpeg()),
            ("8.json", js(LLAVA)), ("8.jpgs", b"cos\nsystem\n"),
        ],
    )  # fmt: skip
    before = path.read_bytes()
    report = index_shard(path, reading=AsFormat("chat"))
    assert path.read_bytes() == before
    assert report.problems == {"missing member": 2, "unreadable facts": 1, "forbidden member": 1}
    shard = Shard(path)
    found = [shard.record(i) for i in range(4)]
    assert [widths(record) for record in found] == [[40], [41, 50], [43, 42], []]
    assert [answer("instruct", record) for record in found] == ["A car.", "No.", "No.", "Hi."]
    assert found[0].facts["turns"][0]["parts"] == [{"text": "What is it?"}, {"media": 0}]
    for i in (4, 5, 6, 7):
        with pytest.raises(SampleError):
            shard.record(i)


def test_a_format_that_does_not_read_single_rows_is_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("1.jpg", jpeg()), ("1.json", js({"conversations": LLAVA}))])
    with pytest.raises(ValueError, match="there is no format"):
        AsFormat("chatt")
    with pytest.raises(ValueError, match="cannot read the samples of shards"):
        index_shard(path, reading=AsFormat("coco_captions"))
    assert not index_path(path).exists()


def test_energon_captions_and_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pair(key: str) -> list[tuple[str, bytes]]:
        return [
            (f"{key}.png", jpeg()),
            (f"{key}.json", js({"texts": {"all": [f"number {key}"]}})),
            (f"{key}.txt", b"no"),
        ]

    split = {
        "split_parts": {"train": ["shards/s_{0..1}.tar"], "val": ["shards/s_2.tar", "shards/s_3.tar"]},
        "exclude": ["shards/s_3.tar", "shards/s_1.tar/20"],
    }
    folder = energon(
        tmp_path / "set",
        sample_type("CaptioningSample", image="jpg,png", caption="json[texts][all][0]"),
        split,
        s_0=pair("00") + pair("01"),
        s_1=pair("10") + pair("20"),
        s_2=pair("30"),
        s_3=pair("40"),
    )
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    assert index_shards.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Megatron-Energon, CaptioningSample" in said and "train: 2 shards" in said and "val: 1 shards" in said
    assert f"shards: [{folder}/shards/s_0.tar, {folder}/shards/s_1.tar]" in said
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for path, digest in before.items())
    assert [record.key for i in range(3) for record in records(folder / f"shards/s_{i}.tar")] == [
        "00",
        "01",
        "10",
        "30",
    ]
    assert records(folder / "shards/s_1.tar")[0].facts == {"caption": "number 10"}
    assert not index_path(folder / "shards/s_3.tar").exists()

    assert index_shards.main([str(folder)]) == 0
    assert "3 shards have their index already" in capsys.readouterr().out
    (folder / ".nv-meta/split.yaml").write_text(yaml.dump(split | {"exclude": ["shards/s_3.tar"]}))
    assert index_shards.main([str(folder)]) == 0
    assert "2 shards have their index already" in capsys.readouterr().out
    assert [record.key for record in records(folder / "shards/s_1.tar")] == ["10", "20"]


@pytest.mark.parametrize(
    ("dataset", "members", "task", "facts"),
    [
        (
            sample_type("VQASample", image="jpg", context="json[q]", answers="json[a]", answer_weights="json[w]"),
            [("1.jpg", jpeg()), ("1.json", js({"q": "What colour?", "a": ["pink", "red"], "w": [0.3, 0.7]}))],
            "vqa",
            {"question": "What colour?", "answers": ["red", "pink"]},
        ),
        (
            {"__module__": "megatron.energon", "__class__": "VQAWebdataset"}
            | {"field_map": {"image": "jpg", "context": "context.txt", "answers": "answer.txt"}},
            [("1.jpg", jpeg()), ("1.context.txt", b"Where?"), ("1.answer.txt", b"here\n")],
            "vqa",
            {"question": "Where?", "answers": ["here"]},
        ),
        (
            sample_type("VidQASample", video="mp4", context="json[context]", answers="json[answers]"),
            [("1.mp4", tiny.clip("left")), ("1.json", js({"context": "Which way?", "answers": ["left"]}))],
            "vqa",
            {"question": "Which way?", "answers": ["left"]},
        ),
        (
            sample_type(
                "MultiChoiceVQASample", image="jpg", context="txt", choices="json[c]", correct_choice_idx="cls"
            ),
            [("1.jpg", jpeg()), ("1.txt", b"Which?"), ("1.json", js({"c": ["a cat", "a dog"]})), ("1.cls", b"1")],
            "vqa",
            {"question": "Which?", "choices": ["a cat", "a dog"], "answers": ["a dog"]},
        ),
        (
            sample_type("ImageClassificationSample", image="jpg", label="cls", label_name="txt"),
            [("1.jpg", jpeg()), ("1.cls", b"3"), ("1.txt", b"tabby")],
            "caption",
            {"class": "3", "caption": "tabby"},
        ),
        (
            {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
            [("1.jpg", jpeg()), ("1.txt", b"A cat.")],
            "caption",
            {"caption": "A cat."},
        ),
    ],
)
def test_energon_sample_types(
    tmp_path: Path, dataset: dict[str, Any], members: list[Any], task: str, facts: dict[str, Any]
) -> None:
    folder = energon(tmp_path / "set", dataset, s=members)
    assert index_shards.main([str(folder)]) == 0
    (record,) = records(folder / "shards/s.tar")
    assert record.facts == facts and len(record.media) == 1 and record.media[0].header is not None
    assert answer(task, record) == (facts.get("answers") or [facts["caption"]])[0]


def test_energon_samples_without_the_field(tmp_path: Path) -> None:
    folder = energon(
        tmp_path / "set",
        sample_type("CaptioningSample", image="jpg", caption="json[caption]"),
        s=[
            ("1.jpg", jpeg()), ("1.json", js({"text": "x"})),
            ("2.png", jpeg()), ("2.json", js({"caption": "x"})),
            ("3.jpg", jpeg()), ("3.json", js({"caption": 3})),
            ("4.jpg", jpeg()), ("4.json", js({"caption": "x"})),
        ],
    )  # fmt: skip
    dataset = EnergonDataset.open(folder)
    report = index_shard(folder / "shards/s.tar", reading=dataset.reading())
    assert report.problems == {"missing field": 2, "missing member": 1}
    assert Shard(folder / "shards/s.tar").record(3).facts == {"caption": "x"}


def test_energon_datasets_that_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = {"sample_type": {"__class__": "VQASample"}, "sample_loader": "sample_loader.py:sample_loader"}
    members = [("1.jpg", jpeg()), ("1.json", js(LLAVA))]
    folder = energon(tmp_path / "a", loader, s=members)
    (folder / ".nv-meta/sample_loader.py").write_text("raise SystemExit('it was run')")
    assert index_shards.main([str(folder)]) == 1
    assert "VQASample with a sample_loader, which is code and is not run" in capsys.readouterr().err
    assert index_shards.main([str(folder), "--as", "chat"]) == 0
    assert answer("instruct", records(folder / "shards/s.tar")[0]) == "A car."
    assert index_shards.main([str(folder / "shards")]) == 0, "another reading makes the index anew"
    with pytest.raises(SampleError, match="wanted a JSON object"):
        records(folder / "shards/s.tar")

    energon(tmp_path / "b", sample_type("OCRSample", image="jpg", text="txt"), s=members)
    assert index_shards.main([str(tmp_path / "b")]) == 1
    assert "OCRSample with no facts of a task here" in capsys.readouterr().err
    missing = {"split_parts": {"train": ["shards/{s,t}.tar"]}}
    energon(tmp_path / "c", sample_type("CaptioningSample", image="jpg", caption="txt"), missing, s=members)
    assert index_shards.main([str(tmp_path / "c")]) == 1
    assert "shards/t.tar" in capsys.readouterr().err
    (tmp_path / "c/.nv-meta/split.yaml").unlink()
    assert index_shards.main([str(tmp_path / "c")]) == 1
    assert "has no split.yaml or split.json" in capsys.readouterr().err


def test_problems_are_told_again_of_an_index_that_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tar(tmp_path / "0.tar", [("0.jpg", jpeg()), ("1.txt", b"x"), ("../2.txt", b"x"), ("3.json", b"[")])
    make_tar(tmp_path / "1.tar", [("9.txt", b"x")])
    for _ in range(2):
        assert index_shards.main([str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "which training will refuse: 3:" in said and "1 x unsafe name" in said
        assert "1 x no facts" in said
    assert "2 shards have their index already" in said


def test_many_shards_at_once_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        make_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", jpeg()), (f"{i}.txt", b"x")])
    (tmp_path / "3.tar").write_bytes(b"no tar")
    assert index_shards.main([str(tmp_path), "--workers", "3"]) == 1
    said = capsys.readouterr()
    assert "indexed 5 samples in 5 of 6 shards" in said.out and "3.tar" in said.err
    make_tar(tmp_path / "3.tar", [("3.jpg", jpeg()), ("3.txt", b"x")])
    assert index_shards.main([str(tmp_path), "--workers", "3"]) == 0
    said = capsys.readouterr()
    assert "5 shards have their index already" in said.out and "indexed 1 samples in 1 of 1 shards" in said.out
    assert index_shards.main([str(tmp_path), "--force"]) == 0
    assert "in 6 of 6 shards" in capsys.readouterr().out
    for i in range(6):
        make_tar(tmp_path / f"{i}.tar", [(f"{i}.jpg", jpeg()), (f"{i}.json", js(LLAVA))])
    assert index_shards.main([str(tmp_path), "--as", "chat", "--workers", "3"]) == 0
    assert "indexed 6 samples in 6 of 6 shards" in capsys.readouterr().out
    assert answer("instruct", records(tmp_path / "5.tar")[0]) == "A car."
    assert index_shards.main([str(tmp_path), "--as", "chat", "--set", "rejions=llava"]) == 1
    assert "has no option rejions" in capsys.readouterr().err
    assert index_shards.main([str(tmp_path), "--set", "regions=llava"]) == 1
    assert index_shards.main([str(tmp_path), str(tmp_path / "1.tar")]) == 1
