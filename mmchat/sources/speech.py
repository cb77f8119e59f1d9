"""Recorded speech with transcripts: LibriSpeech, Speech Commands, SLURP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import UNREADABLE, problem
from mmchat.sources.source import Source

# SLURP's own names of its splits, whose files are the annotators' words in jsonl.
_SLURP_SPLITS = {"val": "devel", "validation": "devel", "dev": "devel"}


def read_librispeech(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """LibriSpeech (openslr.org/12): SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt of "ID TEXT" beside ID.flac.

    The split is the subset: dev-clean, train-clean-100, ...
    """
    names = files.find(f"{split}/*/*/*.trans.txt", f"LibriSpeech/{split}/*/*/*.trans.txt")
    if not names:
        raise ValueError(f"{files} has no {split}/SPEAKER/CHAPTER/*.trans.txt; --split names the subset, as dev-clean")
    for name in names:
        for number, line in enumerate(files.text(name).splitlines(), 1):
            key, _, text = line.strip().partition(" ")
            try:
                if key.count("-") != 2 or not text:
                    raise SampleError("unreadable row", f"wanted ID TEXT, found {line!r:.200}")
                item = files.media("audio", str(PurePosixPath(name).with_name(f"{key}.flac")))
                speaker, chapter, _ = key.split("-")
                yield Record(key, {"text": text, "speaker": speaker, "chapter": chapter}, (item,))
            except SampleError as error:
                yield SampleError(error.reason, f"{name} line {number}: {error.detail}")


def read_speech_commands(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Speech Commands v0.02 (arXiv 1804.03209): WORD/SPEAKER_nohash_N.wav; testing_list.txt and validation_list.txt.

    What neither list names is for training. A speaker is in one split only, which the lists see to; a recording of a
    speaker who is in an earlier list too is refused. _background_noise_ is no word, and is left out.
    """
    lists = {}
    for part in ("validation", "testing"):
        if not (found := files.beside(f"{part}_list.txt", f"*/{part}_list.txt")):
            raise ValueError(f"{files} has no {part}_list.txt")
        lists[part] = set(files.text(found[0]).split())
    held_out = {"testing": _speakers(lists["testing"]), "validation": _speakers(lists["validation"])}
    part = {"val": "validation", "test": "testing"}.get(split, split)
    if part not in ("train", "validation", "testing"):
        raise ValueError(f"Speech Commands has the splits train, validation and testing, not {split}")
    for name in files.beside("*/*_nohash_*.wav", "*/*/*_nohash_*.wav"):
        path = PurePosixPath(name)
        short = f"{path.parent.name}/{path.name}"
        listed = next((one for one, members in lists.items() if short in members), "train")
        if listed != part or path.parent.name == "_background_noise_":
            continue
        speaker = path.name.partition("_")[0]
        others = [one for one, speakers in held_out.items() if one != part and speaker in speakers]
        if others and part != "testing":
            yield SampleError("speaker of another split", f"{name}: {speaker} is in {others[0]}_list.txt too")
            continue
        key = f"{path.parent.name}/{path.stem}"
        yield Record(key, {"text": path.parent.name, "speaker": speaker}, (files.media("audio", name),))


def _speakers(names: set[str]) -> set[str]:
    return {name.rpartition("/")[2].partition("_")[0] for name in names}


def read_slurp(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """SLURP (arXiv 2011.13205): dataset/slurp/SPLIT.jsonl, one record for each of a sentence's recordings.

    Audio is in slurp_real/ or slurp_synth/, or in the tars of those names. `--set microphone=headset` takes the close
    microphone only, `distant` the others.
    """
    part = _SLURP_SPLITS.get(split, split)
    microphone = options.get("microphone", "any")
    if microphone not in ("any", "headset", "distant"):
        raise ValueError(f"microphone is headset, distant or any, not {microphone}")
    name = files.one(f"{part}.jsonl", f"dataset/slurp/{part}.jsonl", f"*/dataset/slurp/{part}.jsonl")
    for number, row in enumerate(files.rows(name)):
        try:
            yield from _slurp_records(row, files, microphone)
        except UNREADABLE as error:
            yield problem(error, f"{name} row {number}")


def _slurp_records(row: Any, files: Files, microphone: str) -> Iterator[Record | SampleError]:
    match row:
        case {"slurp_id": int(number), "sentence": str(text), "recordings": [*recordings]}:
            kept = ("intent", "action", "scenario", "sentence_annotation", "entities")
            facts = {"text": text, "slurp_id": number} | {name: row[name] for name in kept if name in row}
        case SampleError() as error:
            raise error
        case _:
            raise SampleError("unreadable row", f"wanted slurp_id, sentence and recordings, found {row!r:.200}")
    for recording in recordings:
        file = recording.get("file") if isinstance(recording, dict) else None
        is_close = isinstance(file, str) and "-headset" in file
        if microphone != "any" and is_close != (microphone == "headset"):
            continue
        try:
            item = files.media("audio", file, f"slurp_real/{file}", f"slurp_synth/{file}", f"audio/slurp_real/{file}")
            key = f"{number}/{PurePosixPath(str(file)).stem}"
            yield Record(key, facts | {"microphone": "headset" if is_close else "distant"}, (item,))
        except SampleError as error:
            yield SampleError(error.reason, f"slurp_id {number}: {error.detail}")


SOURCES = {
    "librispeech": Source(
        ("transcribe",), ("{split}/*/*/*.trans.txt", "LibriSpeech/{split}/*/*/*.trans.txt"), read_librispeech
    ),
    "speech_commands": Source(("transcribe",), ("testing_list.txt", "*/testing_list.txt"), read_speech_commands),
    "slurp": Source(
        ("transcribe",),
        ("dataset/slurp/*.jsonl", "*/dataset/slurp/*.jsonl"),
        read_slurp,
        {"microphone": "headset, distant or any (default)"},
    ),
}
