"""Makes docs/images/inspect.png: python -m tests.inspect_example [PICTURE.png]

The example is composed of Google's emoji (Apache licence) and sound made here; the model it is prepared for is
SmolLM2 with a CLIP-sized ViT and Whisper, of which only tokenizer and preprocess are used.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import yaml
from PIL import Image
from playwright.sync_api import Browser

from data_prep import inspect_shards
from data_prep.base_models import main as make_base_models
from data_prep.make_shards import media_header
from data_prep.stamp_scenes import CutOut, Scene, caption, draw_scene, load_cut_outs
from mmchat.conversation import MediaRef, Record
from mmchat.data.shard_writer import write_shards
from tests import tiny
from tests.browser import launch, watched_page

NUM_RECORDS = 200
WIDTH, HEIGHT = 1200, 2280
CONFIG = {
    "run": "grounding",
    "model": {
        "llm": {"pretrained": ".cache/base_models/smollm2-135m-instruct"},
        "modalities": {
            "image": {
                "encoder": {"kind": "timm", "model": "vit_base_patch16_clip_224"},
                "connector": {"kind": "pool", "window": [1, 2, 2]},
            },
            "video": {
                "sample": {"kind": "num_frames", "num_frames": 4},
                "connector": {"kind": "spatio_temporal"},
            },
            "audio": {
                "encoder": {"kind": "whisper", "pretrained": ".cache/tiny/whisper"},
                "connector": {"kind": "pool", "window": [10, 1, 1]},
            },
        },
        "fusion": {"kind": "flora", "rank": 16, "alpha": 32},
    },
    "chat": {"format": "chatml"},
    "stages": [
        {
            "name": "align",
            "train": {"connectors": 1e-3},
            "data": [
                {"name": "dialogues", "task": "instruct", "shards": ".cache/inspect_example/dialogues"},
                {"name": "captions", "task": "caption", "shards": ".cache/inspect_example/captions"},
            ],
            "steps": 1,
            "batch": {"lanes": 2, "tokens": 1024, "patches": 8192},
        }
    ],
}


def main(picture: Path, browser: Browser) -> None:
    make_base_models(["smollm2"])
    tiny.build_all()
    things = load_cut_outs("emoji", 24, 0)
    rng = np.random.default_rng(3)
    folder = tiny.ROOT / ".cache" / "inspect_example"
    shutil.rmtree(folder, ignore_errors=True)
    for name, record in (("dialogues", _dialogue), ("captions", _caption)):
        records = (record(f"{i:06d}", things, rng) for i in range(NUM_RECORDS))
        write_shards(records, folder / name, header_of=media_header)
    config, page = folder.relative_to(tiny.ROOT) / "example.yaml", folder / "page.html"
    config.write_text(yaml.safe_dump(CONFIG))
    inspect_shards.main(["--config", str(config), "--out", str(page), "--samples", "4", "--packs", "3", "--seed", "16"])
    with watched_page(browser, WIDTH, HEIGHT) as watched:
        watched.page.goto(page.as_uri())
        watched.page.screenshot(path=picture)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


def _dialogue(key: str, things: list[CutOut], rng: np.random.Generator) -> Record:
    return (_grounded, _melodic, _moving)[int(rng.integers(3))](key, things, rng)


def _caption(key: str, things: list[CutOut], rng: np.random.Generator) -> Record:
    scene = draw_scene(things, 480, (2, 4), rng)
    picture, boxes = _cropped(scene)
    objects = [{"label": thing.label, "box": box} for thing, box in zip(scene.things, boxes, strict=True)]
    return Record(key, {"caption": caption(scene.things), "objects": objects}, (MediaRef("image", picture),))


def _grounded(key: str, things: list[CutOut], rng: np.random.Generator) -> Record:
    """Two questions about a scene: where a thing is, and what is at a point."""
    scene = draw_scene(things, 480, (2, 4), rng)
    picture, boxes = _cropped(scene)
    first, last = 0, len(boxes) - 1
    x1, y1, x2, y2 = boxes[last]
    turns = [
        ("user", [{"media": 0}, {"text": f"Where is the {scene.things[first].label}?"}]),
        ("assistant", [_region(box=boxes[first], label=scene.things[first].label)]),
        ("user", [{"text": "And what is at "}, _region(point=[(x1 + x2) / 2, (y1 + y2) / 2]), {"text": "?"}]),
        ("assistant", [{"text": caption(scene.things[last:])}]),
    ]
    return Record(key, _facts(turns), (MediaRef("image", picture),))


def _cropped(scene: Scene) -> tuple[bytes, list[list[int]]]:
    """The part of the scene that holds the things, as JPEG, and their boxes in it."""
    margin = 16
    left, top = (max(0, min(box[i] for box in scene.boxes) - margin) for i in (0, 1))
    right, bottom = (min(480, max(box[i] for box in scene.boxes) + margin) for i in (2, 3))
    out = io.BytesIO()
    scene.picture.crop((left, top, right, bottom)).save(out, "JPEG", quality=92)
    return out.getvalue(), [[x1 - left, y1 - top, x2 - left, y2 - top] for x1, y1, x2, y2 in scene.boxes]


def _melodic(key: str, things: list[CutOut], rng: np.random.Generator) -> Record:
    """A melody that rises or falls."""
    rises = bool(rng.random() < 0.5)
    answer = "It rises." if rises else "It falls."
    turns = [("user", [{"media": 0}, {"text": "Which way does the melody go?"}]), ("assistant", [{"text": answer}])]
    return Record(key, _facts(turns), (MediaRef("audio", _melody(rises, rng)),))


def _moving(key: str, things: list[CutOut], rng: np.random.Generator) -> Record:
    """A thing that crosses the picture."""
    thing = things[int(rng.integers(len(things)))]
    video, box = _crossing(thing)
    turns = [
        ("user", [{"media": 0}, {"text": f"Where is the {thing.label} in the beginning?"}]),
        ("assistant", [_region(box=box, label=thing.label, time_s=0.25), {"text": "; then it goes to the right."}]),
    ]
    return Record(key, _facts(turns), (MediaRef("video", video),))


def _crossing(thing: CutOut) -> tuple[bytes, list[int]]:
    """An MP4 of two seconds, and the thing's box after a quarter of a second."""
    picture = thing.picture.copy()
    picture.thumbnail((96, 96))
    sky, meadow = Image.new("RGB", (320, 180), (150, 200, 240)), Image.new("RGB", (320, 180), (110, 160, 90))
    out, box = io.BytesIO(), [0, 0, 0, 0]
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 180, "yuv420p", 2_000_000
        for i in range(16):
            frame = Image.composite(meadow, sky, Image.linear_gradient("L").resize((320, 180)))
            x, y = 4 + i * 14, 44
            frame.paste(picture, (x, y), picture)
            if i == 2:
                box = [x, y, x + picture.width, y + picture.height]
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue(), box


def _melody(rises: bool, rng: np.random.Generator) -> bytes:
    """Seven notes of a major scale with overtones, as FLAC."""
    steps = np.array([0, 2, 4, 5, 7, 9, 11, 12])[:: 1 if rises else -1]
    time_s = np.arange(int(0.3 * 16_000)) / 16_000
    notes = [
        sum(np.sin(2 * np.pi * 330 * 2 ** (step / 12) * k * time_s) / k for k in (1, 2, 3)) * np.exp(-5 * time_s)
        for step in steps
    ]
    out = io.BytesIO()
    sound = 0.25 * np.concatenate(notes) + 0.002 * rng.standard_normal(len(notes) * len(time_s))
    soundfile.write(out, sound, 16_000, format="FLAC")
    return out.getvalue()


def _region(**facts: object) -> dict:
    return {"region": {"media": 0, **facts}}


def _facts(turns: list[tuple[str, Any]]) -> dict:
    return {"turns": [{"role": role, "parts": parts} for role, parts in turns]}


if __name__ == "__main__":
    with launch() as launched:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/inspect.png"), launched)
