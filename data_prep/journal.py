"""What a run of make_shards.py has finished, so that the same command continues it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mmchat.data.shard_index import ShardReport
from mmchat.data.shard_writer import Chunk, shard_path
from mmchat.data.shards import index_path

_LOCK_PATIENCE_S = 3.0  # the workers of a run that was killed notice it within a second


@dataclass(frozen=True)
class ShardLine:
    """One finished chunk.

    Attributes:
        digest: of the chunk, see Chunk.
        sha256: of the shard; None where no sample of the chunk was usable, and there is none.
        problems, examples: see ShardReport; the source's own are among them.
    """

    number: int
    digest: str
    num_samples: int
    num_bytes: int
    sha256: str | None
    problems: Mapping[str, int]
    examples: Mapping[str, list[str]]


class Journal:
    """OUT/.make_shards.jsonl: what was asked, then one line for each finished shard, on the disk before it counts.

    At the end its lines are sorted and OUT/report.json is written, so the folder says nothing of how it came to be.
    Opening removes what a killed run left half written. OUT must be locked, see `locked`.

    Raises ValueError where OUT was made by another command.
    """

    def __init__(self, out: Path, asked: Mapping[str, Any], verify: bool = False) -> None:
        self.out = out
        self.asked = asked
        self.path = out / ".make_shards.jsonl"
        self.report_path = out / "report.json"
        self.added: list[ShardLine] = []
        self.is_finished = False
        self._lines = self._read(verify)
        self.num_found = len(self._lines)
        self.is_finished = self.is_finished and self.report_path.exists()
        if not self.is_finished:
            self.report_path.unlink(missing_ok=True)
            self._remove_strays()
            self._write(self._lines)
        self._file = open(self.path, "ab")  # noqa: SIM115 -- closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if not self.is_finished:
            self._remove_strays()

    def left(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks that have no finished shard.

        Raises ValueError where a finished shard was made of another chunk: the source is not the same.
        """
        count = 0
        for chunk in chunks:
            count += 1
            line = self._lines.get(chunk.number)
            if line is None:
                yield chunk
            elif line.digest != chunk.digest:
                raise ValueError(
                    f"the source has changed: shard {chunk.number} in {self.out} was made of other records. "
                    "Remove that folder, or name another OUT"
                )
        if beyond := [number for number in self._lines if number >= count]:
            raise ValueError(
                f"the source has changed: it fills {count} shards now, {self.out} has one numbered {max(beyond)}. "
                "Remove that folder, or name another OUT"
            )

    def add(self, line: ShardLine) -> None:
        """Notes a finished shard; it is on the disk when this returns."""
        self._file.write(_encoded(asdict(line)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines[line.number] = line
        self.added.append(line)

    def finish(self) -> None:
        """Writes the sorted journal, then the report, whose presence says that nothing is left to do."""
        self._remove_strays()
        self._write(self._lines)
        report = self.report()
        skipped = [
            {"reason": reason, "count": count, "examples": report.examples[reason]}
            for reason, count in report.problems.most_common()
        ]
        content = {
            "asked": self.asked,
            "num_shards": len(report.shards),
            "num_samples": report.num_samples,
            "num_bytes": report.num_bytes,
            "num_skipped": report.problems.total(),
            "skipped": skipped,
        }
        _replace(self.report_path, _text(content, indent=2))
        self.is_finished = True

    def report(self) -> ShardReport:
        """All that was written and skipped so far, in the order of the source."""
        report = ShardReport()
        for _, line in sorted(self._lines.items()):
            shards = [shard_path(self.out, line.number)] if line.num_samples else []
            report.merge(
                ShardReport(shards, line.num_samples, line.num_bytes, Counter(line.problems), dict(line.examples))
            )
        return report

    def _read(self, verify: bool) -> dict[int, ShardLine]:
        """The finished shards that are still whole. Raises ValueError."""
        asked, rows, is_damaged = _rows_of(self.path)
        if is_damaged:
            print(f"{self.path} has damaged lines, as of a stopped run: their shards are made again", file=sys.stderr)
        if asked is None:
            if any(self.out.glob("*.tar")):
                raise ValueError(
                    f"{self.out} already has shards, and no whole journal of how they were made; name another OUT"
                )
            return {}
        if rows and asked != self.asked:
            names = dict.fromkeys([*asked, *self.asked])
            changed = [
                f"  {name}: {asked.get(name)!r} then, {self.asked.get(name)!r} now"
                for name in names
                if asked.get(name) != self.asked.get(name)
            ]
            raise ValueError(
                f"{self.out} was begun by another command; name another OUT, or repeat that one:\n" + "\n".join(changed)
            )
        whole = {line.number: line for line in rows if self._is_whole(line, verify)}
        self.is_finished = not is_damaged and 0 < len(whole) == len(rows)
        return whole

    def _is_whole(self, line: ShardLine, verify: bool) -> bool:
        path = shard_path(self.out, line.number)
        if line.num_samples == 0:
            return not path.exists()
        if not path.is_file() or path.stat().st_size != line.num_bytes or not index_path(path).is_file():
            return False
        if not verify:
            return True
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == line.sha256

    def _write(self, lines: Mapping[int, ShardLine]) -> None:
        rows = [self.asked, *(asdict(line) for _, line in sorted(lines.items()))]
        _replace(self.path, b"".join(map(_encoded, rows)))

    def _remove_strays(self) -> None:
        """What is not whole, and shards that are not in the journal."""
        for path in self.out.glob(".*.partial"):
            path.unlink(missing_ok=True)
        for path in self.out.glob("*.tar"):
            if path.stem.isdecimal() and int(path.stem) not in self._lines:
                path.unlink()
                index_path(path).unlink(missing_ok=True)


def asked_before(out: Path) -> Mapping[str, Any]:
    """What the run asked that began OUT; empty where there was none. Raises ValueError for a damaged journal."""
    return _rows_of(out / ".make_shards.jsonl")[0] or {}


def _rows_of(path: Path) -> tuple[dict[str, Any] | None, list[ShardLine], bool]:
    """What was asked (None: nothing was begun), the finished shards, and whether other lines cannot be read.

    A shard whose line cannot be read is made again. Raises ValueError where it is not known what was asked.
    """
    if not path.exists():
        return None, [], False
    asked: dict[str, Any] | None = None
    rows: list[ShardLine] = []
    is_damaged = False
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            row = json.loads(line)
            if asked is None:
                asked = dict(row)
            else:
                rows.append(ShardLine(**row))
        except (ValueError, TypeError) as error:
            is_damaged = True
            if number == 1 and line.endswith(b"\n"):
                raise ValueError(
                    f"{path} line 1 is damaged, as by a power cut, so what was asked is not known: remove "
                    f"{path.parent} and run the command again"
                ) from error
    return asked, rows, is_damaged


def _encoded(row: Mapping[str, Any]) -> bytes:
    return _text(row, separators=(",", ":"))


def _text(content: Mapping[str, Any], **style: Any) -> bytes:
    """JSON in one form for any text: names of files and damaged rows may hold what UTF-8 cannot."""
    return json.dumps(content, ensure_ascii=False, **style).encode("utf-8", "backslashreplace") + b"\n"


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it. Raises ValueError where there is one, or a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"OUT {folder} is not a folder, or lies below a file; name another OUT") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(f"another process is writing {folder}; wait for it, or name another OUT") from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield
    finally:
        os.close(descriptor)
