"""Conversations in rows, mixed as they come: every row says by its own columns which format it has."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmchat.conversation import MODALITIES, MediaRef, Modality, Record
from mmchat.errors import SampleError
from mmchat.sources.chat_dialects import Message, messages_of, translated
from mmchat.sources.chat_regions import REGION_OPTIONS, Item, Objects, Pictures, Piece, RegionReader
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, RecordOf, given_media, of_split, records_of
from mmchat.sources.source import Source

OPTIONS = {"dataset": "entry of a LLaMA-Factory dataset_info.json that lies in SOURCE", **REGION_OPTIONS}

DESCRIPTIONS = "dataset_info.json"
# Beside the annotations, and none.
_OTHER_FILES = (DESCRIPTIONS, "metadata.json", "*_meta.json")
_MARKS = ("{split}.json", "{split}.jsonl", "{split}/instruct.jsonl", "*.json", "*.jsonl")

# A placeholder has the line break behind it, or before it where it ends the text. <img> is Qwen-VL's.
_TAGS = re.compile(
    r"\n?<(?P<last>image|video|audio)>\n?\Z|<(?P<item>image|video|audio)>\n?"
    r"|<img>(?P<path>[^<]+)</img>\n?|<(?P<thing>ref-object|bbox)>"
)


def read_chat(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows of the annotation file, or of SPLIT.json, SPLIT.jsonl or SPLIT/instruct.jsonl.

    Raises ValueError for a file that is missing, of another split or not the only one, and for an option's value.
    """
    name, entry = _annotation(files, split, options.get("dataset"))
    record = chat_record(files, options)
    if entry is not None:
        return records_of(files, name, lambda row, key, find: record(translated(row, entry), key, find))
    return records_of(files, name, record)


SOURCES = {"chat": Source(("instruct",), _MARKS, read_chat, OPTIONS)}


def chat_record(files: Files, options: Mapping[str, str]) -> RecordOf:
    """What makes a record of one row. Raises ValueError for an option's value."""
    regions = RegionReader.of(files, options)

    def record(row: dict[str, Any], key: str, find: Find) -> Record:
        facts = {name: row[name] for name in ("id", "tools") if row.get(name) is not None}
        if isinstance(row.get("turns"), list):  # the facts themselves, as the task takes them
            return Record(key, facts | {"turns": row["turns"]}, _listed_media(row, find))
        turns, media = _turns(row, find, regions)
        return Record(key, facts | {"turns": turns}, tuple(media))

    return record


def _annotation(files: Files, split: str, dataset: str | None) -> tuple[str, Mapping[str, Any] | None]:
    """The annotation file, and its entry in dataset_info.json. Raises ValueError."""
    entries = {}
    if files.stored(DESCRIPTIONS) is not None:
        try:
            found = json.loads(files.text(DESCRIPTIONS))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{DESCRIPTIONS} beside {files} is no JSON: {error}") from error
        entries = found if isinstance(found, dict) else {}
        entries = {
            key: one for key, one in entries.items() if isinstance(one, dict) and isinstance(one.get("file_name"), str)
        }
    if dataset is not None:
        if dataset not in entries:
            known = ", ".join(entries) or "none"
            raise ValueError(f"{DESCRIPTIONS} beside {files} has no local data set {dataset}; it has {known}")
        return entries[dataset]["file_name"], entries[dataset]
    for mark in _MARKS:
        names = files.find(mark.format(split=split))
        names = [name for name in names if not any(fnmatch.fnmatch(PurePosixPath(name).name, o) for o in _OTHER_FILES)]
        if "{split}" not in mark:
            names = of_split(files, names, split)
        if len(names) > 1:
            hint = f", or an entry of {DESCRIPTIONS} by --set dataset=NAME" if entries else ""
            shown = f"{len(names)} files {mark}: {', '.join(names[:5])}"
            raise ValueError(f"{files} holds {shown}; name one as SOURCE{hint}")
        if names:
            described = [key for key, one in entries.items() if one["file_name"] == names[0]]
            if len(described) > 1:
                known = ", ".join(described)
                raise ValueError(f"{names[0]} is {known} in {DESCRIPTIONS}; choose one with --set dataset=NAME")
            return names[0], entries[described[0]] if described else None
    raise ValueError(f"{files} holds none of {', '.join(_MARKS).format(split=split)}")


def _listed_media(row: Mapping[str, Any], find: Find) -> tuple[MediaRef, ...]:
    """Items under "media": [{"modality": "image", "path": ...}]; a null path is an absent item."""
    found = row.get("media") or []
    items = found if isinstance(found, list) else [found]
    for item in items:
        if not isinstance(item, dict) or item.get("modality") not in MODALITIES:
            raise SampleError("unreadable media", f'wanted {{"modality": ..., "path": ...}}, found {item!r:.200}')
    return tuple(find(item["modality"], item.get("path")) for item in items)


def _turns(row: Mapping[str, Any], find: Find, regions: RegionReader) -> tuple[list[dict[str, Any]], list[MediaRef]]:
    """The facts of a row's turns, and its media in reading order. Raises SampleError."""
    messages = messages_of(row)
    given = given_media(row, find)
    objects = Objects.of(row.get("objects"))
    meaning: dict[str, Modality] = {modality: modality for modality in MODALITIES if given[modality]}
    if "video" in meaning and "image" not in meaning and not any("<video>" in str(m.content) for m in messages):
        meaning["image"] = "video"  # LLaVA-Video writes <image> for a video
    said = [_pieces(message, meaning, objects) for message in messages]
    objects.check_all_taken()
    _put_unplaced_first(messages, said, given)

    media: list[MediaRef] = []
    turns: list[dict[str, Any]] = []
    for message, pieces in zip(messages, said, strict=True):
        parts: list[Any] = []
        for piece in pieces:
            if not isinstance(piece, Item):
                parts.append(piece)
                continue
            if piece.source is None and not given[piece.modality]:
                raise SampleError("too many placeholders", f"more {piece.modality} placeholders than items")
            parts.append({"media": len(media)})
            media.append(given[piece.modality].pop(0) if piece.source is None else find(piece.modality, piece.source))
        learn = {} if message.learn is None else {"learn": message.learn}
        turns.append({"role": message.role, "parts": parts, **learn})
    if left := {modality: len(items) for modality, items in given.items() if items}:
        raise SampleError("too few placeholders", f"no placeholder for {left} of the row's items")
    pictures = Pictures(regions, media)
    for turn in turns:
        turn["parts"] = [part for one in turn["parts"] for part in pictures.parts(one)]
    answers = [part for turn in turns if turn["role"] == "assistant" for part in turn["parts"]]
    if not any(part.get("text", "").strip() or "region" in part for part in answers):
        raise SampleError("no answer", "no turn of the assistant says anything")
    return turns, media


def _pieces(message: Message, meaning: Mapping[str, Modality], objects: Objects) -> list[Piece]:
    """A message's content cut at its placeholders; in a list of parts only those of objects are placeholders."""
    if isinstance(message.content, str):
        return _split(message.content, meaning, objects, has_paths=message.role == "user")
    return [piece for part in message.content for piece in _part(part, objects)]


def _split(text: str, meaning: Mapping[str, Modality], objects: Objects, has_paths: bool) -> list[Piece]:
    pieces: list[Piece] = []
    rest = 0
    for match in _TAGS.finditer(text):
        piece: Piece | None = None
        if modality := meaning.get(match["last"] or match["item"] or ""):
            piece = Item(modality)
        elif match["path"] and has_paths:
            piece = Item("image", match["path"].strip())
        elif match["thing"]:
            piece = objects.take(match["thing"])
        if piece is not None:
            pieces += [text[rest : match.start()], piece]
            rest = match.end()
    return [piece for piece in (*pieces, text[rest:]) if piece != ""]


def _part(part: Any, objects: Objects) -> list[Piece]:
    """One element of a message's content list."""
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return _split(text, {}, objects, has_paths=False)
        case {"type": "input_audio", "input_audio": {"data": str(data)}}:
            return [Item("audio", "data:;base64," + data)]
        case {"type": str(kind)} if (modality := kind.removesuffix("_url")) in MODALITIES:
            found = next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)
            if isinstance(found, dict) and "bytes" not in found:
                found = found.get("url", found.get("path"))
            if found is None and isinstance(part.get("base64"), str):
                found = "data:;base64," + part["base64"]
            if isinstance(found, str | bytes | dict | list | None):
                return [Item(modality, found)]
    raise SampleError("unreadable turn", f"{part!r:.200} is neither text nor a media item")


def _put_unplaced_first(
    messages: Sequence[Message], said: Sequence[list[Piece]], given: Mapping[Modality, Sequence[MediaRef]]
) -> None:
    """Shows a modality's items first in the first turn of the user, where no turn says where any of them goes."""
    first = next((pieces for message, pieces in zip(messages, said, strict=True) if message.role == "user"), None)
    for modality in reversed(MODALITIES):
        item = Item(modality)
        if first is not None and not any(item in pieces for pieces in said):
            first[:0] = [item] * len(given[modality])
