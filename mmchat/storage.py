"""Files read by offset: on a local disk, or behind a URL through blocks in a local folder of bounded size.

URLs are those of fsspec (`s3://`, `gs://`, `https://`, ...), whose libraries find credentials their own way. fsspec's
own caches were not used: none of them has a bound that holds for all processes of a machine together.

A block is one file, named by the object's URL, size and version (etag or time, as the store says) and its number, and
is whole when it has its size: it is written under another name and renamed. The version is asked again after each
fetch, so that no block holds what was uploaded later. Whoever wants a missing block holds one of a few lock files while
it is fetched, so that the processes of a machine fetch it once. Who writes holds the file `total`, which counts what
the folder holds; the least recently read blocks are removed before a new one would break the bound. A reader keeps an
open block whatever happens to its name, and a folder that is deleted is filled again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from mmchat.schema import Schema

# Seconds before each new attempt; half a minute bridges a store's restart.
RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

_URL = re.compile(r"[a-z][a-z0-9+.:-]*://", re.IGNORECASE)
# What stores call the facts that change with an object's content.
_VERSION_FACTS = (
    "ETag",
    "etag",
    "md5",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
_UNVERSIONED = "opened as "  # what a version begins with where the store says none of them
_NUM_LOCKS = 64
_KEPT_SHARE = 0.9  # once the folder is full it is cleared to this, so that it is not listed for every block
_servers_with_ranges: set[str] = set()

T = TypeVar("T")


class _Told(OSError):
    """Says all there is to say: it is neither tried again nor explained further."""


class CacheConfig(Schema):
    """Where blocks of shards behind URLs are kept.

    folder: on a fast local disk; shared by a user's processes and runs on a machine, and free to delete at any time.
    max_gb: what it may hold. block_mb: what one request reads.
    """

    folder: str = "~/.cache/mmchat/blocks"
    max_gb: float = Field(default=50.0, gt=0)
    block_mb: float = Field(default=8.0, ge=0.001, le=1000)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_bytes < self.block_bytes:
            raise ValueError(f"max_gb {self.max_gb:g} must hold at least one block of block_mb {self.block_mb:g}")
        return self

    @property
    def max_bytes(self) -> int:
        return int(self.max_gb * 1e9)

    @property
    def block_bytes(self) -> int:
        return int(self.block_mb * 1e6)


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def find(pattern: str) -> list[str]:
    """URLs that match a glob, in order. Raises ValueError for an unusable one, OSError where listing fails."""
    files, path = _filesystem(pattern)
    return sorted(files.unstrip_protocol(name) for name in _patiently(lambda: files.glob(path), pattern))


@dataclass(frozen=True)
class File:
    """A file as it was when it was opened; copies in other processes read the same.

    version: changes with the content; drawn at random where the store says none, so that no other `open` shares its
        blocks. cache: of an object behind a URL; None for a local file.
    """

    path: str
    num_bytes: int
    version: str = ""
    cache: CacheConfig | None = None

    @classmethod
    def open(cls, path: str, cache: CacheConfig) -> File:
        """Raises FileNotFoundError, ValueError for a URL that cannot be used, OSError for other failures.

        Among the latter are a cache folder that cannot be used, and a web server that does not serve byte ranges.
        """
        if not is_url(path):
            status = os.stat(path)
            if not S_ISREG(status.st_mode):
                raise FileNotFoundError(f"{path} is not a file")
            return cls(path, status.st_size, f"{status.st_ino} {status.st_mtime_ns}")
        make_folder(cache)
        facts = _facts(path)
        if facts.get("type") == "directory":
            raise FileNotFoundError(f"{path} is not a file")
        if facts.get("size") is None:
            raise OSError(f"{path}: the server does not say how long it is; put it on one that gives a Content-Length")
        scheme, host, *_ = urlsplit(path)
        if scheme.lower() in ("http", "https") and facts["size"] > 2:
            _check_ranges(f"{scheme}://{host}", path, facts["size"])
        version = _version(facts)
        if not version:
            _say_unversioned(f"{scheme}://{host}")
            version = _UNVERSIONED + secrets.token_hex(8)
        return cls(path, int(facts["size"]), version, cache)

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError where the bytes cannot be had."""
        if self.cache is None:
            return _handle(self.path, self.version).read(offset, size)
        if not 0 <= offset <= offset + size <= self.num_bytes:
            raise OSError(f"{self.path}: wanted {size} bytes at {offset}, it has {self.num_bytes} bytes")
        block_bytes = self.cache.block_bytes
        pieces = []
        for number in range(offset // block_bytes, -(-(offset + size) // block_bytes)):
            first = number * block_bytes
            pieces.append(self._piece(number, max(0, offset - first), min(block_bytes, offset + size - first)))
        return b"".join(pieces)

    @cached_property
    def _digest(self) -> str:
        assert self.cache is not None
        identity = f"{self.path}\n{self.version}\n{self.num_bytes}\n{self.cache.block_bytes}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def _piece(self, number: int, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a block, from the folder or fetched into it."""
        assert self.cache is not None
        first = number * self.cache.block_bytes
        block_size = min(self.cache.block_bytes, self.num_bytes - first)
        folder = _folder(self.cache)
        path = folder / f"{self._digest}-{number}.block"
        piece = _read_block(path, block_size, start, end)
        if piece is None:
            lock = (int(self._digest[:8], 16) + number) % _NUM_LOCKS
            with _locked(folder / f"{lock}.lock"):
                piece = _read_block(path, block_size, start, end)  # another process had it fetched meanwhile
                if piece is None:
                    block = self._fetch(first, block_size)
                    _store(path, block, self.cache.max_bytes)
                    piece = block[start:end]
        return piece

    def _fetch(self, offset: int, size: int) -> bytes:
        """Bytes of the object as it was opened. Raises OSError once asking again is useless."""
        files, name = _filesystem(self.path)

        def fetch() -> bytes:
            try:
                data = files.cat_file(name, start=offset, end=offset + size)
            except Exception as error:
                if getattr(error, "status", None) == 416:  # it has become shorter
                    raise self._changed() from error
                raise
            if len(data) > size:
                raise _no_ranges(self.path)
            if len(data) < size:
                raise OSError(f"wanted {size} bytes, found {len(data)}: the object was changed or the answer cut short")
            return bytes(data)

        block = _patiently(fetch, f"{self.path} at byte {offset}")
        facts = _facts(self.path)  # asked afterwards, so that a block of a later version is never taken for one of this
        version = _version(facts)
        is_same = version == self.version or (not version and self.version.startswith(_UNVERSIONED))
        if not is_same or facts.get("size") != self.num_bytes:
            raise self._changed()
        return block

    def _changed(self) -> _Told:
        return _Told(f"{self.path}: the object changed while it was read; start again to read the new one")


def read_local(path: str, offset: int, size: int) -> bytes:
    """Opens a file for one read. Raises OSError where it is missing or ends before."""
    return _Handle(path).read(offset, size)


class _Handle:
    """An open local file, closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
            data += more  # one call gives 2 GiB at most
        if len(data) != size:
            raise OSError(f"{self.path}: wanted {size} bytes at {offset}, found {len(data)}")
        return data


@lru_cache(maxsize=128)
def _handle(path: str, version: str) -> _Handle:
    """The files read last stay open. A forked process may share them: reading by offset moves nothing."""
    return _Handle(path)


def inflate(data: bytes, size: int) -> bytes:
    """A raw deflate stream of exactly `size` bytes; no more than that is ever inflated. Raises OSError."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise OSError(f"the {len(data)} bytes are no deflate stream: {error}") from error
    if len(inflated) != size or not stream.eof:
        found = "more" if len(inflated) > size else f"{len(inflated)} bytes" + ("" if stream.eof else " and no end")
        raise OSError(f"the deflate stream should hold {size} bytes, found {found}")
    return inflated


# ---- the store ------------------------------------------------------------------------------------------------------


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises ValueError."""
    import fsspec  # takes a tenth of a second, and only URLs need it

    if "::" in url:
        raise ValueError(f"{url}: chained URLs are not read; name the object itself, it is cached here")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a library that is not installed; an unknown kind of URL
        raise ValueError(f"{url}: {error}") from error


def _facts(url: str) -> dict[str, Any]:
    """What the store says of an object now."""
    files, name = _filesystem(url)
    files.invalidate_cache()  # of listings: the object may have changed
    facts: dict[str, Any] = _patiently(lambda: files.info(name), url)
    return facts


def _version(facts: dict[str, Any]) -> str:
    """The facts that change with the content; empty where the store says none."""
    return " ".join(f"{fact}={facts[fact]}" for fact in _VERSION_FACTS if facts.get(fact) is not None)


@lru_cache
def _say_unversioned(store: str) -> None:
    print(
        f"{store} says neither ETag nor time of its objects: what is cached of them serves this run only, "
        "and an object that is replaced meanwhile is not noticed",
        file=sys.stderr,
        flush=True,
    )


def _check_ranges(server: str, url: str, num_bytes: int) -> None:
    """Asks a web server for the second byte, once in a process. Raises OSError where it would send all of them."""
    if server in _servers_with_ranges:
        return
    files, name = _filesystem(url)

    def ask() -> None:
        with files.open(name, size=num_bytes, cache_type="none") as file:
            file.seek(1)
            try:
                file.read(1)
            except ValueError as error:  # this reader hangs up where the answer is no range; cat_file would read it all
                raise _no_ranges(url) from error

    _patiently(ask, url)
    _servers_with_ranges.add(server)


def _no_ranges(url: str) -> _Told:
    return _Told(
        f"{url}: its server does not serve byte ranges, so that every block would fetch the whole object. Put the "
        "shards on a server or store that does, or copy them to a local disk"
    )


def _patiently(action: Callable[[], T], where: str) -> T:
    """Tries again after failures that may pass. Raises FileNotFoundError or an OSError that says what to do."""
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return action()
        except _Told:
            raise
        except Exception as error:  # every store's library raises kinds of its own
            cause = _cause(error)
            status, found = getattr(cause, "status", None), f"{type(cause).__name__}: {cause}"
            if isinstance(cause, FileNotFoundError) or status in (404, 410):
                raise FileNotFoundError(f"{where} does not exist") from error
            refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
            if refused or isinstance(cause, PermissionError | NotImplementedError | ValueError):
                raise OSError(f"{where} cannot be read: {found}. Check the URL and the credentials") from error
            if delay_s is None:
                raise OSError(
                    f"{where} cannot be read after {len(RETRY_DELAYS_S) + 1} attempts: {found}. "
                    "Check the network and the store, then start again: the run continues from its checkpoint"
                ) from error
        print(f"{where}: {found}. Trying again in {delay_s:g} s", file=sys.stderr, flush=True)
        time.sleep(delay_s)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: BaseException) -> BaseException:
    """What went wrong: fsspec's http calls any failure of its first request FileNotFoundError."""
    cause = error.__cause__
    is_http = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if cause is not None and is_http and isinstance(error, FileNotFoundError) else error


# ---- the folder -----------------------------------------------------------------------------------------------------


def make_folder(cache: CacheConfig) -> None:
    """Makes the folder of blocks where it is missing. Raises OSError that names `cache.folder` where it is unusable."""
    with _locked(_folder(cache) / "total"):
        pass


def _folder(cache: CacheConfig) -> Path:
    try:
        return Path(cache.folder).expanduser()
    except RuntimeError as error:  # a user without a home
        raise _Told(f"cache.folder {cache.folder!r}: {error}; name the whole path") from error


def _unusable(folder: Path, error: OSError) -> _Told:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Make room, set cache.max_gb lower, or name another cache.folder"
    else:
        remedy = "Set cache.folder to a folder on a local disk that you may write"
    return _Told(f"cache.folder {folder} cannot be used: {error}. {remedy}")


def _read_block(path: Path, block_size: int, start: int, end: int) -> bytes | None:
    """A piece of a block; None where the block is not there or not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path.parent, error) from error
    try:
        if os.fstat(descriptor).st_size != block_size:
            return None
        with contextlib.suppress(OSError):  # another user's, or a disk that became read-only
            os.utime(descriptor)  # last read now
        piece = os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)
    return piece if len(piece) == end - start else None


def _store(path: Path, block: bytes, max_bytes: int) -> None:
    """Puts a block into the folder. Raises OSError where the disk is full."""
    try:
        with _locked(path.with_name("total")) as total:
            _make_room(path.parent, total, len(block), max_bytes)
            partial = path.with_suffix(".partial")
            partial.write_bytes(block)
            os.replace(partial, path)
    except FileNotFoundError:
        return  # somebody deletes the folder; the block is at hand, and the next one makes the folder anew
    except _Told:
        raise
    except OSError as error:
        raise _unusable(path.parent, error) from error


def _make_room(folder: Path, total_file: int, num_bytes: int, max_bytes: int) -> None:
    """Counts a coming block in, and removes blocks if it does not fit; the caller holds the lock on `total_file`.

    The file may say more than there is (a process was killed, a block removed), never less: the blocks are counted anew
    before any is removed. It is written in place, since file systems flush a file that is truncated and written.
    """
    try:
        total = int(os.pread(total_file, 20, 0))
    except ValueError:  # it is new
        total = max_bytes
    if total + num_bytes > max_bytes:
        blocks = []
        for path in folder.iterdir():
            if path.suffix in (".block", ".partial"):  # nobody else writes now: a partial block was left behind
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    blocks.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in blocks)
        if total + num_bytes > max_bytes:
            goal = min(max_bytes - num_bytes, int(_KEPT_SHARE * max_bytes))
            for _, size, path in sorted(blocks):
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
    os.pwrite(total_file, f"{total + num_bytes:020d}".encode(), 0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds a lock file, made with its folder where it is missing. The system frees it when its holder dies.

    Raises OSError where the folder cannot be used.
    """
    descriptor = _open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a network disk without locks
            raise _unusable(path.parent, error) from error
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would not: a forked child may hold a copy
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    found = OSError()
    for _ in range(1000):  # somebody may be deleting the folder again and again
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError) as error:
            found = error
        except OSError as error:
            raise _unusable(path.parent, error) from error
    raise _unusable(path.parent, found) from found
