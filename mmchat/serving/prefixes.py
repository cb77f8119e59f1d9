"""Keys and values of what has been read before, for prompts that begin the same way."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from mmchat.inference.slots import LayerStates


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that have been read.

    marks: [length, columns] int64, equal where two tokens are the same to the LLM: see mmchat/serving/prompt.py.
    """

    marks: np.ndarray
    states: LayerStates

    def __len__(self) -> int:
        return len(self.marks)


class PrefixStore:
    """At most `max_tokens` tokens; the least recently used prefixes go first. For the engine's thread alone."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._kept: OrderedDict[Prefix, None] = OrderedDict()

    def longest(self, marks: np.ndarray) -> tuple[int, LayerStates | None]:
        """How many tokens of a prompt's beginning are known, and the states that begin with them."""
        best, length = None, 0
        for prefix in self._kept:
            common = _common_length(prefix.marks, marks)
            if common > length:
                best, length = prefix, common
        if best is None:
            return 0, None
        self._kept.move_to_end(best)
        return length, best.states

    def put(self, marks: np.ndarray, states: LayerStates) -> None:
        """Keeps a prefix in place of those that it begins with; one that is too long changes nothing."""
        if len(marks) > self.max_tokens:
            return
        for prefix in list(self._kept):
            common = _common_length(prefix.marks, marks)
            if common == len(marks):  # a longer one is here already
                self._kept.move_to_end(prefix)
                return
            if common == len(prefix):
                self._drop(prefix)
        self._kept[Prefix(marks, states)] = None
        self.num_tokens += len(marks)
        while self.num_tokens > self.max_tokens:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        self._kept.clear()
        self.num_tokens = 0

    def _drop(self, prefix: Prefix) -> None:
        del self._kept[prefix]
        self.num_tokens -= len(prefix)


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    same = (one[:length] == other[:length]).all(axis=1)
    return length if same.all() else int(same.argmin())
