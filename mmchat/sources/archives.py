"""Archives by their members, read at offsets and never unpacked: zips (stored or deflated) and tars.

A compressed tar (.tar.gz, .tgz) has no offsets to read at: it is copied once into a plain tar in a working folder.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import itertools
import os
import re
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmchat.conversation import StoredBytes

_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OTHER_ZIP_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma", 93: "zstandard"}  # APPNOTE 4.4.5
_ZIP_LOCAL_HEADER = 30  # bytes before the name; PKWARE's APPNOTE 4.3.7
_COMPRESSED = (".tar.gz", ".tgz")
_TAR_BLOCK = 512
_LONG_BYTES = 256e6  # what takes a while to read is announced


@dataclass(frozen=True)
class Archive:
    """A zip or tar by its members.

    Attributes:
        path: as the user knows it.
        unreadable: member to what stands against reading it.
        top: the one folder, with its /, that all members lie in; empty where there is none.
    """

    path: Path
    members: dict[str, StoredBytes] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    top: str = ""

    @classmethod
    def open(cls, path: Path, plain: Path) -> Archive:
        """Lists the members of `path`, which lie in `plain`. Raises ValueError."""
        members: dict[str, StoredBytes] = {}
        unreadable: dict[str, str] = {}
        for name, place in _zip_members(path) if path.suffix == ".zip" else _tar_places(path, plain):
            if name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._"):
                continue  # what macOS notes about files
            if isinstance(place, str):
                unreadable[name] = place
            else:
                members[name] = place
        tops = {name.partition("/")[0] if "/" in name else "" for name in (*members, *unreadable)}
        top = f"{tops.pop()}/" if len(tops) == 1 else ""
        return cls(path, members, unreadable, top.removeprefix("/"))

    def full_name(self, name: str) -> str:
        return name if name in self.members or name in self.unreadable else self.top + name

    def place(self, name: str) -> StoredBytes | None:
        return self.members.get(self.full_name(name))

    def find(self, pattern: str) -> Iterable[str]:
        """Members that match a glob, from the top folder or from inside of it; each by one name."""
        matches = re.compile(fnmatch.translate(pattern)).match
        for name in itertools.chain(self.members, self.unreadable):
            if matches(name):
                yield name
            elif self.top and matches(inner := name.removeprefix(self.top)):
                yield inner


def is_archive(path: Path) -> bool:
    return path.suffix in (".zip", ".tar") or path.name.endswith(_COMPRESSED)


def plain_copy(path: Path, work: Path | None) -> Path:
    """The archive itself, or the plain copy of a compressed tar, made in `work`. Raises ValueError."""
    if not path.name.endswith(_COMPRESSED):
        return path
    if work is None:
        raise ValueError(f"{path} is compressed: decompress it first (gunzip), or read it with make_shards.py")
    # Archives of several folders may have one name, and another one may come to lie at the same path.
    stat = path.stat()
    identity = f"{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path.absolute())
    plain = work / f"{hashlib.sha256(identity).hexdigest()[:16]}-{path.name.partition('.')[0]}.tar"
    if plain.exists():
        return plain
    work.mkdir(parents=True, exist_ok=True)
    partial = plain.with_suffix(f".{os.getpid()}.partial")
    try:
        with open(path, "rb") as raw, gzip.open(raw) as compressed, open(partial, "wb") as copy:
            telling = _Telling("copying", path, stat.st_size)
            while data := compressed.read(2**20):
                copy.write(data)
                telling.at(raw.tell())
        partial.rename(plain)
    except EOFError as error:
        raise ValueError(f"{path} cannot be read as an archive: it was cut short; fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}; fetch it again") from error
    finally:
        partial.unlink(missing_ok=True)
    return plain


def _zip_members(path: Path) -> Iterator[tuple[str, StoredBytes | str]]:
    """Name, and place or what stands against reading it, of every file in a zip. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    yield info.filename, "encrypted; wanted a zip without a password"
                    continue
                if info.compress_type not in _ZIP_METHODS:
                    method = _OTHER_ZIP_METHODS.get(info.compress_type, f"method {info.compress_type}")
                    yield info.filename, f"compressed by {method}; wanted stored or deflated"
                    continue
                file.seek(info.header_offset + 26)  # lengths of the name and the extra field
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                start = info.header_offset + _ZIP_LOCAL_HEADER + name_length + extra_length
                deflated = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else None
                yield info.filename, StoredBytes(str(path), start, info.file_size, deflated)
    except (zipfile.BadZipFile, struct.error, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as an archive: {error}. Cut short? Fetch it again") from error


def _tar_places(path: Path, plain: Path) -> Iterator[tuple[str, StoredBytes | str]]:
    telling = _Telling("listing", path, plain.stat().st_size)
    for member in tar_members(plain, path):
        telling.at(member.offset)
        if member.issparse():
            yield member.name.removeprefix("./"), "a sparse file; wanted a plain one"
        elif member.isreg():
            yield member.name.removeprefix("./"), StoredBytes(str(plain), member.offset_data, member.size)


def tar_members(path: Path, shown: Path | None = None) -> Iterator[tarfile.TarInfo]:
    """Every member header of a plain tar. Raises ValueError if it is compressed, cut or damaged, naming `shown`."""
    shown = shown or path
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                    if member.size < 0:
                        raise tarfile.ReadError("a member of negative size")  # tarfile would walk in circles
                    yield member
                end = tar.offset
        except Exception as error:  # on damaged headers tarfile raises whatever its parsers stumble over
            if path.stat().st_size == 0:
                raise ValueError(f"{shown} is empty") from error
            raise ValueError(
                f"{shown}: {type(error).__name__}, {error}. It is cut short, damaged or compressed: "
                "fetch it again, or decompress it (members are read by offset)"
            ) from error
        # tarfile takes the end of the file, or a damaged header, for the end of the archive without a word.
        file.seek(end)
        if file.read(2 * _TAR_BLOCK) != bytes(2 * _TAR_BLOCK):
            raise ValueError(
                f"{shown}: no end-of-archive mark at byte {end}: the tar was cut short between two members, or "
                "the header there is damaged. Fetch it again"
            )
        while tail := file.read(2**20):
            if tail.count(0) != len(tail):
                raise ValueError(f"{shown}: there is data behind the end of the archive at byte {end}; was it joined?")


class Part(io.RawIOBase):
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


class _Telling:
    """Says on stderr that long work on a file began, and every five seconds how far it is."""

    def __init__(self, what: str, path: Path, num_bytes: int) -> None:
        self.what, self.path, self.num_bytes = what, path, num_bytes
        self.said = self.start = time.monotonic()
        announce(what, path, num_bytes, always=what == "copying")

    def at(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self.said >= 5:
            self.said = now
            left = (now - self.start) * (self.num_bytes - done) / done
            say(f"{self.what} {self.path}: {done / self.num_bytes:.0%}, about {left:,.0f} s left")


def announce(what: str, name: Path | str, num_bytes: int, always: bool = False) -> None:
    """Says on stderr that work on a file begins, if it will take a while."""
    if always or num_bytes >= _LONG_BYTES:
        say(f"{what} {name} ({num_bytes / 1e6:,.1f} MB) ...")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
