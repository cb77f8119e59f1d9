"""Video-ChatGPT's questions on videos of ActivityNet (arXiv 2306.05424): VideoInstruct100K, and the tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MediaRef, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.questions import MISSING, SOUND, clip, with_sound
from mmchat.sources.rows import Find, records_of
from mmchat.sources.source import Source

_MARKS = ("VideoInstruct100K.json", "VideoInstruct_Dataset.json")
_TYPES = (".mp4", ".mkv", ".webm", ".avi")
_FOLDERS = ("", "videos/")
_TESTS = {name: f"{name}_qa.json" for name in ("generic", "temporal", "consistency")}


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
        return _grouped(files, name, options)
    return records_of(files, name, lambda row, key, find: _record(files, key, [row], options))


def read_video_chatgpt_tests(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """SPLIT_qa.json: rows {"video_name", "Q", "A"}; of consistency {"video_name", "Q1", "Q2", "A"}.

    The second wording stands under "more". Raises ValueError for another split and for an option's value.
    """
    if split not in _TESTS:
        raise ValueError(f"the tests of Video-ChatGPT are {', '.join(_TESTS)}: name one with --split, found {split}")
    name = files.one(_TESTS[split], f"*/{_TESTS[split]}")
    return records_of(files, name, lambda row, key, find: _test(files, split, options, key, row))


SOURCES = {
    "video_chatgpt_tests": Source(
        ("instruct",),
        tuple(pattern for name in _TESTS.values() for pattern in (name, f"*/{name}")),
        read_video_chatgpt_tests,
        SOUND | MISSING,
    ),
    "video_instruct": Source(
        ("instruct",),
        _MARKS,
        read_video_instruct,
        {"grouped": "yes: one record a video, its questions as one dialogue (default: no, a record a question)"}
        | SOUND,
    ),
}


def _grouped(files: Files, name: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """A record a video, in order of first appearance; holds all texts in memory (42 MB in the published set)."""
    videos: dict[str, list[dict[str, Any]]] = {}

    def collect(row: dict[str, Any], key: str, find: Find) -> Record:
        _exchange(row)
        videos.setdefault(row["video_id"], []).append(row)
        return Record(key, {})

    yield from (error for error in records_of(files, name, collect) if isinstance(error, SampleError))
    for number, (video, rows) in enumerate(videos.items()):
        try:
            yield _record(files, f"{number:08d}", rows, options)
        except SampleError as error:
            yield SampleError(error.reason, f"{name} video {video}, {len(rows)} rows: {error.detail}")


def _record(files: Files, key: str, rows: list[dict[str, Any]], options: Mapping[str, str]) -> Record:
    exchanges = [_exchange(row) for row in rows]
    media = with_sound(_video(files, rows[0]["video_id"]), options)
    turns: list[dict[str, Any]] = []
    for question, answer in exchanges:
        # Video-ChatGPT shows the video behind the question of every other row, from the first on.
        parts: list[dict[str, Any]] = [{"text": question}]
        if not turns:
            place = 1 - int(key) % 2
            parts[place:place] = [{"media": i} for i in range(len(media))]
        turns += [{"role": "user", "parts": parts}, {"role": "assistant", "parts": [{"text": answer}]}]
    return Record(key, {"turns": turns, "id": rows[0]["video_id"]}, media)


def _test(files: Files, split: str, options: Mapping[str, str], key: str, row: dict[str, Any]) -> Record:
    match row:
        case {"Q1": str(first), "Q2": str(second), "A": str(answer), "video_name": str(name)} if name:
            questions = [first, second]
        case {"Q": str(only), "A": str(answer), "video_name": str(name)} if name:
            questions = [only]
        case _:
            raise SampleError("unreadable row", f"wanted video_name, Q (or Q1 and Q2) and A, found {row!r:.200}")
    if not all(text.strip() for text in (answer, *questions)):
        raise SampleError("unreadable row", f"wanted a question and an answer, found {row!r:.200}")
    media, missing = clip(files, split, options, name.removeprefix("v_"), name)
    shown = [{"media": i} for i in range(len(media))]
    own, *more = [
        {
            "turns": [
                {"role": "user", "parts": [*shown, {"text": question}]},
                {"role": "assistant", "parts": [{"text": answer}]},
            ],
            "id": name,
            **missing,
        }
        for question in questions
    ]
    return Record(key, own | ({"more": more} if more else {}), media)


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
