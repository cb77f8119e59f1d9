"""The loader: worker processes own whole lanes, and a step is one pack from each lane of this rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmchat.batch import Batch
from mmchat.config import StageConfig
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.pack import BadSample, LanePacker, collate, join, load_media
from mmchat.errors import SampleError

# Decoders have time limits of their own; this one turns anything else that hangs into an error.
WORKER_TIMEOUT_S = 1800


@dataclass(frozen=True)
class LoadedPack:
    """One decoded pack of one lane, and where the lane stands after it."""

    lane: int
    batch: Batch
    numbers: tuple[SampleId, ...]
    bad: tuple[BadSample, ...]
    state: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What this rank feeds to one optimizer step.

    states: lane -> state after this step. capacity: tokens that the packs could hold.
    """

    batches: list[Batch]
    numbers: tuple[SampleId, ...]
    bad: tuple[BadSample, ...]
    states: dict[int, dict[str, Any]]
    capacity: int
    wait_s: float

    @property
    def num_tokens(self) -> int:
        return sum(batch.token_ids.numel() for batch in self.batches)

    @property
    def num_learned(self) -> int:
        return sum(batch.num_learned for batch in self.batches)

    @property
    def num_boxes(self) -> int:
        return sum(batch.num_boxes for batch in self.batches)


class Loader:
    """Steps for one rank of a stage, from the start or from saved lane states.

    Raises:
        ValueError: the number of lanes does not fit the number of ranks.
    """

    def __init__(
        self,
        stage: StageConfig,
        seed: int,
        template: ChatTemplate,
        rank: int = 0,
        world_size: int = 1,
        states: Mapping[int, dict[str, Any]] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        per_step, joined = stage.batch.lanes, stage.batch.packs_per_micro_batch
        if per_step % (world_size * joined):
            raise ValueError(
                f"stage {stage.name}: batch.lanes {per_step} must be a multiple of ranks x packs_per_micro_batch "
                f"({world_size} x {joined})"
            )
        self.stage = stage
        self.lanes = list(range(rank, per_step, world_size))
        self.mixture = mixture or Mixture(stage.data)
        source = _LaneSource(stage, seed, template, self.mixture, self.lanes, dict(states or {}))
        self.num_workers = min(stage.workers, len(self.lanes))
        timeout = WORKER_TIMEOUT_S if self.num_workers else 0
        self._packs: Iterator[list[LoadedPack]] = iter(
            DataLoader(source, batch_size=None, num_workers=self.num_workers, timeout=timeout)
        )

    @property
    def num_micro_batches(self) -> int:
        return len(self.lanes) // self.stage.batch.packs_per_micro_batch

    def next_step(self) -> Step:
        """The next step; the same for any number of workers."""
        start = time.perf_counter()
        packs = [pack for _ in range(max(1, self.num_workers)) for pack in next(self._packs)]
        packs.sort(key=lambda pack: pack.lane)
        joined = self.stage.batch.packs_per_micro_batch
        return Step(
            batches=[join([pack.batch for pack in packs[i : i + joined]]) for i in range(0, len(packs), joined)],
            numbers=tuple(number for pack in packs for number in pack.numbers),
            bad=tuple(bad for pack in packs for bad in pack.bad),
            states={pack.lane: pack.state for pack in packs},
            capacity=len(packs) * self.stage.batch.tokens,
            wait_s=time.perf_counter() - start,
        )


class _LaneSource(IterableDataset[list[LoadedPack]]):
    """In each worker: one pack from each of its lanes, again and again."""

    def __init__(
        self,
        stage: StageConfig,
        seed: int,
        template: ChatTemplate,
        mixture: Mixture,
        lanes: list[int],
        states: dict[int, dict[str, Any]],
    ) -> None:
        self.stage = stage
        self.seed = seed
        self.template = template
        self.mixture = mixture
        self.lanes = lanes
        self.states = states

    def __iter__(self) -> Iterator[list[LoadedPack]]:
        info = get_worker_info()
        own = self.lanes if info is None else self.lanes[info.id :: info.num_workers]
        packers = {lane: self._packer(lane) for lane in own}
        while True:
            yield [self._load(lane, packer) for lane, packer in packers.items()]

    def _packer(self, number: int) -> LanePacker:
        stage = self.stage
        lane = self.mixture.lane(self.seed, stage.name, number, stage.batch.lanes)
        packer = LanePacker(lane, self.mixture, self.template, stage.batch, self.seed, stage.name)
        if number in self.states:
            packer.load_state(self.states[number])
        return packer

    def _load(self, lane: int, packer: LanePacker) -> LoadedPack:
        planned = packer.next()
        bad = packer.take_bad()
        samples: list[Sample] = []
        media = []
        for number, sample in planned:
            try:
                tensors = load_media(sample, self.template)
            except SampleError as error:
                # The plan must not shift: a token that nothing is learned from stands in.
                bad.append(BadSample(number.source, sample.key, error.reason, error.detail))
                sample, tensors = self.template.stub(sample.key), []
            samples.append(sample)
            media.append(tensors)
        numbers = tuple(number for number, _ in planned)
        return LoadedPack(lane, collate(samples, media), numbers, tuple(bad), packer.state())
