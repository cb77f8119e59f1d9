"""What a judge's reply says: one JSON object with a whole score, and where it is wanted yes or no."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

MAX_SCORE = 5
MAX_BRACES = 1000  # that a verdict is looked for behind

_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """A judge's reply, read.

    Attributes:
        is_right: None where the protocol asks for a score alone.
        is_strict: whether the reply was the JSON object and nothing else.
    """

    score: int
    is_right: bool | None
    is_strict: bool


def parse_verdict(text: str, kind: Literal["yes_no", "score"]) -> Verdict:
    """Reads a judge's reply. Raises ValueError for what is no verdict.

    Strict: the reply is one JSON object with the wanted fields and no others, the score a whole number of 0 to 5.
    Tolerant: a <think> block at the start is skipped, then exactly one JSON object stands anywhere in the text, with
    the wanted fields among others; "Yes" counts as "yes", and a whole number may be written "4" or 4.0. Half scores,
    scores beyond 5, a field given twice and two objects are refused in both.
    """
    fields = {"score"} if kind == "score" else {"verdict", "score"}
    try:
        found, is_strict = _json(text.strip()), True
    except ValueError:
        found, is_strict = None, False
    if not isinstance(found, dict):
        thoughts = _THOUGHTS.match(text)
        objects = list(_objects(text[thoughts.end() :] if thoughts else text))
        if len(objects) != 1:
            raise ValueError(f"wanted one JSON object, found {len(objects)}")
        found, is_strict = objects[0], False
    if not fields <= found.keys():
        raise ValueError(f"wanted the fields {', '.join(sorted(fields))}, found {', '.join(sorted(found)) or 'none'}")
    score, said = found["score"], found.get("verdict")
    is_strict &= found.keys() == fields and type(score) is int and (kind == "score" or said in ("yes", "no"))
    if isinstance(score, str) and re.fullmatch(r"\s*[0-9]\s*", score):
        score = int(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in range(MAX_SCORE + 1):
        raise ValueError(f"wanted a whole score of 0 to {MAX_SCORE}, found {score!r:.80}")
    if kind == "score":
        return Verdict(int(score), None, is_strict)
    if not isinstance(said, str) or said.strip().lower() not in ("yes", "no"):
        raise ValueError(f"wanted yes or no, found {said!r:.80}")
    return Verdict(int(score), said.strip().lower() == "yes", is_strict)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a field is given twice in {names!r:.80}")
    return dict(pairs)


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, outermost ones. Raises ValueError, also for a field given twice."""
    if (count := text.count("{")) > MAX_BRACES:
        raise ValueError(f"wanted at most {MAX_BRACES} opening braces, found {count}")
    place, decoder = text.find("{"), json.JSONDecoder()
    while place >= 0:
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield _json(text[place:end])
        place = text.find("{", end)
