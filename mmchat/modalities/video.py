"""Video: which moments are looked at, the frames shown then, and the preprocess; the encoder is a picture's.

Seconds count from the first frame. Where a video is shorter than its header says, a moment behind the end
shows the last frame, and a video that ends before half of the moments is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
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

    max_total_pixels: bounds frames times encoder-input pixels, over `sample`. seek: `keyframes` shows the last keyframe
    up to each moment, which is faster and up to a keyframe interval early; several moments may show the same one.
    """

    encoder: Annotated[SharedEncoder | ImageEncoderConfig, Field(discriminator="kind")] = SharedEncoder()
    resize: Resize = "pad"
    sample: Annotated[SampleNumFrames | SampleFps, Field(discriminator="kind")] = SampleNumFrames()
    max_total_pixels: int | None = Field(default=None, ge=1)
    max_duration_s: float = Field(default=3600.0, gt=0)
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
        sample = self.config.sample
        if isinstance(sample, SampleFps):
            wanted = min(sample.max_frames, round(duration_s * sample.fps))
        else:
            wanted = sample.num_frames
        if header.num_frames is not None:
            wanted = min(wanted, header.num_frames)
        if self.config.max_total_pixels is not None:
            wanted = min(wanted, self.config.max_total_pixels // self.spec.size**2)
        num_frames = max(1, wanted >> shrink)
        return MediaPlan(
            shape=(num_frames, self.spec.grid_height, self.spec.grid_width),
            num_patches=num_frames * self.spec.patches,
            geometry=square_geometry(width, height, self.spec.size, self.config.resize),
            times_s=tuple((index + 0.5) * duration_s / num_frames for index in range(num_frames)),
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
        )
        squares = np.frombuffer(pixels, np.uint8).reshape(-1, self.spec.size, self.spec.size, 3)
        return self.spec.normalise(squares), tuple(facts["times_s"])

    def _check(self, header: MediaHeader) -> tuple[int, int, float]:
        """Width, height and duration within the limits."""
        width, height, duration_s = header.width, header.height, header.duration_s
        if width is None or height is None or duration_s is None:
            raise SampleError("header incomplete", "a video's header needs width, height and duration")
        self.config.check(width, height)
        if not 0 < duration_s <= self.config.max_duration_s:
            reason = "video too long" if duration_s > 0 else "empty video"
            raise SampleError(reason, f"{duration_s:.3f} s, wanted up to {self.config.max_duration_s:g} s")
        return width, height, duration_s
