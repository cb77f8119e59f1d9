"""One key-value cache for conversations that come and go: a slot each, and all of them end at the same column.

                width       end
    slot 0    |  . . a a a a a a a|          a decode step writes one column and reads a view, so that nothing is
    slot 1    |  b b b b b b b b b|          copied; the same mask as for a padded batch hides what is left of a row
    slot 2    |  . . . . . c c c c|          (sliding windows included)

Where a layer's columns are used up, its rows move to the front of fresh ones. Layers have different numbers of columns,
so that they do not all move in the same step.

A pass may also read a part of a prompt that waits for its slot (MixedCache): the weights are read once for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Columns beyond the longest row that are allocated at a time, in tokens: so many at most, and half of it at least.
HEADROOM = 256

# Keys and values of every layer, [heads, length, dim] each.
LayerStates = tuple[tuple[Tensor, Tensor], ...]
# A cache for one conversation, which grows as it is read.
RowCache = DynamicCache


def check_cacheable(config: PreTrainedConfig) -> None:
    """Raises ValueError for an LLM whose state is more than keys and values of its tokens."""
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        raise ValueError(
            f"this LLM ({config.model_type}) keeps {', '.join(sorted(kind.__name__ for kind in kinds))}; serving needs "
            "one whose layers keep keys and values of every token. Use a Llama, Qwen, SmolLM, Gemma, Mistral or GPT-2 "
            "type of model, or `infer.py chat`"
        )


def row_cache(states: LayerStates | None, length: int) -> RowCache:
    """A cache for one row that begins with the first `length` tokens of `states`, which are read and not written to.

    It keeps every token, also where a layer looks at the last ones only: a later prompt may share any beginning.
    """
    cache = RowCache()
    for keys, values in states or ():
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys[None, :, :length], values[None, :, :length]  # grows by making new ones
        cache.layers.append(layer)
    return cache


def states_of(cache: RowCache) -> LayerStates:
    """Keys and values of a cache with one row."""
    states = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        states.append((layer.keys[0], layer.values[0]))
    return tuple(states)


@dataclass
class _Rows:
    """How many slots are used, and the columns of the longest row."""

    count: int = 0
    width: int = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values [slots, heads, columns, dim]; zero left of a row's tokens, where masked columns are read too.

    Attributes:
        end: the column behind the last token of every row.
    """

    is_sliding = False

    def __init__(self, rows: _Rows, keys: Tensor, values: Tensor, end: int) -> None:
        super().__init__()
        self.rows = rows
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.end = end
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a slot is filled by SlotCache.join")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One new token of every row, [rows, heads, 1, dim]; returns views with it, [rows, heads, width + 1, dim]."""
        count, start = self.rows.count, self.end - self.rows.width
        found = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept[:count, :, self.end] = new[:, :, 0]
            found.append(kept[:count, :, start : self.end + 1])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.rows.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Rows 0 to `rows` - 1 are used. A row that leaves gives its slot to the last one, so that there are no gaps.

    Attributes:
        lengths: tokens of every row.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []
        self._rows = _Rows()

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Columns that a step reads: those of the longest row."""
        return max(self.lengths, default=0)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._slot_layers() for tensor in (layer.keys, layer.values))

    def join(self, states: LayerStates) -> None:
        """Takes a row in, as the last one."""
        length, row = states[0][0].shape[1], self.rows
        for number, pair in enumerate(states):
            layer = self._slot_layers()[number] if self.rows else None
            if layer is None or row == len(layer.keys) or length > layer.end:
                layer = self._move(number, len(states), pair, row + 1, max(self.width, length))
            for kept, new in zip((layer.keys, layer.values), pair, strict=True):
                kept[row, :, : layer.end - length].zero_()
                kept[row, :, layer.end - length : layer.end] = new
        self.lengths.append(length)
        self._settle()

    def leave(self, row: int) -> None:
        """Frees a slot; the last row takes it. Without rows, no memory is held."""
        last = self.rows - 1
        if row != last:
            for layer in self._slot_layers():
                for kept in (layer.keys, layer.values):
                    kept[row, :, : layer.end] = kept[last, :, : layer.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.layers = []
        self._settle()

    def copy_of(self, row: int) -> LayerStates:
        """Keys and values of a row."""
        states = []
        for layer in self._slot_layers():
            columns = slice(layer.end - self.lengths[row], layer.end)
            states.append((layer.keys[row, :, columns].clone(), layer.values[row, :, columns].clone()))
        return tuple(states)

    def mask(self, device: torch.device, window: int | None = None) -> Tensor:
        """Mask [rows, width + 1] of the next step, 0 left of where a row begins, or of its last `window` tokens."""
        width = self.width
        reaches = [length if window is None else min(length, window - 1) for length in self.lengths]
        begins = torch.tensor([width - reach for reach in reaches], device=device)
        return (torch.arange(width + 1, device=device) >= begins[:, None]).long()

    def begin_step(self) -> None:
        """To be called before the model runs: there must be a column to write to."""
        for number, layer in enumerate(self._slot_layers()):
            if layer.end == layer.keys.shape[2]:
                self._move(number, len(self.layers), (layer.keys[0], layer.values[0]), self.rows, self.width)

    def end_step(self) -> None:
        """To be called after the model has run, which has written one token of every row."""
        for layer in self._slot_layers():
            layer.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._settle()

    def _move(self, number: int, layers: int, like: tuple[Tensor, Tensor], rows: int, end: int) -> _SlotLayer:
        """A layer's rows into fresh tensors with slots for `rows`, and columns after `end`, at which they end now.

        Args:
            layers: how many there are, of which this is the one with `number`.
            like: keys and values [heads, any, dim].
        """
        slots = 1 << (rows - 1).bit_length()
        columns = end + HEADROOM * (layers + number + 1) // (2 * layers)
        fresh = [x.new_zeros(slots, x.shape[0], columns, x.shape[2]) for x in like]
        if self.rows:
            old, width = self._slot_layers()[number], self.width
            for new, kept in zip(fresh, (old.keys, old.values), strict=True):
                new[: self.rows, :, end - width : end] = kept[: self.rows, :, old.end - width : old.end]
        layer = _SlotLayer(self._rows, fresh[0], fresh[1], end)
        self.layers[number : number + 1] = [layer]  # the first row's are appended
        return layer

    def _settle(self) -> None:
        self._rows.count, self._rows.width = self.rows, self.width

    def _slot_layers(self) -> list[_SlotLayer]:
        return self.layers  # type: ignore[return-value]


class MixedCache(Cache):
    """For a pass over one sequence: the next token of every slot, then tokens of another row, which has its own cache.

    Tokens of different rows stand in one sequence, so that the attention must go by parts: see `attend`.
    """

    def __init__(self, slots: SlotCache, row: RowCache) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.row = row
        self._masks: dict[int | None, Tensor] = {}
        self._parts: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [1, heads, slots + tokens, dim], which are given back: `attend` knows the others."""
        new = (key_states, value_states)
        keys, values = (states[0, :, : self.slots.rows].transpose(0, 1)[:, :, None] for states in new)
        of_slots = self.slots.update(keys, values, layer_idx)
        keys, values = (states[:, :, self.slots.rows :] for states in new)
        self._parts = of_slots, self.row.update(keys, values, layer_idx)
        return new

    def attend(self, query: Tensor, sliding_window: int | None, attend: Callable[..., Tensor]) -> Tensor:
        """Attention of the layer that has just been updated.

        Args:
            query: [1, heads, slots + tokens, dim]
            attend: attention of (query, key, value, mask or None), each [rows, heads, length, dim].
        Returns:
            as the query.
        """
        assert self._parts is not None
        rows, (of_slots, of_row) = self.slots.rows, self._parts
        if sliding_window not in self._masks:
            mask = self.slots.mask(query.device, sliding_window)
            self._masks[sliding_window] = mask[:, None, None].bool()
        steps = attend(query[0, :, :rows].transpose(0, 1)[:, :, None], *of_slots, self._masks[sliding_window])
        read = attend(query[:, :, rows:], *of_row, None)
        return torch.cat([steps[:, :, 0].transpose(0, 1)[None], read], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
