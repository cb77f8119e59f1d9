"""What can be said about a composed scene: expressions, questions, dialogues, right by construction.

Everything is made from the things and what is visible of them. What could mean another thing as well, or what people
could dispute, is not said: margins (an eighth of the picture for places, half as large again for sizes) keep it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Box = tuple[int, int, int, int]
Facts = dict[str, Any]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_CANDIDATES = 100
_PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
# What is taken for each other is not asked for where the other one is.
_ALIKE = {one: pair for pair in (("rat", "mouse"), ("violin", "cello"), ("horse", "donkey")) for one in pair}
_IRREGULAR = {"mouse": "mice", "sheep": "sheep", "deer": "deer"}
# In words; and the axis with the sign of what lies there.
_SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_AXES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_MARGIN, _LARGER = 0.12, 1.5


@dataclass(frozen=True)
class Thing:
    """One thing of a scene: its name and article, its tint or ""; and what is visible of it, the box in pixels (x2 and
    y2 exclusive) and the number of pixels.
    """

    label: str
    article: str
    tint: str
    box: Box
    num_pixels: int

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        return f"{self.tint} {self.label}".strip()

    @property
    def named(self) -> str:
        """With its article: "a red drum"."""
        return f"a {self.name}" if self.tint else f"{self.article} {self.label}"

    def is_larger(self, other: Thing) -> bool:
        """Clearly, by what is seen of it and by its box alike."""
        own, others = ((one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in (self, other))
        return own > _LARGER * others and self.num_pixels > _LARGER * other.num_pixels


def language(things: Sequence[Thing], size: tuple[int, int], names: Sequence[str], rng: np.random.Generator) -> Facts:
    """All facts of a scene, as the source `referential_scenes` reads them.

    Args:
        size: width and height of the picture.
        names: of what might be asked for although it is not there.
    """
    shown = {alike for thing in things for alike in _ALIKE.get(thing.label, (thing.label,))}
    speaker = _Speaker(things, size, [name for name in names if name not in shown], rng)
    caption, phrases = speaker.caption()
    return {
        "caption": caption,
        "phrases": phrases,
        "targets": speaker.targets(),
        "questions": speaker.questions(),
        "turns": speaker.talk(),
        "rounds": speaker.rounds(),
    }


def plural(label: str) -> str:
    """ "fox" to "foxes"."""
    *before, last = label.split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


class _Speaker:
    def __init__(
        self, things: Sequence[Thing], size: tuple[int, int], absent: list[str], rng: np.random.Generator
    ) -> None:
        self.things, self.size, self.absent, self.rng = things, size, absent, rng
        self.unique = [thing for thing in things if not self.same(thing)]
        self.placed = [thing for thing in self.unique if self.place(thing)]

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def pick_two(self, options: Sequence[Any]) -> list[Any]:
        return [options[int(i)] for i in self.rng.choice(len(options), 2, replace=False)]

    def same(self, thing: Thing) -> list[Thing]:
        """Others of its kind."""
        return [other for other in self.things if other.label == thing.label and other is not thing]

    def is_beside(self, a: Thing, b: Thing, side: str) -> bool:
        """Whether a is clearly left of, right of, above or below b."""
        axis, sign = _AXES[side]
        return sign * (a.middle[axis] - b.middle[axis]) > _MARGIN * self.size[axis]

    def beside(self, thing: Thing, side: str) -> Thing | None:
        """The one thing that is clearly on this side of it, where no other could be meant."""
        axis, sign = _AXES[side]
        on_side = [one for one in self.things if sign * (one.middle[axis] - thing.middle[axis]) > 0]
        return on_side[0] if len(on_side) == 1 and self.is_beside(on_side[0], thing, side) else None

    def place(self, thing: Thing) -> str:
        """The side of the picture that its middle lies farthest to; "" where that is open to dispute."""
        across, down = (thing.middle[axis] / self.size[axis] - 0.5 for axis in (0, 1))
        if max(abs(across), abs(down)) < 0.05:
            return "in the middle"
        if max(abs(across), abs(down)) < 0.1 or abs(abs(across) - abs(down)) < 0.04:
            return ""
        if abs(across) > abs(down):
            return "on the left" if across < 0 else "on the right"
        return "at the top" if down < 0 else "at the bottom"

    # --- Expressions

    def expressions(self, thing: Thing) -> dict[str, list[str]]:
        """What means this thing and no other, by the kind of expression."""
        found: dict[str, list[str]] = {}
        same = self.same(thing)
        if not same:
            found["name"] = [f"the {thing.label}"]
        if thing.tint and all(other.tint != thing.tint for other in same):
            found["colour"] = [f"the {thing.name}"]
        if same:
            for side, word in (("left", "left"), ("right", "right"), ("above", "upper"), ("below", "lower")):
                if all(self.is_beside(thing, other, side) for other in same):
                    found.setdefault("place", []).append(f"the {word} {thing.label}")
            larger, smaller = ("bigger", "smaller") if len(same) == 1 else ("biggest", "smallest")
            if all(thing.is_larger(other) for other in same):
                found["size"] = [f"the {larger} {thing.label}"]
            if all(other.is_larger(thing) for other in same):
                found["size"] = [f"the {smaller} {thing.label}"]
        for other in self.unique:
            for side, words in _SIDES.items():
                if other is not thing and self.beside(other, side) is thing:
                    found.setdefault("relation", []).append(f"the thing {words} the {other.label}")
        return found

    def targets(self) -> list[Facts]:
        """Facts to refer by: those of single things, of all of a kind, and of what is not there; in any order, but a
        plain name comes first in half of the scenes.
        """
        targets: list[Facts] = []
        for thing in self.things:
            found = self.expressions(thing)
            # A relation finds a thing, but does not say what it is.
            descriptions = [one for kind, words in found.items() if kind != "relation" for one in words]
            for kind, words in found.items():
                facts = {"kind": kind, "expressions": words, "boxes": [thing.box]}
                targets.append({**facts, "descriptions": descriptions or [f"the {thing.name}"]})
        for label in dict.fromkeys(thing.label for thing in self.things if self.same(thing)):
            words = [f"every {label}", f"all {plural(label)}"]
            boxes = [one.box for one in self.things if one.label == label]
            targets.append({"kind": "all", "expressions": words, "boxes": boxes, "descriptions": [plural(label)]})
        if self.rng.random() < 0.15:
            targets.append({"kind": "none", "expressions": [f"the {self.pick(self.absent)}"], "boxes": []})
        targets = [targets[int(i)] for i in self.rng.permutation(len(targets))]
        names = [target for target in targets if target["kind"] == "name"]
        if names and self.rng.random() < 0.5:
            targets.remove(names[0])
            targets.insert(0, names[0])
        return targets

    def caption(self) -> tuple[str, list[Facts]]:
        """ "A red drum and a seal." with the place of each name in it."""
        phrases: list[Facts] = []
        text = ""
        for number, thing in enumerate(self.things):
            text += _between(number, len(self.things))
            phrases.append({"start": len(text), "end": len(text) + len(thing.named), "boxes": [thing.box]})
            text += thing.named
        return text[0].upper() + text[1:] + ".", phrases

    # --- Questions

    def questions(self) -> list[Facts]:
        """Questions with short answers, in any order; those that need a look around also with what was looked at."""
        makers: tuple[Callable[[], Facts | None], ...] = (
            self._how_many_things, self._how_many_of_a_kind, self._which_colour, self._is_there, self._is_there,
            self._is_it_beside, self._what_is_beside, self._which_is_bigger, self._what_is_here, self._which_side,
        )  # fmt: skip
        made = [makers[int(i)]() for i in self.rng.permutation(len(makers))]
        return list({facts["question"]: facts for facts in made if facts is not None}.values())

    def _how_many_things(self) -> Facts:
        number = NUMBERS[len(self.things)]
        return {"question": "How many things are there?", "answers": [number], "cot": _seen(*self.things)}

    def _how_many_of_a_kind(self) -> Facts:
        label = self.pick(self.absent) if self.rng.random() < 0.2 else self.pick(self.things).label
        found = [thing for thing in self.things if thing.label == label]
        facts: Facts = {"question": f"How many {plural(label)} are there?", "answers": [NUMBERS[len(found)]]}
        return facts | ({"cot": _seen(*found)} if found else {})

    def _which_colour(self) -> Facts | None:
        tinted = [thing for thing in self.unique if thing.tint]
        if not tinted:
            return None
        thing = self.pick(tinted)
        return {"question": f"What colour is the {thing.label}?", "answers": [thing.tint]}

    def _is_there(self) -> Facts:
        if self.rng.random() < 0.5:
            thing = self.pick(self.things)
            question = f"Is there {thing.article} {thing.label}?"
            return {"question": question, "answers": ["yes"], "cot": _seen(thing)}
        return {"question": f"Is there {_with_article(self.pick(self.absent))}?", "answers": ["no"]}

    def _is_it_beside(self) -> Facts | None:
        if len(self.unique) < 2:
            return None
        a, b = self.pick_two(self.unique)
        side = self.pick(("left", "right", "above", "below"))
        if not self.is_beside(a, b, side) and not self.is_beside(a, b, _OPPOSITE[side]):
            return None
        answer = "yes" if self.is_beside(a, b, side) else "no"
        return {"question": f"Is the {a.label} {_SIDES[side]} the {b.label}?", "answers": [answer], "cot": _seen(a, b)}

    def _what_is_beside(self) -> Facts | None:
        found = [(thing, side, self.beside(thing, side)) for thing in self.unique for side in _SIDES]
        found = [one for one in found if one[2] is not None]
        if not found:
            return None
        thing, side, other = self.pick(found)
        question = f"What is {_SIDES[side]} the {thing.label}?"
        return {"question": question, "answers": _names(other), "cot": _seen(thing, other)}

    def _which_is_bigger(self) -> Facts | None:
        if len(self.unique) < 2:
            return None
        a, b = self.pick_two(self.unique)
        if not a.is_larger(b) and not b.is_larger(a):
            return None
        bigger = a if a.is_larger(b) else b
        return {"question": f"Which is bigger, the {a.label} or the {b.label}?", "answers": [f"the {bigger.label}"]}

    def _what_is_here(self) -> Facts:
        thing = self.pick(self.things)
        facts: Facts = {"regions": [_region(thing)["region"]]}
        if thing.tint and self.rng.random() < 0.5:
            return facts | {"question": "What colour is it?", "answers": [thing.tint]}
        return facts | {"question": "What is it?", "answers": _names(thing)}

    def _which_side(self) -> Facts | None:
        if not self.placed:
            return None
        thing = self.pick(self.placed)
        return {"question": f"In which part is the {thing.label}?", "answers": [self.place(thing)]}

    # --- Dialogues

    def talk(self) -> list[Facts]:
        """Three exchanges, of which the later ones can only be understood from the earlier; none where the scene has
        nothing that one could talk about so.
        """
        makers = (self._talk_of_one, self._talk_of_all, self._talk_of_two)
        made = [makers[int(i)]() for i in self.rng.permutation(len(makers))]
        turns = []
        for number, parts in enumerate(next((one for one in made if one), [])):
            written = [{"text": part} if isinstance(part, str) else part for part in parts]
            role = "assistant" if number % 2 else "user"
            turns.append({"role": role, "parts": [*([{"media": 0}] if number == 0 else []), *written]})
        return turns

    def _talk_of_one(self) -> list[list[Any]]:
        """Whether it is there, where, and on which side; or whether something else is there first."""
        if not self.placed:
            return []
        thing = self.pick(self.placed)
        if self.rng.random() < 0.4:
            start = [[f"Do you see {_with_article(self.pick(self.absent))}?"], ["No."]]
            return [*start, [f"And {thing.article} {thing.label}?"], ["Yes."], ["Where is it?"], [_region(thing)]]
        start = [[f"Do you see {thing.article} {thing.label}?"], ["Yes."], ["Where is it?"], [_region(thing)]]
        return [*start, ["In which part is that?"], [f"It is {self.place(thing)}."]]

    def _talk_of_all(self) -> list[list[Any]]:
        big = [one for one in self.unique if all(one.is_larger(other) for other in self.things if other is not one)]
        if len(self.things) < 2 or not big:
            return []
        return [
            ["What do you see?"], _listed(*self.things),
            ["Which of them is the biggest?"], [f"The {big[0].name}."],
            ["Show me where it is."], [_region(big[0])],
        ]  # fmt: skip

    def _talk_of_two(self) -> list[list[Any]]:
        if len(self.unique) < 2:
            return []
        first, second = self.pick_two(self.unique)
        if not self.is_beside(first, second, "left") and not self.is_beside(second, first, "left"):
            return []
        left = first if self.is_beside(first, second, "left") else second
        return [
            ["What is this ", _region(first), "?"], [first.named],
            ["And this ", _region(second), "?"], [second.named],
            ["Which of the two is further to the left?"], [f"The {left.name}."],
        ]  # fmt: skip

    def rounds(self) -> list[Facts]:
        """Visual Dialog's form: whether something is there, and of what is there, where "it" is, which only the history
        tells. Every round has a hundred candidates, with relevances where a place is asked for.
        """
        rounds: list[Facts] = []
        known = list(dict.fromkeys([*self.absent, *(thing.label for thing in self.things)]))
        there = [f"yes, there is {_with_article(name)}" for name in known]
        there += [f"no, there is no {name}" for name in known]
        where = [f"the {name} is {place}" for name in known for place in _PLACES]
        for i in self.rng.permutation(len(self.placed))[:3]:
            thing = self.placed[int(i)]
            if self.rng.random() < 0.5:
                other = self.pick(self.absent)
                question, answer = f"is there {_with_article(other)}", f"no, there is no {other}"
                rounds.append(self._round(question, answer, there, [f"yes, there is {_with_article(other)}"]))
            question, answer = f"is there {_with_article(thing.label)}", f"yes, there is {_with_article(thing.label)}"
            rounds.append(self._round(question, answer, there, [f"no, there is no {thing.label}"]))
            others = [one for one in self.placed if one is not thing]
            near = [f"the {one.label} is {self.place(one)}" for one in others]
            near += [f"the {thing.label} is {place}" for place in _PLACES]
            near += [f"the {one.label} is {self.place(thing)}" for one in others]
            rounds.append(self._round("where is it", f"the {thing.label} is {self.place(thing)}", where, near))
        return rounds

    def _round(self, question: str, answer: str, pool: Sequence[str], near: Sequence[str]) -> Facts:
        """The candidates that come near, and any of the pool."""
        close = [one for one in dict.fromkeys(near) if one != answer]
        rest = [one for one in pool if one != answer and one not in set(close)]
        others = [*close, *(rest[int(i)] for i in self.rng.permutation(len(rest))[: NUM_CANDIDATES - 1 - len(close)])]
        options = [others[int(i)] for i in self.rng.permutation(len(others))]
        place = int(self.rng.integers(len(options) + 1))
        options.insert(place, answer)
        facts: Facts = {"question": question, "answer": answer, "options": options, "gt_index": place}
        if question == "where is it":
            same = answer.partition(" is ")[0] + " is "  # the right thing in a wrong place is a little relevant
            facts["relevance"] = [1.0 if one == answer else 0.2 if one.startswith(same) else 0.0 for one in options]
        return facts


def _with_article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _region(thing: Thing) -> Facts:
    return {"region": {"media": 0, "box": list(thing.box)}}


def _between(number: int, count: int) -> str:
    """What stands before the item of that number in a list."""
    return "" if number == 0 else " and " if number == count - 1 else ", "


def _listed(*things: Thing) -> list[Any]:
    """ "a drum [box], a seal [box] and a key [box]" as parts; it reads as well without the boxes."""
    parts: list[Any] = []
    for number, thing in enumerate(things):
        parts += [f"{_between(number, len(things))}{thing.named} ", _region(thing)]
    return parts


def _seen(*things: Thing) -> list[Facts]:
    """Reasoning that names what was looked at: "I see a drum [box] and a seal [box]." """
    return [{"text": part} if isinstance(part, str) else part for part in ("I see ", *_listed(*things), ".")]


def _names(thing: Thing) -> list[str]:
    """With and without its tint."""
    return list(dict.fromkeys([f"{thing.article} {thing.label}", thing.named]))
