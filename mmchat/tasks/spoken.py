"""Spoken dialogue: what is said to the model is a recording, its reply is text, with attributes of both in front.

Facts: {"turns": [{"media": 0, "text": "I lost my keys.", "attributes": {"sentiment": "negative"}}, {"text": "Where did
you see them last?", "attributes": {"sentiment": "neutral"}}]}. The last turn is a reply, and so is every second one
before it. `media` is the turn's recording among the record's media, `text` its words; a reply needs its text.

Attributes, as ParalinGPT (arXiv 2312.15316) has them: those of the speech that is answered and those of the reply are
said before the reply, a line each, "heard" ones first, either kind in alphabetical order of the names:

    heard sentiment: negative
    reply sentiment: neutral
    Where did you see them last?

What a turn has no attribute of is left out. Earlier replies stand in the history as they were said, so that past
attributes are known. ParalinGPT writes the two values alone; names keep several attributes apart, and missing ones.

The same facts are three tasks: `spoken` gives recordings and their words, as ParalinGPT does, `spoken_audio` recordings
alone, `spoken_text` words alone. A turn without a recording is its words in each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmchat.conversation import Conversation, MediaRef, Part, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.text import normalised, score_chat, token_f1
from mmchat.tasks.question import Answer, Protocol, Question

Given = Literal["both", "audio", "text"]  # what a question shows of a recording: it, its words, or both
Attributes = dict[str, str]

PROMPTS = (
    "Listen, and reply.",
    "Answer what you hear.",
    "Talk with me.",
    "Reply to what is said.",
    "What do you say to this?",
    "Let us have a conversation.",
    "Respond to the speaker.",
    "Say something in return.",
    "I talk and you answer.",
    "Go on with this conversation.",
    "Hear me out, then reply.",
    "Answer the one who speaks.",
    "Be the other one in this conversation.",
)
NAMING = (
    "Before each reply, name the {}.",
    "Say the {} first, then reply.",
    "Begin with the {}.",
    "First the {}, then your words.",
    "Put the {} in front of what you say.",
    "Tell the {} before you answer.",
    "State the {}, then answer.",
    "Each reply starts with the {}.",
    "Note the {} first.",
    "Give the {} and then the reply.",
    "Write down the {} before your reply.",
    "Start every answer with the {}.",
)


@dataclass(frozen=True)
class _Said:
    """One turn; item is its recording."""

    item: MediaRef | None
    text: str
    attributes: Attributes


class Spoken:
    """The user speaks, the model writes; `given` is what the model gets of what the user says."""

    def __init__(self, given: Given = "both") -> None:
        self.given = given

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """Every reply is learned, but for one that opens the talk."""
        return self._conversation(record, _turns(record), rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """Every reply (KEY#1 and on) after all turns before it; `protocol.history` False keeps the one before it."""
        said = _turns(record)
        asked = []
        for number, i in enumerate(range(1 + len(said) % 2, len(said), 2), 1):
            facts = {"text": said[i].text, "heard": said[i - 1].attributes, "reply": said[i].attributes}
            own = Record(f"{record.key}#{number}", facts, record.media)
            told = said[: i + 1] if protocol.history else said[i - 1 : i + 1]
            turns = self._conversation(record, told, protocol.rng(own.key)).turns
            asked.append(Question(own, Conversation(turns[:-1]), turns[-1].parts))
        return asked

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Token F1 of the reply; with attributes, the mean of that and of the share that is right."""
        if answer.error:
            return 0.0
        found, text = read_reply(answer.text, question)
        parts = [token_f1(text, [question.record.facts["text"]])]
        if wanted := _wanted(question):
            parts.append(sum(_is_right(found, *one) for one in wanted.items()) / len(wanted))
        return sum(parts) / len(parts)

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Token F1, BLEU-4 and ROUGE-L of the replies without their attributes, and `heard_NAME_accuracy` and so on.

        An accuracy is the share of the questions that have the attribute; what could not be read counts in each of
        them, as wrong. An attribute that the answer does not name is wrong.
        """
        texts: list[str | None] = []
        right: dict[str, list[bool]] = {}
        for answer, question in zip(answers, questions, strict=True):
            found, text = ({}, None) if question is None or answer.error else read_reply(answer.text, question)
            texts.append(text)
            for name, value in ({} if question is None else _wanted(question)).items():
                right.setdefault(name, []).append(_is_right(found, name, value))
        wanted = [[] if question is None else [question.record.facts["text"]] for question in questions]
        num_unread = sum(question is None for question in questions)
        scores: dict[str, float] = score_chat(texts, wanted)
        for name, marks in sorted(right.items()):
            slug = "_".join(name.split())
            scores[f"{slug}_accuracy"] = sum(marks) / (len(marks) + num_unread)
            scores[f"num_{slug}"] = len(marks)
        return scores

    def _conversation(self, record: Record, said: Sequence[_Said], rng: random.Random) -> Conversation:
        opening = rng.choice(PROMPTS)
        if names := sorted({name for one in said for name in one.attributes}):
            opening += " " + rng.choice(NAMING).format(" and ".join(names))
        is_opened = bool(len(said) % 2)  # by a reply to nothing
        turns = [Turn("user", (opening,))] if is_opened else []
        for i, one in enumerate(said):
            if (len(said) - i) % 2:
                heard = said[i - 1].attributes if i else {}
                turns.append(Turn("assistant", (serialised(heard, one.attributes, one.text),), None if i else False))
            else:
                parts = self._heard(record, one)
                turns.append(Turn("user", (f"{opening}\n", *parts) if i == 0 else tuple(parts)))
        return Conversation(tuple(turns))

    def _heard(self, record: Record, one: _Said) -> list[Part]:
        """What the model gets of a user's turn. Raises SampleError where that is nothing."""
        parts: list[Part] = [one.item] if one.item is not None and self.given != "text" else []
        if one.text and (self.given != "audio" or one.item is None):
            parts.append(one.text)
        if not parts:
            raise SampleError("empty turn", f"{record.key}: a turn has no words, and its recording is not given")
        return parts


def serialised(heard: Mapping[str, str], reply: Mapping[str, str], text: str) -> str:
    """A reply as the model writes it: attributes of what it heard, its own, its text."""
    return "\n".join([*(f"{name}: {value}" for name, value in _named(heard, reply).items()), text])


def read_reply(answer: str, question: Question) -> tuple[Attributes, str]:
    """The attributes that an answer names, as {"heard sentiment": "negative"}, and the reply behind them.

    Only lines in front of the reply count, and only attributes that the question's record has.
    """
    names, found = _wanted(question).keys(), Attributes()
    rest = answer.strip()
    while (match := re.match(r"([^:\n]+):([^\n]*)(?:\n|$)", rest)) and match[1] in names:
        found.setdefault(match[1], match[2].strip())
        rest = rest[match.end() :].lstrip()
    return found, rest


def _named(heard: Mapping[str, str], reply: Mapping[str, str]) -> Attributes:
    pairs = [("heard", heard), ("reply", reply)]
    return {f"{side} {name}": value for side, one in pairs for name, value in sorted(one.items())}


def _wanted(question: Question) -> Attributes:
    return _named(question.record.facts["heard"], question.record.facts["reply"])


def _is_right(found: Mapping[str, str], name: str, value: str) -> bool:
    return name in found and normalised(found[name]) == normalised(value)


def _turns(record: Record) -> list[_Said]:
    """All turns; those of replies have a text. Raises SampleError."""
    turns = record.facts.get("turns")
    if not isinstance(turns, list) or len(turns) < 2:
        raise SampleError("no turns", f"{record.key}: wanted two turns or more under 'turns', found {turns!r:.200}")
    said = [_said(record, turn) for turn in turns]
    if not all(one.text for one in said[::-1][::2]):
        raise SampleError("no reply", f"{record.key}: the last turn and every second one before it need a text")
    return said


def _said(record: Record, turn: Any) -> _Said:
    match turn:
        case {"media": int(i)} if 0 <= i < len(record.media) and record.media[i].modality == "audio":
            item: MediaRef | None = record.media[i]
        case {"media": other}:
            found = [one.modality for one in record.media]
            raise SampleError("no recording", f"{record.key}: a turn names media {other!r:.50}; the record has {found}")
        case {}:
            item = None
        case _:
            raise SampleError("unreadable turn", f"{record.key}: wanted an object with a text, found {turn!r:.200}")
    text, attributes = turn.get("text", ""), turn.get("attributes", {})
    if not isinstance(text, str) or not isinstance(attributes, dict) or not _are_plain(attributes.items()):
        raise SampleError(
            "unreadable turn",
            f"{record.key}: wanted text, and attributes as words without a colon, found {turn!r:.200}",
        )
    return _Said(item, " ".join(text.split()), attributes)


def _are_plain(pairs: Iterable[tuple[Any, Any]]) -> bool:
    """Whether names and values are words that can stand in a line as "name: value"."""
    words = [word for pair in pairs for word in pair]
    return all(isinstance(word, str) and word.strip() == word != "" and not re.search(r"[:\n]", word) for word in words)
