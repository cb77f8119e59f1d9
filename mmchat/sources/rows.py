"""What formats of rows share: records from rows, and the media files that a row names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MODALITIES, MediaHeader, MediaRef, Modality, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files

Find = Callable[[Modality, Any], MediaRef]
RecordOf = Callable[[dict[str, Any], str, Find], Record]

# What reading a malformed row can raise. ValueError is not among them: that is a fault in what the user asked for.
UNREADABLE = (SampleError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)

# Words in the names of files that tell a split.
_SPLITS = {word: word for word in ("train", "val", "test", "testdev", "eval")}
_SPLITS |= {"training": "train", "valid": "val", "validation": "val", "dev": "val", "devel": "val", "testing": "test"}


def problem(error: Exception, place: str) -> SampleError:
    """One of UNREADABLE, with its place."""
    if isinstance(error, SampleError):
        return SampleError(error.reason, f"{place}: {error.detail}")
    return SampleError("unreadable row", f"{place}: {type(error).__name__}: {error!s:.200}")


def of_split(files: Files, names: Sequence[str], split: str) -> list[str]:
    """Of files that were found by no split's name, those that tell the split; else those that tell none.

    validation, valid, val and dev are one split. A file that was named as SOURCE counts for any. Raises ValueError
    where all tell another split.
    """
    if files.annotation is not None:
        return list(names)
    told = {name: _splits_in(name) for name in names}
    wanted = _SPLITS.get(split)
    own = [name for name in names if (wanted in told[name] if wanted else split in name)]
    if chosen := own or [name for name in names if not told[name]]:
        return chosen
    if not names:
        return []
    found = f"{', '.join(names[:5])} of the splits {', '.join(sorted(set().union(*told.values())))}"
    raise ValueError(f"{files} holds {found}; wanted {split}: choose with --split, or name the file as SOURCE")


def _splits_in(name: str) -> set[str]:
    words = re.split(r"[^a-z]+", name.lower().replace("test-dev", "testdev").replace("test_dev", "testdev"))
    return {_SPLITS[word] for word in words if word in _SPLITS}


def annotated(item: MediaRef, width: Any, height: Any) -> MediaRef:
    """The picture with the size that its set states, in whose pixels its boxes are; no number, no statement.

    Where shards are written, a file of another size is refused.
    """
    if not isinstance(width, int) or not isinstance(height, int):
        return item
    return replace(item, header=MediaHeader(width=width, height=height))


def records_of(files: Files, name: str, record: RecordOf) -> Iterator[Record | SampleError]:
    """Records of a file's rows (see Files.rows), keyed by row number; what `record` refuses comes as SampleError.

    Args:
        record: row, key and the finder of media (whose paths count from the file's folder or a root) to a record.
    """
    return records_from(files.rows(name), name, finder(files, PurePosixPath(name).parent), record)


def records_from(rows: Iterable[Any], name: str, find: Find, record: RecordOf) -> Iterator[Record | SampleError]:
    """As `records_of`, for rows from anywhere. A row that is a list holds rows of its own (Qwen's packed data)."""
    for number, row in enumerate(rows):
        packed = list(enumerate(row)) if isinstance(row, list) else [(None, row)]
        for index, one in packed:
            key, place = f"{number:08d}", f"row {number}"
            if index is not None:
                key, place = f"{key}-{index:03d}", f"{place} item {index}"
            try:
                if isinstance(one, SampleError):
                    raise one
                if not isinstance(one, dict):
                    raise SampleError("unreadable row", f"{one!r:.200} is no object")
                yield record(one, key, find)
            except UNREADABLE as error:
                yield problem(error, f"{name} {place}")


def finder(files: Files, folder: PurePosixPath) -> Find:
    """Finds an item by its path, which counts from `folder` or a root, or has it from bytes or {"bytes", "path"}."""

    def find(modality: Modality, found: Any) -> MediaRef:
        if isinstance(found, dict) and ("bytes" in found or "path" in found):
            found = found.get("path") if found.get("bytes") is None else found["bytes"]
        if isinstance(found, bytes):
            return MediaRef(modality, found)
        if isinstance(found, list) and modality == "video":
            raise SampleError("video as a list of frames", f"{found!r:.200}: wanted a file, which has times; join them")
        path = found.removeprefix("file://") if isinstance(found, str) else found
        is_beside = isinstance(path, str) and "://" not in path and not path.startswith(("/", "data:"))
        return files.media(modality, str(folder / path) if is_beside and path else path, *([path] if is_beside else []))

    return find


def grouped(found: Iterable[Record | SampleError]) -> Iterator[Record | SampleError]:
    """Neighbouring records of the same media as one: the first's key and facts, the others' facts under "more"."""
    waiting: Record | None = None
    for one in found:
        if isinstance(one, Record) and waiting is not None and one.media == waiting.media:
            waiting.facts.setdefault("more", []).append(one.facts)
            continue
        if isinstance(one, Record):
            if waiting is not None:
                yield waiting
            waiting = Record(one.key, dict(one.facts), one.media)
        else:
            yield one
    if waiting is not None:
        yield waiting


GROUPED = {"grouped": "yes: a picture's questions are one record, so that it is stored once (default for train), or no"}


def is_grouped(options: Mapping[str, str], split: str) -> bool:
    """What --set grouped says; evaluation counts questions, so that only training groups them by itself."""
    if (found := options.get("grouped", "yes" if split.startswith("train") else "no")) not in ("yes", "no"):
        raise ValueError(f"--set grouped is yes or no, not {found}")
    return found == "yes"


def given_media(row: Mapping[str, Any], find: Find) -> dict[Modality, list[MediaRef]]:
    """Items under "image", "images", "video", ... in order; none for null and ""; null in a list is an absent item."""
    given: dict[Modality, list[MediaRef]] = {}
    for modality in MODALITIES:
        found = row.get(modality)
        found = row.get(f"{modality}s") if found is None else found
        names = found if isinstance(found, list) else [] if found in (None, "") else [found]
        given[modality] = [find(modality, name) for name in names]
    return given
