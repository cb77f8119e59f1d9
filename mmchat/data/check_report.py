"""What a check of shards found: counts by reason with examples, and what shows only in all shards together.

In memory stay 8 bytes and a sample's number (4) for each key, sample and media item that was read. The 8 bytes begin
its SHA-256: among a hundred million contents, one false match is expected in a few thousand checks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmchat.data.shards import Shard
from mmchat.errors import SampleError
from mmchat.storage import CacheConfig, is_url

Severity = Literal["error", "warning"]

REPORT_FORMAT = 1
MAX_EXAMPLES = 3


@dataclass(frozen=True)
class Use:
    """How a stage reads samples: its task, and the budgets of its packs; None where there is no configuration."""

    task: str
    tokens: int | None = None
    patches: int | None = None


@dataclass(frozen=True)
class Job:
    """One shard to check, the sources that hold it and their uses of it.

    is_evaluation: its media must not be among the other shards'. only_hash: nothing else is asked of it.
    """

    path: str
    sources: tuple[str, ...]
    uses: tuple[Use, ...] = ()
    is_evaluation: bool = False
    only_hash: bool = False


@dataclass
class Finding:
    """A kind of fault: how often it was met, in which sources, and the first examples (shard, key, detail)."""

    severity: Severity
    reason: str
    count: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)


class Findings(dict[tuple[Severity, str], Finding]):
    """Findings by severity and reason."""

    def add(self, severity: Severity, reason: str, job: Job, key: str, detail: str, count: int = 1) -> None:
        detail = detail.removeprefix(f"{job.path}: ").removeprefix(f"{key}: ")
        example = {"shard": job.path, "key": key, "detail": detail}
        self._merge(Finding(severity, reason, count, Counter(dict.fromkeys(job.sources, count)), [example]))

    def merge(self, others: Findings) -> None:
        for finding in others.values():
            self._merge(finding)

    def count(self, severity: Severity, source: str | None = None) -> int:
        chosen = [finding for finding in self.values() if finding.severity == severity]
        return sum(finding.count if source is None else finding.sources[source] for finding in chosen)

    def _merge(self, other: Finding) -> None:
        own = self.setdefault((other.severity, other.reason), Finding(other.severity, other.reason))
        own.count += other.count
        own.sources += other.sources
        own.examples = (own.examples + other.examples)[:MAX_EXAMPLES]


class Hashes:
    """Contents as 64 bits of their hash, each with the number of its sample in the shard."""

    def __init__(self) -> None:
        self.values, self.owners = array("Q"), array("I")

    def add(self, content: bytes, owner: int) -> str:
        """Returns the whole SHA-256, as text."""
        digest = hashlib.sha256(content)
        self.values.append(int.from_bytes(digest.digest()[:8], "little"))
        self.owners.append(owner)
        return digest.hexdigest()


@dataclass
class ShardCheck:
    """What was found in one shard. num_bad counts samples with an error; sha256 is None where it is not known."""

    job: Job
    num_samples: int = 0
    num_bytes: int = 0
    num_bad: int = 0
    media: Counter[str] = field(default_factory=Counter)
    sha256: str | None = None
    findings: Findings = field(default_factory=Findings)
    keys: Hashes = field(default_factory=Hashes)
    samples: Hashes = field(default_factory=Hashes)
    items: Hashes = field(default_factory=Hashes)

    def add(self, severity: Severity, reason: str, key: str, detail: str) -> None:
        self.findings.add(severity, reason, self.job, key, detail)


def open_shard(path: str, cache: CacheConfig | None = None) -> Shard:
    """Raises ValueError."""
    return Shard(path if is_url(path) else Path(path), cache)


class Report:
    """All shards of a check. `checks` come in the order of the shards, whatever order they were made in."""

    def __init__(self, checks: Sequence[ShardCheck], cache: CacheConfig | None = None) -> None:
        self.cache = cache
        self.findings = Findings()
        for check in checks:
            self.findings.merge(check.findings)
        self.checks = checks
        self.sources = list(dict.fromkeys(source for check in checks for source in check.job.sources))
        whole = [check for check in checks if not check.job.only_hash]
        first = self._without_duplicate_shards(whole)
        evaluation = [check for check in checks if check.job.is_evaluation]
        for group in ([c for c in first if not c.job.is_evaluation], [c for c in first if c.job.is_evaluation]):
            self._repeated(group, "samples", "duplicate sample", "the same facts and media as {}")
        for source in self.sources:
            held = [check for check in whole if source in check.job.sources]
            if held and all(check.sha256 and not check.num_samples for check in held):
                self.findings.add("error", "empty source", held[0].job, "", f"{source} holds no samples")
        # The same shards under several names are looked at once.
        held_by = [tuple(i for i, check in enumerate(first) if name in check.job.sources) for name in self.sources]
        for numbers in dict.fromkeys(held_by):
            own = [first[i] for i in numbers]
            self._repeated(own, "keys", "key in several shards", "also in {}; logs tell samples apart by their keys")
        if evaluation:
            self._overlap([c for c in whole if not c.job.is_evaluation], evaluation)

    def _without_duplicate_shards(self, checks: list[ShardCheck]) -> list[ShardCheck]:
        """Notes shards of the same content, which training refuses within a source; returns the first of each."""
        by_content: dict[str, list[ShardCheck]] = {}
        for check in checks:
            if check.sha256 is None:
                continue
            before = by_content.setdefault(check.sha256, [])
            if before:
                own = [other for other in before if set(check.job.sources) & set(other.job.sources)]
                detail = f"the same bytes as {(own or before)[0].job.path}"
                self.findings.add("error" if own else "warning", "duplicate shard", check.job, "", detail)
            before.append(check)
        return [check for check in checks if check.sha256 is None or by_content[check.sha256][0] is check]

    def _repeated(self, checks: Sequence[ShardCheck], table: str, reason: str, detail: str) -> None:
        """Every content that was there before, in the order of the shards."""
        hashes = _Table(checks, table, self.cache)
        order = np.argsort(hashes.values, kind="stable")
        again = np.flatnonzero(np.diff(hashes.values[order]) == 0)
        copies, originals = order[again + 1], order[again]
        self._add_places("warning", reason, hashes, copies, [hashes.name(k) for k in originals[:MAX_EXAMPLES]], detail)

    def _overlap(self, train: Sequence[ShardCheck], evaluation: Sequence[ShardCheck]) -> None:
        own, others = _Table(train, "items", self.cache), _Table(evaluation, "items", self.cache)
        order = np.argsort(others.values)
        found = np.flatnonzero(np.isin(own.values, others.values))
        first = order[np.searchsorted(others.values, own.values[found[:MAX_EXAMPLES]], sorter=order)]
        names = [others.name(k) for k in first]
        self._add_places("error", "media also in evaluation", own, found, names, "the same bytes as in {}")

    def _add_places(
        self, severity: Severity, reason: str, hashes: _Table, places: np.ndarray, others: list[str], detail: str
    ) -> None:
        """One example for each of `others`, the rest as counts of their shards."""
        for k, other in zip(places, others, strict=False):
            self.findings.add(severity, reason, hashes.check(k).job, hashes.key(k), detail.format(other))
        rest = np.bincount(hashes.shard_numbers(places[len(others) :]), minlength=len(hashes.checks))
        for check, count in zip(hashes.checks, rest.tolist(), strict=True):
            if count:
                self.findings.add(severity, reason, check.job, "", "and more of this shard", count)

    def as_json(self) -> dict[str, Any]:
        """The schema is in data_prep/README.md."""
        order = sorted(self.findings.values(), key=lambda finding: (finding.severity, -finding.count, finding.reason))
        return {
            "format": REPORT_FORMAT,
            "errors": self.findings.count("error"),
            "warnings": self.findings.count("warning"),
            "sources": {source: self._totals(source) for source in self.sources},
            "findings": [vars(finding) for finding in order],
        }

    def _totals(self, source: str) -> dict[str, Any]:
        checks = [check for check in self.checks if source in check.job.sources]
        return {
            "shards": len(checks),
            "samples": sum(check.num_samples for check in checks),
            "bytes": sum(check.num_bytes for check in checks),
            "media": dict(sum((check.media for check in checks), Counter[str]())),
            "bad_samples": sum(check.num_bad for check in checks),
            "errors": self.findings.count("error", source),
            "warnings": self.findings.count("warning", source),
        }


class _Table:
    """One kind of hashes of several shards, end to end."""

    def __init__(self, checks: Sequence[ShardCheck], kind: str, cache: CacheConfig | None) -> None:
        self.checks, self.cache = checks, cache
        self.parts: list[Hashes] = [getattr(check, kind) for check in checks]
        self.ends = np.cumsum([0, *(len(part.values) for part in self.parts)])[1:]
        values = [np.array(part.values, np.uint64) for part in self.parts]
        self.values = np.concatenate([np.empty(0, np.uint64), *values])

    def shard_numbers(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, places, side="right")

    def check(self, place: int) -> ShardCheck:
        return self.checks[int(np.searchsorted(self.ends, place, side="right"))]

    def key(self, place: int) -> str:
        """The key of the sample that has a content; its number where the shard has no usable index."""
        number = int(np.searchsorted(self.ends, place, side="right"))
        owner = self.parts[number].owners[int(place) - int(self.ends[number]) + len(self.parts[number].values)]
        try:
            return open_shard(self.checks[number].job.path, self.cache).entry(owner).key
        except (SampleError, ValueError, OSError):
            return f"sample {owner}"

    def name(self, place: int) -> str:
        return f"{self.check(place).job.path}: {self.key(place)}"
