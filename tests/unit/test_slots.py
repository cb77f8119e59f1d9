"""The cache with a slot for each answer: what rows hold while others come, go and layers move."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mmchat.inference import slots
from mmchat.inference.slots import LayerStates, SlotCache

LAYERS, HEADS, DIM = 6, 2, 3


def states(length: int, generator: torch.Generator) -> LayerStates:
    def some() -> Tensor:
        return torch.randn(HEADS, length, DIM, generator=generator)

    return tuple((some(), some()) for _ in range(LAYERS))


def step(cache: SlotCache, rows: list[LayerStates], generator: torch.Generator) -> list[LayerStates]:
    """A token of every row is written; returns what the rows hold then, having looked at what the layers gave back."""
    cache.begin_step()
    new = [states(1, generator) for _ in rows]
    after = [
        tuple((torch.cat([k, nk], 1), torch.cat([v, nv], 1)) for (k, v), (nk, nv) in zip(row, token, strict=True))
        for row, token in zip(rows, new, strict=True)
    ]
    mask = cache.mask(torch.device("cpu"))
    for layer in range(LAYERS):
        keys = torch.stack([token[layer][0] for token in new])
        values = torch.stack([token[layer][1] for token in new])
        for number, found in enumerate(cache.update(keys, values, layer)):
            assert found.shape[2] == mask.shape[1] == cache.width + 1
            for row, kept in enumerate(after):
                assert torch.equal(found[row][:, mask[row].bool()], kept[layer][number])
                assert not found[row][:, ~mask[row].bool()].any()  # zeros: a nan would pass through the mask
    cache.end_step()
    return after


def test_rows_keep_their_tokens_while_others_come_and_go(monkeypatch) -> None:
    monkeypatch.setattr(slots, "HEADROOM", 8)
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    cache, rows = SlotCache(), list[LayerStates]()
    for _ in range(120):
        if len(rows) < 5 and rng.random() < 0.3:
            rows.append(states(rng.choice([1, 3, 30]), generator))
            cache.join(rows[-1])
        if rows and rng.random() < 0.2:
            gone = rng.randrange(len(rows))
            for (keys, values), (kept_keys, kept_values) in zip(cache.copy_of(gone), rows[gone], strict=True):
                assert torch.equal(keys, kept_keys) and torch.equal(values, kept_values)
            cache.leave(gone)
            rows[gone] = rows[-1]
            rows.pop()
        if rows:
            rows = step(cache, rows, generator)


def test_layers_move_in_different_steps(monkeypatch) -> None:
    monkeypatch.setattr(slots, "HEADROOM", 2 * LAYERS)
    generator, cache = torch.Generator().manual_seed(0), SlotCache()
    rows = [states(4, generator)]
    cache.join(rows[0])
    moved = []
    for _ in range(40):
        before = list(cache.layers)
        rows = step(cache, rows, generator)
        moved.append(sum(old is not new for old, new in zip(before, cache.layers, strict=True)))
    assert sum(moved) >= LAYERS and max(moved) <= LAYERS // 2
