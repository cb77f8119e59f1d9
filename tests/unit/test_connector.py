"""Connectors: token counts known beforehand, and the arithmetic of pooling."""

from __future__ import annotations

import math

import pytest
import torch

from mmchat.config import ConfigError, load_config
from mmchat.models.connector import (
    AttentiveConfig,
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
    LinearConfig(places=True),
    MLPConfig(places=True, norm_output=True),
    PoolConfig(window=(2, 2, 3), places=True),
    AttentiveConfig(hidden_dim=12, num_heads=2, norm_output=True),
    AttentiveConfig(hidden_dim=12, num_heads=2, across_frames=True),
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


@pytest.mark.parametrize(
    ("config", "learns"),
    [(AttentiveConfig(hidden_dim=32, num_heads=2), True), (MLPConfig(hidden_dim=32), False)],
    ids=lambda one: one.kind if not isinstance(one, bool) else "",
)
def test_what_neighbours_show_is_learned_by_attention_alone(config, learns):
    """Each token should say what is shown one place to its right."""
    torch.manual_seed(0)
    connector = config.build(1, 4, 0.1)
    optimizer = torch.optim.Adam(connector.parameters(), 0.01)
    for _ in range(400):
        shown = torch.randint(0, 2, (32, 3, 3)).float()
        wanted = torch.zeros_like(shown)
        wanted[:, :, :-1] = shown[:, :, 1:]
        said = connector(shown.reshape(-1, 1), ((1, 3, 3),) * 32)[:, 0]
        loss = (said - wanted.flatten()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (float(loss.detach()) < 0.05) == learns, float(loss.detach())


@pytest.mark.parametrize("across_frames", [False, True])
def test_frames_look_at_each_other_only_across_frames(across_frames):
    torch.manual_seed(0)
    alone = AttentiveConfig(hidden_dim=12, num_heads=2).build(6, 8, 0.1)
    connector = AttentiveConfig(hidden_dim=12, num_heads=2, across_frames=across_frames).build(6, 8, 0.1)
    connector.load_state_dict(alone.state_dict())
    picture, clip = _features(((1, 2, 2),)), _features(((3, 2, 2),))
    assert torch.equal(connector(picture, ((1, 2, 2),)), alone(picture, ((1, 2, 2),)))
    changed = clip.clone()
    changed[8:] += 1  # the last frame
    before, after = connector(clip, ((3, 2, 2),)), connector(changed, ((3, 2, 2),))
    assert torch.equal(before[:8], after[:8]) != across_frames
    assert not torch.equal(before[8:], after[8:])


def test_attentive_refuses_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads 5 must divide hidden_dim 12"):
        AttentiveConfig(hidden_dim=12, num_heads=5).build(6, 8, 0.1)


def test_resampler_refuses_an_item_longer_than_its_clock():
    connector = ResamplerConfig(num_queries=2, num_heads=2, max_time=5).build(6, 8, 0.1)
    with pytest.raises(ValueError, match="max_time 5"):
        connector(_features(), SHAPES)


def _places(config, shape):
    """What a connector adds to the tokens of one item for their places, [t, h, w, dim]."""
    connector = config.build(6, 8, 0.1)
    torch.nn.init.normal_(connector.places.project.weight, generator=torch.Generator().manual_seed(1))
    features = _features((shape,))
    with_places = connector(features, (shape,))
    connector.places = None
    grid = config.grid(shape)
    return (with_places - connector(features, (shape,))).unflatten(0, grid)


def test_equal_places_are_told_alike_in_every_grid():
    small, large, pooled = (
        _places(config, shape)
        for config, shape in (
            (LinearConfig(places=True), (1, 3, 2)),
            (LinearConfig(places=True), (3, 9, 6)),
            (PoolConfig(window=(1, 2, 2), places=True), (1, 6, 4)),
        )
    )
    # The middle of a cell is the middle of the cell in the middle of three by three that are in its place.
    torch.testing.assert_close(large[1:2, 1::3, 1::3], small, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, small, rtol=1e-4, atol=1e-4)
    # And different places are told apart, along each axis.
    cells = large.flatten(0, 2)
    assert float((torch.cdist(cells, cells) + 9 * torch.eye(len(cells))).min()) > 0.1


@pytest.mark.parametrize("places", [False, True])
def test_where_a_token_lies_is_learned_from_its_place_alone(places):
    """Features that are the same everywhere, and tokens that should say how far down and across they lie."""
    torch.manual_seed(0)
    connector = LinearConfig(places=places).build(6, 8, 0.1)
    shapes = ((1, 4, 4), (1, 5, 3))
    features = torch.ones(sum(math.prod(shape) for shape in shapes), 6)
    wanted = torch.cat([torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in shape[1:])) for shape in shapes])
    optimizer = torch.optim.Adam(connector.parameters(), 0.03)
    for _ in range(150):
        loss = (connector(features, shapes)[:, :2] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (loss < 0.001) if places else (loss > 0.05)


@pytest.mark.parametrize("kind", ["resampler", "spatio_temporal"])
def test_tokens_that_read_many_places_have_none(kind):
    where = "model.modalities.image.connector"
    with pytest.raises(ConfigError, match=f"{where}.places: its tokens have no place; leave `places` out"):
        load_config("configs/tiny.yaml", [f"{where}={{kind: {kind}, places: true}}"])
    load_config("configs/tiny.yaml", [f"{where}={{kind: {kind}}}"])
    load_config("configs/tiny.yaml", [f"{where}={{kind: mlp, places: true}}"])
