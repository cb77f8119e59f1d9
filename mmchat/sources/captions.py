"""Captions in rows: {"image" | "video" | "audio": path, "caption" | "captions", "objects"}."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, given_media, of_split, records_of
from mmchat.sources.source import Source

_FACTS = ("caption", "captions", "objects")


def read_captions(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of the annotation file, or of SPLIT/captions.jsonl."""
    named, general = (mark.format(split=split) for mark in _MARKS)
    names = files.find(named) or of_split(files, files.find("captions.jsonl") or files.find(general), split)
    if len(names) != 1:
        found = f"{len(names)} files {general}: {', '.join(names[:5])}; name one of them" if names else "none of them"
        raise ValueError(f"{files}: wanted {named} or one {general}, found {found}")
    return records_of(files, names[0], _record)


_MARKS = ("{split}/captions.jsonl", "*.jsonl")

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
