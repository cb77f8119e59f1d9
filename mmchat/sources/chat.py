"""Conversations in rows: LLaVA's "conversations" and chat messages, mixed as they come."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmchat.conversation import MODALITIES, MediaRef, Modality, Record, Role
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, given_media, records_of
from mmchat.sources.source import Source

# LLaVA's and ShareGPT's names beside the chat-message ones.
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_chat(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of the annotation file, or of SPLIT.json, SPLIT.jsonl or SPLIT/instruct.jsonl."""
    return records_of(files, files.one(*(mark.format(split=split) for mark in _MARKS)), _record)


_MARKS = ("{split}.json", "{split}.jsonl", "{split}/instruct.jsonl", "*.json", "*.jsonl")

SOURCES = {"chat": Source(("instruct",), _MARKS, read_chat)}

# A part of a row's turn: text, or a modality and its path, None for the row's next item of that modality.
_Piece = str | tuple[Modality, str | None]
_Said = tuple[Role, list[_Piece], bool | None]  # role, pieces, learn


def _record(row: dict[str, Any], key: str, find: Find) -> Record:
    """One row as facts and media in reading order. Raises SampleError."""
    given = given_media(row, find)
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
            media.append(given[modality].pop(0) if path is None else find(modality, path))
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
