"""Expressions with the tube or the interval of a video that they name, in rows of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import GROUPED, Find, annotated, grouped, is_grouped, records_of
from mmchat.sources.source import Source

_FACTS = ("expressions", "tube", "interval", "fps")


def read_tracks(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of SPLIT/track.jsonl: {"video": path, "expressions": ["..."], "tube": [[time_s, x1, y1, x2, y2], ...]}.

    Or "interval": [start_s, end_s] in place of "tube". Boxes are in pixels of the video as it is shown, rotation
    applied; "width" and "height", where they are given, are the size that the boxes were drawn on, and a video of
    another size is refused. "fps": frames a second on which tubes are compared.
    """
    found = records_of(files, files.one(f"{split}/track.jsonl", "track.jsonl"), _record)
    return grouped(found) if is_grouped(options, split) else found


def _record(row: dict[str, Any], key: str, find: Find) -> Record:
    if not isinstance(row.get("expressions"), list) or ("tube" in row) == ("interval" in row):
        raise SampleError("unreadable row", f"wanted expressions, and tube or interval; found {row!r:.200}")
    item = annotated(find("video", row.get("video")), row.get("width"), row.get("height"))
    return Record(key, {name: row[name] for name in _FACTS if name in row}, (item,))


SOURCES = {"tracks": Source(("track",), ("{split}/track.jsonl", "track.jsonl"), read_tracks, GROUPED)}
