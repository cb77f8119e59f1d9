"""What formats of rows share: records from rows, and the media files that a row names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MODALITIES, MediaRef, Modality, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files

Find = Callable[[Modality, Any], MediaRef]
RecordOf = Callable[[dict[str, Any], str, Find], Record]


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
            except SampleError as error:
                yield SampleError(error.reason, f"{name} {place}: {error.detail}")


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
