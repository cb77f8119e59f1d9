"""Connectors: token counts known beforehand, and the arithmetic of pooling."""

from __future__ import annotations

import math

import pytest
import torch

from mmchat.models.connector import (
    LinearConfig,
    MLPConfig,
    PoolConfig,
    ResamplerConfig,
    SpatioTemporalConfig,
)

SHAPES = ((1, 4, 4), (1, 4, 4), (3, 4, 4), (1, 5, 3), (7, 1, 1))
CONFIGS = [
    LinearConfig(),
    MLPConfig(hidden_dim=20, norm_input=True, norm_output=True),
    PoolConfig(window=(1, 2, 2)),
    PoolConfig(window=(2, 2, 3), mode="shuffle"),
    ResamplerConfig(num_queries=5, num_heads=2),
    SpatioTemporalConfig(),
]


def _features(shapes=SHAPES, dim=6):
    return torch.randn(sum(math.prod(s) for s in shapes), dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_planned_tokens_equal_made_tokens(config):
    connector = config.build(6, 8, 0.1)
    tokens = connector(_features(), SHAPES)
    assert tokens.shape == (sum(config.num_tokens(shape) for shape in SHAPES), 8)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_an_item_does_not_depend_on_its_neighbours(config):
    connector = config.build(6, 8, 0.1)
    features, start, alone = _features(), 0, []
    for shape in SHAPES:
        alone.append(connector(features[start : start + math.prod(shape)], (shape,)))
        start += math.prod(shape)
    torch.testing.assert_close(connector(features, SHAPES), torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_average_pooling_of_a_partial_window_is_the_mean_of_what_it_has():
    connector = PoolConfig(window=(1, 2, 2)).build(1, 4, 0.1)
    features = torch.arange(9.0)[:, None]  # 3 x 3
    pooled = connector._pool(features, ((1, 3, 3),))
    expected = [[(0 + 1 + 3 + 4) / 4], [(2 + 5) / 2], [(6 + 7) / 2], [8.0]]
    assert pooled.tolist() == expected


def test_shuffle_keeps_every_feature():
    connector = PoolConfig(window=(1, 2, 2), mode="shuffle").build(1, 4, 0.1)
    pooled = connector._pool(torch.arange(16.0)[:, None], ((1, 4, 4),))
    assert pooled.tolist()[0] == [0, 1, 4, 5]
    assert sorted(pooled.flatten().tolist()) == list(range(16))


def test_spatio_temporal_is_means_over_patches_then_over_frames():
    connector = SpatioTemporalConfig().build(1, 4, 0.1)
    pooled = connector._pool(torch.arange(8.0)[:, None], ((2, 2, 2),))  # two frames of four patches
    assert pooled.flatten().tolist() == [1.5, 5.5, 2, 3, 4, 5]


def test_output_norm_starts_at_the_scale_of_token_embeddings():
    connector = MLPConfig(norm_output=True).build(6, 256, 0.07)
    assert abs(float(connector(_features(), SHAPES).std()) - 0.07) < 0.005


def test_resampler_refuses_an_item_longer_than_its_clock():
    connector = ResamplerConfig(num_queries=2, num_heads=2, max_time=5).build(6, 8, 0.1)
    with pytest.raises(ValueError, match="max_time 5"):
        connector(_features(), SHAPES)
