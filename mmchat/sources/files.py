"""The files of a source where they lie: folders, and archives that are read in place, never unpacked.

Names are relative, with `/`. Members of a zip, stored or deflated, and of a tar are read at their offsets. A
compressed tar (.tar.gz, .tgz) has no offsets to read at: it is copied once into a plain tar in the working folder.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ijson
from PIL import Image

from mmchat.conversation import MediaRef, Modality, StoredBytes
from mmchat.errors import SampleError

_ORIENTATION = 0x0112  # EXIF
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ZIP_LOCAL_HEADER = 30  # bytes before the name; PKWARE's APPNOTE 4.3.7
_COMPRESSED = (".tar.gz", ".tgz")


class Files:
    """Looks names up in a source's roots, in order: its folder, archives in that, and the further media roots.

    Args:
        source: a folder, an annotation file in one, or an archive.
        media: further folders and archives that media names may be relative to.
        work: where a compressed tar's plain copy goes; without it such an archive is refused.

    Raises ValueError where a root does not exist.
    """

    def __init__(self, source: Path, media: Sequence[Path] = (), work: Path | None = None) -> None:
        self.source = source
        self.annotation: str | None = None
        named = [source, *media]
        for path in named:
            if not path.exists():
                raise ValueError(f"{path} does not exist; wanted a folder, an annotation file or an archive")
        if source.is_file() and not _is_archive(source):
            self.annotation = source.name
            named[0] = source.parent
        self._folders = [path for path in named if path.is_dir()]
        archives = [path for path in named if path.is_file()]
        # Archives that lie in the folder count too, but only those that need no copy.
        inside = sorted(path for path in named[0].glob("*") if path.suffix in (".zip", ".tar") and path.is_file())
        self._archive_paths = list(dict.fromkeys([*archives, *inside]))
        self._work = work
        self._read: list[tuple[BinaryIO, int]] = []

    def __str__(self) -> str:
        return str(self.source)

    def find(self, *patterns: str) -> list[str]:
        """Names that match any of the globs, sorted, each once; where SOURCE is one file, only that counts."""
        if self.annotation is not None:
            return [self.annotation] if any(fnmatch.fnmatch(self.annotation, Path(p).name) for p in patterns) else []
        found: set[str] = set()
        for pattern in patterns:
            for folder in self._folders[:1]:
                found |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file()}
            for archive in self._archives:
                found |= {name for name in archive if fnmatch.fnmatch(name, pattern)}
        return sorted(found)

    def one(self, *patterns: str) -> str:
        """The one file that a glob matches; the first glob that matches anything counts. Raises ValueError."""
        for pattern in patterns:
            found = self.find(pattern)
            if len(found) == 1:
                return found[0]
            if found:
                raise ValueError(f"{self} holds {len(found)} files {pattern}: {', '.join(found[:5])}; name one of them")
        raise ValueError(f"{self} holds none of {', '.join(patterns)}")

    def stored(self, name: str) -> StoredBytes | None:
        """Where the bytes of a file lie; None where no root has it."""
        for folder in self._folders:
            if (file := folder / name).is_file():
                return StoredBytes(str(file), 0, file.stat().st_size)
        return next((archive[name] for archive in self._archives if name in archive), None)

    def open(self, name: str) -> BinaryIO:
        """A file, opened for reading bytes. Raises ValueError where there is none."""
        for folder in self._folders:
            if (folder / name).is_file():
                return open(folder / name, "rb")
        for path, archive in zip(self._archive_paths, self._archives, strict=True):
            if name in archive:
                if path.suffix == ".zip":
                    return zipfile.ZipFile(path).open(name)  # type: ignore[return-value]
                return io.BufferedReader(_Part(archive[name]))
        raise ValueError(f"{name} is not in {self}")

    def text(self, name: str) -> str:
        """The whole of a small text file in UTF-8."""
        with self.open(name) as file:
            return file.read().decode("utf-8-sig")

    def rows(self, name: str) -> Iterator[Any]:
        """Values of a JSON list or of JSON lines, told apart by the first character, one at a time.

        A line that is no JSON comes as SampleError. Raises ValueError for a list that cannot be parsed.
        """
        with self.open(name) as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            yield from self.items(name, "item")
            return
        with self._reading(name) as file:
            for number, line in enumerate(file):
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if not line:
                    continue
                try:
                    yield json.loads(line.decode("utf-8", "surrogateescape"))
                except (ValueError, RecursionError):
                    shown = line[:200].decode("utf-8", "replace")
                    yield SampleError("unreadable row", f"{name} line {number + 1}: {shown!r} is no JSON")

    def items(self, name: str, prefix: str) -> Iterator[Any]:
        """Values of one list inside a JSON file, such as "annotations.item", one at a time in flat memory.

        Raises ValueError where the file is no JSON.
        """
        return self._parsed(name, ijson.items, prefix)

    def pairs(self, name: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Names and values of an object in a JSON file, the outermost by default, one at a time. Raises ValueError."""
        return self._parsed(name, ijson.kvitems, prefix)

    def _parsed(self, name: str, parse: Callable[..., Iterator[Any]], prefix: str) -> Iterator[Any]:
        with self._reading(name) as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            try:
                yield from parse(file, prefix, use_float=True)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise ValueError(f"{name} in {self} is no whole JSON: {str(error).strip():.300}") from error

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[BinaryIO]:
        place = self.stored(name)
        with self.open(name) as file:
            reading = (file, max(1, place.size if place else 0))
            self._read.append(reading)
            try:
                yield file
            finally:
                self._read.remove(reading)

    @property
    def share_read(self) -> float | None:
        """How far the one file of rows or items that is open has been read, 0 to 1; None for none or several."""
        if len(self._read) != 1:
            return None
        file, size = self._read[0]
        return file.tell() / size

    def media(self, modality: Modality, name: Any, *others: str) -> MediaRef:
        """The item of that name, or of the first of the other names that exists.

        A name is a relative path, an absolute one inside a root, a data URL, or None for an absent item.
        Raises SampleError.
        """
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
        for one in (name, *others):
            try:
                if (stored := self.stored(self._inside(one))) is not None:
                    return MediaRef(modality, stored)
            except OSError as error:  # such as a name that is too long
                raise SampleError("unreadable media path", f"{one!r:.200}: {error}") from error
        roots = " or ".join(map(str, [*self._folders, *self._archive_paths]))
        raise SampleError("missing media", f"{name!r:.200} is not in {roots}; further folders: --media")

    def picture_size(self, item: MediaRef) -> tuple[int, int]:
        """Width and height as displayed, after EXIF orientation: for coordinates given in shares of the picture.

        Raises SampleError where the picture cannot be read.
        """
        try:
            with Image.open(io.BytesIO(item.read())) as picture:
                is_turned = picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
                return picture.size[::-1] if is_turned else picture.size
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for damaged headers
            raise SampleError("undecodable image", f"{item.data!r:.200}: {error}") from error

    def _inside(self, name: str) -> str:
        """The name relative to a root. Raises SampleError where it leads out of all of them."""
        path = PurePosixPath(name)
        if ".." not in path.parts:
            if not path.is_absolute():
                return path.as_posix()
            for folder in self._folders:
                if path.is_relative_to(folder.absolute()):
                    return path.relative_to(folder.absolute()).as_posix()
        raise SampleError(
            "media outside of the source",
            f"{name!r:.200}: paths lie inside the source's folder or one named by --media (links in them may lead out)",
        )

    @cached_property
    def _archives(self) -> list[dict[str, StoredBytes]]:
        return [_members(self._plain(path)) for path in self._archive_paths]

    def _plain(self, path: Path) -> Path:
        """The archive itself, or the plain copy of a compressed tar. Raises ValueError."""
        if not path.name.endswith(_COMPRESSED):
            return path
        if self._work is None:
            raise ValueError(f"{path} is compressed: decompress it first (gunzip), or read it with make_shards.py")
        # Archives of several folders may have one name.
        plain = self._work / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]}.tar"
        if not plain.exists():
            self._work.mkdir(parents=True, exist_ok=True)
            partial = plain.with_suffix(".partial")
            try:
                with gzip.open(path) as compressed, open(partial, "wb") as copy:
                    shutil.copyfileobj(compressed, copy, 2**20)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} cannot be read as an archive: {error}") from error
            partial.rename(plain)
        return plain


class _Part(io.RawIOBase):
    """A part of a file, read as if it were a file of its own."""

    def __init__(self, place: StoredBytes) -> None:
        self._place = place
        self._at = 0
        self._file = open(place.path, "rb")  # noqa: SIM115 -- closed by close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._place.offset + self._at)
        data = self._file.read(min(len(buffer), max(0, self._place.size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_archive(path: Path) -> bool:
    return path.suffix in (".zip", ".tar") or path.name.endswith(_COMPRESSED)


def _members(path: Path) -> dict[str, StoredBytes]:
    """Name to place of every regular file in a zip or plain tar. Raises ValueError."""
    try:
        if path.suffix != ".zip":
            with tarfile.open(path, "r:") as tar:
                return {
                    member.name.removeprefix("./"): StoredBytes(str(path), member.offset_data, member.size)
                    for member in tar
                    if member.isreg()
                }
        members = {}
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                is_encrypted = info.flag_bits & 1
                if info.is_dir() or is_encrypted or info.compress_type not in _ZIP_METHODS:
                    continue
                file.seek(info.header_offset + 26)  # lengths of the name and the extra field
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                start = info.header_offset + _ZIP_LOCAL_HEADER + name_length + extra_length
                deflated = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else None
                members[info.filename] = StoredBytes(str(path), start, info.file_size, deflated)
        return members
    except (tarfile.TarError, zipfile.BadZipFile, struct.error, OSError) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}") from error
