"""Video: which moments are looked at, the frames shown then, and the preprocess; the encoder is a picture's.

Seconds count from the first frame. Where a video is shorter than its header says, a moment behind the end
shows the last frame, and a video that ends before half of the moments is refused; so is one that lasts more than
twice as long as its header says.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import Excerpt, MediaPlan
from mmchat.modalities.decode import Resize, Seek
from mmchat.modalities.image import ImageConfig, ImageLimits, square_geometry
from mmchat.modalities.image_encoders import ImageEncoderConfig, ImageSpec
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.schema import Schema


class SharedEncoder(Schema):
    """The image modality's encoder sees the frames too: one set of weights."""

    kind: Literal["shared"] = "shared"


class SampleNumFrames(Schema):
    """As many frames from every video, from the middles of equal segments; fewer only where it has fewer."""

    kind: Literal["num_frames"] = "num_frames"
    num_frames: int = Field(default=8, ge=1)


class SampleFps(Schema):
    """A frame every 1 / fps seconds, from the middles of equal segments, but at most `max_frames`."""

    kind: Literal["fps"] = "fps"
    fps: float = Field(default=1.0, gt=0)
    max_frames: int = Field(default=32, ge=1)


class VideoConfig(ImageLimits, SandboxLimits):
    """How videos are seen.

    max_total_pixels: bounds frames times encoder-input pixels, over `sample`. too_long: a video above max_duration_s is
    refused; or its `first` max_duration_s are seen as if it ended there; or frames are `spread` over all of it. seek:
    `keyframes` shows the last keyframe up to each moment, which is faster and up to a keyframe interval early; several
    moments may show the same one.
    """

    encoder: Annotated[SharedEncoder | ImageEncoderConfig, Field(discriminator="kind")] = SharedEncoder()
    resize: Resize = "pad"
    sample: Annotated[SampleNumFrames | SampleFps, Field(discriminator="kind")] = SampleNumFrames()
    max_total_pixels: int | None = Field(default=None, ge=1)
    max_duration_s: float = Field(default=3600.0, gt=0)
    too_long: Literal["refuse", "first", "spread"] = "refuse"
    backend: Literal["pyav", "decord", "torchcodec"] = "pyav"
    seek: Seek = "exact"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.seek == "keyframes" and self.backend != "pyav":
            raise ValueError(f"seek: keyframes needs backend: pyav, found {self.backend}")
        return self

    def preprocess(self, image: ImageConfig | None = None) -> VideoPreprocess:
        """The preprocess; `image` is the image modality, whose encoder is asked where it is shared."""
        if not isinstance(self.encoder, SharedEncoder):
            return VideoPreprocess(self, self.encoder.spec())
        if image is None:
            raise ValueError("video's encoder is shared with image, but the image modality is not configured")
        return VideoPreprocess(self, image.encoder.spec())

    def build_encoder(self) -> nn.Module | None:
        """The encoder with its weights; None where it is the image modality's."""
        return None if isinstance(self.encoder, SharedEncoder) else self.encoder.build()


class VideoPreprocess:
    """Encoded video to [frames, 3, size, size] float32, normalised for the encoder; implements Preprocess."""

    def __init__(self, config: VideoConfig, spec: ImageSpec) -> None:
        self.config = config
        self.spec = spec
        self.sandbox = Sandbox(config)

    def header(self, data: bytes) -> MediaHeader:
        """Size after rotation, duration, frame rate and count, as the container says. Raises SampleError."""
        facts, _ = self.sandbox.call("video_header", data)
        header = MediaHeader(**facts)
        self._check(header)
        return header

    def plan(self, header: MediaHeader, shrink: int = 0) -> MediaPlan:
        """Shape (frames, grid_height, grid_width); each `shrink` halves the frames. Raises SampleError."""
        width, height, duration_s = self._check(header)
        seen_s = min(duration_s, self.config.max_duration_s) if self.config.too_long == "first" else duration_s
        there = math.inf if header.num_frames is None else max(1, round(header.num_frames * seen_s / duration_s))
        sample = self.config.sample
        limits: dict[str, float] = {}
        if isinstance(sample, SampleFps):
            asked = min(there, max(1, round(seen_s * sample.fps)))
            limits["sample.max_frames"] = sample.max_frames
        else:
            asked = min(there, sample.num_frames)
        if self.config.max_total_pixels is not None:
            limits["max_total_pixels"] = max(1, self.config.max_total_pixels // self.spec.size**2)
        allowed = min(asked, *limits.values()) if limits else asked
        num_frames = max(1, int(allowed) >> shrink)
        if num_frames < allowed:
            limits["the pack's budget"] = num_frames

        excerpts = []
        if seen_s < duration_s:
            excerpts.append(Excerpt("video longer than max_duration_s, first part seen", seen_s, duration_s, "s"))
        elif duration_s > self.config.max_duration_s:
            whole = header.num_frames or max(num_frames, asked)
            excerpts.append(
                Excerpt("video longer than max_duration_s, frames all over it seen", num_frames, whole, "frames")
            )
        if num_frames < asked:
            limit = min(limits, key=lambda name: limits[name])
            excerpts.append(Excerpt(f"frames limited by {limit}, seen further apart", num_frames, asked, "frames"))
        return MediaPlan(
            shape=(num_frames, self.spec.grid_height, self.spec.grid_width),
            num_patches=num_frames * self.spec.patches,
            geometry=square_geometry(width, height, self.spec.size, self.config.resize),
            times_s=tuple((index + 0.5) * seen_s / num_frames for index in range(num_frames)),
            excerpts=tuple(excerpts),
        )

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """Decodes the planned frames to [frames, 3, size, size]. Raises SampleError."""
        return self.frames(data, plan)[0]

    def frames(self, data: bytes, plan: MediaPlan) -> tuple[Tensor, tuple[float, ...]]:
        """The planned frames, and the time in seconds at which each of them really starts."""
        facts, pixels = self.sandbox.call(
            "video_frames",
            data,
            times_s=plan.times_s,
            size=self.spec.size,
            resize=self.config.resize,
            fill=self.spec.fill,
            interpolation=self.spec.interpolation,
            backend=self.config.backend,
            seek=self.config.seek,
            is_whole=all(excerpt.unit != "s" for excerpt in plan.excerpts),
        )
        squares = np.frombuffer(pixels, np.uint8).reshape(-1, self.spec.size, self.spec.size, 3)
        return self.spec.normalise(squares), tuple(facts["times_s"])

    def _check(self, header: MediaHeader) -> tuple[int, int, float]:
        """Width, height and duration within the limits."""
        width, height, duration_s = header.width, header.height, header.duration_s
        if width is None or height is None or duration_s is None:
            raise SampleError("header incomplete", "a video's header needs width, height and duration")
        self.config.check(width, height)
        longest_s = self.config.max_duration_s
        if not 0 < duration_s < math.inf:  # also of nan, this is false
            raise SampleError("empty video", f"{duration_s:.3f} s, wanted more than none")
        if duration_s > longest_s and self.config.too_long == "refuse":
            raise SampleError(
                "video too long",
                f"{duration_s:.3f} s, wanted up to {longest_s:g} s (max_duration_s); too_long: first or spread in the "
                "model's configuration sees a part of it",
            )
        return width, height, duration_s
