"""Mixtures: named sources of shards with weights, and the way from a sample's number to its record."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmchat.config import SourceConfig
from mmchat.conversation import Record
from mmchat.data.lanes import Lane, SampleId, Source
from mmchat.data.shards import Shard, expand_shards
from mmchat.storage import CacheConfig
from mmchat.tasks import TASKS, Task


class Mixture:
    """The opened sources of a stage; shards behind URLs are read through `cache`.

    Attributes:
        sources: names and sizes, for lanes.
        weights: share of the samples drawn from each source; they add up to one.
        tasks: source name to task.

    Raises ValueError where names repeat, a task is unknown, or a source's shards are missing, broken or
    empty.
    """

    def __init__(self, configs: Sequence[SourceConfig], cache: CacheConfig | None = None) -> None:
        if not configs:
            raise ValueError("a mixture needs at least one source")
        if twice := [name for name, count in Counter(config.name for config in configs).items() if count > 1]:
            raise ValueError(f"sources must have different names; found more than once: {twice}")
        self._shards = {config.name: _open_shards(config, cache) for config in configs}
        self._ends = {  # source name to [shards] number of samples up to the end of each shard
            name: np.cumsum([shard.num_samples for shard in shards]) for name, shards in self._shards.items()
        }
        self.tasks = {config.name: _task(config) for config in configs}
        self.sources = tuple(
            Source(name, tuple(shard.num_samples for shard in shards)) for name, shards in self._shards.items()
        )
        total = sum(config.weight for config in configs)
        self.weights = tuple(config.weight / total for config in configs)

    def fingerprint(self) -> str:
        """Hash of every source's name and shards' contents: what the positions of lanes refer to."""
        facts = [(name, [shard.sha256 for shard in shards]) for name, shards in self._shards.items()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def lane(self, seed: int, stage: str, lane: int, num_lanes: int) -> Lane:
        return Lane(self.sources, self.weights, seed, stage, lane, num_lanes)

    def locate(self, sample: SampleId) -> tuple[Shard, int]:
        """The shard that holds a sample, and the sample's number in it."""
        ends = self._ends[sample.source]
        number = int(np.searchsorted(ends, sample.index, side="right"))
        return self._shards[sample.source][number], sample.index - (int(ends[number - 1]) if number else 0)

    def record(self, sample: SampleId) -> Record:
        """Reads one sample's facts. Raises SampleError."""
        shard, i = self.locate(sample)
        return shard.record(i)


def _task(config: SourceConfig) -> Task:
    if config.task not in TASKS:
        near = difflib.get_close_matches(config.task, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"source {config.name!r}: no task {config.task!r}, there are {sorted(TASKS)}{hint}")
    return TASKS[config.task]


def _open_shards(config: SourceConfig, cache: CacheConfig | None) -> list[Shard]:
    def opened(path: Path | str) -> Shard | ValueError:
        try:
            return Shard(path, cache)
        except ValueError as error:
            return error

    shards: list[Shard] = []
    errors: list[str] = []
    try:
        paths = expand_shards(config.shards)
    except ValueError as error:
        raise ValueError(f"source {config.name!r}: {error}") from error
    with ThreadPoolExecutor(16) as pool:  # a store answers after milliseconds, and there may be thousands of shards
        for shard in pool.map(opened, paths):
            if isinstance(shard, Shard):
                shards.append(shard)
            else:
                errors.append(str(shard))
    if errors:
        raise ValueError(f"source {config.name!r}: {len(errors)} shards cannot be used:\n  " + "\n  ".join(errors))
    if not any(shard.num_samples for shard in shards):
        raise ValueError(f"source {config.name!r}: its {len(shards)} shards hold no samples")
    by_content: dict[str, Shard] = {}
    for shard in shards:
        first = by_content.setdefault(shard.sha256, shard)
        if first is not shard:
            raise ValueError(
                f"source {config.name!r}: {first.path} and {shard.path} have the same content, "
                "which would be trained twice. Remove one, or raise the source's weight instead"
            )
    return shards
