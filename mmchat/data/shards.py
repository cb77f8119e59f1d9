"""Shards: plain webdataset tars with an index beside each, read by offset through the index.

A sample is `KEY.json` (its facts, any JSON object) and media members `KEY.0.jpg`, `KEY.1.mp4`, ... The
optional fact `"media": [{"modality": "image", "member": "0.jpg"}, ...]` names the items in order; a null
member is an absent item. Without it the media members count in name order, their modality by extension. An
image with a `.txt` and no json is a caption pair.

The index `NAME.tar.index.jsonl` starts with one line about the shard, then has one line a sample: key, offset
and size of each member, what the media headers say, characters of text. webdataset's own reader is not used:
it drops the tail of a truncated tar in silence, splits a sample whose members are apart, and its default
decoding executes pickles. Here nothing is extracted, and only members of the types in ALLOWED_TYPES are ever
opened.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset import TarWriter

from mmchat.conversation import MODALITIES, MediaHeader, MediaRef, Modality, Record, StoredBytes
from mmchat.errors import SampleError

FORMAT = 1
INDEX_SUFFIX = ".index.jsonl"

MEDIA_TYPES: dict[Modality, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "m4a"),
}
MODALITY_BY_TYPE = {type_: modality for modality, types in MEDIA_TYPES.items() for type_ in types}
ALLOWED_TYPES = frozenset({"json", "txt", "npy", "safetensors", *MODALITY_BY_TYPE})
PICKLE_TYPES = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_MEMBER_BYTES = 4 * 2**30  # a ustar header can say 8 GiB; a member is held in memory as a whole
MAX_RANGE = 1_000_000  # names that one brace range may stand for

HeaderOf = Callable[[Modality, bytes], MediaHeader]

_TAR_BLOCK = 512
_NAME = re.compile(r"((?:[^/]+/)*[^/.]+)\.([^/]+)")  # webdataset's rule: the suffix starts at the first dot
_KEY = re.compile(r"(?!__)[\w-]+(?:/(?!__)[\w-]+)*")  # webdataset skips names that start with two underscores
_MAX_KEY_BYTES = 80  # a ustar name holds 100, suffix included


@dataclass
class ShardReport:
    """What was written or indexed, and what was not, counted by reason with a few examples each."""

    shards: list[Path] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add_problem(self, error: SampleError) -> None:
        self.problems[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < 3:
            examples.append(error.detail)

    def merge(self, other: ShardReport) -> None:
        self.shards += other.shards
        self.num_samples += other.num_samples
        self.num_bytes += other.num_bytes
        self.problems += other.problems
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:3]


@dataclass(frozen=True)
class IndexEntry:
    """One line of an index.

    Attributes:
        members: suffix ("json", "0.jpg") to (offset, size) in bytes.
        media: the items in order, with their headers and still in the shard.
        num_characters: length of all strings in the facts together.
        problem: reason and detail, where the sample cannot be used.
    """

    key: str
    members: dict[str, tuple[int, int]]
    media: tuple[MediaRef, ...]
    num_characters: int
    problem: tuple[str, str] | None


class Shard:
    """A tar and its index. Opening reads one line; the positions of the entries are read at the first use.

    Raises ValueError where the tar or its index is missing, or the tar is not the one that was indexed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index_path = index_path(path)
        remedy = f"python data_prep/index_shards.py {path}"
        if not path.is_file():
            raise ValueError(f"shard {path} does not exist")
        if not self.index_path.is_file():
            raise ValueError(f"shard {path} has no index {self.index_path.name}; make it with: {remedy}")
        with open(self.index_path, "rb") as file:
            line = file.readline(4096)
        try:
            header = json.loads(line)
            found = header["format"]
            self.num_samples = int(header["num_samples"])
            self.num_bytes = int(header["shard_bytes"])
            self.sha256 = str(header["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.index_path} does not start with an index header; make it anew: {remedy}"
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"{self.index_path} has format {found}, this version reads {FORMAT}; make it anew: {remedy}"
            )
        if (size := path.stat().st_size) != self.num_bytes:
            raise ValueError(
                f"shard {path} has {size} bytes, but {self.num_bytes} when it was indexed: it was cut short "
                f"or replaced. Fetch it again, or index what is there now: {remedy}"
            )
        self._first_entry = len(line)

    @cached_property
    def _line_starts(self) -> np.ndarray:
        """[num_samples + 1] byte offsets in the index: eight bytes a sample are all that stays in memory."""
        text = np.fromfile(self.index_path, dtype=np.uint8, offset=self._first_entry)
        starts = np.concatenate([[0], np.flatnonzero(text == ord("\n")) + 1]) + self._first_entry
        if len(starts) != self.num_samples + 1:
            raise ValueError(
                f"{self.index_path} has {len(starts) - 1} entries, its header says {self.num_samples}; "
                f"make it anew: python data_prep/index_shards.py {self.path}"
            )
        return starts

    def entry(self, i: int) -> IndexEntry:
        """The index line of sample `i`; the tar is not touched."""
        start, end = (int(x) for x in self._line_starts[i : i + 2])
        with open(self.index_path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            line = json.loads(text)
            members = {suffix: (int(offset), int(size)) for suffix, (offset, size) in line["members"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(
                "damaged index", f"{self.index_path} line {i + 2}: {error}; make it anew with data_prep/index_shards.py"
            ) from error
        media = []
        for item in line["media"]:
            header = {name: x for name, x in item.items() if name not in ("modality", "member")}
            stored = None if item["member"] is None else self._stored(*members[item["member"]])
            media.append(MediaRef(item["modality"], stored, MediaHeader(**header) if header else None))
        problem = tuple(line["problem"]) if "problem" in line else None
        return IndexEntry(line["key"], members, tuple(media), line["num_characters"], problem)

    def record(self, i: int) -> Record:
        """The facts of sample `i`, read and parsed, and its media, still encoded in the shard.

        Raises SampleError where the sample has a problem, or its facts cannot be read.
        """
        entry = self.entry(i)
        where = f"{self.path}: {entry.key}"
        _refuse_pickles(entry.members, where)
        if entry.problem is not None:
            raise SampleError(entry.problem[0], f"{self.path}: {entry.problem[1]}")
        suffix = _facts_suffix(entry.members, where)
        try:
            data = self._stored(*entry.members[suffix]).read()
        except OSError as error:
            raise SampleError("unreadable shard", f"{where}: {error}") from error
        facts = _parse_facts(data, suffix, where)
        facts.pop("media", None)
        return Record(entry.key, facts, entry.media)

    def _stored(self, offset: int, size: int) -> StoredBytes:
        if not 0 <= offset <= offset + size <= self.num_bytes:
            raise ValueError(f"{self.index_path} points outside of its shard: {size} bytes at {offset}")
        return StoredBytes(str(self.path), offset, size)


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


def write_shards(
    samples: Iterable[Record | SampleError],
    out: Path,
    samples_per_shard: int = 1000,
    max_shard_bytes: int = 512 * 2**20,
    header_of: HeaderOf | None = None,
) -> ShardReport:
    """Writes `out/000000.tar`, `out/000001.tar`, ... and their indexes; the same samples give the same bytes.

    A shard ends before the sample that would make it hold more than `samples_per_shard` samples or
    `max_shard_bytes` bytes; a larger sample gets a shard of its own. Each shard appears under its name only
    when it is whole. A SampleError among the samples, or a sample that cannot be stored, is counted in the
    report's problems.

    Args:
        header_of: reads the header facts for the index; it raises SampleError for media that are not usable.

    Raises ValueError where `out` already has shards.
    """
    if samples_per_shard < 1 or max_shard_bytes < 1:
        raise ValueError("a shard must hold at least one sample and one byte")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.tar")):
        raise ValueError(f"{out} already has shards; name an empty folder, or remove them first")
    report = ShardReport()
    writer: _ShardWriter | None = None
    try:
        for sample in samples:
            try:
                if isinstance(sample, SampleError):
                    raise sample
                encoded = _encode(sample, header_of)
                if writer is not None and sample.key in writer.entries:
                    raise SampleError("duplicate key", f"{sample.key!r} is already in {writer.path.name}")
            except SampleError as error:
                report.add_problem(error)
                continue
            if writer is not None and (
                len(writer.entries) >= samples_per_shard or writer.num_bytes + encoded.tar_bytes > max_shard_bytes
            ):
                report.merge(writer.close())
                writer = None
            if writer is None:
                writer = _ShardWriter(out / f"{len(report.shards):06d}.tar")
            writer.add(encoded)
        if writer is not None:
            report.merge(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    return report


def index_shard(path: Path, header_of: HeaderOf | None = None) -> ShardReport:
    """Makes the index of any webdataset tar, from its member headers; nothing is extracted.

    Members of one key are joined wherever they lie. Links, devices and names that leave the folder are left
    out and reported. A sample that cannot be used stays in the index with its problem, so that it is refused
    with the reason whenever it is met, and is reported.

    Raises ValueError, and leaves no index, where the file is not a whole, plain tar.
    """
    report = ShardReport([path])
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    doubled: dict[str, str] = {}
    for member in _tar_members(path):
        if member.isdir():
            continue
        where = f"{path}: {member.name!r} at byte {member.offset}"
        try:
            if not member.isreg() or member.issparse():
                raise SampleError("not a plain file", f"{where} is a link, a device or sparse")
            split = _split_name(member.name, where)
        except SampleError as error:
            report.add_problem(error)
            continue
        if split is None or _type(split[1]) not in ALLOWED_TYPES | PICKLE_TYPES:
            continue
        key, suffix = split
        members = samples.setdefault(key, {})
        if suffix in members:
            doubled[key] = suffix
        members[suffix] = (member.offset_data, member.size)

    lines = []
    with open(path, "rb") as file:
        for key, members in samples.items():
            line: dict[str, Any] = {"key": key, "members": members, "media": [], "num_characters": 0}
            try:
                if key in doubled:
                    raise SampleError("duplicate member", f"{key} has {doubled[key]!r} more than once")
                line["media"], line["num_characters"] = _describe(file, key, members, header_of)
            except SampleError as error:
                line["problem"] = [error.reason, error.detail]  # without the path: shards are moved
                report.add_problem(SampleError(error.reason, f"{path}: {error.detail}"))
            lines.append(line)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report.num_samples = len(lines)
    report.num_bytes = path.stat().st_size
    _write_index(path, report.num_bytes, sha256, lines)
    return report


def expand_shards(pattern: str | list[str]) -> list[Path]:
    """Paths of the shards that patterns name, in order: files, folders, globs, ranges like {000000..000012}.

    Raises ValueError that lists every named shard that is missing and every pattern that matches nothing.
    """
    shards: list[Path] = []
    missing: list[str] = []
    for name in [name for one in ([pattern] if isinstance(pattern, str) else pattern) for name in _braces(one)]:
        path = Path(name)
        if path.is_file():
            shards.append(path)
            continue
        found = sorted(path.glob("*.tar") if path.is_dir() else map(Path, glob.glob(name, recursive=True)))
        found = [match for match in found if match.suffix == ".tar" and match.is_file()]
        shards += found
        if not found:
            missing.append(f"{name} (a folder without .tar files)" if path.is_dir() else name)
    if missing:
        raise ValueError("no such shards:\n  " + "\n  ".join(missing))
    if not shards:
        raise ValueError("no shards are named")
    if twice := [str(shard) for shard, count in Counter(shards).items() if count > 1]:
        raise ValueError("shards are named more than once:\n  " + "\n  ".join(twice))
    return shards


def _braces(pattern: str) -> Iterator[str]:
    """Names for every number of every {first..last}; a zero-padded first number sets the width."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MAX_RANGE:
        raise ValueError(f"{match[0]} in {pattern!r} must rise, and by less than {MAX_RANGE}")
    for number in range(first, last + 1):
        yield from _braces(f"{pattern[: match.start()]}{number:0{len(match[1])}d}{pattern[match.end() :]}")


@dataclass(frozen=True)
class _Encoded:
    """A sample as it will be stored: members by suffix, and what the index says of it."""

    key: str
    members: dict[str, bytes]
    media: list[dict[str, Any]]
    num_characters: int

    @property
    def tar_bytes(self) -> int:
        return sum(_TAR_BLOCK + _padded(len(data)) for data in self.members.values())


class _ShardWriter:
    """One shard while it is written, under a hidden name; `close` makes it and its index visible."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
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
            members[suffix] = (self.num_bytes - _padded(len(data)), len(data))
        self.entries[sample.key] = {
            "key": sample.key,
            "members": members,
            "media": sample.media,
            "num_characters": sample.num_characters,
        }

    def close(self) -> ShardReport:
        self._tar.close()
        _sync(self._file)
        self._file.close()
        num_bytes = self.partial.stat().st_size
        # The index first: a shard is never seen without one.
        _write_index(self.path, num_bytes, self._hash.hexdigest(), list(self.entries.values()))
        os.replace(self.partial, self.path)
        return ShardReport([self.path], len(self.entries), num_bytes)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # it writes its end, and the disk may be full
            self._tar.close()
        self._file.close()
        self.partial.unlink(missing_ok=True)


def _encode(record: Record, header_of: HeaderOf | None) -> _Encoded:
    """Raises SampleError for a record that cannot be stored."""
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
    for i, item in enumerate(record.media):
        named: dict[str, Any] = {"modality": item.modality, "member": None}
        header = item.header
        if item.data is not None:
            where = f"{record.key}: {item.modality} {i}"
            if isinstance(item.data, StoredBytes):
                where += f", {item.data.path}"
            data = _read_media(item, where)
            named["member"] = f"{i}.{_media_type(item, data, where)}"
            members[named["member"]] = data
            if header_of is not None:
                header = _read_header(header_of, item.modality, data, where)
        listed.append(named)
        media.append(_media_line(named, header))
    facts = {"media": listed, **record.facts} if listed else record.facts
    try:
        text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        members["json"] = text.encode()
    except (ValueError, TypeError, RecursionError) as error:  # a NaN, a lone surrogate, not JSON
        raise SampleError("unwritable facts", f"{record.key}: {error}") from error
    parsed = _parse_facts(members["json"], "json", record.key)  # what is written can be read
    parsed.pop("media", None)
    return _Encoded(record.key, members, media, _num_characters(parsed))


def _read_media(item: MediaRef, where: str) -> bytes:
    size = item.data.size if isinstance(item.data, StoredBytes) else len(item.data or b"")
    if size > MAX_MEMBER_BYTES:
        raise SampleError("media too large", f"{where} has {size} bytes, the limit is {MAX_MEMBER_BYTES}")
    try:
        return item.read()
    except OSError as error:
        raise SampleError("unreadable media", f"{where}: {error}") from error


def _read_header(header_of: HeaderOf, modality: Modality, data: bytes, where: str) -> MediaHeader:
    try:
        return header_of(modality, data)
    except SampleError as error:
        raise SampleError(error.reason, f"{where}: {error.detail}") from error


def _media_type(item: MediaRef, data: bytes, where: str) -> str:
    """File type by the first bytes, since names lie; by the name where those say nothing."""
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


def _describe(
    file: BinaryIO, key: str, members: dict[str, tuple[int, int]], header_of: HeaderOf | None
) -> tuple[list[dict[str, Any]], int]:
    """What the index says of a foreign sample: its media, and characters of text. Raises SampleError."""

    def read(suffix: str, limit: int) -> bytes:
        offset, size = members[suffix]
        if size > limit:
            raise SampleError("member too large", f"{key}.{suffix} has {size} bytes, the limit is {limit}")
        file.seek(offset)
        return file.read(size)

    _refuse_pickles(members, key)
    suffix = _facts_suffix(members, key)
    facts = _parse_facts(read(suffix, MAX_JSON_BYTES), suffix, key)
    listed = facts.pop("media", None)
    if listed is None:
        listed = [
            {"modality": MODALITY_BY_TYPE[_type(member)], "member": member}
            for member in sorted(members, key=_natural_order)
            if _type(member) in MODALITY_BY_TYPE
        ]
    media = []
    for item in _checked_media(listed, members, key):
        header = None
        if header_of is not None and item["member"] is not None:
            data = read(item["member"], MAX_MEMBER_BYTES)
            header = _read_header(header_of, item["modality"], data, f"{key}.{item['member']}")
        media.append(_media_line(item, header))
    return media, _num_characters(facts)


def _checked_media(listed: Any, members: Iterable[str], where: str) -> list[dict[str, Any]]:
    if not isinstance(listed, list):
        raise SampleError("unreadable media list", f"{where}: the fact 'media' is {type(listed).__name__}, not a list")
    for item in listed:
        if not isinstance(item, dict) or item.keys() != {"modality", "member"} or item["modality"] not in MODALITIES:
            raise SampleError(
                "unreadable media list",
                f'{where}: wanted {{"modality": ..., "member": ...}}, found {item!r:.200}',
            )
        if item["member"] is not None and item["member"] not in members:
            raise SampleError("missing member", f"{where} names {item['member']!r:.200}, which the shard lacks")
    return listed


def _media_line(item: dict[str, Any], header: MediaHeader | None) -> dict[str, Any]:
    known = {} if header is None else {name: x for name, x in asdict(header).items() if x is not None}
    return {"modality": item["modality"], "member": item["member"], **known}


def _facts_suffix(members: Iterable[str], where: str) -> str:
    if "json" in members:
        return "json"
    if "txt" in members:
        return "txt"
    raise SampleError("no facts", f"{where} has neither a .json nor a .txt member")


def _refuse_pickles(members: Iterable[str], where: str) -> None:
    for suffix in members:
        if _type(suffix) in PICKLE_TYPES:
            raise SampleError(
                "forbidden member", f"{where}.{suffix} is a pickle, which would run code; it is never opened"
            )


def _parse_facts(data: bytes, suffix: str, where: str) -> dict[str, Any]:
    """The JSON object, or the caption of a .txt. Raises SampleError past the limits of size and depth."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if len(data) > MAX_JSON_BYTES:
        raise SampleError("facts too large", f"{where} has {len(data)} bytes of facts, the limit is {MAX_JSON_BYTES}")
    try:
        text = data.decode()
        if suffix == "txt":
            return {"caption": text.strip()}
        facts = json.loads(text, parse_constant=refuse_constant)
        if "\\u" in text:
            # An escape may hide half a surrogate pair, which no tokenizer takes.
            json.dumps(facts, ensure_ascii=False).encode()
    except RecursionError as error:
        raise SampleError("facts too deep", f"{where} nests deeper than {MAX_JSON_DEPTH}") from error
    except ValueError as error:
        raise SampleError("unreadable facts", f"{where}: {error}") from error
    if not isinstance(facts, dict):
        raise SampleError("unreadable facts", f"{where}: wanted a JSON object, found {type(facts).__name__}")
    level: list[Any] = [facts]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
        if not level:
            return facts
    raise SampleError("facts too deep", f"{where} nests deeper than {MAX_JSON_DEPTH}")


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _num_characters(node: Any) -> int:
    """Length of all strings together, keys of objects left out."""
    if isinstance(node, str):
        return len(node)
    return sum(map(_num_characters, _children(node))) if isinstance(node, dict | list) else 0


def _tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Every member header of a plain tar. Raises ValueError if it is compressed, cut short or damaged."""
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
                raise ValueError(f"{path} is empty") from error
            raise ValueError(
                f"{path}: {type(error).__name__}, {error}. It is cut short, damaged or compressed: "
                "fetch it again, or decompress it (members are read by offset)"
            ) from error
        # tarfile takes the end of the file, or a damaged header, for the end of the archive without a word.
        file.seek(end)
        if file.read(2 * _TAR_BLOCK) != bytes(2 * _TAR_BLOCK):
            raise ValueError(
                f"{path}: no end-of-archive mark at byte {end}: the tar was cut off between two members, or "
                "the header there is damaged. Fetch it again"
            )
        while tail := file.read(2**20):
            if tail.count(0) != len(tail):
                raise ValueError(f"{path}: there is data behind the end of the archive at byte {end}; was it joined?")


def _split_name(name: str, where: str) -> tuple[str, str] | None:
    """Key and suffix of a member name, None where it has none. Raises SampleError for path tricks."""
    name = name.removeprefix("./")
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
        raise SampleError("unsafe name", f"{where} leaves the folder, or has characters that names should not have")
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def _type(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _natural_order(suffix: str) -> list[tuple[int, str]]:
    """ "2.jpg" before "10.jpg"."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", suffix)]


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


def _write_index(shard: Path, shard_bytes: int, sha256: str, lines: list[dict[str, Any]]) -> None:
    path = index_path(shard)
    partial = path.with_name(f".{path.name}.partial")
    header = {"format": FORMAT, "shard_bytes": shard_bytes, "num_samples": len(lines), "sha256": sha256}
    with open(partial, "wb") as file:
        for line in (header, *lines):
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        _sync(file)
    os.replace(partial, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
