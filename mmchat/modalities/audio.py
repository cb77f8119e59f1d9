"""Sound: any file to log-mel windows, and Whisper's encoder (arXiv 2212.04356), which pays by the second.

Whisper sees windows of 30 seconds, or of fewer by configuration, padded with silence. Its encoder yields 50 positions a
second; only those that hold sound go on to the model.
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
from mmchat.modalities import Excerpt, MediaPlan
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
    """The encoder of a Whisper checkpoint of transformers, by hub name or local folder.

    window_s: seconds that it hears at once; None is what it was trained on, 30. A longer sound is heard in several
        windows. With 4 a short command costs an eighth. The encoder was not trained on short windows, so train the
        connector with the same.
    """

    kind: Literal["whisper"] = "whisper"
    pretrained: str
    window_s: int | None = Field(default=None, ge=1)

    def spec(self) -> AudioSpec:
        config = self._config()
        return AudioSpec(config.num_mel_bins, config.max_source_positions, config.d_model)

    def feature_extractor(self) -> Any:
        """transformers' WhisperFeatureExtractor in the checkpoint's numbers, or in the model's."""
        from transformers import WhisperFeatureExtractor

        spec = self.spec()
        seconds = spec.window_positions // POSITIONS_PER_S
        try:
            if self.window_s is None:
                return WhisperFeatureExtractor.from_pretrained(self.pretrained)
            return WhisperFeatureExtractor.from_pretrained(self.pretrained, chunk_length=seconds)
        except OSError:  # a checkpoint saved without its preprocessor
            return WhisperFeatureExtractor(feature_size=spec.num_mels, chunk_length=seconds)

    def build(self) -> WhisperEncoder:
        from transformers import WhisperModel

        whisper: Any = WhisperModel
        model, report = whisper.from_pretrained(self.pretrained, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(f"{self.pretrained} lacks weights of Whisper: {report}")
        encoder, spec = model.get_encoder(), self.spec()
        if self.window_s is not None:  # the first positions of the window that it was trained on
            encoder.config.max_source_positions = spec.window_positions
            encoder.embed_positions = nn.Embedding.from_pretrained(
                encoder.embed_positions.weight.detach()[: spec.window_positions].clone()
            )
        return WhisperEncoder(encoder, spec)

    def _config(self) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.pretrained, trust_remote_code=False)
        if config.model_type != "whisper":
            raise ValueError(f"{self.pretrained} is a {config.model_type}; wanted Whisper")
        if self.window_s is not None:
            whole_s = config.max_source_positions // POSITIONS_PER_S
            if self.window_s > whole_s:
                raise ValueError(f"window_s {self.window_s}: {self.pretrained} hears {whole_s} s at once; wanted less")
            config.max_source_positions = self.window_s * POSITIONS_PER_S
        return config


class AudioConfig(SandboxLimits):
    """How sound is heard.

    too_long: what happens to a sound above max_duration_s. `refuse`: it is refused; `first`: its first max_duration_s
    are heard; `spread`: as much of it, in whole encoder windows with equal gaps between them.
    """

    encoder: WhisperEncoderConfig
    max_duration_s: float = Field(default=300.0, gt=0)
    too_long: Literal["refuse", "first", "spread"] = "refuse"

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
        duration_s = self._check(header)
        heard_s = min(duration_s, self.config.max_duration_s)
        positions = max(1, math.ceil(round(heard_s * POSITIONS_PER_S, 6)))
        windows = math.ceil(positions / self.spec.window_positions)
        spans_s: tuple[tuple[float, float], ...] = ()
        excerpts: tuple[Excerpt, ...] = ()
        if heard_s < duration_s:
            part = "first part heard"
            if self.config.too_long == "spread":
                part = "windows all over it heard"
                spans_s = _spread(positions, self.spec.window_positions, duration_s)
            excerpts = (Excerpt(f"sound longer than max_duration_s, {part}", heard_s, duration_s, "s"),)
        num_patches = windows * self.spec.window_positions
        return MediaPlan((positions, 1, 1), num_patches, spans_s=spans_s, excerpts=excerpts)

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """Decodes one item to [windows, mels, 2 * window_positions] by its plan. Raises SampleError."""
        return self.features(self.samples(data, plan))

    def samples(self, data: bytes, plan: MediaPlan) -> np.ndarray:
        """What is heard of one item: [windows, samples of a window] float32 at SAMPLE_RATE_HZ. Raises SampleError.

        Behind the end of the sound there is silence.
        """
        duration_s = plan.shape[0] / POSITIONS_PER_S
        _, payload = self.sandbox.call(
            "audio_samples",
            data,
            sample_rate_hz=SAMPLE_RATE_HZ,
            max_duration_s=duration_s,
            spans_s=plan.spans_s,
            holds="part" if plan.excerpts else "whole",
        )
        window = self.spec.window_positions * SAMPLE_RATE_HZ // POSITIONS_PER_S  # samples
        padded = np.zeros(math.ceil(plan.shape[0] / self.spec.window_positions) * window, np.float32)
        sound = np.frombuffer(payload, np.float32)[: len(padded)]
        padded[: len(sound)] = sound
        return padded.reshape(-1, window)

    def features(self, windows: np.ndarray) -> Tensor:
        """[windows, samples] to log-mel [windows, mels, 2 * window_positions].

        Raises SampleError where samples are so large that their power is no number.
        """
        features = self.feature_extractor(list(windows), sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        found = np.asarray(features["input_features"], np.float32)
        if not np.isfinite(found).all():
            raise SampleError(
                "audio not finite",
                f"samples up to {np.abs(windows).max():.3g} have no spectrum; wanted them from -1 to 1",
            )
        return torch.from_numpy(found)

    def _check(self, header: MediaHeader) -> float:
        """Duration within the limits, in seconds."""
        if header.duration_s is None:
            raise SampleError("header incomplete", "a sound's header needs its duration")
        longest_s = self.config.max_duration_s
        if not 0 < header.duration_s < math.inf:  # also of nan, this is false
            raise SampleError("empty audio", f"{header.duration_s:.3f} s, wanted more than none")
        if header.duration_s > longest_s and self.config.too_long == "refuse":
            raise SampleError(
                "audio too long",
                f"{header.duration_s:.3f} s, wanted up to {longest_s:g} s (max_duration_s); too_long: first or spread "
                "in the model's configuration hears a part of it",
            )
        return header.duration_s


def _spread(positions: int, window_positions: int, duration_s: float) -> tuple[tuple[float, float], ...]:
    """Start and end in seconds of pieces that fill one encoder window each, the last perhaps a part of one.

    The gaps between them are equal, those before the first and behind the last half as long.
    """
    lengths_s = [
        min(window_positions, positions - first) / POSITIONS_PER_S for first in range(0, positions, window_positions)
    ]
    gap_s = max(0.0, duration_s - positions / POSITIONS_PER_S) / len(lengths_s)
    window_s = window_positions / POSITIONS_PER_S
    starts_s = [round(gap_s * (number + 0.5) + window_s * number, 3) for number in range(len(lengths_s))]
    return tuple((start, start + length) for start, length in zip(starts_s, lengths_s, strict=True))


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
