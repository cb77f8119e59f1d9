"""Composes scenes to talk about, with exact boxes: python data_prep/referential_scenes.py [--out FOLDER] [--train N]

Cut-outs of Tux Paint's stamps stand on photographs and on backgrounds made here; some are tinted, some hide a part of
others, some kinds occur twice. Each scene has referring expressions, a grounded caption, questions with and without a
grounded reasoning, a dialogue of three turns and one in Visual Dialog's form with a hundred candidates, all right by
construction.

Three splits: `train`; `test` has the same kinds of things in new scenes on photographs that training never shows;
`kinds` has kinds that training never shows, on the same photographs as `test`. The pictures are fetched (GPL, BSD and
Apache licences), and what is made of them stays out of version control.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from data_prep.base_models import PICTURES
from data_prep.open_data import OPENCV
from data_prep.packages import DOWNLOADS, ROOT, PackageError, fetch, fetch_debian
from data_prep.scene_language import Thing, language
from data_prep.stamp_scenes import CutOut, extent, load_cut_outs, made_background, new_split, varied, with_progress

SCENES = ROOT / ".cache" / "referential_scenes"

# Raised when the same options give other scenes.
VERSION = 2

# Photographs without things that a question could mean, by package; every fourth is held out for the tests.
_OPENCV_PHOTOS = (
    "home.jpg", "building.jpg", "leuvenA.jpg", "graf1.png", "board.jpg", "aloeL.jpg", "left.jpg", "left05.jpg",
    "sudoku.png", "starry_night.jpg", "ela_original.jpg", "box_in_scene.png",
)  # fmt: skip
_SKIMAGE_PHOTOS = (
    "rocket.jpg", "hubble_deep_field.jpg", "brick.png", "moon.png", "gravel.png", "grass.png", "page.png", "ihc.png",
)  # fmt: skip

TINTS = {
    "red": (225, 40, 40),
    "green": (50, 185, 60),
    "blue": (50, 90, 235),
    "yellow": (245, 220, 40),
    "purple": (165, 60, 205),
}
# Sizes of a scene in pixels, as often as they occur here.
SIZES = ((224, 224),) * 7 + ((224, 168), (168, 224), (224, 150))


@dataclass(frozen=True)
class Materials:
    """What the scenes of one split are made of, and which names a question may use for what is not there."""

    cut_outs: tuple[CutOut, ...]
    photos: tuple[Image.Image, ...]
    names: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all splits are there, made with these options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SCENES, help="default: .cache/referential_scenes")
    parser.add_argument("--kinds", type=int, default=72, help="kinds of things; every sixth is held out (default: 72)")
    parser.add_argument("--train", type=int, default=12000, help="scenes to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=400, help="scenes of each test split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=DOWNLOADS, help="where packages are kept")
    args = parser.parse_args(arguments)
    try:
        materials = load_materials(args.kinds, args.seed, args.cache)
        for split, of_split in materials.items():
            num_scenes = args.train if split == "train" else args.test
            start = time.monotonic()
            folder = compose(of_split, args.out, split, num_scenes, args.seed, args.processes)
            names = ", ".join(cut_out.label for cut_out in of_split.cut_outs)
            print(f"{folder}: {num_scenes:,} scenes, {time.monotonic() - start:.0f} s. Kinds: {names}", flush=True)
    except (PackageError, ValueError, OSError) as error:
        print(f"referential_scenes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("referential_scenes: stopped; splits finished so far are kept", file=sys.stderr)
        return 130
    return 0


def load_materials(num_kinds: int, seed: int, cache: Path = DOWNLOADS) -> dict[str, Materials]:
    """By split. Raises PackageError where pictures cannot be had, ValueError for more kinds than there are."""
    cut_outs = load_cut_outs("tuxpaint", num_kinds, seed, cache)
    photos = _photos(cache)
    seen = tuple(cut_out for number, cut_out in enumerate(cut_outs) if number % 6 < 5)
    unseen = tuple(cut_out for number, cut_out in enumerate(cut_outs) if number % 6 == 5)
    shown = tuple(photo for number, photo in enumerate(photos) if number % 4 < 3)
    held_out = tuple(photo for number, photo in enumerate(photos) if number % 4 == 3)
    known, new = (tuple(cut_out.label for cut_out in part) for part in (seen, unseen))
    return {
        "train": Materials(seen, shown, known),
        "test": Materials(seen, held_out, known),
        "kinds": Materials(unseen, held_out, (*known, *new)),
    }


def compose(materials: Materials, out: Path, split: str, num_scenes: int, seed: int, num_processes: int = 1) -> Path:
    """Writes OUT/SPLIT: images/, scenes.jsonl as data_prep/README.md says, and source.json.

    The same arguments give the same bytes, whatever the number of processes. A folder made with the same arguments is
    left as it is; ValueError is raised for one made with others.
    """
    if num_scenes < 1 or seed < 0 or len(materials.cut_outs) < 4:
        raise ValueError(f"{num_scenes} scenes, seed {seed}, {len(materials.cut_outs)} kinds; wanted 1, 0, 4 at least")
    folder = out / split
    source = {
        "version": VERSION,
        "split": split,
        "num_scenes": num_scenes,
        "seed": seed,
        "kinds": [{"label": cut_out.label, "origin": cut_out.origin} for cut_out in materials.cut_outs],
        "num_photos": len(materials.photos),
    }
    with new_split(folder, source) as made:
        if made is not None:
            with (
                ProcessPoolExecutor(num_processes, initializer=_receive, initargs=(materials,)) as pool,
                (made / "scenes.jsonl").open("w", encoding="utf-8") as file,
            ):
                rows = pool.map(partial(_write_scene, made, split, seed), range(num_scenes), chunksize=16)
                for row in with_progress(rows, num_scenes, split):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


# --- One scene

_materials: list[Materials] = []  # what the processes of a pool compose with, given to each once


def _receive(materials: Materials) -> None:
    _materials[:] = [materials]


def _write_scene(folder: Path, split: str, seed: int, index: int) -> dict[str, Any]:
    """Writes picture `index` of a split; returns its line of scenes.jsonl."""
    rng = np.random.default_rng([seed, zlib.crc32(f"referential/{split}".encode()), index])
    picture, things = draw_scene(_materials[0], rng)
    image = f"images/{index:06d}.jpg"
    picture.save(folder / image, quality=90)
    return {"id": f"{split}-{index:06d}", "image": image, **language(things, picture.size, _materials[0].names, rng)}


def draw_scene(materials: Materials, rng: np.random.Generator) -> tuple[Image.Image, list[Thing]]:
    """A picture and what stands in it, each thing at least two thirds visible; boxes are those of what is visible."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    picture = behind(materials.photos, width, height, rng)
    num_things = int(rng.choice((1, 2, 3, 4), p=(0.25, 0.35, 0.25, 0.15)))
    kinds = [int(kind) for kind in rng.choice(len(materials.cut_outs), num_things, replace=False)]
    if num_things > 1 and rng.random() < 0.3:
        kinds[1] = kinds[0]
    owner = np.full((height, width), -1)
    visible: list[tuple[int, str, int]] = []  # kind, tint, whole area; numbered as in `owner`
    for kind in kinds:
        cut_out = materials.cut_outs[kind]
        tint, colours = _tinted(cut_out, rng)
        for attempt in range(30):
            side = min(width, height) * rng.uniform(0.38, 0.75) / num_things**0.25 * 0.97**attempt
            pasted = varied(colours, round(side), rng)
            x = int(rng.integers(0, max(1, width - pasted.width + 1)))
            y = int(rng.integers(0, max(1, height - pasted.height + 1)))
            pasted = pasted.crop((0, 0, min(pasted.width, width - x), min(pasted.height, height - y)))
            mask = np.zeros(owner.shape, bool)
            mask[y : y + pasted.height, x : x + pasted.width] = np.asarray(pasted)[..., 3] > 0
            after = np.where(mask, len(visible), owner)
            if all((after == number).sum() >= area * 2 / 3 for number, (_, _, area) in enumerate(visible)):
                break
        else:
            continue  # no room was found: one thing less
        picture.paste(pasted, (x, y), pasted)
        owner = after
        visible.append((kind, tint, int(mask.sum())))
    things = []
    for number, (kind, tint, _) in enumerate(visible):
        cut_out = materials.cut_outs[kind]
        mask = owner == number
        things.append(Thing(cut_out.label, cut_out.article, tint, extent(mask), int(mask.sum())))
    return picture, things


def behind(photos: Sequence[Image.Image], width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A part of a photograph, or in two of five scenes a background made here."""
    if rng.random() < 0.4 or not photos:
        return made_background(max(width, height), rng).crop((0, 0, width, height))
    photo = photos[int(rng.integers(len(photos)))]
    least = max(width / photo.width, height / photo.height)
    scale = rng.uniform(least, max(least, 1.0))
    part_width, part_height = min(photo.width, round(width / scale)), min(photo.height, round(height / scale))
    x, y = int(rng.integers(photo.width - part_width + 1)), int(rng.integers(photo.height - part_height + 1))
    part = photo.resize((width, height), Image.Resampling.BILINEAR, (x, y, x + part_width, y + part_height))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(part, np.float32) * rng.uniform(0.6, 1.15)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _tinted(cut_out: CutOut, rng: np.random.Generator) -> tuple[str, Image.Image]:
    """In one of five cases the cut-out in one colour, where it is bright enough to show it; and the colour's name.

    What is called by a colour ("green bus") keeps it.
    """
    pixels = np.array(cut_out.picture)
    light = pixels[..., :3].mean(-1)
    has_colour = not TINTS.keys().isdisjoint(cut_out.label.split())
    if rng.random() >= 0.2 or has_colour or light[pixels[..., 3] > 128].mean() < 90:
        return "", cut_out.picture
    name = list(TINTS)[int(rng.integers(len(TINTS)))]
    shades = (light / 255)[..., None] ** 0.7 * np.array(TINTS[name])
    pixels[..., :3] = (0.2 * pixels[..., :3] + 0.8 * shades).clip(0, 255).round()
    return name, Image.fromarray(pixels)


def _photos(cache: Path) -> list[Image.Image]:
    folder = fetch_debian(OPENCV, cache) / "usr/share/doc/opencv-doc/examples/data"
    photos = [_bounded(Image.open(folder / name)) for name in _OPENCV_PHOTOS]
    with zipfile.ZipFile(fetch(PICTURES, cache)) as wheel:
        for name in _SKIMAGE_PHOTOS:
            photos.append(_bounded(Image.open(io.BytesIO(wheel.read(f"skimage/data/{name}")))))
    return photos


def _bounded(photo: Image.Image) -> Image.Image:
    photo = photo.convert("RGB")
    photo.thumbnail((640, 640))
    return photo


if __name__ == "__main__":
    sys.exit(main())
