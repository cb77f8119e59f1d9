"""What formats of rows share: records from the rows of one file, and the media files that a row names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MODALITIES, MediaRef, Modality, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files

Find = Callable[[Modality, Any], MediaRef]


def records_of(
    files: Files, name: str, record: Callable[[dict[str, Any], str, Find], Record]
) -> Iterator[Record | SampleError]:
    """Records of a file's rows (see Files.rows), keyed by row number; what `record` refuses comes as SampleError.

    Args:
        record: row, key and the finder of media (whose paths count from the file's folder or a root) to a record.
    """
    folder = PurePosixPath(name).parent

    def find(modality: Modality, path: Any) -> MediaRef:
        is_beside = isinstance(path, str) and "://" not in path and not path.startswith(("/", "data:"))
        return files.media(modality, str(folder / path) if is_beside and path else path, *([path] if is_beside else []))

    for number, row in enumerate(files.rows(name)):
        try:
            if isinstance(row, SampleError):
                raise row
            if not isinstance(row, dict):
                raise SampleError("unreadable row", f"{row!r:.200} is no object")
            yield record(row, f"{number:08d}", find)
        except SampleError as error:
            yield SampleError(error.reason, f"{name} row {number}: {error.detail}")


def given_media(row: Mapping[str, Any], find: Find) -> dict[Modality, list[MediaRef]]:
    """Items under "image", "images", "video", ... in order; null inside a list is an absent item."""
    given: dict[Modality, list[MediaRef]] = {}
    for modality in MODALITIES:
        found = row.get(modality, row.get(f"{modality}s"))
        names = found if isinstance(found, list) else [] if found is None else [found]
        given[modality] = [find(modality, name) for name in names]
    return given
