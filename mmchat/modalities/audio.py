"""Sound: any file to log-mel windows, and Whisper's encoder (arXiv 2212.04356), which pays by the second.

Whisper sees windows of 30 seconds, padded with silence. Its encoder yields 50 positions a second; only those
that hold sound go on to the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmchat.batch import FeatureShape
from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.schema import Schema

SAMPLE_RATE_HZ = 16_000
POSITIONS_PER_S = 50  # a spectrum every 10 ms, halved by the encoder's second convolution


@dataclass(frozen=True)
class AudioSpec:
    """What an encoder takes and gives.

    Attributes:
        num_mels: mel channels of a spectrum.
        window_positions: encoder positions of a window; 1500, for 30 seconds, in every published model.
        feature_dim: width of one feature.
    """

    num_mels: int
    window_positions: int
    feature_dim: int


class WhisperEncoderConfig(Schema):
    """The encoder of a Whisper checkpoint of transformers, by hub name or local folder."""

    kind: Literal["whisper"] = "whisper"
    pretrained: str

    def spec(self) -> AudioSpec:
        config = self._config()
        return AudioSpec(config.num_mel_bins, config.max_source_positions, config.d_model)

    def feature_extractor(self) -> Any:
        """transformers' WhisperFeatureExtractor in the checkpoint's numbers, or in the model's."""
        from transformers import WhisperFeatureExtractor

        try:
            return WhisperFeatureExtractor.from_pretrained(self.pretrained)
        except OSError:  # a checkpoint saved without its preprocessor
            spec = self.spec()
            return WhisperFeatureExtractor(
                feature_size=spec.num_mels, chunk_length=spec.window_positions // POSITIONS_PER_S
            )

    def build(self) -> WhisperEncoder:
        from transformers import WhisperModel

        whisper: Any = WhisperModel
        model, report = whisper.from_pretrained(self.pretrained, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(f"{self.pretrained} lacks weights of Whisper: {report}")
        return WhisperEncoder(model.get_encoder(), self.spec())

    def _config(self) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.pretrained)
        if config.model_type != "whisper":
            raise ValueError(f"{self.pretrained} is a {config.model_type}; wanted Whisper")
        return config


class AudioConfig(SandboxLimits):
    """How sound is heard."""

    encoder: WhisperEncoderConfig
    max_duration_s: float = Field(default=300.0, gt=0)

    def preprocess(self) -> AudioPreprocess:
        """The preprocess of the encoder; reads the encoder's metadata, no weights."""
        return AudioPreprocess(self, self.encoder.spec())

    def build_encoder(self) -> nn.Module:
        """The encoder with its weights (see mmchat.modalities.Encoder)."""
        return self.encoder.build()


class AudioPreprocess:
    """Encoded sound to log-mel windows [windows, mels, mel_frames] float32; implements Preprocess."""

    def __init__(self, config: AudioConfig, spec: AudioSpec) -> None:
        self.config = config
        self.spec = spec
        self.feature_extractor = config.encoder.feature_extractor()
        self.sandbox = Sandbox(config)

    def header(self, data: bytes) -> MediaHeader:
        """Sample rate and duration as the file tells them. Raises SampleError."""
        facts, _ = self.sandbox.call("audio_header", data)
        header = MediaHeader(**facts)
        self._check(header)
        return header

    def plan(self, header: MediaHeader, shrink: int = 0) -> MediaPlan:
        """Shape (50 positions a second, 1, 1); `shrink` changes nothing. Raises SampleError.

        The cost counts whole windows: the encoder works on the silence at the end too.
        """
        positions = max(1, math.ceil(round(self._check(header) * POSITIONS_PER_S, 6)))
        windows = math.ceil(positions / self.spec.window_positions)
        return MediaPlan(shape=(positions, 1, 1), num_patches=windows * self.spec.window_positions)

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """Decodes one item to [windows, mels, 2 * window_positions] by its plan. Raises SampleError."""
        duration_s = plan.shape[0] / POSITIONS_PER_S
        _, samples = self.sandbox.call("audio_samples", data, sample_rate_hz=SAMPLE_RATE_HZ, max_duration_s=duration_s)
        window = self.spec.window_positions * SAMPLE_RATE_HZ // POSITIONS_PER_S  # samples
        padded = np.zeros(math.ceil(plan.shape[0] / self.spec.window_positions) * window, np.float32)
        sound = np.frombuffer(samples, np.float32)[: len(padded)]
        padded[: len(sound)] = sound
        features = self.feature_extractor(
            list(padded.reshape(-1, window)), sampling_rate=SAMPLE_RATE_HZ, return_tensors="np"
        )
        return torch.from_numpy(np.asarray(features["input_features"], np.float32))

    def _check(self, header: MediaHeader) -> float:
        """Duration within the limits, in seconds."""
        if header.duration_s is None:
            raise SampleError("header incomplete", "a sound's header needs its duration")
        if not 0 < header.duration_s <= self.config.max_duration_s:
            reason = "audio too long" if header.duration_s > 0 else "empty audio"
            raise SampleError(reason, f"{header.duration_s:.3f} s, wanted up to {self.config.max_duration_s:g} s")
        return header.duration_s


class WhisperEncoder(nn.Module):
    """The encoder of a Whisper model."""

    def __init__(self, encoder: nn.Module, spec: AudioSpec) -> None:
        super().__init__()
        self.encoder = encoder
        self.spec = spec
        self.feature_dim = spec.feature_dim

    def stand_in(self) -> tuple[Tensor, tuple[FeatureShape, ...]]:
        """One window, of which one position counts."""
        return torch.zeros(1, self.spec.num_mels, 2 * self.spec.window_positions), ((1, 1, 1),)

    def forward(self, data: Tensor, shapes: tuple[FeatureShape, ...]) -> Tensor:
        """data [windows, mels, 2 * window_positions] of all items to [sum of positions, feature_dim].

        An item owns as many whole windows as its positions need; the positions behind its sound are dropped.
        """
        hidden = self.encoder(data).last_hidden_state  # [windows, window_positions, feature_dim]
        size = self.spec.window_positions
        counts = [math.ceil(positions / size) for positions, _, _ in shapes]
        items = hidden.split(counts)
        return torch.cat([item.flatten(0, 1)[: shape[0]] for item, shape in zip(items, shapes, strict=True)])
