"""Instruction following and open chat: turns of text, media and regions, from LLaVA or chat-message files.

Facts: {"turns": [{"role": "user", "parts": [{"text": "..."} | {"media": 0} | {"region": {"media": 0,
"box": [...]}}], "learn": optional bool}]}; `media` counts through the record's media.

What other importers share is here too: a source's file, its rows, media files, and scores of text.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
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
    StoredBytes,
    Turn,
)
from mmchat.errors import SampleError

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
        return score_texts(answers, [[_last_answer(record)] for record in records])


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


def _last_answer(record: Record) -> str:
    answers = [turn for turn in record.facts["turns"] if turn["role"] == "assistant"]
    return "".join(part.get("text", "") for part in answers[-1]["parts"]) if answers else ""


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
                raise SampleError(
                    "too many placeholders", f"more {modality} placeholders than {modality} items"
                )
            parts.append({"media": len(media)})
            media.append(given[modality].pop(0) if path is None else _load_media(modality, path, roots))
        turns.append({"role": role, "parts": parts} | ({} if learn is None else {"learn": learn}))
    if left := {modality: len(items) for modality, items in given.items() if items}:
        raise SampleError("too few placeholders", f"no placeholder for {left} of the row's items")
    answers = [
        part.get("text", "") for turn in turns if turn["role"] == "assistant" for part in turn["parts"]
    ]
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


def given_media(row: Mapping[str, Any], roots: Sequence[Path]) -> dict[Modality, list[MediaRef]]:
    """Items under "image", "images", "video", ... in order; null inside a list is an absent item."""
    given: dict[Modality, list[MediaRef]] = {}
    for modality in MODALITIES:
        found = row.get(modality, row.get(f"{modality}s"))
        names = found if isinstance(found, list) else [] if found is None else [found]
        given[modality] = [_load_media(modality, name, roots) for name in names]
    return given


def _prepend_single_items(said: Sequence[_Said], given: Mapping[Modality, Sequence[MediaRef]]) -> None:
    """Shows a modality's only item first in the first turn of the user, where no turn says where it goes."""
    first = next((pieces for role, pieces, _ in said if role == "user"), None)
    for modality in reversed(MODALITIES):
        placeholder = (modality, None)
        placed = any(placeholder in pieces for _, pieces, _ in said)
        if first is not None and len(given[modality]) == 1 and not placed:
            first.insert(0, placeholder)


def find_file(source: Path, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """The file to read, and the folders that its media paths may be relative to.

    Args:
        source: the file itself, or a folder that holds one of `names`.

    Raises ValueError where there is none.
    """
    if source.is_file():
        return source, [source.parent]
    for name in names:
        if (file := source / name).is_file():
            return file, list(dict.fromkeys([file.parent, source]))
    raise ValueError(f"{source} is no file, nor a folder that holds {' or '.join(names)}")


def read_rows(file: Path) -> Iterator[dict[str, Any] | SampleError]:
    """Rows of a JSON list or of JSON lines, told apart by the first character; a bad one as SampleError.

    Raises ValueError for a JSON list that cannot be parsed.
    """
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        is_list = lines.read(1024).lstrip().startswith("[")
        lines.seek(0)
        try:
            rows = json.load(lines) if is_list else map(_parse_line, lines)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no JSON list: {error}") from error
        for number, row in enumerate(rows):
            if isinstance(row, dict):
                yield row
            elif row != "":  # an empty line
                yield SampleError("unreadable row", f"{file.name} row {number}: {row!r:.200} is no object")


def _parse_line(line: str) -> Any:
    """The JSON value, or the line itself where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line.strip()


def _load_media(modality: Modality, name: Any, roots: Sequence[Path]) -> MediaRef:
    """The item that a row names: a relative path, a data URL, or None if it is absent. Raises SampleError."""
    if name is None:
        return MediaRef(modality, None)
    if not isinstance(name, str) or not name:
        raise SampleError("unreadable media path", f"{modality}: {name!r:.200}")
    if name.startswith("data:"):
        try:
            return MediaRef(modality, base64.b64decode(name.partition(";base64,")[2], validate=True))
        except binascii.Error as error:
            raise SampleError(
                "unreadable media path", f"{modality}: a data URL that is not base64"
            ) from error
    if "://" in name:
        raise SampleError("media not local", f"{name:.200} is a URL: download it and name the file")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(
            "media outside of the source",
            f"{name!r:.200}: paths are relative and inside the source's folder (where a link may lead out)",
        )
    for root in roots:
        try:
            if (file := root / path).is_file():
                return MediaRef(modality, StoredBytes(str(file), 0, file.stat().st_size))
        except OSError as error:  # such as a name that is too long
            raise SampleError("unreadable media path", f"{name!r:.200}: {error}") from error
    raise SampleError("missing media", f"{name!r:.200} is not in {' or '.join(map(str, roots))}")


def score_texts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and token F1 of each answer with its best reference, averaged over all records.

    Raises ValueError where there is not one answer a record, or no record.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(references)} records; there must be one for each")
    exact = f1 = 0.0
    for answer, texts in zip(answers, references, strict=True):
        exact += any(_normal(answer) == _normal(text) for text in texts)
        f1 += max((_token_f1(answer, text) for text in texts), default=0.0)
    return {"exact_match": exact / len(answers), "token_f1": f1 / len(answers)}


def _normal(text: str) -> str:
    """Lower case, without outer space, trailing punctuation and a leading article."""
    return re.sub(r"^(?:an?|the)\s+(?=\S)", "", re.sub(r"[\s.,;:!?]+$", "", text.strip().lower()))


def _token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words in common (SQuAD's measure, arXiv 1606.05250)."""
    said, wanted = (Counter(re.findall(r"\w+", _normal(text))) for text in (answer, reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())
