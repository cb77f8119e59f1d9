"""Speech in a dialogue's place: spoken dialogues with attributes, and spoken questions about pictures or clips.

Both are rows of the project's own (json, jsonl), since no public set has one form that others follow: Switchboard with
its sentiment labels (LDC2020T14) is licensed, and a script that joins it writes such rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmchat.conversation import MediaRef, Modality, Record
from mmchat.errors import SampleError
from mmchat.sources.files import Files
from mmchat.sources.rows import Find, records_of
from mmchat.sources.source import Source

_DIALOGUES = ("{split}/spoken_dialogue.jsonl", "{split}/spoken_dialogue.json")
_QUESTIONS = ("{split}/spoken_question.jsonl", "{split}/spoken_question.json")


def read_spoken_dialogue(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows {"turns": [{"audio": path, "text": "...", "attributes": {"sentiment": "neutral"}}, ...]}; the last replies.

    Each of a turn's values may be missing or null, and so may an attribute. A reply's recording is left out.
    """
    return records_of(files, files.one(*(name.format(split=split) for name in _DIALOGUES)), _dialogue)


def _dialogue(row: dict[str, Any], key: str, find: Find) -> Record:
    turns = row["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("unreadable row", f"wanted a list of objects under 'turns', found {turns!r:.200}")
    media, facts = list[MediaRef](), list[dict[str, Any]]()
    for i, turn in enumerate(turns):
        fact: dict[str, Any] = {"text": turn["text"]} if turn.get("text") is not None else {}
        is_reply = (len(turns) - i) % 2 == 1
        if turn.get("audio") is not None and not is_reply:
            fact["media"] = len(media)
            media.append(find("audio", turn["audio"]))
        attributes = turn.get("attributes") or {}
        if kept := {name: value for name, value in attributes.items() if value is not None}:
            fact["attributes"] = kept
        facts.append(fact)
    return Record(key, {name: row[name] for name in row if name != "turns"} | {"turns": facts}, tuple(media))


def read_spoken_question(files: Files, split: str, options: Mapping[str, str]) -> Iterator[Record | SampleError]:
    """Rows {"image": path, "questions": [{"audio": path, "text": "...", "answers": [...]}, ...]}; or "video"."""
    return records_of(files, files.one(*(name.format(split=split) for name in _QUESTIONS)), _questions)


def _questions(row: dict[str, Any], key: str, find: Find) -> Record:
    modalities: tuple[Modality, ...] = ("image", "video")
    shown = [find(modality, row[modality]) for modality in modalities if row.get(modality) is not None]
    questions = row["questions"]
    if not shown or not isinstance(questions, list) or not questions:
        raise SampleError("unreadable row", f"wanted image or video, and questions, found {row!r:.200}")
    heard, facts = list[MediaRef](), list[dict[str, Any]]()
    for one in questions:
        question = {"media": len(shown) + len(heard)} | ({"text": one["text"]} if one.get("text") else {})
        facts.append({"question": question, "answers": one["answers"]})
        heard.append(find("audio", one["audio"]))
    more = {"more": facts[1:]} if len(facts) > 1 else {}
    return Record(key, facts[0] | more, (*shown, *heard))


SOURCES = {
    "spoken_dialogue": Source(("spoken",), _DIALOGUES, read_spoken_dialogue),
    "spoken_question": Source(("vqa",), _QUESTIONS, read_spoken_question),
}
