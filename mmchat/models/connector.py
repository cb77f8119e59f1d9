"""Connectors: encoder features to media tokens (the 'projection adapter'). One class a kind, one union at the end.

Features and tokens are flat, item after item, without padding: `features` is [sum(t * h * w), feature_dim] and
`shapes` names (t, h, w) of every item. A connector knows how many tokens an item of a given shape becomes before any
model runs, so that packs can be planned from file headers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmchat.batch import FeatureShape
from mmchat.schema import Schema


@dataclass(frozen=True)
class Moments:
    """How an item's tokens lie in time: first `tokens` for each `frames` frames in turn, then `rest`, which tell none.

    The last group has as many tokens where fewer frames are left.
    """

    frames: int
    tokens: int
    rest: int = 0

    def times_s(self, frame_times_s: Sequence[float]) -> list[float]:
        """The time of each group in seconds: the mean of its frames'."""
        groups = [frame_times_s[i : i + self.frames] for i in range(0, len(frame_times_s), self.frames)]
        return [sum(group) / len(group) for group in groups]


class _ConnectorConfig(Schema):
    """What every kind has in common.

    norm_input: LayerNorm over the features first, for encoders whose channels differ widely in scale (CNNs).
    norm_output: LayerNorm at the end that starts at `output_scale` times the scale of the LLM's token embeddings. At
        1, new media tokens look like text tokens in size; larger ones keep what they say through the first layers,
        and are learned from faster (docs/experiments.md).
    places: adds to each token a learned map of where it lies in its item (sines and cosines of relative time, height
        and width), for encoders whose features do not tell; linear, mlp and pool only (attentive has its own).
    times: adds to each token of a video a learned map of the seconds at which its frames are shown; not resampler.
    """

    norm_input: bool = False
    norm_output: bool = False
    output_scale: float = Field(1.0, gt=0)
    places: bool = False
    times: bool = False

    def moments(self, shape: FeatureShape) -> Moments | None:
        """How the tokens of an item lie in time; None for kinds whose tokens read many moments."""
        return None

    def grid(self, shape: FeatureShape) -> FeatureShape | None:
        """(t, h, w) of the tokens of an item; None for kinds whose tokens read many places."""
        return shape


class _PlacelessConfig(_ConnectorConfig):
    """Of kinds whose tokens lie nowhere: each of them reads many places."""

    @field_validator("places")
    @classmethod
    def _no_places(cls, value: bool) -> bool:
        if value:
            raise ValueError("its tokens have no place; leave `places` out, or choose linear, mlp or pool")
        return value

    def grid(self, shape: FeatureShape) -> None:
        return None


class LinearConfig(_ConnectorConfig):
    """One linear layer a feature (Shikra, arXiv 2306.15195)."""

    kind: Literal["linear"] = "linear"

    def num_tokens(self, shape: FeatureShape) -> int:
        return math.prod(shape)

    def moments(self, shape: FeatureShape) -> Moments:
        return Moments(1, shape[1] * shape[2])

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        return Connector(self, feature_dim, llm_dim, token_std, nn.Linear(feature_dim, llm_dim))


class MLPConfig(_ConnectorConfig):
    """Two linear layers with GELU between (LLaVA-1.5, arXiv 2310.03744). hidden_dim defaults to the LLM's."""

    kind: Literal["mlp"] = "mlp"
    hidden_dim: int | None = Field(None, gt=0)

    def num_tokens(self, shape: FeatureShape) -> int:
        return math.prod(shape)

    def moments(self, shape: FeatureShape) -> Moments:
        return Moments(1, shape[1] * shape[2])

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        return Connector(self, feature_dim, llm_dim, token_std, _mlp(feature_dim, self.hidden_dim, llm_dim))


class AttentiveConfig(_ConnectorConfig):
    """An MLP whose features look at each other in between: self-attention over a picture, a frame or a whole clip.

    Where a thing ends, its neighbours tell: what one place of the encoder's grid shows says little of that, and an LLM
    takes long to learn to put places together (docs/experiments.md; Honeybee, arXiv 2312.06742, found that connectors
    that mix neighbours locate better). A learned map of the place is added before the attention, so that `places`
    is not needed.

    across_frames: features of a clip look at those of all its frames, not of their own alone: what moves where can be
        told from one token. Pictures are not touched by it.
    """

    kind: Literal["attentive"] = "attentive"
    hidden_dim: int | None = Field(None, gt=0)
    num_heads: int = Field(8, gt=0)
    across_frames: bool = False

    @field_validator("places")
    @classmethod
    def _has_places(cls, value: bool) -> bool:
        if value:
            raise ValueError("it knows places already; leave `places` out")
        return value

    def num_tokens(self, shape: FeatureShape) -> int:
        return math.prod(shape)

    def moments(self, shape: FeatureShape) -> Moments:
        return Moments(1, shape[1] * shape[2])

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        projection = Attentive(self, feature_dim, self.hidden_dim or llm_dim, llm_dim)
        return Connector(self, feature_dim, llm_dim, token_std, projection)


class PoolConfig(_ConnectorConfig):
    """Fewer tokens: windows of (time, height, width) features become one token, then an MLP.

    mode `average` means the window (a partial window at the edge means what it has); `shuffle` concatenates it (pixel
    shuffle as in InternVL and SmolVLM; partial windows are filled with zeros).
    """

    kind: Literal["pool"] = "pool"
    window: tuple[int, int, int] = (1, 2, 2)
    mode: Literal["average", "shuffle"] = "average"
    hidden_dim: int | None = Field(None, gt=0)

    def grid(self, shape: FeatureShape) -> FeatureShape:
        t, h, w = (math.ceil(size / step) for size, step in zip(shape, self.window, strict=True))
        return t, h, w

    def num_tokens(self, shape: FeatureShape) -> int:
        return math.prod(self.grid(shape))

    def moments(self, shape: FeatureShape) -> Moments:
        _, height, width = self.grid(shape)
        return Moments(self.window[0], height * width)

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        pooled_dim = feature_dim * (math.prod(self.window) if self.mode == "shuffle" else 1)
        projection = _mlp(pooled_dim, self.hidden_dim, llm_dim)
        return Connector(self, feature_dim, llm_dim, token_std, projection, pool=self._pool)

    def _pool(self, features: Tensor, shapes: Sequence[FeatureShape]) -> Tensor:
        pooled = []
        for items, shape in _runs(features, shapes):  # items [n, t, h, w, dim]
            pad = [-size % step for size, step in zip(shape, self.window, strict=True)]
            items = F.pad(items, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
            kt, kh, kw = self.window
            windows = rearrange(items, "n (t a) (h b) (w c) d -> (n t h w) (a b c) d", a=kt, b=kh, c=kw)
            if self.mode == "shuffle":
                pooled.append(windows.flatten(1))
                continue
            real = F.pad(items.new_ones(1, *shape, 1), (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
            counts = rearrange(real, "n (t a) (h b) (w c) d -> (n t h w) (a b c) d", a=kt, b=kh, c=kw).sum(1)
            pooled.append(windows.sum(1) / counts.repeat(len(items), 1))
        return torch.cat(pooled)


class ResamplerConfig(_PlacelessConfig):
    """Perceiver resampler (Flamingo, arXiv 2204.14198): learned queries read each item; the count is fixed.

    A learned embedding of time (up to max_time) tells frames or moments apart.
    """

    kind: Literal["resampler"] = "resampler"
    num_queries: int = Field(32, gt=0)
    depth: int = Field(2, gt=0)
    num_heads: int = Field(8, gt=0)
    max_time: int = Field(1500, gt=0)

    @field_validator("times")
    @classmethod
    def _no_times(cls, value: bool) -> bool:
        if value:
            raise ValueError("each of its tokens reads all frames; leave `times` out, or choose another connector")
        return value

    def num_tokens(self, shape: FeatureShape) -> int:
        return self.num_queries

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        return Connector(self, feature_dim, llm_dim, token_std, Resampler(self, feature_dim, llm_dim))


class SpatioTemporalConfig(_PlacelessConfig):
    """Video-ChatGPT (arXiv 2306.05424): T temporal tokens (mean over patches) then N spatial ones (mean over frames).

    The reference pads short clips with zero tokens and attends to them; here a clip of T frames has T + N tokens.
    """

    kind: Literal["spatio_temporal"] = "spatio_temporal"

    def num_tokens(self, shape: FeatureShape) -> int:
        return shape[0] + shape[1] * shape[2]

    def moments(self, shape: FeatureShape) -> Moments:
        return Moments(1, 1, shape[1] * shape[2])

    def build(self, feature_dim: int, llm_dim: int, token_std: float) -> Connector:
        projection = nn.Linear(feature_dim, llm_dim)
        return Connector(self, feature_dim, llm_dim, token_std, projection, pool=self._pool)

    def _pool(self, features: Tensor, shapes: Sequence[FeatureShape]) -> Tensor:
        pooled = []
        for items, _ in _runs(features, shapes):  # items [n, t, h, w, dim]
            temporal = items.mean(dim=(2, 3))  # [n, t, dim]
            spatial = items.mean(dim=1).flatten(1, 2)  # [n, h * w, dim]
            pooled.append(torch.cat([temporal, spatial], dim=1).flatten(0, 1))
        return torch.cat(pooled)


ConnectorConfig = Annotated[
    LinearConfig | MLPConfig | AttentiveConfig | PoolConfig | ResamplerConfig | SpatioTemporalConfig,
    Field(discriminator="kind"),
]
AnyConnectorConfig = LinearConfig | MLPConfig | AttentiveConfig | PoolConfig | ResamplerConfig | SpatioTemporalConfig


class Connector(nn.Module):
    """Features of the items of one modality to media tokens.

    forward: features [sum(t * h * w), feature_dim], shapes, and under `times` the times of each item's frames in
    seconds -> [sum(num_tokens(shape)), llm_dim]
    """

    def __init__(
        self,
        config: AnyConnectorConfig,
        feature_dim: int,
        llm_dim: int,
        token_std: float,
        projection: nn.Module,
        pool: Callable[[Tensor, Sequence[FeatureShape]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.norm_input = nn.LayerNorm(feature_dim) if config.norm_input else nn.Identity()
        self.projection = projection
        self.norm_output = nn.LayerNorm(llm_dim) if config.norm_output else nn.Identity()
        if isinstance(self.norm_output, nn.LayerNorm):
            nn.init.constant_(self.norm_output.weight, token_std * config.output_scale)
        self._pool = pool
        self.places = Places(config, llm_dim, token_std * config.output_scale) if config.places else None
        self.times = Times(config, llm_dim, token_std * config.output_scale) if config.times else None

    def forward(
        self, features: Tensor, shapes: Sequence[FeatureShape], times_s: Sequence[Sequence[float]] = ()
    ) -> Tensor:
        features = self.norm_input(features)
        if self._pool is not None:
            features = self._pool(features, shapes)
        if isinstance(self.projection, Resampler | Attentive):
            tokens = self.projection(features, shapes)
        else:
            tokens = self.projection(features)
        tokens = self.norm_output(tokens)
        if self.places is not None:
            tokens = self.places(tokens, shapes)
        return tokens if self.times is None else self.times(tokens, shapes, times_s)


class Attentive(nn.Module):
    """linear, place, GELU, attention within each frame or clip (pre-norm, residual), linear.

    forward: features [sum(t * h * w), feature_dim], shapes -> [sum(t * h * w), llm_dim]
    """

    def __init__(self, config: AttentiveConfig, feature_dim: int, hidden_dim: int, llm_dim: int) -> None:
        super().__init__()
        if hidden_dim % config.num_heads:
            raise ValueError(f"attentive: num_heads {config.num_heads} must divide hidden_dim {hidden_dim}")
        self.num_heads = config.num_heads
        self.across_frames = config.across_frames
        self.enter = nn.Linear(feature_dim, hidden_dim)
        self.place = nn.Linear(PLACE_DIM, hidden_dim, bias=False)
        self.norm = nn.LayerNorm(hidden_dim)
        self.to_qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.leave = nn.Linear(hidden_dim, llm_dim)

    def forward(self, features: Tensor, shapes: Sequence[FeatureShape]) -> Tensor:
        waves = torch.cat([place_waves(shape) for shape in shapes]).to(features)
        hidden = F.gelu(self.enter(features) + self.place(waves))
        read = []
        for items, _ in _runs(self.to_qkv(self.norm(hidden)), shapes):  # items [n, t, h, w, 3 * dim]
            axes = "three n a (t h w) d" if self.across_frames else "three (n t) a (h w) d"
            q, k, v = rearrange(items, f"n t h w (three a d) -> {axes}", three=3, a=self.num_heads)
            read.append(rearrange(F.scaled_dot_product_attention(q, k, v), "f a p d -> (f p) (a d)"))
        return self.leave(hidden + self.out(torch.cat(read)))


NUM_WAVES = 4
PLACE_DIM = 3 * 2 * NUM_WAVES


@functools.lru_cache(maxsize=256)
def place_waves(shape: FeatureShape) -> Tensor:
    """[t * h * w, PLACE_DIM] sines and cosines of the middles of the cells, 0 to 1 along each axis."""
    axes = [(torch.arange(size) + 0.5) / size for size in shape]
    middles = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # [cells, 3]
    angles = middles[..., None] * math.pi * 2.0 ** torch.arange(NUM_WAVES)  # [cells, 3, waves]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class Places(nn.Module):
    """Adds to each token where it lies in its item, the same for every size of grid."""

    def __init__(self, config: AnyConnectorConfig, llm_dim: int, token_std: float) -> None:
        super().__init__()
        self.grid = config.grid
        self.project = nn.Linear(PLACE_DIM, llm_dim, bias=False)
        # As large in sum as the tokens themselves.
        nn.init.normal_(self.project.weight, std=token_std * (PLACE_DIM / 2) ** -0.5)

    def forward(self, tokens: Tensor, shapes: Sequence[FeatureShape]) -> Tensor:
        waves = [place_waves(self.grid(shape)) for shape in shapes]
        return tokens + self.project(torch.cat(waves).to(tokens))


class Times(nn.Module):
    """Adds to each token when its frames are shown, in seconds: the same for every length and frame rate."""

    NUM_WAVES = 13
    SHORTEST_S = 0.5  # the periods of the waves double, up to 2,048 seconds

    def __init__(self, config: AnyConnectorConfig, llm_dim: int, token_std: float) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(2 * self.NUM_WAVES, llm_dim, bias=False)
        # As large in sum as the tokens themselves.
        nn.init.normal_(self.project.weight, std=token_std * self.NUM_WAVES**-0.5)

    def forward(self, tokens: Tensor, shapes: Sequence[FeatureShape], times_s: Sequence[Sequence[float]]) -> Tensor:
        waves = [self._waves(shape, times) for shape, times in zip(shapes, times_s, strict=True)]
        return tokens + self.project(torch.cat(waves).to(tokens))

    def _waves(self, shape: FeatureShape, times_s: Sequence[float]) -> Tensor:
        """[tokens, 26] sines and cosines of the time of each token of an item, zeros for those that tell none."""
        moments = self.config.moments(shape)
        assert moments is not None and len(times_s) == shape[0], "one time a frame, of a kind whose tokens tell times"
        seconds = torch.tensor(moments.times_s(times_s), dtype=torch.float64)
        periods = self.SHORTEST_S * 2.0 ** torch.arange(self.NUM_WAVES, dtype=torch.float64)
        angles = 2 * math.pi * seconds[:, None] / periods  # [moments, waves]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).repeat_interleave(moments.tokens, dim=0)
        return F.pad(waves, (0, 0, 0, moments.rest)).float()


class Resampler(nn.Module):
    """Learned queries that attend to the features of one item and to each other's slots, `depth` times."""

    def __init__(self, config: ResamplerConfig, feature_dim: int, llm_dim: int) -> None:
        super().__init__()
        if llm_dim % config.num_heads:
            raise ValueError(f"resampler: num_heads {config.num_heads} must divide the LLM's width {llm_dim}")
        self.max_time = config.max_time
        self.queries = nn.Parameter(torch.randn(config.num_queries, llm_dim) * llm_dim**-0.5)
        self.time = nn.Parameter(torch.randn(config.max_time, llm_dim) * 0.02)
        self.project = nn.Linear(feature_dim, llm_dim)
        self.layers = nn.ModuleList(_ResamplerLayer(llm_dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(llm_dim)

    def forward(self, features: Tensor, shapes: Sequence[FeatureShape]) -> Tensor:
        features = self.project(features)
        tokens = []
        for items, shape in _runs(features, shapes):  # items [n, t, h, w, dim]
            if shape[0] > self.max_time:
                raise ValueError(f"resampler: an item of {shape[0]} time steps exceeds max_time {self.max_time}")
            items = items + self.time[: shape[0], None, None]
            context = items.flatten(1, 3)  # [n, t * h * w, dim]
            queries = self.queries.expand(len(items), -1, -1)
            for layer in self.layers:
                queries = layer(queries, context)
            tokens.append(self.norm(queries).flatten(0, 1))
        return torch.cat(tokens)


class _ResamplerLayer(nn.Module):
    """Cross-attention over features and queries together, then an MLP; pre-norm, residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        normed = self.norm_queries(queries)
        q = rearrange(self.to_q(normed), "n q (h d) -> n h q d", h=self.num_heads)
        kv = self.to_kv(torch.cat([self.norm_context(context), normed], dim=1))
        k, v = rearrange(kv, "n k (two h d) -> two n h k d", two=2, h=self.num_heads)
        read = rearrange(F.scaled_dot_product_attention(q, k, v), "n h q d -> n q (h d)")
        queries = queries + self.out(read)
        return queries + self.mlp(queries)


def _mlp(feature_dim: int, hidden_dim: int | None, llm_dim: int) -> nn.Sequential:
    hidden = hidden_dim or llm_dim
    return nn.Sequential(nn.Linear(feature_dim, hidden), nn.GELU(), nn.Linear(hidden, llm_dim))


def _runs(features: Tensor, shapes: Sequence[FeatureShape]) -> list[tuple[Tensor, FeatureShape]]:
    """Neighbouring items of one shape as one tensor [n, t, h, w, dim]: pictures of a batch are a single run."""
    runs, start = [], 0
    for shape, group in groupby(shapes):
        count = len(list(group))
        size = count * math.prod(shape)
        runs.append((features[start : start + size].reshape(count, *shape, features.shape[-1]), shape))
        start += size
    return runs
