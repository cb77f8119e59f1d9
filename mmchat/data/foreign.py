"""How the samples of foreign shards are read, where their members are not facts as they lie.

The tars stay as they are: what is read is stored in the index, and from then on counts as the sample's facts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from mmchat.conversation import MediaRef, Modality, Record, StoredBytes
from mmchat.data.shards import (
    MAX_JSON_BYTES,
    MODALITY_BY_TYPE,
    facts_suffix,
    parse_facts,
    type_of,
)
from mmchat.errors import SampleError
from mmchat.sources import SOURCES, read_source
from mmchat.sources.files import Files

Listed = list[dict[str, Any]]  # the fact "media": [{"modality": ..., "member": ...}, ...]


@dataclass(frozen=True)
class Members:
    """The members of one sample: suffix to offset and size in the opened shard."""

    key: str
    places: Mapping[str, tuple[int, int]]
    file: BinaryIO
    path: Path

    def read(self, suffix: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Raises SampleError for a member that is too large or missing."""
        if suffix not in self.places:
            found = ", ".join(self.places)
            raise SampleError("missing member", f"{self.key}: wanted a member .{suffix}, found {found}")
        offset, size = self.places[suffix]
        if size > limit:
            raise SampleError("member too large", f"{self.key}.{suffix} has {size} bytes, the limit is {limit}")
        self.file.seek(offset)
        return self.file.read(size)

    def json(self, suffix: str) -> Any:
        """Any JSON. Raises SampleError."""
        return parse_facts(b'{"value":' + self.read(suffix) + b"}", "json", f"{self.key}.{suffix}")["value"]

    def text(self, suffix: str) -> str:
        """Raises SampleError."""
        return str(parse_facts(self.read(suffix), "txt", f"{self.key}.{suffix}")["caption"])

    def listed(self) -> Listed:
        """The media members in name order."""
        suffixes = sorted((one for one in self.places if type_of(one) in MODALITY_BY_TYPE), key=_natural_order)
        return [{"modality": MODALITY_BY_TYPE[type_of(suffix)], "member": suffix} for suffix in suffixes]


def _natural_order(suffix: str) -> list[tuple[int, str]]:
    """ "2.jpg" before "10.jpg"."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", suffix)]


class Reading(Protocol):
    """Reads the facts of foreign samples.

    Attributes:
        label: kept in the index, so that an index of another reading is made anew.
    """

    @property
    def label(self) -> str: ...

    def __call__(self, members: Members) -> tuple[dict[str, Any], Listed]:
        """Facts and media of one sample. Raises SampleError."""


def read_plain(members: Members) -> tuple[dict[str, Any], Any, bool]:
    """The .json, or the .txt as a caption; where a .json without a caption has a .txt beside it, both.

    Returns facts, media, and whether one member holds these facts as they are. Raises SampleError.
    """
    suffix = facts_suffix(members.places, members.key)
    facts = parse_facts(members.read(suffix), suffix, members.key)
    if "media" in facts:
        return facts, facts.pop("media"), True
    is_split = suffix == "json" and "txt" in members.places and not facts.keys() & {"caption", "captions"}
    if is_split:
        facts["caption"] = members.text("txt")
    return facts, members.listed(), not is_split


@dataclass(frozen=True)
class Classes:
    """Pictures with a number in .cls: facts {"class": 7, "caption": "goldfish"}."""

    names: Sequence[str]

    @property
    def label(self) -> str:
        return "classes " + hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    def __call__(self, members: Members) -> tuple[dict[str, Any], Listed]:
        found = members.text("cls").strip()
        if not found.isdecimal():
            raise SampleError("unknown class", f"{members.key}: wanted a number in .cls, found {found!r:.100}")
        if int(found) >= len(self.names):
            raise SampleError("unknown class", f"{members.key}: class {found} of {len(self.names)} named ones")
        return {"class": int(found), "caption": self.names[int(found)]}, members.listed()


@dataclass
class AsFormat:
    """The .json of a sample as one row of a public format, such as LLaVA's; a list in it is a conversation.

    Media that a row names is the member of that name, or else the next member of its modality: rows often keep the path
    that a file had before it was packed. A row that names none has all members, in name order.

    Raises ValueError for a format that does not make one record of one row.
    """

    format: str
    options: Mapping[str, str] = field(default_factory=dict)
    _files: _SampleFiles | None = field(default=None, init=False)
    _records: Iterator[Record | SampleError] = field(default=iter(()), init=False)

    def __post_init__(self) -> None:
        if self.format not in SOURCES:
            raise ValueError(f"there is no format {self.format}; there are {', '.join(SOURCES)}")
        read_source(self.format, _SampleFiles(), "train", self.options)  # refuses unknown options now

    @property
    def label(self) -> str:
        return " ".join([f"as {self.format}", *(f"{name}={value}" for name, value in self.options.items())])

    def __call__(self, members: Members) -> tuple[dict[str, Any], Listed]:
        if self._files is None:
            self._files = _SampleFiles()
            self._records = read_source(self.format, self._files, "train", self.options)
        row = members.json("json")
        if isinstance(row, list):
            has_roles = any("role" in turn for turn in row if isinstance(turn, dict))
            row = {"messages" if has_roles else "conversations": row}
        elif not isinstance(row, dict):
            raise SampleError("unreadable facts", f"{members.key}: wanted an object or a list, found {row!r:.100}")
        num_taken = self._files.num_taken
        self._files.put(row, members)
        record = next(self._records, None)
        if record is None or self._files.num_taken != num_taken + 1:
            raise ValueError(f"format {self.format} does not make one record of one row, so it cannot read shards")
        if isinstance(record, SampleError):
            raise SampleError(record.reason, f"{members.key}: {record.detail}")
        return record.facts, [{"modality": item.modality, "member": self._files.member(item)} for item in record.media]


class _SampleFiles(Files):
    """What a format takes for its files: one annotation file whose rows are the samples of a shard as they come."""

    def __init__(self) -> None:
        super().__init__(Path(__file__).parent)  # any folder; nothing is looked up in it
        self.num_taken = 0
        self._row: dict[str, Any] = {}
        self._members: Members | None = None
        self._unnamed: Listed = []

    def put(self, row: dict[str, Any], members: Members) -> None:
        listed = members.listed()
        self._row, self._members, self._unnamed = row, members, listed
        for modality in {item["modality"] for item in listed}:
            if row.get(modality) is None and row.get(f"{modality}s") is None:
                names = [item["member"] for item in listed if item["modality"] == modality]
                self._row = self._row | {f"{modality}s": names}

    def member(self, item: MediaRef) -> str | None:
        """The suffix of the member that an item is. Raises SampleError for one that is none."""
        if item.data is None:
            return None
        assert self._members is not None
        for suffix, (offset, _) in self._members.places.items():
            if isinstance(item.data, StoredBytes) and item.data.offset == offset:
                return suffix
        raise SampleError("media in the row", f"{self._members.key}: wanted a member, found the {item.modality} itself")

    def find(self, *patterns: str) -> list[str]:
        return ["shard.jsonl"]

    def stored(self, name: str) -> StoredBytes | None:
        return None

    def open(self, name: str) -> BinaryIO:
        raise ValueError("this format reads more than the rows of one file, so it cannot read the samples of shards")

    def rows(self, name: str) -> Iterator[Any]:
        while True:
            self.num_taken += 1
            yield self._row

    def media(self, modality: Modality, name: Any, *others: str) -> MediaRef:
        assert self._members is not None
        if name is None:
            return MediaRef(modality, None)
        names = {PurePosixPath(one).name for one in (name, *others) if isinstance(one, str)}
        stem = PurePosixPath(self._members.key).name
        left = [item for item in self._unnamed if item["modality"] == modality]
        named = [item for item in left if {item["member"], f"{stem}.{item['member']}"} & names]
        if not left:
            raise SampleError("missing member", f"{self._members.key}: no {modality} member is left for {name!r:.200}")
        found = (named or left)[0]
        self._unnamed = [item for item in self._unnamed if item is not found]
        return MediaRef(modality, StoredBytes(str(self._members.path), *self._members.places[found["member"]]))
