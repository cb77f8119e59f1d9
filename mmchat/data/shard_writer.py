"""Writing shards: plain webdataset tars, each with its index; the same samples give the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from mmchat.conversation import MediaHeader, MediaRef, Record, StoredBytes
from mmchat.data.shard_index import (
    TAR_BLOCK,
    HeaderOf,
    ShardReport,
    media_line,
    padded,
    partial_path,
    read_header,
    sync,
    write_index,
)
from mmchat.data.shards import MAX_MEMBER_BYTES, MODALITY_BY_TYPE, num_characters, parse_facts
from mmchat.errors import SampleError
from mmchat.modalities.feature_files import features_type

Check = Callable[[Record], object]

_KEY = re.compile(r"(?!__)[\w-]+(?:/(?!__)[\w-]+)*")  # webdataset skips names that start with two underscores
_NUM_LAST_KEYS = 2**14
_MAX_KEY_BYTES = 80  # a ustar name holds 100, suffix included


@dataclass(frozen=True)
class Chunk:
    """What one shard is made of, however many processes make shards.

    Attributes:
        records: in the source's order.
        skipped: what the source could not use since the chunk before.
        digest: sha256 in hex of keys, facts and sizes of media: another source gives another one.
    """

    number: int
    records: list[Record]
    skipped: ShardReport
    digest: str


def cut_chunks(
    samples: Iterable[Record | SampleError], samples_per_shard: int = 1000, max_shard_bytes: int = 512 * 2**20
) -> Iterator[Chunk]:
    """Cuts a source into chunks, chunk k being shard k; nothing but the samples decides where.

    A chunk ends before the record that would be one too many, or would make its shard larger than `max_shard_bytes`; a
    larger record gets a chunk of its own. Media is not read, its size is known. A record that turns out not to be
    usable has been counted here, so a shard may hold less. A key that came before is counted as "duplicate key", which
    takes 8 bytes of memory for each key.

    Raises ValueError for limits below one.
    """
    if samples_per_shard < 1 or max_shard_bytes < 1:
        raise ValueError("a shard must hold at least one sample and one byte")
    records: list[Record] = []
    number, num_bytes, skipped, digest = 0, 0, ShardReport(), hashlib.sha256()
    seen = _Seen()
    for sample in samples:
        if isinstance(sample, SampleError):
            skipped.add_problem(sample)
            continue
        if not seen.add(sample.key):
            skipped.add_problem(SampleError("duplicate key", f"{sample.key!r} came before in this source"))
            continue
        text = _description(sample)
        files = {_file(item): item for item in sample.media if item.data is not None}
        sizes = [len(text), *(_num_bytes(item) for item in files.values())]
        sample_bytes = sum(TAR_BLOCK + padded(size) for size in sizes)
        if records and (len(records) == samples_per_shard or num_bytes + sample_bytes > max_shard_bytes):
            yield Chunk(number, records, skipped, digest.hexdigest())
            number, num_bytes, records, skipped, digest = number + 1, 0, [], ShardReport(), hashlib.sha256()
        records.append(sample)
        num_bytes += sample_bytes
        digest.update(text + b"\n")
    if records or skipped.problems:
        yield Chunk(number, records, skipped, digest.hexdigest())


class _Seen:
    """Keys by 64 bits of a hash: the last ones in a set, all others sorted, in 8 bytes each.

    Among 100 million keys, one is taken for another with a probability of 3 in 10,000.
    """

    def __init__(self) -> None:
        self._last: set[int] = set()
        self._others = np.empty(0, np.uint64)

    def add(self, key: str) -> bool:
        """Whether the key is new."""
        hashed = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        place = self._others.searchsorted(np.uint64(hashed))
        if hashed in self._last or (place < len(self._others) and int(self._others[place]) == hashed):
            return False
        self._last.add(hashed)
        if len(self._last) >= max(_NUM_LAST_KEYS, len(self._others) // 64):
            last = np.fromiter(self._last, np.uint64, len(self._last))
            self._others = np.sort(np.concatenate([self._others, last]))
            self._last.clear()
        return True


def _description(record: Record) -> bytes:
    """Key, facts and sizes of media as JSON, about as long as the facts will be in the shard."""
    sizes = [[item.modality, None if item.data is None else _num_bytes(item)] for item in record.media]
    try:
        text = json.dumps([record.key, sizes, record.facts], ensure_ascii=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError):
        text = record.key  # it will be refused
    return text.encode("utf-8", "surrogatepass")


def _num_bytes(item: MediaRef) -> int:
    return item.data.size if isinstance(item.data, StoredBytes) else len(item.data or b"")


def _file(item: MediaRef) -> object:
    """What two items have in common that are read from the same bytes: the pictures and the sound of a video."""
    data = item.data
    return (data.path, data.offset, data.size) if isinstance(data, StoredBytes) else id(data)


def shard_path(out: Path, number: int) -> Path:
    return out / f"{number:06d}.tar"


def write_shard(
    path: Path,
    records: Iterable[Record],
    header_of: HeaderOf | None = None,
    check: Check | None = None,
) -> ShardReport:
    """Writes one shard and its index; both appear under their names only when they are whole.

    A record that cannot be stored is counted in the report's problems. Where none can, there is no shard. The same
    records give the same bytes.

    Args:
        header_of: reads the header facts for the index; it raises SampleError for media that are not usable.
        check: raises SampleError for a record, its media with their headers, that is not worth storing.
    """
    report = ShardReport()
    writer: _ShardWriter | None = None
    try:
        for record in records:
            try:
                encoded = _encode(record, header_of, check)
                if writer is not None and record.key in writer.entries:
                    raise SampleError("duplicate key", f"{record.key!r} is already in {path.name}")
            except SampleError as error:
                report.add_problem(error)
                continue
            if writer is None:
                writer = _ShardWriter(path)
            writer.add(encoded)
        if writer is not None:
            report.merge(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    return report


def write_shards(
    samples: Iterable[Record | SampleError],
    out: Path,
    samples_per_shard: int = 1000,
    max_shard_bytes: int = 512 * 2**20,
    header_of: HeaderOf | None = None,
) -> ShardReport:
    """Writes `out/000000.tar`, `out/000001.tar`, ... and their indexes in this process: see cut_chunks and write_shard.

    data_prep/make_shards.py does the same in many processes, and continues where it was stopped.

    Raises ValueError where `out` already has shards.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ValueError(f"{out} already has shards; name an empty folder, or remove them first")
    report = ShardReport()
    for chunk in cut_chunks(samples, samples_per_shard, max_shard_bytes):
        report.merge(chunk.skipped)
        report.merge(write_shard(shard_path(out, chunk.number), chunk.records, header_of))
    return report


@dataclass(frozen=True)
class _Encoded:
    """A sample as it will be stored: members by suffix, and what the index says of it."""

    key: str
    members: dict[str, bytes]
    media: list[dict[str, Any]]
    num_characters: int


class _ShardWriter:
    """One shard while it is written, under a hidden name; `close` makes it and its index visible."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # A name of its own: a killed run may have left a process that still writes the same shard.
        self.partial = partial_path(path)
        self.num_bytes = 0
        self.entries: dict[str, dict[str, Any]] = {}
        self._hash = hashlib.sha256()
        self._file = open(self.partial, "wb")  # noqa: SIM115 -- closed by close() or discard()
        # A fixed time and owner: the same samples give the same bytes.
        self._tar = TarWriter(self, user="", group="", mtime=0, encoder=False)

    def write(self, data: bytes) -> int:
        """The tar stream ends here: hashed on its way to the file."""
        self._hash.update(data)
        return self._file.write(data)

    def add(self, sample: _Encoded) -> None:
        members = {}
        for suffix, data in sorted(sample.members.items()):  # TarWriter's own order
            self._tar.write({"__key__": sample.key, suffix: data})
            # Counted from the end: a name that is not ASCII has more than one header block before its data.
            self.num_bytes = self._tar.tarstream.offset
            members[suffix] = (self.num_bytes - padded(len(data)), len(data))
        self.entries[sample.key] = {
            "key": sample.key,
            "members": members,
            "media": sample.media,
            "num_characters": sample.num_characters,
        }

    def close(self) -> ShardReport:
        self._tar.close()
        sync(self._file)
        self._file.close()
        num_bytes = self.partial.stat().st_size
        # The index first: a shard is never seen without one.
        write_index(self.path, num_bytes, self._hash.hexdigest(), list(self.entries.values()))
        os.replace(self.partial, self.path)
        return ShardReport([self.path], len(self.entries), num_bytes)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # it writes its end, and the disk may be full
            self._tar.close()
        self._file.close()
        self.partial.unlink(missing_ok=True)


def _encode(record: Record, header_of: HeaderOf | None, check: Check | None) -> _Encoded:
    """Items that are read from the same bytes share one member; the sound of a video without any is an absent item.

    Raises SampleError for a record that cannot be stored.
    """
    if not _KEY.fullmatch(record.key) or len(record.key.encode()) > _MAX_KEY_BYTES:
        raise SampleError(
            "unsafe key",
            f"{record.key!r}: a key has letters, digits, _, - and inner /, at most {_MAX_KEY_BYTES} bytes",
        )
    if "media" in record.facts:
        raise SampleError("reserved fact", f"{record.key}: the fact 'media' is written by the shard itself")
    members: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    media: list[dict[str, Any]] = []
    known: list[MediaRef] = []
    stored: dict[object, str] = {}  # the members of the files so far
    for i, item in enumerate(record.media):
        named: dict[str, Any] = {"modality": item.modality, "member": None}
        header = item.header
        if item.data is not None:
            where = f"{record.key}: {item.modality} {i}"
            if isinstance(item.data, StoredBytes):
                where += f", {item.data.path}"
            data = _read_media(item, where)
            is_shared = _file(item) in stored
            named["member"] = stored.setdefault(_file(item), f"{i}.{_media_type(item, data, where)}")
            members[named["member"]] = data
            if header_of is not None:
                try:
                    header = read_header(header_of, item.modality, data, where)
                except SampleError as error:
                    if not is_shared or error.reason != "no audio track":
                        raise
                    named["member"], item = None, replace(item, data=None)
                else:
                    _check_annotated(item.header, header, where)
        listed.append(named)
        media.append(media_line(named, header))
        known.append(replace(item, header=header))
    if check is not None:
        check(replace(record, media=tuple(known)))
    facts = {"media": listed, **record.facts} if listed else record.facts
    try:
        text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        members["json"] = text.encode()
    except (ValueError, TypeError, RecursionError) as error:  # a NaN, a lone surrogate, not JSON
        raise SampleError("unwritable facts", f"{record.key}: {error}") from error
    parsed = parse_facts(members["json"], "json", record.key)  # what is written can be read
    parsed.pop("media", None)
    return _Encoded(record.key, members, media, num_characters(parsed))


def _check_annotated(annotated: MediaHeader | None, found: MediaHeader, where: str) -> None:
    """Raises SampleError for another size than the source states, in whose pixels the boxes are."""
    if annotated is None or annotated.width is None or annotated.height is None:
        return
    wanted, size = (annotated.width, annotated.height), (found.width, found.height)
    if size != wanted:
        turned = ", which EXIF turns," if size == wanted[::-1] else ""
        detail = f"annotated {wanted[0]}x{wanted[1]}, the file{turned} shows {size[0]}x{size[1]}; boxes would not fit"
        raise SampleError("picture of another size", f"{where}: {detail}: fetch the set's own pictures")


def _read_media(item: MediaRef, where: str) -> bytes:
    size = _num_bytes(item)
    if size > MAX_MEMBER_BYTES:
        raise SampleError("media too large", f"{where} has {size} bytes, the limit is {MAX_MEMBER_BYTES}")
    try:
        return item.read()
    except OSError as error:
        raise SampleError("unreadable media", f"{where}: {error}") from error


def _media_type(item: MediaRef, data: bytes, where: str) -> str:
    """File type by the first bytes, since names lie; by the name where those say nothing."""
    if (stored := features_type(data)) is not None:
        return stored
    brand = data[8:12]
    if data[:4] == b"RIFF" and brand in (b"WEBP", b"WAVE", b"AVI "):
        return {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}[brand]
    if data[4:8] == b"ftyp":
        return {b"qt  ": "mov", b"M4A ": "m4a"}.get(brand, "mp4")
    if data[:4] == b"OggS":
        return "opus" if b"OpusHead" in data[:64] else "ogg"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm" if b"webm" in data[:64] else "mkv"
    for magic, type_ in (
        (b"\xff\xd8\xff", "jpg"),
        (b"\x89PNG", "png"),
        (b"GIF8", "gif"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"fLaC", "flac"),
        (b"ID3", "mp3"),
        (b"BM", "bmp"),
    ):
        if data.startswith(magic):
            return type_
    suffix = Path(item.data.path).suffix[1:].lower() if isinstance(item.data, StoredBytes) else ""
    if MODALITY_BY_TYPE.get(suffix) == item.modality:
        return suffix
    raise SampleError("unknown media type", f"{where} starts with {data[:12]!r}, no type that shards store")
