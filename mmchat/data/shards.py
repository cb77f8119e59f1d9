"""Shards: plain webdataset tars with an index beside each, local or behind a URL, read by offset through the index.

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

import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from mmchat.conversation import MediaHeader, MediaRef, Modality, Record, StoredBytes
from mmchat.errors import SampleError
from mmchat.storage import CacheConfig, File, find, is_url

FORMAT = 1
INDEX_SUFFIX = ".index.jsonl"

MEDIA_TYPES: dict[Modality, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "m4a"),
}
MODALITY_BY_TYPE = {type_: modality for modality, types in MEDIA_TYPES.items() for type_ in types}
ALLOWED_TYPES = frozenset({"json", "txt", "npy", "safetensors", *MODALITY_BY_TYPE})
# The last two are lists of media as NVIDIA's converters for Megatron-Energon pickle them.
PICKLE_TYPES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "jpgs", "videos"})

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 64
MAX_MEMBER_BYTES = 4 * 2**30  # a ustar header can say 8 GiB; a member is held in memory as a whole
MAX_RANGE = 1_000_000  # names that one brace range may stand for


@dataclass(frozen=True)
class IndexEntry:
    """One line of an index.

    Attributes:
        members: suffix ("json", "0.jpg") to (offset, size) in bytes.
        media: the items in order, with their headers and still in the shard.
        num_characters: length of all strings in the facts together.
        problem: reason and detail, where the sample cannot be used.
        facts: of a foreign sample whose members are not facts as they lie (mmchat.data.foreign); they count then.
    """

    key: str
    members: dict[str, tuple[int, int]]
    media: tuple[MediaRef, ...]
    num_characters: int
    problem: tuple[str, str] | None
    facts: dict[str, Any] | None = None


class Shard:
    """A tar and its index. Opening reads one line; the positions of the entries are read at the first use.

    A `path` that is a URL is read in blocks through `cache`, the index too.

    Raises ValueError where the tar or its index is missing, or the tar is not the one that was indexed.
    """

    def __init__(self, path: Path | str, cache: CacheConfig | None = None) -> None:
        self.path = path
        self.index_path: Path | str = f"{path}{INDEX_SUFFIX}" if isinstance(path, str) else index_path(path)
        cache = cache or CacheConfig()
        self._remedy = f"python data_prep/index_shards.py {path}"
        if isinstance(path, str) and is_url(path):
            self._remedy += " on a local copy, and put the index beside the shard"
        self._tar = _open(path, cache, f"shard {path} does not exist")
        absent = f"shard {path} has no index {Path(self.index_path).name}; make it with: {self._remedy}"
        self._index = _open(self.index_path, cache, absent)
        try:
            line = self._index.read(0, min(4096, self._index.num_bytes)).partition(b"\n")[0]
        except OSError as error:
            raise ValueError(f"the index of shard {path} cannot be read: {error}") from error
        try:
            header = json.loads(line)
            found = header["format"]
            self.num_samples = int(header["num_samples"])
            self.num_bytes = int(header["shard_bytes"])
            self.sha256 = str(header["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.index_path} does not start with an index header; make it anew: {self._remedy}"
            ) from error
        if found != FORMAT:
            raise ValueError(
                f"{self.index_path} has format {found}, this version reads {FORMAT}; make it anew: {self._remedy}"
            )
        if (size := self._tar.num_bytes) != self.num_bytes:
            raise ValueError(
                f"shard {path} has {size} bytes, but {self.num_bytes} when it was indexed: it was cut short "
                f"or replaced. Fetch it again, or index what is there now: {self._remedy}"
            )
        self._first_entry = len(line) + 1

    @cached_property
    def _line_starts(self) -> np.ndarray:
        """[num_samples + 1] byte offsets in the index: eight bytes a sample are all that stays in memory."""
        num_bytes = max(0, self._index.num_bytes - self._first_entry)
        text = np.frombuffer(self._index.read(self._first_entry, num_bytes), dtype=np.uint8)
        starts = np.concatenate([[0], np.flatnonzero(text == ord("\n")) + 1]) + self._first_entry
        if len(starts) != self.num_samples + 1:
            raise ValueError(
                f"{self.index_path} has {len(starts) - 1} entries, its header says {self.num_samples}; "
                f"make it anew: {self._remedy}"
            )
        return starts

    def entry(self, i: int) -> IndexEntry:
        """The index line of sample `i`; the tar is not touched. Raises SampleError."""
        try:
            start, end = self._line_starts[i : i + 2].tolist()
            text = self._index.read(start, end - start)
        except OSError as error:
            raise SampleError("unreadable shard", f"the index of {self.path}: {error}") from error
        try:
            line = from_json(text)  # twice as fast as json, and every sample begins with it
            members = {suffix: (int(offset), int(size)) for suffix, (offset, size) in line["members"].items()}
            media = []
            for item in line["media"]:
                modality, member = item.pop("modality"), item.pop("member")
                stored = None
                if member is not None:
                    stored = StoredBytes(self._tar.path, *self._inside(*members[member]), file=self._tar)
                media.append(MediaRef(modality, stored, MediaHeader(**item) if item else None))
            problem = tuple(line["problem"]) if "problem" in line else None
            return IndexEntry(line["key"], members, tuple(media), line["num_characters"], problem, line.get("facts"))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SampleError(
                "damaged index",
                f"{self.index_path} line {i + 2}: {error!r:.300}; make it anew with data_prep/index_shards.py",
            ) from error

    def record(self, i: int) -> Record:
        """The facts of sample `i`, read and parsed, and its media, still encoded in the shard.

        Raises SampleError where the sample has a problem, or its facts cannot be read.
        """
        entry = self.entry(i)
        where = f"{self.path}: {entry.key}"
        refuse_pickles(entry.members, where)
        if entry.problem is not None:
            raise SampleError(entry.problem[0], f"{self.path}: {entry.problem[1]}")
        if entry.facts is not None:
            return Record(entry.key, entry.facts, entry.media)
        suffix = facts_suffix(entry.members, where)
        try:
            data = self._tar.read(*self._inside(*entry.members[suffix]))
        except OSError as error:
            raise SampleError("unreadable shard", f"{where}: {error}") from error
        facts = parse_facts(data, suffix, where)
        facts.pop("media", None)
        return Record(entry.key, facts, entry.media)

    def _inside(self, offset: int, size: int) -> tuple[int, int]:
        if not 0 <= offset <= offset + size <= self.num_bytes:
            raise ValueError(f"{self.index_path} points outside of its shard: {size} bytes at {offset}")
        return offset, size


def _open(path: Path | str, cache: CacheConfig, absent: str) -> File:
    try:
        return File.open(str(path), cache)
    except FileNotFoundError as error:
        raise ValueError(absent) from error
    except OSError as error:
        raise ValueError(str(error)) from error


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + INDEX_SUFFIX)


def expand_shards(pattern: str | list[str]) -> list[Path | str]:
    """Shards that patterns name, in order: files, folders, globs, ranges like {000000..000012}, local or as URLs.

    Local shards come as paths, those behind URLs as strings; whether a URL without a glob is there shows when it is
    opened.

    Raises ValueError that lists every named shard that is missing and every pattern that matches nothing.
    """
    shards: list[Path | str] = []
    missing: list[str] = []
    for name in [name for one in ([pattern] if isinstance(pattern, str) else pattern) for name in _braces(one)]:
        found: list[Path] | list[str] = _remote_shards(name) if is_url(name) else _local_shards(name)
        shards += found
        if not found:
            is_folder = Path(name).is_dir() or (is_url(name) and not name.endswith(".tar"))
            missing.append(f"{name} (a folder without .tar files)" if is_folder else name)
    if missing:
        raise ValueError("no such shards:\n  " + "\n  ".join(missing))
    if not shards:
        raise ValueError("no shards are named")
    if twice := [str(shard) for shard, count in Counter(shards).items() if count > 1]:
        raise ValueError("shards are named more than once:\n  " + "\n  ".join(twice))
    return shards


def _local_shards(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.tar") if path.is_dir() else map(Path, glob.glob(name, recursive=True)))
    return [match for match in found if match.suffix == ".tar" and match.is_file()]


def _remote_shards(url: str) -> list[str]:
    """Raises ValueError where the store cannot be listed."""
    if not set(url) & set("*["):  # a question mark begins the query of a URL
        if url.endswith(".tar"):
            return [url]
        url = f"{url.rstrip('/')}/*.tar"
    try:
        return [match for match in find(url) if match.endswith(".tar")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{url} cannot be listed: {error}. Name the shards, for instance by a range") from error


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


def facts_suffix(members: Iterable[str], where: str) -> str:
    if "json" in members:
        return "json"
    if "txt" in members:
        return "txt"
    raise SampleError("no facts", f"{where} has neither a .json nor a .txt member")


def refuse_pickles(members: Iterable[str], where: str) -> None:
    for suffix in members:
        if type_of(suffix) in PICKLE_TYPES:
            raise SampleError(
                "forbidden member", f"{where}.{suffix} is a pickle, which would run code; it is never opened"
            )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_facts(data: bytes, suffix: str, where: str) -> dict[str, Any]:
    """The JSON object, or the caption of a .txt. Raises SampleError past the limits of size and depth."""

    if len(data) > MAX_JSON_BYTES:
        raise SampleError("facts too large", f"{where} has {len(data)} bytes of facts, the limit is {MAX_JSON_BYTES}")
    try:
        text = data.decode()
        if suffix == "txt":
            return {"caption": text.strip()}
        facts = _STRICT_JSON.decode(text)
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
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return facts
    raise SampleError("facts too deep", f"{where} nests deeper than {MAX_JSON_DEPTH}")


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def num_characters(node: Any) -> int:
    """Length of all strings together, keys of objects left out."""
    if isinstance(node, str):
        return len(node)
    return sum(map(num_characters, _children(node))) if isinstance(node, dict | list) else 0


def type_of(suffix: str) -> str:
    return suffix.rpartition(".")[2]
