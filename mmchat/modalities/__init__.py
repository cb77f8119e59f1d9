"""Ways to see and hear: one file a modality holds its decoding, geometry, preprocessing and encoder.

Every modality offers the same two things:

* a *preprocess*: `header(bytes)` reads what the file says of itself, `plan(header)` tells the feature shape and the
  cost before anything is decoded, and calling it decodes one item by its plan;
* an *encoder*: a module that turns the stacked items of a batch into features, and knows a harmless stand-in item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from mmchat.batch import FeatureShape
from mmchat.conversation import MediaHeader
from mmchat.regions import Geometry


@dataclass(frozen=True)
class Excerpt:
    """What is seen or heard of an item that is longer than its budget; as text "rule: how much".

    Attributes:
        rule: which budget, and which part of the item, in the same words for every item.
        shown, whole: seconds, or frames: those planned, and those that the rule without the budget asks for.
    """

    rule: str
    shown: float
    whole: float
    unit: Literal["s", "frames"]

    def __str__(self) -> str:
        return f"{self.rule}: {self.amount}"

    @property
    def amount(self) -> str:
        return f"{self.shown:,.6g} of {self.whole:,.6g} {self.unit} ({self.shown / self.whole:.2%})"


@dataclass(frozen=True)
class MediaPlan:
    """What one item will become, known from its header alone.

    Attributes:
        shape: feature shape (time, height, width).
        num_patches: encoder cost in patches (or spectrogram positions), the unit of the patch budget.
        geometry: original pixels to encoder-input pixels; None for audio.
        times_s: presentation time of every frame (video) in seconds, else empty.
        spans_s: start and end of the pieces of a sound that are heard one behind another; empty: from its beginning.
        excerpts: why and how an item is not seen or heard as its length asks; empty where it is.
    """

    shape: FeatureShape
    num_patches: int
    geometry: Geometry | None = None
    times_s: tuple[float, ...] = ()
    spans_s: tuple[tuple[float, float], ...] = ()
    excerpts: tuple[Excerpt, ...] = ()


class Preprocess(Protocol):
    """Bytes to encoder input, the same function in training, inference and serving."""

    def header(self, data: bytes) -> MediaHeader:
        """Reads sizes without decoding; raises SampleError where the limits of size or aspect are broken."""

    def plan(self, header: MediaHeader, shrink: int = 0) -> MediaPlan:
        """Plans one item; each `shrink` step about halves its tokens where the modality can. Raises SampleError."""

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """Decodes one item to [parts, ...] (see MediaBatch.data). Raises SampleError."""


class Encoder(Protocol):
    """A module; `forward(data, shapes)` turns stacked items into features [sum(t * h * w), feature_dim]."""

    feature_dim: int

    def stand_in(self) -> tuple[Tensor, tuple[FeatureShape, ...]]:
        """The smallest legal, harmless input, for a rank whose batch lacks the modality."""

    def __call__(self, data: Tensor, shapes: tuple[FeatureShape, ...]) -> Tensor: ...
