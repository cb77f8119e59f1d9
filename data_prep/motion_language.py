"""What is asked and said about a clip of moving things: which way, which of two, which first; right by construction.

A clip is as likely as the same clip played backwards, and every question has as many answers of one kind as of another.
So neither the words nor a set of frames without their order tells more than chance: of "left or right", of "yes or no"
and of "the drum or the seal" a half. Frames without their order do show whether a thing moves across or up and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np

from mmchat.tasks.video_qa import TYPES

# Sign along x and along y.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

Option = TypeVar("Option")


@dataclass(frozen=True)
class Design:
    """What happens in a clip of two things, and how it is asked.

    Attributes:
        directions: of those that move, in the order in which they do: of the first thing, or of both.
        which: form of the question which thing moves (1 of 2), or which moves first (1 of 4).
        is_first_named: of that question: whether it names the first thing first; of "does it?" so that the answer is
            yes.
        ways: for each direction the form of its question (1 of 3), and whether that names the right one first, or is
            answered with yes.
    """

    directions: tuple[str, ...]
    which: int
    is_first_named: bool
    ways: tuple[tuple[int, bool], ...]


def designs(count: int, rng: np.random.Generator) -> list[Design]:
    """As many clips, in half of which both things move; what can be asked and answered occurs equally often."""
    num_pairs = count // 2
    num_single = count - num_pairs
    ways = tuple(product(range(3), (True, False)))
    single = [
        Design((direction,), which, named, (way,))
        for direction, which, named, way in dealt(
            tuple(product(DIRECTIONS, range(2), (True, False), ways)), num_single, rng
        )
    ]
    pairs = [
        Design(both, which, named, asked)
        for (both, which, named), asked in zip(
            dealt(tuple(product(product(DIRECTIONS, repeat=2), range(4), (True, False))), num_pairs, rng),
            dealt(tuple(product(ways, repeat=2)), num_pairs, rng),
            strict=True,
        )
    ]
    found = [*single, *pairs]
    return [found[int(i)] for i in rng.permutation(count)]


def dealt(options: Sequence[Option], count: int, rng: np.random.Generator) -> list[Option]:
    """So many of the options in any order, none of them more than once oftener than another."""
    found: list[Option] = []
    while len(found) < count:
        found += [options[int(i)] for i in rng.permutation(len(options))]
    return found[:count]


def questions(design: Design, labels: tuple[str, str]) -> list[dict[str, Any]]:
    """Questions as {"question", "answer", "type"}; what one says does not tell the answer to another.

    Args:
        labels: of the two things. The first moves, alone or first.
    """
    first, second = (f"the {label}" for label in labels)
    named = (first, second) if design.is_first_named else (second, first)
    if len(design.directions) == 1:
        # The direction is asked without a name, which would tell what moves.
        asked = [_which_moves(design, first, named)]
        (way,) = design.ways
        asked.append(_way(f"{named[0]} or {named[1]} moves.", design.directions[0], *way))
    else:
        asked = [_which_first(design, first, second, named)]
        for thing, direction, way in zip((first, second), design.directions, design.ways, strict=True):
            asked.append(_way(thing, direction, *way))
    return [{**one, "question": one["question"][0].upper() + one["question"][1:]} for one in asked]


def _question(question: str, answer: str, kind: str) -> dict[str, Any]:
    return {"question": question, "answer": answer, "type": TYPES.index(kind)}


def _which_moves(design: Design, first: str, named: tuple[str, str]) -> dict[str, Any]:
    if design.which == 0:
        return _question(f"which moves, {named[0]} or {named[1]}?", first, "object")
    return _question(f"does {named[0]} move?", "yes" if design.is_first_named else "no", "yes_no")


def _which_first(design: Design, first: str, second: str, named: tuple[str, str]) -> dict[str, Any]:
    one, other = named
    is_true = design.is_first_named
    forms = (
        (f"which moves first, {one} or {other}?", first),
        (f"which moves last, {one} or {other}?", second),
        (f"does {one} move before {other}?", "yes" if is_true else "no"),
        (f"does {one} move after {other}?", "no" if is_true else "yes"),
    )
    return _question(*forms[design.which], "temporal")


def _way(who: str, direction: str, form: int, flag: bool) -> dict[str, Any]:
    """Which way something moves; `who` is a thing, or a sentence that says that one of two does."""
    is_told = who.endswith(".")
    one, other = (direction, OPPOSITE[direction]) if flag else (OPPOSITE[direction], direction)
    match form:
        case 0:
            return _question(f"{who} Which way?" if is_told else f"which way does {who} move?", direction, "motion")
        case 1:
            asked = f"{one} or {other}?"
            return _question(
                f"{who} {asked.capitalize()}" if is_told else f"does {who} move {asked}", direction, "motion"
            )
    question = f"{who} Does it move {one}?" if is_told else f"does {who} move {one}?"
    return _question(question, "yes" if flag else "no", "yes_no")


def captions(design: Design, named: tuple[str, str]) -> list[str]:
    """Sentences that say the same; `named` has the articles: "a drum"."""
    first, second = named
    if len(design.directions) == 1:
        (way,) = design.directions
        found = [f"{first} moves {way}, {second} stays where it is.", f"{second} stays and {first} moves {way}."]
    else:
        way, then = design.directions
        found = [
            f"first {first} moves {way}, then {second} moves {then}.",
            f"{first} moves {way} before {second} moves {then}.",
            f"{second} moves {then} after {first} has moved {way}.",
        ]
    return [one[0].upper() + one[1:] for one in found]
