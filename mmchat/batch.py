"""The typed batch that every path feeds to the model: training, scoring and generation alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmchat.conversation import Box

IGNORE = -100

# (time, height, width) of the features that an encoder yields for one item; a still image has time 1, audio height
# and width 1.
FeatureShape = tuple[int, int, int]


@dataclass(frozen=True)
class MediaBatch:
    """Every item of one modality in a batch, in reading order.

    Attributes:
        data: encoder input, items stacked along the first axis: images [items, 3, height, width], video frames
            [frames, 3, height, width], audio windows [windows, mels, mel_frames].
        shapes: feature shape of each item; the encoder yields sum(t * h * w) features.
        index: [media_tokens] flat position (row * length + column) of each media token's placeholder. Empty under
            late fusion, where media never enters the sequence.
        anchors: [items, 3] row, segment, and position in the segment from which tokens may look at the item; only late
            fusion reads it.
        times_s: of each item the time of every frame in seconds; () for items that are no videos.
        boxes: of each item those that its conversation speaks of, in shares of the encoder's input; () of videos.
    """

    data: Tensor
    shapes: tuple[FeatureShape, ...]
    index: Tensor
    anchors: Tensor
    times_s: tuple[tuple[float, ...], ...] = ()
    boxes: tuple[tuple[Box, ...], ...] = ()

    def to(self, device: torch.device) -> MediaBatch:
        return replace(self, data=self.data.to(device), index=self.index.to(device), anchors=self.anchors.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. A training batch has one row that holds many conversations (segments) end to end.

    Attributes:
        token_ids: [rows, length] int64; any id stands at a placeholder, it is replaced.
        labels: [rows, length] int64, the token to predict *at* this position (already shifted), or IGNORE.
        segment_ids: [rows, length] int64, rising from 0 in a row; -1 marks padding.
        positions: [rows, length] int64, restarts at 0 with every segment.
        presence: [rows, length, modalities] float gates of the fusion, see mmchat/models/fusion.py.
        media: one entry for each modality that occurs.
        keys: names of the samples, for messages.
    """

    token_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    positions: Tensor
    presence: Tensor
    media: dict[str, MediaBatch] = field(default_factory=dict)
    keys: tuple[str, ...] = ()

    @property
    def num_learned(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def num_boxes(self) -> int:
        return sum(len(boxes) for media in self.media.values() for boxes in media.boxes)

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            labels=self.labels.to(device),
            segment_ids=self.segment_ids.to(device),
            positions=self.positions.to(device),
            presence=self.presence.to(device),
            media={name: media.to(device) for name, media in self.media.items()},
        )


@dataclass(frozen=True)
class TokenLoss:
    """Summed cross-entropy (nats) and the number of learned tokens; never a mean, so that any split adds up."""

    sum: Tensor
    count: int
