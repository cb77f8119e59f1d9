"""VideoInstruct100K of Video-ChatGPT (arXiv 2306.05424): questions and answers on videos of ActivityNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, records_of
from mmchat.sources.source import Source

_MARKS = ("VideoInstruct100K.json", "VideoInstruct_Dataset.json")
_TYPES = (".mp4", ".mkv", ".webm", ".avi")
_FOLDERS = ("", "videos/")


def read_video_instruct(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows {"q", "a", "video_id"}, a record each. There is one split: train.

    Raises ValueError for another split and for an option's value.
    """
    if split != "train":
        raise ValueError(f"VideoInstruct100K is all training data: wanted split train, found {split}")
    if options.get("grouped", "no") not in ("yes", "no"):
        raise ValueError(f"grouped={options['grouped']}: wanted yes or no")
    name = files.one(*_MARKS)
    if options.get("grouped") == "yes":
        return _grouped(files, name)
    return records_of(files, name, lambda row, key, find: _record(files, key, [row]))


SOURCES = {
    "video_instruct": Source(
        ("instruct",),
        _MARKS,
        read_video_instruct,
        {"grouped": "yes: one record a video, its questions as one dialogue (default: no, a record a question)"},
    )
}


def _grouped(files: Files, name: str) -> Iterator[Record | SampleError]:
    """A record a video, in order of first appearance; holds all texts in memory (42 MB in the published set)."""
    videos: dict[str, list[dict[str, Any]]] = {}

    def collect(row: dict[str, Any], key: str, find: Find) -> Record:
        _exchange(row)
        videos.setdefault(row["video_id"], []).append(row)
        return Record(key, {})

    yield from (error for error in records_of(files, name, collect) if isinstance(error, SampleError))
    for number, (video, rows) in enumerate(videos.items()):
        try:
            yield _record(files, f"{number:08d}", rows)
        except SampleError as error:
            yield SampleError(error.reason, f"{name} video {video}, {len(rows)} rows: {error.detail}")


def _record(files: Files, key: str, rows: list[dict[str, Any]]) -> Record:
    turns: list[dict[str, Any]] = []
    for question, answer in map(_exchange, rows):
        # Video-ChatGPT shows the video behind the question of every other row, from the first on.
        parts: list[dict[str, Any]] = [{"text": question}]
        if not turns:
            parts.insert(1 - int(key) % 2, {"media": 0})
        turns += [{"role": "user", "parts": parts}, {"role": "assistant", "parts": [{"text": answer}]}]
    return Record(key, {"turns": turns, "id": rows[0]["video_id"]}, (_video(files, rows[0]["video_id"]),))


def _exchange(row: dict[str, Any]) -> tuple[str, str]:
    match row:
        case {"q": str(question), "a": str(answer), "video_id": str(video)} if video and answer.strip():
            return question, answer
    raise SampleError("unreadable row", f"wanted q, a and video_id as text, found {row!r:.200}")


def _video(files: Files, video: str) -> MediaRef:
    """The file of a video id, which has "v_" before YouTube's id; files of some downloads have it not."""
    if PurePosixPath(video).name != video:
        raise SampleError("media outside of the source", f"{video!r:.200} is no video id")
    stems = [folder + stem for folder in _FOLDERS for stem in (video, video.removeprefix("v_"))]
    first, *others = (stem + ending for stem in stems for ending in _TYPES)
    return files.media("video", first, *others)
