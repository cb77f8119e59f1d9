"""Captions in rows: {"image" | "video" | "audio": path, "caption" | "captions", "objects"}."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, given_media, records_of
from mmchat.sources.source import Source

_FACTS = ("caption", "captions", "objects")


def read_captions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of the annotation file, or of SPLIT/captions.jsonl."""
    return records_of(files, files.one(*(mark.format(split=split) for mark in _MARKS)), _record)


_MARKS = ("{split}/captions.jsonl", "captions.jsonl", "*.jsonl")

SOURCES = {"captions": Source(("caption",), _MARKS, read_captions)}


def _record(row: dict[str, Any], key: str, find: Find) -> Record:
    facts = {name: row[name] for name in _FACTS if row.get(name) is not None}
    _check_objects(facts.get("objects", []))
    return Record(key, facts, tuple(itertools.chain.from_iterable(given_media(row, find).values())))


def _check_objects(objects: Any) -> None:
    """Raises SampleError where `objects` is not a list of labels with boxes."""
    for thing in objects if isinstance(objects, list) else [objects]:
        match thing:
            case {"label": str(), "box": [_, _, _, _] as box} if all(isinstance(x, int | float) for x in box):
                continue
        raise SampleError("unreadable objects", f'wanted {{"label": ..., "box": [4 numbers]}}, found {thing!r:.200}')
