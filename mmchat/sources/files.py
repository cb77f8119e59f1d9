"""The files of a source where they lie: folders, and archives that are read in place, never unpacked.

Names are relative, with `/`. Members of a zip, stored or deflated, and of a tar are read at their offsets. A
compressed tar (.tar.gz, .tgz) has no offsets to read at: it is copied once into a plain tar in the working folder.
Where all members of an archive share one top folder, names count from inside of that too.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ijson
from PIL import Image

from mmchat.conversation import MediaRef, Modality, StoredBytes
from mmchat.errors import SampleError

_ORIENTATION = 0x0112  # EXIF
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OTHER_ZIP_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma", 93: "zstandard"}  # APPNOTE 4.4.5
_ZIP_LOCAL_HEADER = 30  # bytes before the name; PKWARE's APPNOTE 4.3.7
_COMPRESSED = (".tar.gz", ".tgz")
_TAR_BLOCK = 512
_MAX_JSON_DEPTH = 64
_MAX_LINE_BYTES = 64 * 2**20
_LONG_BYTES = 256e6  # what takes a while to read is announced


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
        self._named = frozenset(archives)
        self._work = work
        self._read: list[tuple[BinaryIO, int]] = []

    def __str__(self) -> str:
        return str(self.source)

    def find(self, *patterns: str) -> list[str]:
        """Names that match any of the globs, sorted, each once; where SOURCE is one file, only that counts."""
        if self.annotation is not None:
            return [self.annotation] if any(fnmatch.fnmatch(self.annotation, Path(p).name) for p in patterns) else []
        return self.beside(*patterns)

    def beside(self, *patterns: str) -> list[str]:
        """As `find`, but where SOURCE is one file, the names in its folder: for what belongs to an annotation file."""
        found: set[str] = set()
        for pattern in patterns:
            for folder in self._folders[:1]:
                paths = (path for path in folder.glob(pattern) if not path.name.startswith("._") and path.is_file())
                found |= {path.relative_to(folder).as_posix() for path in paths}
            for archive in self._archives:
                found |= set(archive.find(pattern))
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
        places = (archive.place(name) for archive in self._archives)
        return next((place for place in places if place is not None), None)

    def open(self, name: str) -> BinaryIO:
        """A file, opened for reading bytes. Raises ValueError where there is none."""
        for folder in self._folders:
            if (folder / name).is_file():
                return open(folder / name, "rb")
        if (place := self.stored(name)) is None:
            raise ValueError(self._unreadable(name) or f"{name} is not in {self}")
        if place.deflated_size is None:
            return io.BufferedReader(_Part(place))
        # The path of a place in a zip is the archive's own: only compressed tars are copied.
        archive = next(one for one in self._archives if one.place(name) is not None)
        return zipfile.ZipFile(archive.path).open(archive.full_name(name))  # type: ignore[return-value]

    def _unreadable(self, name: str) -> str | None:
        """Why a member that is there cannot be read; None where it is not there."""
        found = ((archive, archive.unreadable.get(archive.full_name(name))) for archive in self._archives)
        return next((f"{name} in {archive.path} is {why}" for archive, why in found if why), None)

    def text(self, name: str) -> str:
        """The whole of a small text file. Raises ValueError where it is not UTF-8."""
        with self.open(name) as file:
            try:
                return file.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8(f"{name} in {self}")) from error

    def rows(self, name: str) -> Iterator[Any]:
        """Values of a JSON list or of JSON lines, told apart by the first character, one at a time.

        A line that is no JSON comes as SampleError. Raises ValueError for a list that cannot be parsed, and for a file
        that is neither.
        """
        with self.open(name) as file:
            start = file.read(1024)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(_not_utf8(f"{name} in {self}"))
        start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"["):
            yield from self.items(name, "item")
            return
        if start.partition(b"\n")[0].strip() == b"{":
            raise ValueError(f"{name} in {self} is one JSON object over several lines; wanted a list, or a row a line")
        with self._reading(name) as file:
            for number in itertools.count(1):
                if not (line := file.readline(_MAX_LINE_BYTES)):
                    return
                where = f"{name} line {number}"
                if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(2**20)
                    yield SampleError("unreadable row", f"{where} has more than {_MAX_LINE_BYTES:,} bytes")
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if not line:
                    continue
                try:
                    yield json.loads(line.decode())
                except UnicodeDecodeError:
                    yield SampleError("unreadable row", _not_utf8(where))
                except (ValueError, RecursionError):
                    shown = line[:200].decode("utf-8", "replace")
                    yield SampleError("unreadable row", f"{where}: {shown!r} is no JSON")

    def items(self, name: str, prefix: str) -> Iterator[Any]:
        """Values of one list inside a JSON file, such as "annotations.item", one at a time in flat memory.

        Raises ValueError where the file is no JSON.
        """
        return self._parsed(name, "items", prefix)

    def pairs(self, name: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Names and values of an object in a JSON file, the outermost by default, one at a time. Raises ValueError."""
        return self._parsed(name, "kvitems", prefix)

    def _parsed(self, name: str, parse: str, prefix: str) -> Iterator[Any]:
        num_found = 0
        try:
            for one in self._parsed_by(ijson, name, parse, prefix):
                yield one
                num_found += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if "integer overflow" not in str(error):
                raise ValueError(f"{name} in {self} is no whole JSON: {_json_fault(error)}") from error
        else:
            return
        # The parser in C reads integers of 64 bits, the slow one of any size.
        try:
            slow = self._parsed_by(ijson.get_backend("python"), name, parse, prefix)
            yield from itertools.islice(slow, num_found, None)
        except (ijson.JSONError, ValueError) as error:
            raise ValueError(f"{name} in {self} is no whole JSON: {_json_fault(error)}") from error

    def _parsed_by(self, backend: Any, name: str, parse: str, prefix: str) -> Iterator[Any]:
        with self._reading(name) as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            yield from getattr(backend, parse)(_Shallow(file), prefix, use_float=True)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[BinaryIO]:
        place = self.stored(name)
        with self.open(name) as file:
            reading = (file, max(1, place.size if place else 0))
            if reading[1] >= _LONG_BYTES:
                _say(f"reading {name} ({reading[1] / 1e6:,.0f} MB) ...")
            self._read.append(reading)
            try:
                yield file
            finally:
                self._read.remove(reading)

    @property
    def share_read(self) -> float | None:
        """How far the file of rows or items has been read that was opened first of those open, 0 to 1, or None."""
        if not self._read:
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
        for one in (name, *others):
            if (why := self._unreadable(self._inside(one))) is not None:
                raise SampleError("unreadable media", why)
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
    def _archives(self) -> list[_Archive]:
        archives = []
        for path in self._archive_paths:
            try:
                archives.append(_Archive.open(path, self._plain(path)))
            except ValueError as error:
                if path in self._named:
                    raise
                _say(f"passed over, as it only lies in the folder: {error}")
        return archives

    def _plain(self, path: Path) -> Path:
        """The archive itself, or the plain copy of a compressed tar. Raises ValueError."""
        if not path.name.endswith(_COMPRESSED):
            return path
        if self._work is None:
            raise ValueError(f"{path} is compressed: decompress it first (gunzip), or read it with make_shards.py")
        # Archives of several folders may have one name, and another one may come to lie at the same path.
        stat = path.stat()
        identity = f"{stat.st_size} {stat.st_mtime_ns} ".encode() + os.fsencode(path.absolute())
        plain = self._work / f"{hashlib.sha256(identity).hexdigest()[:16]}-{path.name.partition('.')[0]}.tar"
        if plain.exists():
            return plain
        self._work.mkdir(parents=True, exist_ok=True)
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


@dataclass(frozen=True)
class _Archive:
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
    def open(cls, path: Path, plain: Path) -> _Archive:
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


class _Telling:
    """Says on stderr that long work on a file began, and every five seconds how far it is."""

    def __init__(self, what: str, path: Path, num_bytes: int) -> None:
        self.what, self.path, self.num_bytes = what, path, num_bytes
        self.said = self.start = time.monotonic()
        if num_bytes >= _LONG_BYTES or what == "copying":
            _say(f"{what} {path} ({num_bytes / 1e6:,.1f} MB) ...")

    def at(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self.said >= 5:
            self.said = now
            left = (now - self.start) * (self.num_bytes - done) / done
            _say(f"{self.what} {self.path}: {done / self.num_bytes:.0%}, about {left:,.0f} s left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Shallow:
    """A file of JSON, read as long as its lists and objects do not lie too deep: ijson's time and memory grow with the
    square of that. Raises ijson.JSONError.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._depth = 0
        self._is_in_string = False
        self._escape = b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        text = (self._escape + data).replace(rb"\\", b"").replace(rb"\"", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.split(b'"')
        brackets = b"".join(parts[self._is_in_string :: 2]).translate(None, _NO_BRACKETS)
        self._is_in_string ^= len(parts) % 2 == 0
        num_layers = 0
        while (inner := brackets.replace(b"[]", b"").replace(b"{}", b"")) != brackets and num_layers <= _MAX_JSON_DEPTH:
            brackets = inner
            num_layers += 1
        num_opened = brackets.count(b"[") + brackets.count(b"{")
        self._depth += num_opened - (len(brackets) - num_opened)
        if max(self._depth, num_layers) > _MAX_JSON_DEPTH:
            raise ijson.JSONError(f"lists or objects lie more than {_MAX_JSON_DEPTH} deep")
        return data


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _json_fault(error: Exception) -> str:
    """The parser's words without the lines that point at the place."""
    said = str(error).strip().partition("\n")[0][:200]
    if "UTF" in said or isinstance(error, UnicodeDecodeError):
        return "it has bytes that are not UTF-8, which is wanted: convert it"
    if "premature" in said.lower() or "incomplete" in said.lower():
        return f"{said}. Was it cut short? Fetch it again"
    return said


def _not_utf8(what: str) -> str:
    return f"{what} is not UTF-8, which is wanted: convert it (iconv -t UTF-8, with -f UTF-16, LATIN1 or what it is)"


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
