"""Packs: conversations laid end to end in one row, within a token budget and an encoder-patch budget.

Sizes are known from headers, so a pack is planned before anything of it is decoded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmchat.batch import Batch, MediaBatch
from mmchat.config import BatchConfig
from mmchat.conversation import MODALITIES
from mmchat.data.chat_template import ChatTemplate, PlannedMedia, Sample
from mmchat.data.lanes import Lane, SampleId
from mmchat.data.mixture import Mixture
from mmchat.errors import SampleError

# A source of nothing but unusable samples must end the run, not spin.
MAX_BAD_IN_A_ROW = 200


@dataclass(frozen=True)
class BadSample:
    """A sample that was left out, for the log."""

    source: str
    key: str
    reason: str
    detail: str


class LanePacker:
    """Draws a lane's samples and plans its packs.

    A few samples wait in the lane for a pack that they fit; the one that has waited longest always goes first, so none
    starves. The state is the lane's position and the waiting samples' numbers.
    """

    def __init__(
        self, lane: Lane, mixture: Mixture, template: ChatTemplate, batch: BatchConfig, seed: int, stage: str
    ) -> None:
        self.lane = lane
        self.mixture = mixture
        self.template = template
        self.batch = batch
        self.seed_words = f"{seed}/{stage}"
        self.waiting: list[tuple[SampleId, Sample]] = []
        self.bad: list[BadSample] = []

    def next(self) -> list[tuple[SampleId, Sample]]:
        """Plans the next pack. Raises RuntimeError where nothing but bad samples is drawn."""
        pack: list[tuple[SampleId, Sample]] = []
        tokens, patches = self.batch.tokens, self.batch.patches
        while True:
            self._draw()
            fits = [
                i
                for i, (_, sample) in enumerate(self.waiting)
                if len(sample) <= tokens and sample.num_patches <= patches
            ]
            if not fits:
                return pack
            chosen = max(fits, key=lambda i: len(self.waiting[i][1])) if pack else fits[0]
            taken = self.waiting.pop(chosen)
            pack.append(taken)
            tokens -= len(taken[1])
            patches -= taken[1].num_patches

    def take_bad(self) -> list[BadSample]:
        """Samples left out since the last call."""
        bad, self.bad = self.bad, []
        return bad

    def state(self) -> dict[str, Any]:
        return {"lane": self.lane.state(), "waiting": [list(number) for number, _ in self.waiting]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; only the waiting samples are planned again."""
        self.lane.load_state(state["lane"])
        planned = [(number, self._plan(number)) for number in (SampleId(*saved) for saved in state["waiting"])]
        self.waiting = [(number, sample) for number, sample in planned if sample is not None]
        self.bad = []

    def _draw(self) -> None:
        failed = 0
        while len(self.waiting) < self.batch.lookahead:
            number = self.lane.next()
            sample = self._plan(number)
            if sample is not None:
                self.waiting.append((number, sample))
                continue
            failed += 1
            if failed > MAX_BAD_IN_A_ROW:
                last = self.bad[-1]
                raise RuntimeError(
                    f"{failed} samples in a row could not be used; the last, {last.key} of {last.source}: "
                    f"{last.reason}: {last.detail}"
                )

    def _plan(self, number: SampleId) -> Sample | None:
        key = f"{number.source}#{number.index}"
        try:
            record = self.mixture.record(number)
            key = f"{number.source}/{record.key}"
            words = f"{self.seed_words}/{number.source}/{number.epoch}/{number.index}"
            conversation = self.mixture.tasks[number.source].conversation(record, random.Random(f"{words}/phrase"))
            return self.template.fit(conversation, key, f"{words}/dropout", self.batch.tokens, self.batch.patches)
        except SampleError as error:
            self.bad.append(BadSample(number.source, key, error.reason, error.detail))
            return None


def load_media(sample: Sample, template: ChatTemplate) -> list[Tensor]:
    """Decodes a sample's items, each [parts, ...]. Raises SampleError."""
    tensors = []
    for item in sample.media:
        try:
            data = item.ref.read()
        except OSError as error:
            raise SampleError("unreadable shard", str(error)) from error
        tensors.append(template.preprocesses[item.modality](data, item.plan))
    return tensors


def collate(samples: Sequence[Sample], media: Sequence[Sequence[Tensor]]) -> Batch:
    """One row of conversations end to end, from planned samples and their decoded items."""
    offsets = np.cumsum([0, *(len(sample) for sample in samples)])
    offsets = offsets[:-1].tolist()
    items: dict[str, list[tuple[PlannedMedia, Tensor, int, int]]] = {}
    for segment, (offset, sample, tensors) in enumerate(zip(offsets, samples, media, strict=True)):
        for item, tensor in zip(sample.media, tensors, strict=True):
            items.setdefault(item.modality, []).append((item, tensor, offset, segment))

    return Batch(
        token_ids=_ints([[token for sample in samples for token in sample.token_ids]]),
        labels=_ints([[label for sample in samples for label in sample.labels]]),
        segment_ids=_ints([[i for i, sample in enumerate(samples) for _ in range(len(sample))]]),
        positions=_ints([[position for sample in samples for position in range(len(sample))]]),
        presence=torch.from_numpy(np.concatenate([sample.gates for sample in samples]))[None],
        media={
            modality: MediaBatch(
                data=torch.cat([tensor for _, tensor, _, _ in items[modality]]),
                shapes=tuple(item.plan.shape for item, *_ in items[modality]),
                index=_ints([offset + place for item, _, offset, _ in items[modality] for place in item.places]),
                anchors=_ints([(0, segment, item.start) for item, _, _, segment in items[modality]]),
                times_s=tuple(item.plan.times_s for item, *_ in items[modality]),
                boxes=tuple(item.boxes for item, *_ in items[modality]),
            )
            for modality in MODALITIES
            if modality in items
        },
        keys=tuple(sample.key for sample in samples),
    )


def _ints(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def join(packs: Sequence[Batch]) -> Batch:
    """Several packs as one longer row, for one forward pass over all of them."""
    if len(packs) == 1:
        return packs[0]
    lengths = [pack.token_ids.shape[1] for pack in packs]
    segments = [int(pack.segment_ids.max()) + 1 for pack in packs]
    token_offsets = np.cumsum([0, *lengths])[:-1].tolist()
    segment_offsets = np.cumsum([0, *segments])[:-1].tolist()
    media: dict[str, MediaBatch] = {}
    for modality in MODALITIES:
        found = [
            (pack.media[modality], token_offset, torch.tensor([0, segment_offset, 0]))
            for pack, token_offset, segment_offset in zip(packs, token_offsets, segment_offsets, strict=True)
            if modality in pack.media
        ]
        if found:
            media[modality] = MediaBatch(
                data=torch.cat([item.data for item, _, _ in found]),
                shapes=tuple(shape for item, _, _ in found for shape in item.shapes),
                index=torch.cat([item.index + offset for item, offset, _ in found]),
                anchors=torch.cat([item.anchors + offset for item, _, offset in found]),
                times_s=tuple(times_s for item, _, _ in found for times_s in item.times_s),
                boxes=tuple(boxes for item, _, _ in found for boxes in item.boxes),
            )
    return Batch(
        token_ids=torch.cat([pack.token_ids for pack in packs], dim=1),
        labels=torch.cat([pack.labels for pack in packs], dim=1),
        segment_ids=torch.cat(
            [pack.segment_ids + offset for pack, offset in zip(packs, segment_offsets, strict=True)], dim=1
        ),
        positions=torch.cat([pack.positions for pack in packs], dim=1),
        presence=torch.cat([pack.presence for pack in packs], dim=1),
        media=media,
        keys=tuple(key for pack in packs for key in pack.keys),
    )
