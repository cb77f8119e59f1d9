"""The index of a shard: made for foreign tars from their member headers; nothing is extracted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmchat.conversation import MODALITIES, MediaHeader, Modality
from mmchat.data.foreign import Members, Reading, read_plain
from mmchat.data.shards import (
    ALLOWED_TYPES,
    FORMAT,
    MAX_MEMBER_BYTES,
    PICKLE_TYPES,
    index_path,
    num_characters,
    refuse_pickles,
    type_of,
)
from mmchat.errors import SampleError
from mmchat.sources.archives import tar_members

HeaderOf = Callable[[Modality, bytes], MediaHeader]

TAR_BLOCK = 512
_META = re.compile(r"__[^/]*__(?:$|/)")  # of the whole tar, by webdataset's rule
_NAME = re.compile(r"((?:[^/]+/)*[^/.]+)\.([^/]+)")  # webdataset's rule: the suffix starts at the first dot


@dataclass
class ShardReport:
    """What was written or indexed, and what was not, counted by reason with a few examples each.

    unread: members of foreign shards that no sample can use, counted by type.
    """

    shards: list[Path] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

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
        self.unread += other.unread
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:3]


def index_shard(
    path: Path,
    header_of: HeaderOf | None = None,
    reading: Reading | None = None,
    excluded: frozenset[str] = frozenset(),
) -> ShardReport:
    """Makes the index of any webdataset tar, from its member headers; nothing is extracted.

    Members of one key are joined wherever they lie. Links, devices and names that leave the folder are left
    out and reported. A sample that cannot be used stays in the index with its problem, so that it is refused
    with the reason whenever it is met, and is reported.

    Args:
        reading: of samples whose members are not facts as they lie; the index then holds the facts.
        excluded: keys that are left out.

    Raises ValueError, and leaves no index, where the file is not a whole, plain tar.
    """
    report = ShardReport([path])
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    doubled: dict[str, str] = {}
    for member in tar_members(path):
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
        if split is None or _META.match(member.name) or split[0] in excluded:
            continue
        key, suffix = split
        if type_of(suffix) not in ALLOWED_TYPES | PICKLE_TYPES | {"cls"}:
            report.unread[type_of(suffix)] += 1
            continue
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
                refuse_pickles(members, key)
                line |= _describe(Members(key, members, file, path), header_of, reading)
            except SampleError as error:
                line["problem"] = [error.reason, error.detail]  # without the path: shards are moved
                report.add_problem(SampleError(error.reason, f"{path}: {error.detail}"))
            lines.append(line)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report.num_samples = len(lines)
    report.num_bytes = path.stat().st_size
    left_out = report.problems - Counter(line["problem"][0] for line in lines if "problem" in line)
    write_index(path, report.num_bytes, sha256, lines, reading_label(reading, excluded), left_out)
    return report


def read_report(path: Path) -> ShardReport:
    """What was found when the index of a shard was made, as far as it is kept there. Raises ValueError or OSError."""
    report = ShardReport([path])
    with open(index_path(path), "rb") as file:
        header = json.loads(file.readline())
        report.num_samples, report.num_bytes = header["num_samples"], header["shard_bytes"]
        for reason, count in header.get("left_out", {}).items():
            report.problems[reason] += count
            report.examples[reason] = [f"{path}: {count} members; --force names them"]
        for line in file:
            if (problem := json.loads(line).get("problem")) is not None:
                report.add_problem(SampleError(problem[0], f"{path}: {problem[1]}"))
    return report


def reading_label(reading: Reading | None, excluded: frozenset[str]) -> str | None:
    """What the header of an index says of how its samples were read; None for plain shards."""
    words = [] if reading is None else [reading.label]
    if excluded:
        words.append(f"without {hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()[:16]}")
    return " ".join(words) or None


def is_current(path: Path, label: str | None) -> bool:
    """Whether a shard has an index, newer than the tar and of the same size and reading."""
    index = index_path(path)
    try:
        if index.stat().st_mtime_ns < path.stat().st_mtime_ns:
            return False
        with open(index, "rb") as file:
            header = json.loads(file.readline(4096))
        return (header["format"], header["shard_bytes"], header.get("reading")) == (FORMAT, path.stat().st_size, label)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _describe(members: Members, header_of: HeaderOf | None, reading: Reading | None) -> dict[str, Any]:
    """What the index says of a foreign sample: media, characters, and facts not as they lie. Raises SampleError."""
    facts, listed, is_stored = read_plain(members) if reading is None else (*reading(members), False)
    media = []
    for item in _checked_media(listed, members.places, members.key):
        header = None
        if header_of is not None and item["member"] is not None:
            data = members.read(item["member"], MAX_MEMBER_BYTES)
            header = read_header(header_of, item["modality"], data, f"{members.key}.{item['member']}")
        media.append(media_line(item, header))
    line = {"media": media, "num_characters": num_characters(facts)}
    return line if is_stored else line | {"facts": facts}


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


def media_line(item: dict[str, Any], header: MediaHeader | None) -> dict[str, Any]:
    known = {} if header is None else {name: x for name, x in asdict(header).items() if x is not None}
    return {"modality": item["modality"], "member": item["member"], **known}


def read_header(header_of: HeaderOf, modality: Modality, data: bytes, where: str) -> MediaHeader:
    try:
        return header_of(modality, data)
    except SampleError as error:
        raise SampleError(error.reason, f"{where}: {error.detail}") from error


def _split_name(name: str, where: str) -> tuple[str, str] | None:
    """Key and suffix of a member name, None where it has none. Raises SampleError for path tricks."""
    name = name.removeprefix("./")
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
        raise SampleError("unsafe name", f"{where} leaves the folder, or has characters that names should not have")
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def write_index(
    shard: Path,
    shard_bytes: int,
    sha256: str,
    lines: list[dict[str, Any]],
    reading: str | None = None,
    left_out: Mapping[str, int] | None = None,
) -> None:
    """Writes the index beside its shard.

    left_out: members that are not in the index, counted by reason.
    """
    path = index_path(shard)
    partial = partial_path(path)
    header: dict[str, Any] = {"format": FORMAT, "shard_bytes": shard_bytes, "num_samples": len(lines), "sha256": sha256}
    if reading is not None:
        header["reading"] = reading
    if left_out:
        header["left_out"] = dict(left_out)
    try:
        with open(partial, "wb") as file:
            for line in (header, *lines):
                text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")
            sync(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """Where a file lies until it is whole: hidden, and of this process alone."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
