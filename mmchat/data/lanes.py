"""The order of samples as a pure function of seed, stage, lane, mixture weights and source sizes.

A stage has a fixed number of lanes. In every epoch of a source, blocks of neighbouring samples are permuted
and dealt to the lanes, and the samples are shuffled inside each block: together the lanes see every sample
exactly once. Ranks, workers and machines do not occur here; whoever owns a lane draws the same samples.

Randomness is a hash of names and counters (blake2b), stretched by Philox' raw bits, which numpy keeps the
same in all versions (it does not promise that of `permutation` and `choice`). So any position is reached
without a replay.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

BLOCK_SIZE = 64
# A small source is cut finer, so that the lanes' shares of an epoch differ by about an eighth at most.
BLOCKS_PER_LANE = 8


class SampleId(NamedTuple):
    """One sample: its number through all shards of the source, and the lane's pass through the source."""

    source: str
    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which has no use here


@dataclass(frozen=True)
class Source:
    """The sizes of one source of samples.

    Attributes:
        shard_sizes: samples in each shard.
        block_size: neighbouring samples that are read together, at most; a block lies within one shard.
    """

    name: str
    shard_sizes: tuple[int, ...]
    block_size: int = BLOCK_SIZE

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    def block_starts(self, num_lanes: int) -> np.ndarray:
        """[blocks + 1] index of the first sample of each block, and the number of samples at the end."""
        return _block_starts(self.shard_sizes, self.block_size, num_lanes)


class Lane:
    """An endless sequence of samples, and where it stands.

    Raises ValueError for sources without samples, names that occur twice and weights that are not positive.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        stage: str,
        lane: int,
        num_lanes: int,
    ) -> None:
        if not 0 <= lane < num_lanes:
            raise ValueError(f"lane {lane} is not one of {num_lanes}")
        if len({source.name for source in sources}) != len(sources) or not sources:
            raise ValueError(f"a lane needs sources of different names, found {[source.name for source in sources]}")
        if empty := [source.name for source in sources if source.num_samples == 0]:
            raise ValueError(f"sources without samples: {empty}")
        if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"{len(sources)} sources need as many positive weights, found {list(weights)}")
        total = math.fsum(weights)
        # The last source takes the rest, so that rounding leaves no gap.
        self._bounds = [bound / total for bound in itertools.accumulate(weights)][:-1]
        self._draw_words = (seed, stage, "draw", lane)
        self._shares = [_Share(source, (seed, stage, source.name), lane, num_lanes) for source in sources]
        self._draws = 0

    def next(self) -> SampleId:
        """Draws a source by the weights, then takes that source's next sample."""
        share = self._shares[bisect.bisect_right(self._bounds, _uniform(*self._draw_words, self._draws))]
        self._draws += 1
        return share.next()

    def state(self) -> dict[str, Any]:
        """Where the lane stands, as JSON: {"draws": n, "sources": {name: [epoch, position]}}."""
        sources = {share.source.name: [share.epoch, share.position] for share in self._shares}
        return {"draws": self._draws, "sources": sources}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, without replay. Raises ValueError if it is of other sources."""
        names = {share.source.name for share in self._shares}
        if state["sources"].keys() != names:
            raise ValueError(
                f"the lane state is of sources {sorted(state['sources'])}, the mixture has {sorted(names)}; "
                "continue with the same sources, or start the stage anew"
            )
        self._draws = int(state["draws"])
        for share in self._shares:
            share.epoch, share.position = (int(x) for x in state["sources"][share.source.name])


class _Share:
    """One lane's part of one source: the blocks dealt to it in each epoch."""

    def __init__(self, source: Source, words: tuple[int | str, ...], lane: int, num_lanes: int) -> None:
        self.source = source
        self.epoch = 0
        self.position = 0
        self._words = words
        self._lane = lane
        self._num_lanes = num_lanes
        # What was worked out last: the blocks dealt in one epoch, and the order inside one block.
        self._dealt: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, first samples, ends
        self._order: tuple[int, int, np.ndarray] | None = None  # epoch, first sample, order

    def next(self) -> SampleId:
        starts, ends = self._blocks()
        while self.position >= (ends[-1] if len(ends) else 0):
            self.epoch, self.position = self.epoch + 1, 0
            starts, ends = self._blocks()
        block = int(np.searchsorted(ends, self.position, side="right"))
        start, before = int(starts[block]), int(ends[block - 1]) if block else 0
        if self._order is None or self._order[:2] != (self.epoch, start):
            order = start + _permutation(int(ends[block]) - before, *self._words, "samples", self.epoch, start)
            self._order = (self.epoch, start, order)
        index = int(self._order[2][self.position - before])
        self.position += 1
        return SampleId(self.source.name, self.epoch, index)

    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """[own blocks] each: first sample of a block in this epoch, and the lane's position where it ends."""
        if self._dealt is None or self._dealt[0] != self.epoch:
            starts = self.source.block_starts(self._num_lanes)
            num_blocks = len(starts) - 1
            # The deal begins at another lane in every epoch: of few samples, all lanes get their turn.
            first = (self._lane + self.epoch) % self._num_lanes
            own = np.zeros(0, dtype=np.int64)
            if first < num_blocks:
                own = _block_order(num_blocks, self._words, self.epoch)[first :: self._num_lanes]
            self._dealt = (self.epoch, starts[own], np.cumsum(starts[own + 1] - starts[own]))
        return self._dealt[1], self._dealt[2]


@lru_cache(maxsize=256)  # all lanes of a process share one table a source
def _block_starts(shard_sizes: tuple[int, ...], block_size: int, num_lanes: int) -> np.ndarray:
    total = sum(shard_sizes)
    size = max(1, min(block_size, total // (BLOCKS_PER_LANE * num_lanes)))
    ends = itertools.accumulate(shard_sizes)
    starts = [np.arange(end - num, end, size) for num, end in zip(shard_sizes, ends, strict=True)]
    return np.concatenate([*starts, np.array([total])]).astype(np.int64)


@lru_cache(maxsize=16)  # lanes of a process come to an epoch at about the same time
def _block_order(num_blocks: int, words: tuple[int | str, ...], epoch: int) -> np.ndarray:
    return _permutation(num_blocks, *words, "blocks", epoch)


def _digest(size: int, words: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(words).encode(), digest_size=size).digest(), "little")


def _uniform(*words: int | str) -> float:
    """A number in [0, 1)."""
    return (_digest(8, words) >> 11) / 2**53


def _permutation(length: int, *words: int | str) -> np.ndarray:
    bits = np.random.Philox(key=_digest(16, words)).random_raw(length)
    return np.argsort(bits, kind="stable")
