"""Lanes: every sample once an epoch, the same order for the same words, and a state that continues it."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat.data.lanes import Lane, SampleId, Source

ORDER = [
    ("b", 10),
    ("b", 25),
    ("a", 228),
    ("a", 224),
    ("a", 226),
    ("b", 0),
    ("b", 26),
    ("b", 27),
    ("a", 221),
    ("a", 225),
    ("b", 37),
    ("a", 223),
]

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any)


def first_epoch(source: Source, lane: int, num_lanes: int, epoch: int = 0) -> list[int]:
    """Samples of one epoch that a lane draws; an epoch may give it none."""
    sequence = Lane([source], [1.0], 7, "stage", lane, num_lanes)
    drawn = []
    while (sample := sequence.next()).epoch <= epoch:
        if sample.epoch == epoch:
            drawn.append(sample.index)
    return drawn


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 20), st.integers(0, 2))
def test_all_lanes_together_see_every_sample_once_an_epoch(
    sizes: list[int], num_lanes: int, block_size: int, epoch: int
) -> None:
    source = Source("s", tuple(sizes), block_size)
    seen = Counter(index for lane in range(num_lanes) for index in first_epoch(source, lane, num_lanes, epoch))
    assert seen == Counter(range(sum(sizes)))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 5), st.integers(0, 150), st.integers(0, 2**40))
def test_a_state_continues_the_sequence(sizes: list[int], num_lanes: int, draws: int, seed: int) -> None:
    sources = [Source("a", tuple(sizes)), Source("b", (30,))]

    def lane() -> Lane:
        return Lane(sources, [1.0, 2.5], seed, "stage", num_lanes - 1, num_lanes)

    whole, resumed = lane(), lane()
    for _ in range(draws):
        whole.next()
    resumed.load_state(json.loads(json.dumps(whole.state())))
    assert [resumed.next() for _ in range(50)] == [whole.next() for _ in range(50)]
    assert resumed.state() == whole.state()


def test_the_order_does_not_change_between_versions() -> None:
    """Checkpoints hold positions: an order that changed would repeat and skip data after a resume."""
    lane = Lane([Source("a", (5, 300)), Source("b", (40,))], [3, 1], 0, "align", 1, 4)
    drawn = [lane.next() for _ in range(12)]
    assert [(sample.source, sample.index) for sample in drawn] == ORDER


def test_seed_stage_epoch_and_lane_change_the_order() -> None:
    def draw(seed: int = 0, stage: str = "a", lane: int = 0, name: str = "s") -> list[SampleId]:
        sequence = Lane([Source(name, (1000,))], [1], seed, stage, lane, 2)
        return [sequence.next() for _ in range(1000)]

    plain = draw()
    assert plain == draw()
    for other in (draw(seed=1), draw(stage="b"), draw(lane=1), draw(name="t")):
        assert [sample.index for sample in plain] != [sample.index for sample in other]
    by_epoch = [[sample.index for sample in plain if sample.epoch == epoch] for epoch in (0, 1)]
    assert by_epoch[0] != by_epoch[1][: len(by_epoch[0])]


def test_reading_stays_inside_a_block() -> None:
    lane = Lane([Source("s", (50_000, 50_000))], [1], 0, "stage", 0, 8)
    drawn = [lane.next().index for _ in range(64)]
    assert max(drawn) - min(drawn) == 63
    assert drawn != sorted(drawn)


def test_the_lanes_shares_of_a_small_source_differ_little() -> None:
    sizes = [len(first_epoch(Source("s", (100,)), lane, 8)) for lane in range(8)]
    assert sum(sizes) == 100 and min(sizes) >= 12 and max(sizes) <= 13
    # Fewer samples than lanes: every lane gets its turn within as many epochs as there are lanes.
    for lane in range(8):
        sample = Lane([Source("s", (1,))], [1], 0, "stage", lane, 8).next()
        assert sample.index == 0 and sample.epoch < 8


def test_sources_are_drawn_by_weight() -> None:
    lane = Lane([Source(name, (1000,)) for name in "abc"], [1, 2, 7], 0, "stage", 0, 1)
    count = Counter(lane.next().source for _ in range(5000))
    assert [round(count[name] / 5000, 1) for name in "abc"] == [0.1, 0.2, 0.7]


def test_the_choice_of_source_does_not_depend_on_sizes() -> None:
    lanes = [Lane([Source("a", (size,)), Source("b", (10,))], [1, 1], 0, "stage", 0, 1) for size in (7, 700)]
    assert [lanes[0].next().source for _ in range(100)] == [lanes[1].next().source for _ in range(100)]


def test_refusals() -> None:
    source = Source("s", (10,))
    for sources, weights, lane in (
        ([source], [0.0], 0),
        ([source], [float("inf")], 0),
        ([source], [1.0, 1.0], 0),
        ([source, source], [1.0, 1.0], 0),
        ([Source("s", (0, 0))], [1.0], 0),
        ([], [], 0),
        ([source], [1.0], 4),
    ):
        with pytest.raises(ValueError):
            Lane(sources, weights, 0, "stage", lane, 4)
    with pytest.raises(ValueError, match="the same sources"):
        Lane([source], [1.0], 0, "stage", 0, 4).load_state({"draws": 1, "sources": {"other": [0, 1]}})
