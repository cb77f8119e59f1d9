"""Small conversations in the layouts of LLaVA, Qwen-VL, LLaMA-Factory, ms-swift, OpenAI, TRL and Hugging Face datasets.

Pictures are 48 x 32 pixels. Every set has one malformed record or more.
"""

from __future__ import annotations

import base64
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def picture(i: int) -> bytes:
    return tiny.picture(list(tiny.COLOURS)[i % 4], random.Random(i))


def _place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _rows(path: Path, rows: list[Any]) -> None:
    """JSON, or JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def _exchange(question: str, answer: str = "A circle.", *more: str) -> list[dict[str, str]]:
    said = (question, answer, *more)
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]


def llava(folder: Path) -> Fixture:
    """llava_v1_5_mix665k: pictures in five folders, a row without one, <image> behind the text and in a later turn."""
    names = ["coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/140031996.jpg",
             "textvqa/train_images/7dbabf9af3d5a4b4.jpg", "vg/VG_100K/2371.jpg"]  # fmt: skip
    for i, name in enumerate(names):
        _place(folder / name, picture(i))
    rows = [
        {"id": "000000033471", "image": names[0],
         "conversations": _exchange("<image>\nWhat is shown?", "A circle.", "Which colour?", "Red.")},
        {"id": "2354786", "image": names[1], "conversations": _exchange("Is it round?\n<image>", "Yes")},
        {"id": "140031996", "image": names[2], "conversations": _exchange("Who wrote this?", "Nobody.")},
        {"id": "wgByO4Y_0", "model": "", "conversations": _exchange("What does <image> mean in HTML?", "Nothing.")},
        {"id": "VG_100K/2371", "image": names[4],
         "conversations": _exchange("Hello", "Hi.", "<image>\nDescribe the region.", "A disc.")},
        {"id": "lost", "image": "coco/train2017/000000000001.jpg", "conversations": _exchange("<image>\nWhat?")},
        {"id": "twice", "image": names[3], "conversations": _exchange("<image>\nWhat is <image>?")},
    ]  # fmt: skip
    _rows(folder / "llava_v1_5_mix665k.json", rows)
    return Fixture("instruct", folder, 5, {"missing media": 1, "too many placeholders": 1})


def lcs_558k(folder: Path) -> Fixture:
    """LLaVA-Pretrain: the chat file beside another JSON file that holds no conversations; pictures in images.zip."""
    chats, about = [], []
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for i in range(5):
            name = f"0045{i}/0045{i}9375.jpg"
            if i != 3:
                archive.writestr(name, picture(i))
            question = "<image>\nGive a brief description of the image." if i % 2 else "Render a summary.\n<image>"
            chats.append({"id": f"0045{i}9375", "image": name, "conversations": _exchange(question, "a circle")})
            about.append({"id": f"0045{i}9375", "image": name, "url": "", "caption": "", "blip_caption": "a circle"})
    _rows(folder / "blip_laion_cc_sbu_558k.json", chats)
    _rows(folder / "blip_laion_cc_sbu_558k_meta.json", about)
    return Fixture("instruct", folder, 4, {"missing media": 1})


def llava_more_media(folder: Path) -> Fixture:
    """LLaVA-NeXT's rows of several pictures, of a video that is written <image>, and with sound."""
    for i in range(2):
        _place(folder / f"{i}.jpg", picture(i))
    _place(folder / "clip.mp4", tiny.clip("right"))
    _place(folder / "tone.wav", tiny.tone(440, 0.5))
    rows = [
        {"image": ["0.jpg", "1.jpg"], "conversations": _exchange("<image>\n<image>\nWhich is red?", "The first.")},
        {"video": "clip.mp4", "conversations": _exchange("<image>\nWhere does it move?", "To the right.")},
        {"video": "clip.mp4", "conversations": _exchange("What moves?\n<video>", "A square.")},
        {"image": "0.jpg", "audio": "tone.wav", "conversations": _exchange("<audio>\n<image>\nBoth?", "Yes.")},
        {"image": ["0.jpg", "1.jpg"], "conversations": _exchange("<image>\nWhich?")},
        {"videos": [["0.jpg", "1.jpg"]], "conversations": _exchange("<video>\nWhat?")},
    ]
    _rows(folder / "train.jsonl", rows)
    return Fixture("instruct", folder, 4, {"too few placeholders": 1, "video as a list of frames": 1})


def qwen_vl(folder: Path) -> Fixture:
    """Qwen-VL's first format: paths inside the text, regions in <ref> and <box> in thousandths of the picture."""
    for i in range(2):
        _place(folder / f"assets/{i}.jpeg", picture(i))

    def row(*texts: str) -> dict[str, Any]:
        sides = ("user", "assistant")
        return {"id": "identity", "conversations": [{"from": sides[i % 2], "value": t} for i, t in enumerate(texts)]}

    rows = [
        row("Hello", "I am here."),
        row("Picture 1: <img>assets/0.jpeg</img>\nWhat is it?", "A circle.", "Frame the circle",
            "<ref>circle</ref><box>(250,500),(750,1000)</box>"),
        row("Picture 1: <img>assets/0.jpeg</img>\nPicture 2: <img>assets/1.jpeg</img>\nWhich is red?", "Picture 1."),
        row("Picture 1: <img>assets/1.jpeg</img>\nPoint at <ref>it</ref>", "<box>(500,500)</box>."),
        row("Picture 1: <img>assets/0.jpeg</img>\nFrame it", "<ref>circle</ref><box>(250,500),(750</box>"),
        row("Picture 1: <img>assets/2.jpeg</img>\nWhat?", "Nothing."),
    ]  # fmt: skip
    _rows(folder / "train.json", rows)
    return Fixture(
        "instruct", folder, 4, {"unreadable region": 1, "missing media": 1}, options=("--set", "regions=qwen_vl")
    )


def qwen_packed(folder: Path) -> Fixture:
    """What Qwen's pack_data.py writes: a row is a list of rows."""
    for i in range(4):
        _place(folder / f"images/{i:03d}.jpg", picture(i))

    def row(i: int) -> dict[str, Any]:
        return {"image": f"images/{i:03d}.jpg", "conversations": _exchange("<image>\nWhat is the main object?")}

    _rows(folder / "train_pack.json", [[row(0), row(1)], [row(2)], [row(3), row(4)]])
    return Fixture("instruct", folder, 4, {"missing media": 1})


def llama_factory(folder: Path) -> Fixture:
    """A data folder of LLaMA-Factory: several files, and dataset_info.json that names columns and roles."""
    _place(folder / "mllm_demo_data/1.jpg", picture(1))
    _place(folder / "mllm_demo_data/3.flac", tiny.tone(300, 0.5))
    info = {
        "identity": {"file_name": "identity.json"},
        "mllm_demo": {
            "file_name": "mllm_demo.json",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog", "images": "pictures", "audios": "audios", "system": "rule",
                        "tools": "tools", "chosen": "chosen", "rejected": "rejected"},
            "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "Q", "assistant_tag": "A",
                     "observation_tag": "saw", "function_tag": "does"},
        },
        "elsewhere": {"hf_hub_url": "somebody/something"},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))
    _rows(folder / "identity.json", [
        {"instruction": "Who are you?", "input": "", "output": "A model.", "history": [["Hi", "Hello."]]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
    ])  # fmt: skip

    def row(*said: tuple[str, str], **columns: Any) -> dict[str, Any]:
        return {"dialog": [{"who": who, "what": what} for who, what in said], **columns}

    path = "mllm_demo_data/1.jpg"
    _rows(folder / "mllm_demo.json", [
        row(("Q", "<image>What is it?"), ("A", "A circle."), ("Q", "And this?<image>"), ("A", "The same."),
            pictures=[path, path]),
        row(("Q", "How warm is it?"), ("does", '{"name": "weather"}'), ("saw", '{"celsius": 20}'), ("A", "20 degrees."),
            rule="Be brief.", tools='[{"name": "weather"}]'),
        row(("Q", "<audio>What is heard?"), ("A", "A tone."), audios=["mllm_demo_data/3.flac"]),
        row(("Q", "Say hello"), chosen={"who": "A", "what": "Hello."}, rejected={"who": "A", "what": "No."}),
        row(("Q", "What?"), ("robot", "?")),
        row(("Q", "<image><image>What?"), ("A", "!"), pictures=[path]),
    ])  # fmt: skip
    return Fixture(
        "instruct",
        folder,
        4,
        {"unknown role": 1, "too many placeholders": 1},
        options=("--set", "dataset=mllm_demo"),
    )


def ms_swift(folder: Path) -> Fixture:
    """ms-swift's standard format: loss by message, objects with their own placeholders, a rejected response."""
    for i in range(2):
        _place(folder / f"{i}.jpg", picture(i))

    def row(user: str, assistant: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **more}

    rows = [
        {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi.", "loss": False},
                      {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2", "loss": True}],
         "rejected_response": "3"},
        row("<image>Describe it.", "<ref-object><bbox> and <ref-object><bbox> are here", images=["0.jpg"],
            objects={"ref": ["a dog", "a woman"], "bbox": [[4.5, 6, 12, 20], [40, 30, 20, 10]]}),
        row("<image>Find the <ref-object>", "<bbox><bbox>", images="0.jpg",
            objects={"ref": ["sheep"], "bbox": [[0.25, 0.5, 0.75, 1], [0.5, 0.5]], "bbox_type": "norm1"}),
        row("<image><image>Where is it?", "Here: <bbox>", images=["0.jpg", "1.jpg"],
            objects={"ref": [], "bbox": [[1, 2]], "image_id": [1]}),
        row("Two pictures?", "Yes, a <bbox> is text here.", images=["0.jpg", "1.jpg"]),
        row("<image>Where?", "<bbox><bbox>", images=["0.jpg"], objects={"ref": [], "bbox": [[1, 2, 3, 4]]}),
        row("<image>Where?", "<bbox>", images=["0.jpg"], objects={"ref": [], "bbox": [[1, 2, 3]]}),
        row("<image>Where?", "<bbox>", images=["0.jpg"], objects={"ref": [], "bbox": [[1, 2, 300, 400]]}),
    ]  # fmt: skip
    _rows(folder / "train.jsonl", rows)
    skipped = {"objects mismatch": 1, "unreadable objects": 1, "region outside the picture": 1}
    return Fixture("instruct", folder, 5, skipped)


def openai(folder: Path) -> Fixture:
    """Content parts of OpenAI and Hugging Face, tool calls, and TRL's prompts with completions and preferences."""
    _place(folder / "0.jpg", picture(0))
    url = "data:image/jpeg;base64," + base64.b64encode(picture(1)).decode()
    sound = {"data": base64.b64encode(tiny.tone(500, 0.5)).decode(), "format": "wav"}

    def message(role: str, *parts: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": list(parts), **more}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    rows = [
        {"messages": [message("developer", text("Be brief.")),
                      message("user", text("What is this?"), {"type": "image_url", "image_url": {"url": url}}),
                      message("assistant", text("A circle."), weight=0),
                      message("user", {"type": "input_audio", "input_audio": sound}, text("And this?")),
                      message("assistant", text("A tone."), weight=1)]},
        {"messages": [{"role": "user", "content": "Look."},
                      {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "1", "content": "Nothing."},
                      {"role": "assistant", "content": "There is nothing."}]},
        {"images": ["0.jpg"], "prompt": [message("user", {"type": "image"}, text("What?"))],
         "completion": [message("assistant", text("A circle."))]},
        {"images": ["0.jpg"], "prompt": [{"role": "user", "content": "What is it?"}],
         "chosen": [{"role": "assistant", "content": "A circle."}],
         "rejected": [{"role": "assistant", "content": "?"}]},
        {"prompt": "The sky is", "completion": " blue."},
        {"chosen": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
         "rejected": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}]},
        {"prompt": "The sky is", "completion": " green.", "label": False},
        {"messages": [message("user", {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}),
                      message("assistant", text("?"))]},
    ]  # fmt: skip
    _rows(folder / "train.jsonl", rows)
    return Fixture("instruct", folder, 6, {"rejected answer": 1, "media not local": 1})


def _table() -> list[dict[str, Any]]:
    """Rows with the same columns in each, as tables have them."""

    def row(i: int, question: str, num_pictures: int = 1) -> dict[str, Any]:
        content = [{"type": "image", "text": None}] * num_pictures + [{"type": "text", "text": question}]
        return {
            "images": [{"bytes": picture(i), "path": f"{i}.jpg"}],
            "audio": None,
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": f"Circle {i}."}]},
            ],
        }

    rows = [row(i, "What is it?") for i in range(4)]
    rows[2]["audio"] = {"bytes": tiny.tone(400, 0.5), "path": None}
    return [*rows, row(4, "Which?", num_pictures=2)]


def hf_dataset(folder: Path) -> Fixture:
    """A DatasetDict that datasets saved, with Image and Audio features."""
    import datasets

    features = datasets.Features({
        "images": datasets.List(datasets.Image()), "audio": datasets.Audio(),
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(
            {"type": datasets.Value("string"), "text": datasets.Value("string")})}),
    })  # fmt: skip
    rows = datasets.Dataset.from_list(_table()).cast(features)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([0])})
    splits.save_to_disk(str(folder), num_shards={"train": 2, "test": 1})
    return Fixture("instruct", folder, 4, {"too many placeholders": 1})


def hf_parquet(folder: Path) -> Fixture:
    """Parquet files as the hub keeps them: data/SPLIT-00000-of-00002.parquet."""
    import pyarrow
    import pyarrow.parquet

    rows = _table()
    (folder / "data").mkdir(parents=True)
    for i, part in enumerate((rows[:3], rows[3:])):
        schema = pyarrow.Table.from_pylist(rows).schema
        table = pyarrow.Table.from_pylist(part, schema)
        pyarrow.parquet.write_table(table, folder / f"data/train-0000{i}-of-00002.parquet")
        pyarrow.parquet.write_table(table.slice(0, 1), folder / f"data/test-0000{i}-of-00002.parquet")
    return Fixture("instruct", folder, 4, {"too many placeholders": 1})


def video_instruct(folder: Path) -> Fixture:
    """VideoInstruct100K: files of several types, one without the "v_" of its id, one video that is missing."""
    for name in ("v_k_ZXmr8pmrs.mkv", "v_PLqTX6ij52U.mp4", "d-RWukGol4Q.mp4"):
        _place(folder / "videos" / name, tiny.clip("left"))
    ids = ["v_k_ZXmr8pmrs", "v_PLqTX6ij52U", "v_d-RWukGol4Q", "v_k_ZXmr8pmrs", "v_gone0000000"]
    rows = [{"q": f"What is said {i}?", "a": "A square moves.", "video_id": video} for i, video in enumerate(ids)]
    rows.append({"q": "What?", "a": "", "video_id": ids[0]})
    _rows(folder / "VideoInstruct100K.json", rows)
    return Fixture("instruct", folder, 4, {"missing media": 1, "unreadable row": 1})


def video_chatgpt_tests(folder: Path) -> Fixture:
    """Two wordings of a question; one video is gone, which stays a question, and one row has no answer."""
    _place(folder / "videos" / "v_p1QGn0IzfW0.mkv", tiny.clip("left"))
    rows = [
        {"Q1": "What moves?", "Q2": "Which thing is moving?", "A": "A square.", "video_name": name}
        for name in ("v_p1QGn0IzfW0", "v_p1QGn0IzfW0", "v_gone0000000")
    ]
    _rows(folder / "consistency_qa.json", [*rows, {**rows[0], "A": None}])
    return Fixture("instruct", folder, 3, {"unreadable row": 1}, "consistency")


FIXTURES: Fixtures = {
    "chat": llava,
    "chat:lcs_558k": lcs_558k,
    "chat:more_media": llava_more_media,
    "chat:qwen_vl": qwen_vl,
    "chat:qwen_packed": qwen_packed,
    "chat:llama_factory": llama_factory,
    "chat:ms_swift": ms_swift,
    "chat:openai": openai,
    "hf_dataset": hf_dataset,
    "hf_dataset:parquet": hf_parquet,
    "video_chatgpt_tests": video_chatgpt_tests,
    "video_instruct": video_instruct,
}
