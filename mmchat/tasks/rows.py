"""What importers of rows share: a source's file, its rows, and the media files that a row names."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmchat.conversation import MODALITIES, MediaRef, Modality, StoredBytes
from mmchat.errors import SampleError


def find_file(source: Path, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """The file to read, and the folders that its media paths may be relative to.

    Args:
        source: the file itself, or a folder that holds one of `names`.

    Raises ValueError where there is none.
    """
    if source.is_file():
        return source, [source.parent]
    for name in names:
        if (file := source / name).is_file():
            return file, list(dict.fromkeys([file.parent, source]))
    raise ValueError(f"{source} is no file, nor a folder that holds {' or '.join(names)}")


def read_rows(file: Path) -> Iterator[dict[str, Any] | SampleError]:
    """Rows of a JSON list or of JSON lines, told apart by the first character; a bad one as SampleError.

    Raises ValueError for a JSON list that cannot be parsed.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        is_list = lines.read(1024).lstrip().startswith("[")
        lines.seek(0)
        try:
            rows = json.load(lines) if is_list else map(_parse_line, lines)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON list: {error}") from error
        for number, row in enumerate(rows):
            if isinstance(row, dict):
                yield row
            elif row != "":  # an empty line
                yield SampleError("unreadable row", f"{file.name} row {number}: {row!r:.200} is no object")


def _parse_line(line: str) -> Any:
    """The JSON value, or the line itself where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.strip()


def given_media(row: Mapping[str, Any], roots: Sequence[Path]) -> dict[Modality, list[MediaRef]]:
    """Items under "image", "images", "video", ... in order; null inside a list is an absent item."""
    given: dict[Modality, list[MediaRef]] = {}
    for modality in MODALITIES:
        found = row.get(modality, row.get(f"{modality}s"))
        names = found if isinstance(found, list) else [] if found is None else [found]
        given[modality] = [load_media(modality, name, roots) for name in names]
    return given


def load_media(modality: Modality, name: Any, roots: Sequence[Path]) -> MediaRef:
    """The item that a row names: a relative path, a data URL, or None if it is absent. Raises SampleError."""
    if name is None:
        return MediaRef(modality, None)
    if not isinstance(name, str) or not name:
        raise SampleError("unreadable media path", f"{modality}: {name!r:.200}")
    if name.startswith("data:"):
        try:
            return MediaRef(modality, base64.b64decode(name.partition(";base64,")[2], validate=True))
        except binascii.Error as error:
            raise SampleError("unreadable media path", f"{modality}: a data URL that is not base64") from error
    if "://" in name:
        raise SampleError("media not local", f"{name:.200} is a URL: download it and name the file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(
            "media outside of the source",
            f"{name!r:.200}: paths are relative and inside the source's folder (where a link may lead out)",
        )
    for root in roots:
        try:
            if (file := root / path).is_file():
                return MediaRef(modality, StoredBytes(str(file), 0, file.stat().st_size))
        except OSError as error:  # such as a name that is too long
            raise SampleError("unreadable media path", f"{name!r:.200}: {error}") from error
    raise SampleError("missing media", f"{name!r:.200} is not in {' or '.join(map(str, roots))}")
