"""Has stamps named and pictures asked about aloud: python data_prep/spoken_stamps.py [--out FOLDER] [--scenes FOLDER]

Synthetic voices say names and captions of stamps, questions about the pictures of referential_scenes.py ("How many
apples are there?") and commands ("Show me the red drum."). Three kinds of rows come of it: transcripts in the layout of
LibriSpeech; spoken questions with answers in words; dialogues that ask aloud for a place and are answered with a box.

Voices, and with them all recordings, are disjoint between splits: those of configs/directed_speech.yaml. Who speaks is
drawn without regard to what is said. The pictures of `train` and `val` are other ones of the scenes' training split,
those of `test` are of its test split. A split is only seen complete.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile

from data_prep.directed_config import SPLITS, Split, load_directed
from data_prep.engines import num_cores, run_local
from data_prep.open_data import folders
from data_prep.packages import DOWNLOADS, ROOT, PackageError
from data_prep.referential_scenes import SCENES
from data_prep.rooms import RATE_HZ, noise
from data_prep.stamp_scenes import new_split, with_progress
from data_prep.voices import Voice, prepare, say

SPEECH = ROOT / ".cache" / "media_scenes" / "spoken_stamps"

# Raised when the same options give other recordings.
VERSION = 1

COMMANDS = (
    "Where is {}?",
    "Show me {}.",
    "Find {}.",
    "Can you find {}?",
    "Where do you see {}?",
    "Mark {}.",
)
# Short enough to say, and few enough of each kind to be learned from few voices.
_ASKED = re.compile(r"How many |What colour |Is there |In which part |What is (left|right|above|below)\b")
_MEANT = ("name", "colour", "place", "size")
_LONGEST_S = 4.0  # few are longer than 2
_CHUNK = 20
_NAME = re.compile(r"An? ([a-z]+(?: [a-z]+)?)\.?")


@dataclass(frozen=True)
class Counts:
    """How many of what a split has: names and captions; pictures, and questions or commands about each."""

    names: int
    captions: int
    asked: int
    commanded: int
    each: int


COUNTS: dict[Split, Counts] = {
    "train": Counts(names=1000, captions=500, asked=750, commanded=500, each=2),
    "val": Counts(names=100, captions=100, asked=100, commanded=60, each=1),
    "test": Counts(names=200, captions=100, asked=300, commanded=200, each=1),
}


@dataclass(frozen=True)
class Utterance:
    """One recording to be: what is said, which take of it, in what kind (0 name, 1 caption, 2 question, 3 command)."""

    text: str
    take: int
    kind: int


@dataclass
class Plan:
    """What is to be said in a split, each once, and the rows that take it by its number."""

    utterances: dict[Utterance, int] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    commanded: list[dict[str, Any]] = field(default_factory=list)

    def said(self, text: str, take: int, kind: int) -> int:
        """The number of a recording; the same words in the same take are recorded once."""
        return self.utterances.setdefault(Utterance(text, take, kind), len(self.utterances))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all splits are there, made with these options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SPEECH, help="default: .cache/media_scenes/spoken_stamps")
    parser.add_argument("--scenes", type=Path, default=SCENES, help="of referential_scenes.py (default: its own)")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["hibari", "flite", "espeak", "piper"],
        help="of the voices (default: all); flite needs apt",
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of everything, for a try")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: one for each core)")
    parser.add_argument("--cache", type=Path, default=DOWNLOADS, help="where packages are kept")
    args = parser.parse_args(arguments)
    try:
        voices = {split: _voices(split, args.engines) for split in SPLITS}
        prepare([voice for split in SPLITS for voice in voices[split]], args.cache)
        names = stamp_names(folders("stamps", args.cache)[0])
        for split in SPLITS:
            start = time.monotonic()
            plan = make_plan(args.scenes, names, split, scaled(COUNTS[split], args.share), args.seed)
            folder = record(plan, args.out, split, voices, args.seed, args.workers, args.cache)
            print(f"{folder}: {len(plan.utterances):,} recordings, {time.monotonic() - start:.0f} s", flush=True)
    except (PackageError, ValueError, OSError) as error:
        print(f"spoken_stamps: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spoken_stamps: stopped; splits finished so far are kept", file=sys.stderr)
        return 130
    return 0


def scaled(counts: Counts, share: float) -> Counts:
    """A share of each number, at least 1; as many about each picture."""
    numbers = (counts.names, counts.captions, counts.asked, counts.commanded)
    return Counts(*(max(1, round(number * share)) for number in numbers), each=counts.each)


def stamp_names(folder: Path) -> list[str]:
    """Names of all stamps that are a short common noun, with their articles: "A harp seal"."""
    found = set()
    for file in folder.rglob("*.txt"):
        first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
        if _NAME.fullmatch(first):
            found.add(first.rstrip("."))
    return sorted(found)


# --- What is said


def make_plan(scenes: Path, names: Sequence[str], split: Split, counts: Counts, seed: int) -> Plan:
    """Draws names, captions, questions and commands. Raises ValueError where there are too few pictures."""
    rng, plan = _rng(seed, f"plan/{split}"), Plan()
    rows = _scenes(scenes, split)
    kinds = sorted({label for label in _labels(scenes)})
    for number in range(counts.names):
        # Half are the kinds that the pictures show, half are any stamps.
        name = str(rng.choice(kinds if number % 2 else names))
        bare = name.partition(" ")[2].capitalize()
        plan.said(f"{name if rng.random() < 0.6 else bare}.", number, 0)
    captions = [row["caption"] for row in rows if len(row["phrases"]) < 3]
    for number, i in enumerate(rng.permutation(len(captions))[: counts.captions]):
        plan.said(captions[int(i)], number, 1)
    takes = 4 if split == "train" else 2
    order = iter([rows[int(i)] for i in rng.permutation(len(rows))])
    _fill(plan.asked, counts.asked, order, partial(_asked, plan, counts.each, takes, rng), "questions")
    order = iter([rows[int(i)] for i in rng.permutation(len(rows))])
    _fill(plan.commanded, counts.commanded, order, partial(_commanded, plan, counts.each, takes, rng), "commands")
    return plan


def _scenes(scenes: Path, split: Split) -> list[dict[str, Any]]:
    """Rows of the pictures that a split may show."""
    of = "test" if split == "test" else "train"
    file = scenes / of / "scenes.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no {file}; make it with 'python data_prep/referential_scenes.py'")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["image"] = f"{of}/{row['image']}"
    if split == "test":
        return rows
    return [row for number, row in enumerate(rows) if (number % 10 == 9) == (split == "val")]


def _labels(scenes: Path) -> Iterable[str]:
    """ "A drum" for each kind of thing that the training pictures show."""
    for kind in json.loads((scenes / "train" / "source.json").read_text())["kinds"]:
        yield f"{'An' if kind['label'][0] in 'aeiou' else 'A'} {kind['label']}"


def _fill(found: list[dict[str, Any]], count: int, rows: Iterable[dict[str, Any]], make: Any, what: str) -> None:
    for row in rows:
        if len(found) == count:
            return
        if (made := make(row)) is not None:
            found.append(made)
    if len(found) < count:
        raise ValueError(f"{len(found)} pictures with spoken {what}, wanted {count}; make more scenes")


def _asked(plan: Plan, each: int, takes: int, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, Any] | None:
    """Questions with answers in words about one picture, for the source `spoken_question`."""
    suited = [one for one in row["questions"] if "regions" not in one and _ASKED.match(one["question"])]
    # Text and answer in any order: what is asked first in a row of the scenes is drawn already.
    if len(suited) < each:
        return None
    questions = []
    for one in suited[:each]:
        number = plan.said(one["question"], int(rng.integers(takes)), 2)
        questions.append({"audio": number, "text": one["question"], "answers": one["answers"]})
    return {"image": row["image"], "questions": questions}


def _commanded(
    plan: Plan, each: int, takes: int, rng: np.random.Generator, row: dict[str, Any]
) -> dict[str, Any] | None:
    """A dialogue in which things of one picture are asked for aloud, for the source `chat`."""
    suited = [one for one in row["targets"] if one["kind"] in _MEANT and len(one["boxes"]) == 1]
    different = {tuple(one["boxes"][0]): one for one in reversed(suited)}
    if not different:
        return None
    media: list[dict[str, Any]] = [{"modality": "image", "path": row["image"]}]
    turns: list[dict[str, Any]] = []
    for box, one in list(different.items())[:each]:
        expression = one["expressions"][int(rng.integers(len(one["expressions"])))]
        text = COMMANDS[int(rng.integers(len(COMMANDS)))].format(expression)
        asked = [{"media": 0}] if not turns else []
        turns.append({"role": "user", "parts": [*asked, {"media": len(media)}]})
        turns.append({"role": "assistant", "parts": [{"region": {"media": 0, "box": list(box)}}]})
        media.append({"modality": "audio", "path": plan.said(text, int(rng.integers(takes)), 3), "text": text})
    return {"id": row["id"], "media": media, "turns": turns}


# --- How it is said


def record(
    plan: Plan,
    out: Path,
    split: Split,
    voices: dict[Split, list[Voice]],
    seed: int,
    num_workers: int = 1,
    cache: Path = DOWNLOADS,
) -> Path:
    """Writes OUT/SPLIT: SPEAKER/KIND/*.flac with transcripts as LibriSpeech has them, and the rows that ask aloud.

    The same arguments give the same recordings with one version of the engines, whatever the number of workers. A
    folder made with the same arguments is left as it is; ValueError is raised for one made with others.
    """
    folder, utterances = out / split, list(plan.utterances)
    words = zlib.crc32(json.dumps([[one.text, one.take, one.kind] for one in utterances]).encode())
    source = {
        "version": VERSION,
        "split": split,
        "seed": seed,
        "voices": [voice.name for voice in voices[split]],
        "recordings": len(utterances),
        "words_crc32": words,
    }
    every = [voice.name for one in SPLITS for voice in voices[one]]
    speakers = {name: number for number, name in enumerate(every)}
    drawn = [_voice(voices[split], one, split, seed) for one in utterances]
    names = [
        f"{speakers[voice.name]}/{one.kind}/{speakers[voice.name]}-{one.kind}-{number:06d}"
        for number, (one, voice) in enumerate(zip(utterances, drawn, strict=True))
    ]
    with new_split(folder, source, "") as made:
        if made is not None:
            todo = list(zip(utterances, drawn, names, strict=True))
            chunks = [todo[first : first + _CHUNK] for first in range(0, len(todo), _CHUNK)]
            counts = run_local(partial(_record_chunk, made, split, seed, cache), chunks, num_workers)
            for _ in with_progress(counts, len(chunks), f"{split}, in chunks of {_CHUNK}"):
                pass
            _write_rows(made, plan, names)
            of_split = "".join(f"{speakers[voice.name]} {voice.name}\n" for voice in voices[split])
            (made / "speakers.txt").write_text(of_split)
    return folder


def _record_chunk(
    folder: Path, split: Split, seed: int, cache: Path, chunk: Sequence[tuple[Utterance, Voice, str]]
) -> int:
    for one, voice, name in chunk:
        file = folder / f"{name}.flac"
        file.parent.mkdir(parents=True, exist_ok=True)
        samples = spoken(one, voice, _rng(seed, f"{split}/sound/{one.text}", one.take), cache)
        soundfile.write(file, samples, RATE_HZ, format="FLAC", subtype="PCM_16")
    return len(chunk)


def spoken(one: Utterance, voice: Voice, rng: np.random.Generator, cache: Path = DOWNLOADS) -> np.ndarray:
    """[samples] int16 at 16 kHz: somewhat faster or slower, higher or lower, louder or softer, with a little noise."""
    rate = float(np.clip(rng.normal(1.0, 0.08), 0.85, 1.25))
    pitch = float(np.clip(rng.normal(1.0, 0.06), 0.88, 1.15))
    samples = say(one.text, voice, rate, pitch, float(rng.normal(0, 2.5)), cache)
    before, behind = (int(rng.uniform(0.05, 0.25) * RATE_HZ) for _ in range(2))
    samples = np.pad(samples, (before, behind))[: int(_LONGEST_S * RATE_HZ)]
    kind = ("quiet", "fan", "hum", "street")[int(rng.integers(4))]
    samples = samples + noise(kind, len(samples), rng) * 10 ** (rng.uniform(-66, -44) / 20)
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def _voices(split: Split, engines: Sequence[str]) -> list[Voice]:
    """Of these engines, those of the split. Raises ValueError where there is none."""
    found = [voice for voice in load_directed().speakers(split) if voice.engine in engines]
    if not found:
        raise ValueError(f"no voice of {', '.join(engines)} is for {split}; wanted espeak among --engines")
    return found


def _voice(voices: Sequence[Voice], one: Utterance, split: Split, seed: int) -> Voice:
    """An engine, a base of it and a warp of that, each as likely as the others."""
    rng = _rng(seed, f"{split}/voice/{one.text}", one.take)
    for part in ("engine", "base", "name"):
        options = sorted({getattr(voice, part) for voice in voices})
        chosen = options[int(rng.integers(len(options)))]
        voices = [voice for voice in voices if getattr(voice, part) == chosen]
    return voices[0]


def _write_rows(folder: Path, plan: Plan, names: Sequence[str]) -> None:
    """Transcripts, spoken_question.jsonl and instruct.jsonl; recordings by path in place of their numbers."""
    lines: dict[str, list[str]] = {}
    for one, name in zip(plan.utterances, names, strict=True):
        speaker, kind, key = name.split("/")
        lines.setdefault(f"{speaker}/{kind}/{speaker}-{kind}.trans.txt", []).append(f"{key} {one.text}\n")
    for file, found in lines.items():
        (folder / file).write_text("".join(found), encoding="utf-8")
    for row in plan.asked:
        for question in row["questions"]:
            question["audio"] = f"{names[question['audio']]}.flac"
    for row in plan.commanded:
        for item in row["media"][1:]:
            item["path"] = f"{names[item['path']]}.flac"
    for file, rows in (("spoken_question.jsonl", plan.asked), ("instruct.jsonl", plan.commanded)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rng(seed: int, name: str, number: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(f"spoken/{name}".encode()), number])


if __name__ == "__main__":
    # By its full name: the processes that share the work import what they run.
    from data_prep import spoken_stamps as module

    sys.exit(module.main())
