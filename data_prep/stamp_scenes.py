"""Composes captioned pictures with exact boxes: python data_prep/stamp_scenes.py [--out FOLDER] [--pictures KIND]

Photographs of single things, cut out of their background, are pasted on backgrounds made here. Any number of scenes
with names, boxes and sides that are right by construction comes of it. Both splits show the same things in new scenes:
what is tested is seeing and locating, not unheard-of kinds.

The pictures are free but not ours: Tux Paint's stamps are under the GPL, Google's emoji (the way out where there is no
apt) under the Apache licence. They are fetched, and what is made of them stays out of version control.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from data_prep.packages import DOWNLOADS, ROOT, Package, PackageError, fetch, fetch_debian

SCENES = ROOT / ".cache" / "stamp_scenes"
SOURCE = "source.json"

# Raised when the same options give other scenes.
VERSION = 1

TUXPAINT = Package(
    "debian",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2+",
)
EMOJI = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "MIT (the package), Apache-2.0 (the pictures)",
)

# Smaller stamps would be blown up more than twice in a scene of the default size.
_MIN_STAMP_SIDE = 96
# Where the photographs of everyday things are; elsewhere are drawings, signs and flags.
_STAMP_GROUPS = ("animals", "clothes", "food", "hobbies", "household", "medical", "plants", "sports", "vehicles")
# Things that most people have a word for, in the words of both sources: they are taken first.
_COMMON_NAMES = """
    accordion airplane ambulance apple apricot avocado axe bacon badger balloon banana banjo basket
    basketball bat bear beaver bed bell bicycle boat boot broccoli broom bull bus butterfly cactus
    camel camera candle car carrot cello chair cheese_wedge chicken chimpanzee coconut cookie
    corn couch cow crab crocodile croissant crow crown cucumber daffodil deer dog dolphin donkey door
    doughnut dress drum drum_kit duck eagle eggplant electric_guitar elephant envelope feather
    fire_extinguisher fire_truck flamingo flute fox frog garlic giraffe goat gorilla grasshopper
    green_apple green_bus guitar hamburger hammer harp hedgehog helicopter horse hot_pepper iguana
    kangaroo key kite kiwifruit koala ladder ladybug lemon leopard lightbulb lion lizard lobster magnet
    mango maple_leaf marigold microscope mosquito mouse mug mushroom octopus onion ostrich otter owl
    palm_tree parrot peach peacock pear pelican penguin pickup_truck pig pineapple pinecone pizza potato
    pretzel rabbit race_car rat rhinoceros rocket rooster rose rubber_duck sailboat saw saxophone scooter
    scorpion seahorse seal shark sheep shrimp skateboard skunk sloth snail snake snowflake soccer_ball
    spider sports_car squid squirrel stethoscope strawberry sunflower swan syringe taxi teapot telescope
    tennis_racket tiger tomato toolbox toothbrush toucan tractor trophy truck trumpet tulip turkey turtle
    umbrella unicorn violin waffle watch watermelon whale wrench yellow_lemon
"""

QUESTIONS = {
    "what": ("What is this?", "What do you see?", "What is in the picture?", "Name what you see."),
    "where": ("Where is the {label}?", "Where do you see the {label}?", "In which part is the {label}?"),
    "count": ("How many objects are there?", "How many things do you see?", "Count the objects."),
}
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


@dataclass(frozen=True)
class CutOut:
    """One thing without its background.

    Attributes:
        label: its name without an article, "harp seal".
        article: "a" or "an".
        picture: RGBA.
        origin: which file of which package it is.
    """

    label: str
    article: str
    picture: Image.Image = field(compare=False)
    origin: str = ""


@dataclass(frozen=True)
class Scene:
    """A composed picture; `boxes` are those of the pixels that differ from `background`, as x1, y1, x2, y2 with x2 and
    y2 just behind the last pixel.
    """

    picture: Image.Image
    background: Image.Image
    things: tuple[CutOut, ...]
    boxes: tuple[tuple[int, int, int, int], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if both splits are there, made with these options."""
    parser = argparse.ArgumentParser(
        prog="stamp_scenes.py", description="Composes captioned pictures with exact boxes from free cut-outs."
    )
    parser.add_argument("--out", type=Path, default=SCENES, help="folder for the splits (default: .cache/stamp_scenes)")
    parser.add_argument(
        "--pictures",
        choices=("auto", "tuxpaint", "emoji"),
        default="auto",
        help="stamps of Tux Paint (Debian package), emoji (npm package), or what can be had (default: auto)",
    )
    parser.add_argument("--kinds", type=int, default=24, help="different things (default: %(default)s)")
    parser.add_argument("--train", type=int, default=2000, help="scenes to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="scenes to score with (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="side of a scene in pixels (default: %(default)s)")
    parser.add_argument(
        "--objects",
        type=int,
        nargs=2,
        default=(1, 1),
        metavar=("MIN", "MAX"),
        help="things in a scene (default: 1 1)",
    )
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=DOWNLOADS, help="where packages are kept (default: .cache/downloads)"
    )
    args = parser.parse_args(arguments)
    try:
        cut_outs = load_cut_outs(args.pictures, args.kinds, args.seed, args.cache)
        print(f"{len(cut_outs)} kinds: {', '.join(cut_out.label for cut_out in cut_outs)}", flush=True)
        for split, num_scenes in (("train", args.train), ("test", args.test)):
            start = time.monotonic()
            folder = compose(
                cut_outs, args.out, split, num_scenes, args.seed, args.size, tuple(args.objects), args.processes
            )
            print(f"{folder}: {num_scenes:,} scenes, {time.monotonic() - start:.1f} s", flush=True)
    except (PackageError, ValueError, OSError) as error:
        print(f"stamp_scenes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stamp_scenes: stopped; splits finished so far are kept", file=sys.stderr)
        return 130
    return 0


def load_cut_outs(pictures: str, num_kinds: int, seed: int, cache: Path = DOWNLOADS) -> list[CutOut]:
    """`num_kinds` things with distinct names and looks; `pictures` is "tuxpaint", "emoji", or "auto" for either.

    Raises PackageError where the pictures cannot be had, ValueError for more kinds than there are.
    """
    if pictures == "emoji":
        return _emoji(fetch(EMOJI, cache), num_kinds, seed)
    try:
        stamps = fetch_debian(TUXPAINT, cache) / "usr/share/tuxpaint/stamps"
    except PackageError as error:
        if pictures == "tuxpaint":
            raise
        print(f"stamp_scenes: taking emoji, because: {error}", file=sys.stderr)
        try:
            return _emoji(fetch(EMOJI, cache), num_kinds, seed)
        except PackageError as second:
            raise PackageError(f"no pictures to compose with: {error}; and {second}") from None
    return _stamps(stamps, num_kinds, seed)


def compose(
    cut_outs: Sequence[CutOut],
    out: Path,
    split: str,
    num_scenes: int,
    seed: int,
    image_size: int = 224,
    objects_per_scene: tuple[int, int] = (1, 1),
    num_processes: int = 1,
) -> Path:
    """Writes OUT/SPLIT: images/, captions.jsonl and instruct.jsonl as data_prep/README.md says, and source.json.

    The same arguments give the same bytes, whatever the number of processes. A folder made with the same arguments is
    left as it is; ValueError is raised for one made with others, and for arguments that cannot be.
    """
    fewest, most = objects_per_scene
    if not 1 <= fewest <= most <= min(len(cut_outs), len(NUMBERS) - 1):
        raise ValueError(
            f"objects per scene {fewest} to {most}; wanted 1 <= MIN <= MAX <= {min(len(cut_outs), len(NUMBERS) - 1)}"
        )
    if num_scenes < 1 or image_size < 32 or seed < 0:
        raise ValueError(f"{num_scenes} scenes of {image_size} pixels with seed {seed}; wanted at least 1, 32 and 0")
    folder = out / split
    source = {
        "version": VERSION,
        "split": split,
        "num_scenes": num_scenes,
        "seed": seed,
        "image_size": image_size,
        "objects_per_scene": [fewest, most],
        "kinds": [{"label": cut_out.label, "origin": cut_out.origin} for cut_out in cut_outs],
    }
    with new_split(folder, source) as made:
        if made is not None:
            write = partial(_write_scene, made, split, seed, image_size, objects_per_scene)
            with _mapper(num_processes, cut_outs) as each:
                rows = list(with_progress(each(write, range(num_scenes)), num_scenes, split))
            for number, name in enumerate(("captions.jsonl", "instruct.jsonl")):
                lines = (json.dumps(row[number], ensure_ascii=False) + "\n" for row in rows)
                (made / name).write_text("".join(lines), encoding="utf-8")
    return folder


@contextmanager
def new_split(folder: Path, source: dict[str, Any], media: str = "images") -> Iterator[Path | None]:
    """A folder with images/, or another name for its media, that becomes `folder` once it is filled.

    None where that was made from this source before.

    Raises ValueError where it was made from another one.
    """
    if folder.exists():
        found = json.loads((folder / SOURCE).read_text()) if (folder / SOURCE).is_file() else {}
        if differs := [key for key in source if found.get(key) != source[key]]:
            raise ValueError(f"{folder} exists with other {', '.join(differs)}; remove it or choose another --out")
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial_folder:
        made = Path(partial_folder) / folder.name
        (made / media).mkdir(parents=True)
        yield made
        (made / SOURCE).write_text(json.dumps(source, indent=1) + "\n")
        made.rename(folder)


def draw_scene(
    cut_outs: Sequence[CutOut], image_size: int, objects_per_scene: tuple[int, int], rng: np.random.Generator
) -> Scene:
    """A scene of some of the cut-outs, each at most once; they do not cover each other."""
    background = made_background(image_size, rng)
    picture = background.copy()
    taken = np.zeros((image_size, image_size), bool)
    num_objects = int(rng.integers(objects_per_scene[0], objects_per_scene[1] + 1))
    things, boxes = [], []
    for index in rng.choice(len(cut_outs), num_objects, replace=False):
        # Several things are smaller, so that there is room; still less where the room was not found.
        side = image_size * rng.uniform(0.4, 0.8) / num_objects**0.5
        while True:
            pasted = varied(cut_outs[index].picture, round(side), rng)
            x = int(rng.integers(0, max(1, image_size - pasted.width + 1)))
            y = int(rng.integers(0, max(1, image_size - pasted.height + 1)))
            mask = np.zeros_like(taken)
            alpha = np.asarray(pasted.getchannel("A"))[: image_size - y, : image_size - x]
            mask[y : y + alpha.shape[0], x : x + alpha.shape[1]] = alpha > 0
            if not (mask & taken).any():
                break
            side = max(4.0, side * 0.95)
        picture.paste(pasted, (x, y), pasted)
        taken |= mask
        things.append(cut_outs[index])
        boxes.append(extent(mask))
    return Scene(picture, background, tuple(things), tuple(boxes))


def caption(things: Sequence[CutOut]) -> str:
    """ "A harp seal, an apple and a drum." """
    named = [f"{thing.article} {thing.label}" for thing in things]
    text = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return text[0].upper() + text[1:] + "."


def place(box: Sequence[int], image_size: int) -> str:
    """The side that the middle of the box lies farthest to, or the middle."""
    across = (box[0] + box[2]) / 2 / image_size - 0.5
    down = (box[1] + box[3]) / 2 / image_size - 0.5
    if max(abs(across), abs(down)) < 0.06:
        return "In the middle."
    if abs(across) >= abs(down):
        return "On the left." if across < 0 else "On the right."
    return "At the top." if down < 0 else "At the bottom."


# --- One scene


# What the processes of a pool compose with, given to each once.
_cut_outs: list[CutOut] = []


def _write_scene(
    folder: Path,
    split: str,
    seed: int,
    image_size: int,
    objects_per_scene: tuple[int, int],
    index: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes picture `index` of a split; returns its lines of captions.jsonl and instruct.jsonl."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    scene = draw_scene(_cut_outs, image_size, objects_per_scene, rng)
    image = f"images/{index:06d}.jpg"
    scene.picture.save(folder / image, quality=90)
    objects = [{"label": thing.label, "box": list(box)} for thing, box in zip(scene.things, scene.boxes, strict=True)]
    described = {"image": image, "caption": caption(scene.things), "objects": objects}
    asked = {
        "id": f"{split}-{index:06d}",
        "image": image,
        "conversations": _exchanges(scene, image_size, can_count=objects_per_scene[1] > 1, rng=rng),
    }
    return described, asked


def _exchanges(scene: Scene, image_size: int, can_count: bool, rng: np.random.Generator) -> list[dict[str, str]]:
    """One to three questions in any order, with answers. What is always one is not worth counting."""
    kinds = [str(kind) for kind in rng.permutation(["what", "where", "count"] if can_count else ["what", "where"])]
    said = []
    for kind in kinds[: int(rng.integers(1, len(kinds) + 1))]:
        question = QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
        match kind:
            case "what":
                answer = caption(scene.things)
            case "where":
                index = int(rng.integers(len(scene.things)))
                question = question.format(label=scene.things[index].label)
                answer = place(scene.boxes[index], image_size)
            case _:
                answer = f"{NUMBERS[len(scene.things)]}."
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return said


def varied(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """The cut-out mirrored or not, a little turned, brighter or darker, with longer side `side`; cropped to what
    shows. Alpha that would hardly show is none, so that boxes end where one sees the thing end.
    """
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    scale = side / max(turned.size)
    width, height = (max(2, round(length * scale)) for length in turned.size)
    pixels = np.array(turned.resize((width, height), Image.Resampling.LANCZOS))
    colours = pixels[..., :3].astype(np.float32) * rng.uniform(0.75, 1.2)
    pixels[..., :3] = colours.clip(0, 255).round()
    pixels[..., 3][pixels[..., 3] < 48] = 0
    if not pixels[..., 3].any():  # a hair that vanished when made smaller
        pixels[..., 3] = 255
    return Image.fromarray(pixels).crop(extent(pixels[..., 3] > 0))


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of what is true in the mask [height, width], x2 and y2 just behind the last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def made_background(size: int, rng: np.random.Generator) -> Image.Image:
    """One colour, a gradient between two, or a cloudy texture, chosen at random."""
    first, second = rng.uniform(40, 255, (2, 3))
    kind = rng.integers(3)
    if kind == 0:
        mix = np.zeros((size, size))
    elif kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        across = np.linspace(-1, 1, size)
        mix = across[None, :] * np.cos(angle) + across[:, None] * np.sin(angle)
        mix = (mix - mix.min()) / np.ptp(mix)
    else:
        cells = int(rng.integers(3, 17))
        coarse = Image.fromarray(rng.random((cells, cells), np.float32))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)
        mix = (mix + rng.normal(0, 0.06, (size, size))).clip(0, 1)
    pixels = first + (second - first) * mix[..., None]  # [size, size, 3]
    return Image.fromarray(pixels.round().astype(np.uint8))


# --- Pictures


def _stamps(folder: Path, num_kinds: int, seed: int) -> list[CutOut]:
    """Tux Paint's photographs. Each has a text beside it, whose first line is English: "A harp seal."

    Left out are mirrored copies, drawings, and names that are no short common noun.
    """
    candidates: dict[str, list[CutOut]] = {}
    for file in sorted(folder.rglob("*.png")):
        group = file.relative_to(folder).parent.as_posix()
        text = file.with_suffix(".txt")
        if group.split("/")[0] not in _STAMP_GROUPS or "cartoon" in file.as_posix() or not text.exists():
            continue
        if file.stem.endswith(("_mirror", "_flip")):
            continue
        with text.open(encoding="utf-8", errors="replace") as opened:
            found = re.fullmatch(r"(An?) ([a-z]+(?: [a-z]+)?)\.?", opened.readline().strip())
        if found is None or (found[1] == "An") != (found[2][0] in "aeiou"):
            continue
        with Image.open(file) as opened_picture:
            if max(opened_picture.width, opened_picture.height) < _MIN_STAMP_SIDE:
                continue
            picture = opened_picture.convert("RGBA")
        if np.asarray(picture)[..., 3].min() > 10 or _is_drawing(picture):  # not cut out; no photograph
            continue
        origin = f"{TUXPAINT.pin} {file.relative_to(folder).as_posix()}"
        candidates.setdefault(group, []).append(CutOut(found[2], found[1].lower(), picture, origin))
    return _distinct(candidates, num_kinds, seed)


def _is_drawing(picture: Image.Image) -> bool:
    """Whether most neighbours have the same colour, which a photograph's noise forbids."""
    pixels = np.asarray(picture).astype(int)
    solid = pixels[..., 3] > 200
    both = solid[:, 1:] & solid[:, :-1]
    equal = np.abs(np.diff(pixels[..., :3], axis=1)).sum(-1) <= 2
    return bool((equal & both).sum() > 0.6 * both.sum())


def _emoji(archive: Path, num_kinds: int, seed: int) -> list[CutOut]:
    """Google's emoji of things, 64 pixels wide."""
    names = frozenset(_COMMON_NAMES.split())
    with tarfile.open(archive) as opened:
        listed = json.load(opened.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        wanted = {
            f"package/img/google/64/{item['image']}": item
            for item in listed
            if item["has_img_google"] and item["short_name"] in names
        }
        candidates: dict[str, list[CutOut]] = {}
        for member in opened:
            if (item := wanted.get(member.name)) is not None:
                data = opened.extractfile(member).read()  # type: ignore[union-attr]
                label = item["short_name"].replace("_", " ")
                cut_out = CutOut(
                    label,
                    "an" if label[0] in "aeio" or label.startswith("um") else "a",
                    Image.open(io.BytesIO(data)).convert("RGBA"),
                    f"{EMOJI.pin} {item['image']}",
                )
                candidates.setdefault(item["subcategory"], []).append(cut_out)
    return _distinct(candidates, num_kinds, seed)


def _distinct(candidates: dict[str, list[CutOut]], num_kinds: int, seed: int) -> list[CutOut]:
    """Picks things that neither look nor sound alike: next is always the one farthest from all that were picked, of
    the groups picked from least; things with a common name come first.

    How far apart two look is told by the colours of an 8 x 8 version of each. Names that share their last word
    ("seal", "harp seal") are the same thing to somebody. Raises ValueError where there are too few.
    """
    things = sorted(
        ((group, thing) for group, members in candidates.items() for thing in members),
        key=lambda entry: (entry[1].label, entry[1].origin),
    )
    nouns = [thing.label.split()[-1] for _, thing in things]
    names = frozenset(_COMMON_NAMES.split())
    is_rare = [thing.label.replace(" ", "_") not in names for _, thing in things]
    if num_kinds > len(set(nouns)):
        raise ValueError(f"{num_kinds} kinds are more than the {len(set(nouns))} that there are")
    looks = np.stack([_look(thing.picture) for _, thing in things])  # [things, 192]
    distances = np.full(len(things), np.inf)
    picked: list[int] = []
    used: dict[str, int] = {}
    while len(picked) < num_kinds:
        free = [index for index in range(len(things)) if nouns[index] not in {nouns[one] for one in picked}]
        ranks = {index: (is_rare[index], used.get(things[index][0], 0)) for index in free}
        free = [index for index in free if ranks[index] == min(ranks.values())]
        index = free[int(distances[free].argmax())] if picked else random.Random(seed).choice(free)
        picked.append(index)
        used[things[index][0]] = used.get(things[index][0], 0) + 1
        distances = np.minimum(distances, np.linalg.norm(looks - looks[index], axis=1))
    return [things[index][1] for index in picked]


def _look(picture: Image.Image) -> np.ndarray:
    """[192] colours of the picture on grey, 8 x 8."""
    grey = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    small = Image.alpha_composite(grey, picture).convert("RGB").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


# --- Running


@contextmanager
def _mapper(num_processes: int, cut_outs: Sequence[CutOut]) -> Iterator[Any]:
    """A map in order, in this process or in several."""
    if num_processes == 1:
        _receive(cut_outs)
        yield map
        return
    with ProcessPoolExecutor(num_processes, initializer=_start_process, initargs=(list(cut_outs),)) as pool:
        try:
            yield partial(pool.map, chunksize=16)
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process(cut_outs: Sequence[CutOut]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says that it was stopped, once
    _receive(cut_outs)


def _receive(cut_outs: Sequence[CutOut]) -> None:
    _cut_outs[:] = cut_outs


def with_progress(rows: Iterator[Any], total: int, split: str, every_s: float = 2.0) -> Iterator[Any]:
    """The rows; says on stderr how many have passed and how long the rest will take."""
    start = said = time.monotonic()
    for count, row in enumerate(rows, 1):
        yield row
        if (now := time.monotonic()) - said >= every_s:
            said = now
            left = (now - start) / count * (total - count)
            print(f"{split}: {count:,} of {total:,} scenes, {left:.0f} s left", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
