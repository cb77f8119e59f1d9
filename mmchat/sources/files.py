"""The files of a source where they lie: folders, and archives that are read in place, never unpacked.

Names are relative, with `/`. Where all members of an archive share one top folder, names count from inside of that
too.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import ijson
from PIL import Image

from mmchat.conversation import MediaRef, Modality, StoredBytes
from mmchat.errors import SampleError
from mmchat.sources.archives import Archive, Part, announce, is_archive, plain_copy, say
from mmchat.sources.json_text import Shallow, json_fault, not_utf8

_ORIENTATION = 0x0112  # EXIF
_MAX_LINE_BYTES = 64 * 2**20


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
        if source.is_file() and not is_archive(source):
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
            return io.BufferedReader(Part(place))
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
                raise ValueError(not_utf8(f"{name} in {self}")) from error

    def rows(self, name: str) -> Iterator[Any]:
        """Values of a JSON list or of JSON lines, told apart by the first character, one at a time.

        A line that is no JSON comes as SampleError. Raises ValueError for a list that cannot be parsed, and for a file
        that is neither.
        """
        with self.open(name) as file:
            start = file.read(1024)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(not_utf8(f"{name} in {self}"))
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
                    yield SampleError("unreadable row", not_utf8(where))
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
                raise ValueError(f"{name} in {self} is no whole JSON: {json_fault(error)}") from error
        else:
            return
        # The parser in C reads integers of 64 bits, the slow one of any size.
        try:
            slow = self._parsed_by(ijson.get_backend("python"), name, parse, prefix)
            yield from itertools.islice(slow, num_found, None)
        except (ijson.JSONError, ValueError) as error:
            raise ValueError(f"{name} in {self} is no whole JSON: {json_fault(error)}") from error

    def _parsed_by(self, backend: Any, name: str, parse: str, prefix: str) -> Iterator[Any]:
        with self._reading(name) as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            yield from getattr(backend, parse)(Shallow(file), prefix, use_float=True)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[BinaryIO]:
        place = self.stored(name)
        with self.open(name) as file:
            reading = (file, max(1, place.size if place else 0))
            announce("reading", name, reading[1])
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
    def _archives(self) -> list[Archive]:
        archives = []
        for path in self._archive_paths:
            try:
                archives.append(Archive.open(path, plain_copy(path, self._work)))
            except ValueError as error:
                if path in self._named:
                    raise
                say(f"passed over, as it only lies in the folder: {error}")
        return archives
