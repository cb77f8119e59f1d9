"""Instruction following and open chat: turns of text, media and regions, from LLaVA or chat-message files.

Facts: {"turns": [{"role": "user", "parts": [{"text": "..."} | {"media": 0} | {"region": {"media": 0,
"box": [...]}}], "learn": optional bool}]}; `media` counts through the record's media.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmchat.conversation import (
    MODALITIES,
    Conversation,
    MediaRef,
    Modality,
    Part,
    Record,
    Region,
    Role,
    Turn,
)
from mmchat.errors import SampleError
from mmchat.tasks.rows import find_file, given_media, load_media, read_rows
from mmchat.tasks.text_score import references, score_texts

# LLaVA's and ShareGPT's names beside the chat-message ones.
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Instruct:
    """Reads LLaVA rows ("conversations") and chat-message rows ("messages"), mixed as they come."""

    def records(self, source: Path, split: str) -> Iterator[Record | SampleError]:
        """Rows of a .json or .jsonl file, or a folder with SPLIT.json, SPLIT.jsonl or SPLIT/instruct.jsonl.

        Media paths are relative to the file's folder, or to `source`. Raises ValueError where there is no
        such file.
        """
        file, roots = find_file(source, [f"{split}.json", f"{split}.jsonl", f"{split}/instruct.jsonl"])
        for number, row in enumerate(read_rows(file)):
            if isinstance(row, SampleError):
                yield row
                continue
            try:
                yield _record(row, f"{number:08d}", roots)
            except SampleError as error:
                yield SampleError(error.reason, f"{file.name} row {number}: {error.detail}")

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        try:
            return _conversation(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SampleError("unreadable facts", f"{record.key}: turns cannot be read: {error!r}") from error

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Compares each answer with the text of the record's last assistant turn."""
        return score_texts(answers, [references(record, self._last_answer) for record in records])

    def _last_answer(self, record: Record) -> list[str]:
        """Raises SampleError where there is none."""
        answers = [t for t in self.conversation(record, random.Random(0)).turns if t.role == "assistant"]
        if not answers:
            raise SampleError("no answer", f"{record.key}: wanted an assistant turn")
        return ["".join(part for part in answers[-1].parts if isinstance(part, str))]


def _conversation(record: Record) -> Conversation:
    facts = record.facts["turns"]
    shown = [part["media"] for turn in facts for part in turn["parts"] if "media" in part]
    turns = []
    for turn in facts:
        parts: list[Part] = []
        for part in turn["parts"]:
            match part:
                case {"text": str(text)}:
                    parts.append(text)
                case {"media": int(i)} if 0 <= i < len(record.media):
                    parts.append(record.media[i])
                case {"region": {"media": int(i)} as region} if i in shown:
                    # Regions count media as the conversation shows them.
                    parts.append(_region(region | {"media": shown.index(i)}))
                case _:
                    raise ValueError(f"part {part!r:.200} among {len(record.media)} media")
        if turn["role"] not in ROLES.values() or not isinstance(turn.get("learn"), bool | None):
            raise ValueError(f"role {turn['role']!r:.100}, learn {turn.get('learn')!r:.100}")
        turns.append(Turn(turn["role"], tuple(parts), turn.get("learn")))
    return Conversation(tuple(turns))


def _region(facts: dict[str, Any]) -> Region:
    """Raises ValueError or TypeError for facts that are no region."""
    shapes: dict[str, Any] = {}
    for name, length in (("box", 4), ("point", 2)):
        if name in facts:
            shapes[name] = _numbers(facts[name], length)
    if "tube" in facts:
        shapes["tube"] = tuple(_numbers(box, 5) for box in facts["tube"])
    if "time_s" in facts:
        shapes["time_s"] = float(facts["time_s"])
    return Region(**(facts | shapes))


def _numbers(found: Sequence[Any], length: int) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in found)
    if len(numbers) != length or not all(map(math.isfinite, numbers)):
        raise ValueError(f"wanted {length} numbers, found {found!r:.200}")
    return numbers


# A part of a row's turn: text, or a modality and its path, None for the row's next item of that modality.
_Piece = str | tuple[Modality, str | None]
_Said = tuple[Role, list[_Piece], bool | None]  # role, pieces, learn


def _record(row: dict[str, Any], key: str, roots: Sequence[Path]) -> Record:
    """One row as facts and media in reading order. Raises SampleError."""
    given = given_media(row, roots)
    said = _said(row, [modality for modality in MODALITIES if given[modality]])
    _prepend_single_items(said, given)
    media: list[MediaRef] = []
    turns: list[dict[str, Any]] = []
    for role, pieces, learn in said:
        parts: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                parts.append({"text": piece})
                continue
            modality, path = piece
            if path is None and not given[modality]:
                raise SampleError("too many placeholders", f"more {modality} placeholders than {modality} items")
            parts.append({"media": len(media)})
            media.append(given[modality].pop(0) if path is None else load_media(modality, path, roots))
        turns.append({"role": role, "parts": parts} | ({} if learn is None else {"learn": learn}))
    if left := {modality: len(items) for modality, items in given.items() if items}:
        raise SampleError("too few placeholders", f"no placeholder for {left} of the row's items")
    answers = [part.get("text", "") for turn in turns if turn["role"] == "assistant" for part in turn["parts"]]
    if not any(text.strip() for text in answers):
        raise SampleError("no answer", "no turn of the assistant has text")
    facts: dict[str, Any] = {"turns": turns}
    if isinstance(row.get("id"), str | int):
        facts["id"] = row["id"]
    return Record(key, facts, tuple(media))


def _said(row: dict[str, Any], present: Sequence[Modality]) -> list[_Said]:
    """The turns of a row with their placeholders found. Raises SampleError.

    Args:
        present: modalities of which the row has items; the placeholders of all others are text.
    """
    names = ("from", "value") if "conversations" in row else ("role", "content")
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise SampleError("no turns", "wanted a list under 'conversations' or 'messages'")
    said: list[_Said] = []
    if isinstance(row.get("system"), str) and row["system"]:
        said.append(("system", [row["system"]], None))
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("learn"), bool | None):
            raise SampleError("unreadable turn", f"{turn!r:.200}")
        role, content = (turn.get(name) for name in names)
        if not isinstance(role, str) or role not in ROLES:
            raise SampleError("unknown role", f"{role!r:.100} is none of {', '.join(ROLES)}")
        if isinstance(content, str):
            pieces = _split(content, present)
        elif isinstance(content, list):
            pieces = [_piece(piece) for piece in content]
        else:
            raise SampleError("unreadable turn", f"wanted text or a list, found {type(content).__name__}")
        said.append((ROLES[role], pieces, turn.get("learn")))
    return said


def _split(text: str, present: Sequence[Modality]) -> list[_Piece]:
    """Text around placeholders; the line break behind one belongs to it."""
    pieces: list[_Piece] = []
    rest = 0
    for match in re.finditer(r"<(image|video|audio)>\n?", text):
        modality = next((one for one in present if one == match[1]), None)
        if modality is not None:
            pieces += [text[rest : match.start()], (modality, None)]
            rest = match.end()
    return [piece for piece in (*pieces, text[rest:]) if piece]


def _piece(piece: Any) -> _Piece:
    """One element of a message's content list; its text holds no placeholders."""
    match piece:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if (modality := kind.removesuffix("_url")) in MODALITIES:
            path = piece.get(kind, piece.get("path", piece.get("url")))
            if isinstance(path, dict):
                path = path.get("url", path.get("path"))
            if isinstance(path, str | None):
                return modality, path
    raise SampleError("unreadable turn", f"{piece!r:.200} is neither text nor a media item")


def _prepend_single_items(said: Sequence[_Said], given: Mapping[Modality, Sequence[MediaRef]]) -> None:
    """Shows a modality's only item first in the first turn of the user, where no turn says where it goes."""
    first = next((pieces for role, pieces, _ in said if role == "user"), None)
    for modality in reversed(MODALITIES):
        placeholder = (modality, None)
        placed = any(placeholder in pieces for _, pieces, _ in said)
        if first is not None and len(given[modality]) == 1 and not placed:
            first.insert(0, placeholder)
