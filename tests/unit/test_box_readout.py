"""Boxes read from media tokens: which token is to tell which box, and that a step learns it."""

from __future__ import annotations

import pytest
import torch
import yaml

from mmchat.config import ConfigError, parse_config
from mmchat.models.box_readout import NUM_BINS, BoxReadout, targets
from mmchat.regions import Geometry
from tests import tiny


def test_a_token_shows_the_smallest_box_around_its_middle():
    large, small = (0.0, 0.0, 1.0, 0.75), (0.5, 0.5, 0.7, 0.7)
    sides, weights = targets([(small, large)], [(1, 2, 2)])  # middles at 0.25 and 0.75
    # 0.75, 0.25 and the two upper ones lie in the large box; the small one holds no middle, and takes the nearest.
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert [tuple(side) for side in sides.tolist()] == [
        pytest.approx(large),
        pytest.approx(large),
        pytest.approx(large),
        pytest.approx(small),
    ]


def test_small_boxes_in_one_cell_get_a_token_each():
    near = ((0.30, 0.30, 0.31, 0.31), (0.32, 0.30, 0.33, 0.31))
    sides, weights = targets([near], [(1, 2, 2)])
    assert sorted(weights.tolist()) == [0.0, 0.0, 1.0, 1.0]
    assert {tuple(round(v, 2) for v in side) for side in sides[weights > 0].tolist()} == set(near)


def test_items_without_boxes_count_nothing():
    sides, weights = targets([(), ((0.0, 0.0, 0.4, 0.4),), ()], [(1, 2, 2), (1, 2, 2), (3, 1, 1)])
    assert sides.shape == (11, 4) and weights.tolist() == [0.0] * 4 + [1.0] + [0.0] * 6
    assert targets([], [])[0].shape == (0, 4)


def test_each_box_counts_once_however_large_and_however_items_are_split():
    torch.manual_seed(0)
    readout, tokens = BoxReadout(8), torch.randn(8, 8)
    torch.nn.init.zeros_(readout.project.weight)
    torch.nn.init.zeros_(readout.project.bias)
    boxes = [((0.0, 0.0, 1.0, 1.0),), ((0.0, 0.0, 0.4, 0.4), (0.6, 0.0, 1.0, 1.0))]
    grids = [(1, 2, 2), (1, 2, 2)]
    whole = readout.loss(tokens, boxes, grids)
    # Nothing known: the logarithm of the number of bins for each of three boxes.
    torch.testing.assert_close(whole, 3 * torch.tensor(float(NUM_BINS)).log())
    torch.nn.init.normal_(readout.project.weight)
    whole = readout.loss(tokens, boxes, grids)
    parts = sum(readout.loss(tokens[4 * i : 4 * i + 4], boxes[i : i + 1], grids[:1]) for i in (0, 1))
    torch.testing.assert_close(whole, parts)


def test_boxes_are_learned():
    """From tokens that hold the sides as numbers, linearly read: the likeliest bins lie within one of the truth."""
    torch.manual_seed(0)
    readout = BoxReadout(64)
    optimizer = torch.optim.Adam(readout.parameters(), lr=0.02)
    code = torch.randn(2, 64)

    def made(n: int) -> tuple[torch.Tensor, list]:
        low = torch.rand(n) * 0.5
        boxes = torch.stack([low, low, low + 0.4, low + 0.4], -1)
        angle = low[:, None] * 6
        tokens = angle.sin() * code[0] + angle.cos() * code[1]
        return tokens, [(tuple(box),) for box in boxes.tolist()]

    for _ in range(300):
        tokens, boxes = made(64)
        loss = readout.loss(tokens, boxes, [(1, 1, 1)] * 64) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, boxes = made(64)
    found = readout(tokens).argmax(-1) / NUM_BINS + 0.5 / NUM_BINS
    wanted = torch.tensor([own[0] for own in boxes])
    assert (found - wanted).abs().mean() < 1.5 / NUM_BINS


def test_what_is_cropped_away_is_no_part_of_a_box():
    wide = Geometry(600, 100, 224, 224, 2.24, 2.24, -560.0, 0.0)  # its middle, 250 to 350, is seen
    assert wide.to_shares((240.0, 0.0, 300.0, 100.0)) == pytest.approx((0.0, 0.0, 0.5, 1.0))
    x0, _, x1, _ = wide.to_shares((0.0, 0.0, 50.0, 50.0))
    assert x0 == x1 == 0.0


def test_shares_follow_the_picture_into_its_square():
    geometry = Geometry(200, 100, 224, 224, 1.12, 1.12, 0.0, 56.0)
    assert geometry.to_shares((0.0, 0.0, 200.0, 100.0)) == pytest.approx((0.0, 0.25, 1.0, 0.75))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"regions": 1}}, "losses.regions needs model.modalities.image.read_boxes"),
        ({"losses": {"answers": 0}}, "answers and regions are both 0"),
        ({"losses": {"answers": float("inf")}}, "finite"),
        ({"connector": {"kind": "resampler"}, "read_boxes": True}, "tokens of connector resampler have no place"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    for key in ("connector", "read_boxes"):
        if key in changes:
            values["model"]["modalities"]["image"][key] = changes[key]
    values["stages"][0] |= {key: changes[key] for key in ("losses",) if key in changes}
    with pytest.raises(ConfigError, match=message):
        parse_config(values, "test")
