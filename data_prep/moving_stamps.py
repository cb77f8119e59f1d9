"""Composes clips of moving things: python data_prep/moving_stamps.py [--out FOLDER] [--train N]

Two cut-outs of Tux Paint's stamps lie on a part of a real video clip, or of a photograph. One of them moves, or both
do, one after the other. Each clip has captions, and questions for the task `video_qa`: which way, which of the two,
which first. data_prep/motion_language.py says why neither the words nor frames without their order tell the answers.

Splits: `train` and `val`; `test` has the same kinds of things on clips and photographs that training never shows;
`kinds` has kinds that training never shows, on those of `test`. The pictures are fetched (GPL, BSD, Apache and CC BY
licences), and what is made of them stays out of version control.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import numpy as np
from PIL import Image

from data_prep import open_data, referential_scenes
from data_prep.motion_language import DIRECTIONS, Design, captions, designs, questions
from data_prep.packages import DOWNLOADS, ROOT, PackageError
from data_prep.referential_scenes import SIZES, behind
from data_prep.stamp_scenes import CutOut, new_split, varied, with_progress

CLIPS = ROOT / ".cache" / "media_scenes" / "moving_stamps"

# Raised when the same options give other clips.
VERSION = 1

SHOWN_CLIPS = ("vtest.avi", "tree.avi", "bigbuckbunny.mp4")
HELD_OUT_CLIPS = ("bikes.mp4", "carphone_pristine.mp4")
FPS = 8
_SECONDS = (2.0, 2.8)
_REAL = 0.75  # of the backgrounds; the others are photographs
_SIDE = 240  # the shorter one of clips as they are kept in memory
_TRIES = 80


@dataclass(frozen=True)
class Materials:
    """What the clips of one split are made of; `clips` are [frames, height, width, 3] at FPS."""

    cut_outs: tuple[CutOut, ...]
    photos: tuple[Image.Image, ...]
    clips: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Mover:
    """A thing in a clip: where its middle is before and after it moves, in pixels, and when that is, in seconds.

    One that stays has both in one place.
    """

    label: str
    article: str
    picture: Image.Image
    before: tuple[float, float]
    after: tuple[float, float]
    start_s: float
    end_s: float

    def box(self, time_s: float) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 at a time; parts may lie outside of the picture."""
        share = min(1.0, max(0.0, (time_s - self.start_s) / (self.end_s - self.start_s)))
        share = share * share * (3 - 2 * share)  # it speeds up and slows down
        x, y = (a + (b - a) * share for a, b in zip(self.before, self.after, strict=True))
        left, top = round(x - self.picture.width / 2), round(y - self.picture.height / 2)
        return left, top, left + self.picture.width, top + self.picture.height

    def swept(self) -> tuple[int, int, int, int]:
        """The box of all places where it is."""
        one, other = self.box(self.start_s), self.box(self.end_s)
        return min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all splits are there, made with these options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CLIPS, help="default: .cache/media_scenes/moving_stamps")
    parser.add_argument("--kinds", type=int, default=72, help="kinds of things; every sixth is held out (default: 72)")
    parser.add_argument("--train", type=int, default=1500, help="clips to learn from (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--test", type=int, default=300, help="clips of each test split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=DOWNLOADS, help="where packages are kept")
    args = parser.parse_args(arguments)
    counts = {"train": args.train, "val": args.val, "test": args.test, "kinds": args.test}
    try:
        for split, of_split in load_materials(args.kinds, args.seed, args.cache).items():
            start = time.monotonic()
            folder = compose(of_split, args.out, split, counts[split], args.seed, args.processes)
            print(f"{folder}: {counts[split]:,} clips, {time.monotonic() - start:.0f} s", flush=True)
    except (PackageError, ValueError, OSError) as error:
        print(f"moving_stamps: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moving_stamps: stopped; splits finished so far are kept", file=sys.stderr)
        return 130
    return 0


def load_materials(num_kinds: int, seed: int, cache: Path = DOWNLOADS) -> dict[str, Materials]:
    """By split, with the kinds and photographs of referential_scenes.py. Raises PackageError, ValueError."""
    stills = referential_scenes.load_materials(num_kinds, seed, cache)
    folders = open_data.folders("clips", cache)

    def clips(names: Sequence[str]) -> tuple[np.ndarray, ...]:
        found = [next(folder / name for folder in folders if (folder / name).exists()) for name in names]
        return tuple(read_clip(file) for file in found)

    shown, held_out = clips(SHOWN_CLIPS), clips(HELD_OUT_CLIPS)
    behind_of = {"train": ("train", shown), "val": ("train", shown), "test": ("test", held_out)}
    behind_of["kinds"] = ("kinds", held_out)
    return {
        split: Materials(stills[still].cut_outs, stills[still].photos, found)
        for split, (still, found) in behind_of.items()
    }


def read_clip(file: Path) -> np.ndarray:
    """[frames, height, width, 3] uint8 at FPS, the shorter side at most _SIDE."""
    frames: list[np.ndarray] = []
    with av.open(str(file)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            # Some of these files have no times: frames are evenly spaced by the rate that is stated.
            if number * FPS < len(frames) * float(container.streams.video[0].average_rate or FPS):
                continue
            picture = frame.to_image()
            scale = min(1.0, _SIDE / min(picture.size))
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            frames.append(np.asarray(picture))
    return np.stack(frames)


def compose(materials: Materials, out: Path, split: str, num_clips: int, seed: int, num_processes: int = 1) -> Path:
    """Writes OUT/SPLIT: videos/, SPLIT_q.json and SPLIT_a.json (ActivityNet-QA's form), captions.jsonl, clips.jsonl.

    The same arguments give the same bytes with one version of PyAV, whatever the number of processes. A folder made
    with the same arguments is left as it is; ValueError is raised for one made with others.
    """
    if num_clips < 1 or seed < 0 or len(materials.cut_outs) < 2:
        raise ValueError(f"{num_clips} clips, seed {seed}, {len(materials.cut_outs)} kinds; wanted 1, 0, 2 at least")
    folder = out / split
    source = {
        "version": VERSION,
        "split": split,
        "num_clips": num_clips,
        "seed": seed,
        "kinds": [{"label": cut_out.label, "origin": cut_out.origin} for cut_out in materials.cut_outs],
        "behind": [len(materials.photos), [clip.shape[0] for clip in materials.clips]],
    }
    planned = designs(num_clips, _rng(seed, f"{split}/designs"))
    with new_split(folder, source, "videos") as made:
        if made is not None:
            with ProcessPoolExecutor(num_processes, initializer=_receive, initargs=(materials,)) as pool:
                write = partial(_write_clip, made, split, seed)
                found = pool.map(write, range(num_clips), planned, chunksize=16)
                rows = list(with_progress(found, num_clips, split))
            _write_rows(made, split, rows)
    return folder


def _write_rows(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> None:
    """The same facts in three forms: those of the clip, of ActivityNet-QA, and captions."""
    asked, answered = [], []
    for row in rows:
        for number, one in enumerate(row["questions"]):
            key = {"question_id": f"{row['id']}-{number}"}
            asked.append({**key, "video_name": row["id"], "question": one["question"]})
            answered.append({**key, "answer": one["answer"], "type": one["type"]})
    (folder / f"{split}_q.json").write_text(json.dumps(asked))
    (folder / f"{split}_a.json").write_text(json.dumps(answered))
    captioned = [{"video": row["video"], "captions": row["captions"]} for row in rows]
    for name, lines in (("clips.jsonl", rows), ("captions.jsonl", captioned)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- One clip

_materials: list[Materials] = []  # what the processes of a pool compose with, given to each once


def _receive(materials: Materials) -> None:
    _materials[:] = [materials]


def _write_clip(folder: Path, split: str, seed: int, index: int, design: Design) -> dict[str, Any]:
    """Writes clip `index` of a split; returns its line of clips.jsonl."""
    name = f"{split}-{index:06d}"
    frames, movers = draw_clip(_materials[0], design, _rng(seed, split, index))
    video = f"videos/{name}.mp4"
    (folder / video).write_bytes(encoded(frames))
    labels = movers[0].label, movers[1].label
    named = f"{movers[0].article} {labels[0]}", f"{movers[1].article} {labels[1]}"
    things = [
        {"label": mover.label, "direction": direction, "start_s": mover.start_s, "end_s": mover.end_s}
        | {"from": mover.box(mover.start_s), "to": mover.box(mover.end_s)}
        for mover, direction in zip(movers, (*design.directions, None)[:2], strict=True)
    ]
    said = {"captions": captions(design, named), "questions": questions(design, labels)}
    return {"id": name, "video": video, "things": things, **said}


def draw_clip(materials: Materials, design: Design, rng: np.random.Generator) -> tuple[np.ndarray, tuple[Mover, Mover]]:
    """Frames [frames, height, width, 3] at FPS, and the two things, which never cover each other."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    num_frames = round(rng.uniform(*_SECONDS) * FPS)
    scene = _behind(materials, width, height, num_frames, rng)
    movers = _movers(materials.cut_outs, design, (width, height), num_frames / FPS, rng)
    frames = []
    for number in range(num_frames):
        frame = Image.fromarray(scene[number])
        for mover in movers:
            frame.paste(mover.picture, mover.box((number + 0.5) / FPS)[:2], mover.picture)
        frames.append(np.asarray(frame))
    return np.stack(frames), movers


def _behind(materials: Materials, width: int, height: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """[frames, height, width, 3]: a part of a clip, from any moment on, forwards or backwards; or of a photograph."""
    if rng.random() >= _REAL or not materials.clips:
        return np.stack([np.asarray(behind(materials.photos, width, height, rng))] * num_frames)
    clip = materials.clips[int(rng.integers(len(materials.clips)))]
    clip = np.concatenate([clip, clip[::-1]]) if len(clip) < num_frames else clip
    first = int(rng.integers(len(clip) - num_frames + 1))
    clip = clip[first : first + num_frames][:: int(rng.choice((1, -1)))]
    scale = max(width / clip.shape[2], height / clip.shape[1]) * rng.uniform(1, 1.4)
    part = min(clip.shape[2], width / scale), min(clip.shape[1], height / scale)
    x, y = rng.uniform(0, clip.shape[2] - part[0]), rng.uniform(0, clip.shape[1] - part[1])
    box = (x, y, x + part[0], y + part[1])
    light, is_mirrored = rng.uniform(0.6, 1.15), rng.random() < 0.5
    parts = [Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR, box) for one in clip]
    pixels = (np.stack([np.asarray(one) for one in parts]) * light).clip(0, 255).astype(np.uint8)
    return pixels[:, :, ::-1] if is_mirrored else pixels


def _movers(
    cut_outs: Sequence[CutOut], design: Design, size: tuple[int, int], seconds: float, rng: np.random.Generator
) -> tuple[Mover, Mover]:
    """Two things of different kinds with paths apart from each other. Times and places are as likely backwards."""
    kinds = [cut_outs[int(kind)] for kind in rng.choice(len(cut_outs), 2, replace=False)]
    edge, gap = rng.uniform(0.08, 0.16, 2) * seconds, rng.uniform(0.02, 0.06, 2) * seconds
    half = seconds / 2
    times = [(edge[0], half - gap[0]), (half + gap[1], seconds - edge[1])]
    if len(design.directions) == 1:
        times[0] = edge[0], seconds - edge[1]
    pictures = [varied(kind.picture, round(min(size) * rng.uniform(0.3, 0.42)), rng) for kind in kinds]
    for attempt in range(_TRIES):
        if attempt % 10 == 9:
            pictures = [one.resize((round(one.width * 0.9), round(one.height * 0.9))) for one in pictures]
        pair = []
        for kind, picture, direction, (start_s, end_s) in zip(
            kinds, pictures, (*design.directions, None)[:2], times, strict=True
        ):
            before, after = _path(picture.size, direction, size, rng)
            pair.append(Mover(kind.label, kind.article, picture, before, after, round(start_s, 3), round(end_s, 3)))
        one, other = (mover.swept() for mover in pair)
        if one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]:
            return pair[0], pair[1]
    raise ValueError(f"no room for two things in {size[0]} x {size[1]} pixels")


def _path(
    picture: tuple[int, int], direction: str | None, size: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middle of a picture before and after it moves; a fifth of it at most lies outside then."""
    ends = []
    for axis in (0, 1):
        margin = 0.3 * picture[axis]
        sign = DIRECTIONS[direction][axis] if direction is not None else 0
        length = rng.uniform(0.3, 0.42) * size[axis] if sign else 0.0
        low = rng.uniform(margin, max(margin, size[axis] - margin - length))
        ends.append((low, low + length)[:: sign or 1])
    (x1, x2), (y1, y2) = ends
    return (x1, y1), (x2, y2)


def encoded(frames: np.ndarray) -> bytes:
    """H.264 in mp4 of [frames, height, width, 3] at FPS."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "25", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def _rng(seed: int, name: str, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"moving/{name}".encode()), index])


if __name__ == "__main__":
    sys.exit(main())
