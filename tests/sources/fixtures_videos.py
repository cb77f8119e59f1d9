"""Small sets of videos: expressions with tubes and intervals, and a dialogue about clips with their sound."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures

# Of the white square of tiny.clip("right"), 64 x 32 pixels: it moves 48 pixels to the right in 7/8 of a second.
TUBE = [[0.0, 0, 8, 16, 24], [0.5, 27.4, 8, 43.4, 24], [0.875, 48, 8, 64, 24]]


def sounding_clip(num_frames: int = 8) -> bytes:
    """tiny.clip("right") at 8 frames a second, with a tone of 440 Hz."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        for i in range(num_frames):
            pixels = np.zeros((32, 64, 3), np.uint8)
            x = int(48 * i / (num_frames - 1))
            pixels[8:24, x : x + 16] = 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2000 * num_frames) / 16_000)
        frame = av.AudioFrame.from_ndarray(tone.astype(np.float32)[None], format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux([*audio.encode(frame), *audio.encode(None), *video.encode(None)])
    return out.getvalue()


def tracks(folder: Path) -> Fixture:
    """Two clips: a tube with two expressions and an interval in one; one row without a place, one of another size."""
    (folder / "train").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / "train" / name).write_bytes(tiny.clip("right"))
    rows: list[dict[str, Any]] = [
        {"video": "a.mp4", "expressions": ["the square", "what moves"], "tube": TUBE, "width": 64, "height": 32},
        {"video": "a.mp4", "expressions": ["it is on the right"], "interval": [0.5, 1.0], "width": 64, "height": 32},
        {"video": "b.mp4", "expressions": ["a white square"], "tube": TUBE[:2], "fps": 8},
        {"video": "b.mp4", "expressions": ["nothing"]},
        {"video": "b.mp4", "expressions": ["a square"], "tube": TUBE, "width": 640, "height": 320},
    ]
    (folder / "train/track.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Fixture(
        "track", folder, 3, {"unreadable row": 1, "picture of another size": 1}, options=("--set", "grouped=no")
    )


def video_instruct_with_sound(folder: Path) -> Fixture:
    """A clip with a sound track and one without, whose sound is an absent item; a row without an answer."""
    (folder / "v_one00000000.mp4").write_bytes(sounding_clip())
    (folder / "v_two00000000.mp4").write_bytes(tiny.clip("left"))
    rows = [{"q": "What is it?", "a": "A square.", "video_id": f"v_{name}00000000"} for name in ("one", "two")]
    rows.append({"q": "And?", "a": "", "video_id": "v_one00000000"})
    (folder / "VideoInstruct100K.json").write_text(json.dumps(rows))
    return Fixture("instruct", folder, 2, {"unreadable row": 1}, options=("--set", "sound=yes"))


FIXTURES: Fixtures = {"tracks": tracks, "video_instruct:sound": video_instruct_with_sound}
