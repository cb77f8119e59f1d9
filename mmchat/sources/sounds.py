"""Captions of sounds: AudioCaps and Clotho, whose tables are CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import UNREADABLE, problem
from mmchat.sources.source import Source

_AUDIO_TYPES = ("wav", "flac", "mp3", "m4a", "ogg")
_CLOTHO_SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}


def read_audiocaps(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """AudioCaps (github.com/cdjkim/audiocaps): SPLIT.csv of audiocap_id, youtube_id, start_time, caption.

    A clip's captions (five in val and test) become one record; the table is held in memory (9 MB). Clips are not
    published: files count that are named YOUTUBE_ID or AUDIOCAP_ID, with or without a leading Y or a start time, in the
    folder, in SPLIT/ or in audio/.
    """
    name = files.one(f"{split}.csv", f"dataset/{split}.csv", f"*/{split}.csv")
    clips: dict[tuple[str, str], list[dict[str, str]]] = {}
    for number, row in enumerate(_rows(files, name), 2):
        if isinstance(row, SampleError):
            yield problem(row, f"{name} line {number}")
            continue
        if not all(row.get(column) for column in ("audiocap_id", "youtube_id", "start_time", "caption")):
            yield SampleError(
                "unreadable row", f"{name} line {number}: wanted audiocap_id,youtube_id,start_time,caption, found {row}"
            )
            continue
        clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
    for (video, start), rows in clips.items():
        ids = [row["audiocap_id"] for row in rows]
        stems = [video, f"Y{video}", f"{video}_{start}", f"Y{video}_{start}", *ids]
        folders = ("", f"{split}/", "audio/", f"audio/{split}/")
        names = [f"{folder}{stem}.{type_}" for folder in folders for stem in stems for type_ in _AUDIO_TYPES]
        try:
            facts = {"captions": [row["caption"] for row in rows], "youtube_id": video, "start_time": start}
            yield Record(ids[0], facts, (files.media("audio", names[0], *names[1:]),))
        except SampleError as error:
            yield problem(error, f"{name} audiocap_id {ids[0]}")


def read_clotho(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Clotho 2.1 (zenodo.org/records/4783391): clotho_captions_SPLIT.csv of file_name, caption_1, ..., caption_5.

    Splits are development, validation and evaluation (also train, val, test), the recordings in a folder of that name.
    """
    part = _CLOTHO_SPLITS.get(split, split)
    name = files.one(f"clotho_captions_{part}.csv", f"*/clotho_captions_{part}.csv")
    for number, row in enumerate(_rows(files, name)):
        try:
            if isinstance(row, SampleError):
                raise row
            file, captions = row.get("file_name"), [row.get(f"caption_{i}") for i in range(1, 6)]
            if not file or not all(captions):
                raise SampleError("unreadable row", f"wanted file_name and caption_1 to caption_5, found {row!r:.200}")
            item = files.media("audio", f"{part}/{file}", file, f"clotho_audio_{part}/{part}/{file}")
            yield Record(f"{number:08d}", {"captions": captions, "file_name": file}, (item,))
        except UNREADABLE as error:
            yield problem(error, f"{name} line {number + 2}")


def _rows(files: Files, name: str) -> Iterator[dict[str, str] | SampleError]:
    """Raises ValueError for a table that is not in UTF-8."""
    with files.open(name) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
        while True:
            try:
                yield next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # such as a quote that is never closed
                yield SampleError("unreadable row", f"{error}")
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} in {files} is not in UTF-8 ({error}); convert it first (iconv)") from error


SOURCES = {
    "audiocaps": Source(("caption",), ("dataset/{split}.csv", "{split}.csv"), read_audiocaps),
    "clotho": Source(("caption",), ("clotho_captions_*.csv", "*/clotho_captions_*.csv"), read_clotho),
}
