"""What tasks share in reading facts: each value of the wanted kind, or a SampleError that says what was found."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

from mmchat.conversation import Record, Region
from mmchat.errors import SampleError

MAX_ASKED = 8  # facts of one record that one conversation asks for


def drawn(record: Record, rng: random.Random) -> list[Record]:
    """Some of the facts under "more", each as a record, and last the record's own.

    Of those that tell each other's answer, one alone is among them: of targets with a box in common, and of equal
    questions about the same places. The record's own comes before all others.
    """
    told, asked = _tells(record), list[Record]()
    more = more_of(record)
    for one in rng.sample(more, len(more)):
        if len(asked) < MAX_ASKED - 1 and told.isdisjoint(tells := _tells(one)):
            asked.append(one)
            told |= tells
    return [*asked, Record(record.key, record.facts)]


def _tells(record: Record) -> set[object]:
    """What a turn about these facts says: its boxes, its question."""
    tells: set[object] = set(boxes_of(record, "boxes")) if "boxes" in record.facts else set()
    if isinstance(question := record.facts.get("question"), str):
        tells.add((*question.casefold().rstrip(" .?!").split(), json.dumps(record.facts.get("regions", []))))
    return tells


def more_of(record: Record) -> list[Record]:
    """The facts under "more", each as a record."""
    more = record.facts.get("more", [])
    if not isinstance(more, list) or not all(isinstance(facts, dict) for facts in more):
        raise SampleError("unreadable facts", f"{record.key}: wanted a list under 'more', found {more!r:.200}")
    return [Record(record.key, facts) for facts in more]


def shown_in(record: Record) -> int:
    """Which of the record's media its boxes lie in: the first picture or video."""
    for i, item in enumerate(record.media):
        if item.modality != "audio":
            return i
    raise SampleError("no media", f"{record.key}: wanted a picture or a video, found {len(record.media)} sounds")


def text_of(record: Record, name: str) -> str:
    """A text that is not blank."""
    found = record.facts.get(name)
    if not isinstance(found, str) or not found.strip():
        raise SampleError(f"no {name}", f"{record.key}: wanted text under {name!r}, found {found!r:.200}")
    return found


def texts_of(record: Record, name: str) -> list[str]:
    """Texts that are not blank, at least one."""
    found = record.facts.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise SampleError(
            f"no {name.removesuffix('s')}", f"{record.key}: wanted texts under {name!r}, found {found!r:.200}"
        )
    return found


def boxes_of(record: Record, name: str) -> list[tuple[float, float, float, float]]:
    """Boxes [x1, y1, x2, y2]; there may be none."""
    found = record.facts.get(name)
    try:
        return [_numbers(box, 4) for box in found]  # type: ignore[union-attr, misc]
    except (TypeError, ValueError) as error:
        raise SampleError(f"unreadable {name}", f"{record.key}: wanted boxes under {name!r}: {error}") from error


def regions_of(record: Record, found: Any) -> list[Region]:
    """Regions from their facts: {"media": 0, "box" | "point" | "tube": [...], "label", "time_s"}."""
    try:
        return [region_of(facts) for facts in found]
    except (TypeError, ValueError, AttributeError) as error:
        raise SampleError("unreadable regions", f"{record.key}: {error}, in {found!r:.200}") from error


def region_of(facts: dict[str, Any]) -> Region:
    """One region from its facts. Raises ValueError or TypeError for facts that are no region."""
    shapes: dict[str, Any] = {}
    for name, length in (("box", 4), ("point", 2)):
        if name in facts:
            shapes[name] = _numbers(facts[name], length)
    if "tube" in facts:
        shapes["tube"] = tuple(_numbers(box, 5) for box in facts["tube"])
    if "time_s" in facts:
        (shapes["time_s"],) = _numbers([facts["time_s"]], 1)
    return Region(**(facts | shapes))


def _numbers(found: Sequence[Any], length: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in found) if isinstance(found, list | tuple) else ()
    except OverflowError:  # a whole number of hundreds of digits, which JSON allows
        numbers = ()
    if len(numbers) != length or not all(map(math.isfinite, numbers)):
        raise ValueError(f"wanted {length} numbers, found {found!r:.200}")
    return numbers
