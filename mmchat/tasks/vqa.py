"""Questions about pictures and videos, answered in a word or a phrase, with or without the reasons first.

Facts: {"question": "...", "answers": ["...", ...], "regions": [{"media": 0, "box" | "point": [...]}], "cot": [{"text":
"..."} | {"region": {"media": 0, "box": [...]}}, ...]}. The first answer is the one that is learned, the others are
further annotators'; regions, where there are any, are what the question is about; cot, where there is one, is the chain
of thought that leads to the answer, with or without the places that it looks at (Shikra, arXiv 2306.15195). Optionally
"more": further such facts about the same media, some of which are asked first, so that a picture with many questions
is stored and encoded once.

A question may be spoken: {"question": {"media": 1, "text": "..."}} is the recording `media` in the question's place;
its words, where they are known, are not given. Recordings of questions stand behind all other media of a record.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from mmchat.conversation import Conversation, MediaRef, Part, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.metrics.text import score_texts
from mmchat.metrics.vqa import vqa_accuracy
from mmchat.tasks.facts import drawn, region_of, regions_of, text_of, texts_of
from mmchat.tasks.question import Answer, Protocol, Question, asked_alone, each_alone, last_question
from mmchat.tasks.rec import spaced

SHORT = (
    " Answer in a word or a short phrase.",
    " Give a short answer.",
    " Answer briefly.",
    "",
    " Keep it short.",
    " A word or two will do.",
    " One word, or a few.",
    " Be brief.",
    " A short answer, please.",
    " Just the answer.",
    " The answer alone, please.",
    " In a word or a phrase.",
    " No whole sentence is needed.",
    " Say it in as few words as you can.",
)
WITH_PLACES = (
    " Explain with the places that you look at, then answer.",
    " Think step by step, say where you look, then answer.",
    " Give your reasons, with the place of each thing that you name, then the answer.",
    " Point to what you see on the way to the answer.",
    " First say what you see and where it is; the answer comes last.",
    " Reason with boxes, then answer.",
    " Show where your reasons lie in the picture, then conclude.",
    " Say where each thing is that matters here, then answer.",
    " Before you answer, go through the places that matter.",
    " Which places tell you? Name them, then answer.",
    " Explain your answer, with positions.",
    " Lead up to the answer, marking what you look at.",
)
IN_WORDS = (
    " Explain in words, then answer.",
    " Think step by step, then answer.",
    " Give your reasons first, the answer last.",
    " Say how you come to the answer, without positions.",
    " First say what you see; the answer comes last.",
    " Reason in words alone, then answer.",
    " Explain, then conclude.",
    " Before you answer, say what matters here.",
    " Say what speaks for it, then answer.",
    " How do you know? Explain, then answer.",
    " Take it step by step, and end with the answer.",
    " Put your thoughts into words before you answer.",
)
MARKS = tuple(".?!:;\u2026\u3002\uff1f\uff01\u061f")  # also those of Chinese and Arabic
ABOUT = (
    "About {}: ",
    "Look at {}. ",
    "This is about {}. ",
    "With regard to {}: ",
    "Concerning {}: ",
    "See {}. ",
    "Take {}. ",
    "Here is a question about {}. ",
    "I point at {}. ",
    "I mean {}. ",
    "Consider {}. ",
    "At {}: ",
)


class VQA:
    """Asks the questions as they are; the record's own is last."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return _conversation(record, _shown(record), rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """Each question of the record, alone."""
        shown = _shown(record)  # without what the other questions of the record say
        return asked_alone(record, lambda one: last_question(_conversation(one, shown, protocol.rng(one.key)), one))

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """VQAv2's accuracy where the protocol says so; else 1 for an exact match, and token F1."""
        said, wanted = _said(answer), _answers(question)
        if protocol.match == "exact":
            return max(score_texts([said], [wanted]).values())
        return vqa_accuracy(said, _annotators(wanted))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """`vqa_v2`: that set's accuracy. `exact`: exact match and token F1 with the annotator's that is nearest.

        What stands before the last "The answer is" is not compared.
        """
        said = [_said(answer) for answer in answers]
        wanted = [_answers(question) for question in questions]
        if protocol.match == "exact":
            return score_texts(said, wanted)
        accuracies = [vqa_accuracy(text, _annotators(texts)) for text, texts in zip(said, wanted, strict=True)]
        return {"accuracy": sum(accuracies) / len(accuracies)}


def asked(question: str) -> str:
    """The question with a mark, and no blank before it; some sets leave the mark out."""
    question = question.rstrip()
    mark = question[-1:] if question[-1:] in MARKS else "?"
    return question.removesuffix(mark).rstrip() + mark


def final_answer(text: str) -> str:
    """What stands behind the last "The answer is", without a closing full stop; else the whole text."""
    found = re.search(r".*\bthe answer is\b:?\s+(.+?)\s*\.?\s*$", text, re.IGNORECASE | re.DOTALL)
    return found[1] if found else text


def _conversation(record: Record, shown: tuple[MediaRef, ...], rng: random.Random) -> Conversation:
    turns: list[Turn] = []
    for one in drawn(record, rng):
        turns += _exchange(replace(one, media=record.media), () if turns else shown, rng)
    return Conversation(tuple(turns))


def _shown(record: Record) -> tuple[MediaRef, ...]:
    """What the questions are about: the media before the spoken questions. Raises SampleError for another order."""
    found = [_spoken(one.facts.get("question"), record.media) for one in each_alone(record)]
    spoken = {question for question in found if question is not None}
    shown = [i for i in range(len(record.media)) if i not in spoken]
    if shown != list(range(len(shown))):
        raise SampleError("media out of order", f"{record.key}: recordings of questions ({spoken}) must stand last")
    return record.media[: len(shown)]


def _spoken(question: object, media: Sequence[MediaRef]) -> int | None:
    """Which of the media is a question that is spoken; None for another question."""
    match question:
        case {"media": int(i)} if 0 <= i < len(media) and media[i].modality == "audio":
            return i
    return None


def _exchange(one: Record, media: tuple[MediaRef, ...], rng: random.Random) -> tuple[Turn, Turn]:
    """Question and answer; the media stands in front of the question."""
    spoken = _spoken(one.facts.get("question"), one.media)
    question = asked(text_of(one, "question")) if spoken is None else one.media[spoken]
    answer = texts_of(one, "answers")[0]
    parts: list[Part] = [*media]
    if regions := regions_of(one, one.facts.get("regions", [])):
        before, _, after = rng.choice(ABOUT).partition("{}")
        parts += [before, *spaced(regions), after]
    if "cot" not in one.facts:
        parts += _in_manner(question, rng.choice(SHORT))
        return Turn("user", tuple(parts)), Turn("assistant", (answer,))
    reasons = _reasons(one)
    is_grounded = any(isinstance(part, Region) for part in reasons)
    manner = rng.choice((*WITH_PLACES, *IN_WORDS) if is_grounded else IN_WORDS)
    if manner in IN_WORDS:
        reasons = [_without_places(reasons)]
    parts += _in_manner(question, manner)
    conclusion = f" The answer is {answer.strip().removesuffix('.').rstrip()}."
    return Turn("user", tuple(parts)), Turn("assistant", (*reasons, conclusion))


def _in_manner(question: Part, manner: str) -> list[Part]:
    """A question, and how it is to be answered."""
    return [question + manner] if isinstance(question, str) else [question, *([manner.strip()] if manner else [])]


def _reasons(one: Record) -> list[Part]:
    """The chain of thought as parts. Raises SampleError."""
    found, parts = one.facts["cot"], list[Part]()
    try:
        for part in found:
            match part:
                case {"text": str(text)} if text:
                    parts.append(text)
                case {"region": {"media": int()} as region}:
                    parts.append(region_of(region))
                case _:
                    raise ValueError(f"wanted text or a region, found {part!r:.200}")
    except (TypeError, ValueError) as error:
        raise SampleError("unreadable cot", f"{one.key}: {error}, in {found!r:.200}") from error
    if not "".join(part for part in parts if isinstance(part, str)).strip():
        raise SampleError("no cot", f"{one.key}: wanted the words of a chain of thought, found {found!r:.200}")
    return parts


def _without_places(reasons: Sequence[Part]) -> str:
    """The words alone, with no blank where a place stood."""
    words = " ".join("".join(part for part in reasons if isinstance(part, str)).split())
    return re.sub(r" (?=[.,;:!?])", "", words)


def _said(answer: Answer) -> str | None:
    return None if answer.said is None else final_answer(answer.said)


def _answers(question: Question | None) -> list[str]:
    """The right answers; none where the question cannot be asked."""
    return [] if question is None or question.problem else texts_of(question.record, "answers")


def _annotators(answers: Sequence[str]) -> Sequence[str]:
    """The votes: shards of VQAv2 hold the commonest answer in front of those of all ten annotators."""
    return answers[1:] if len(answers) == 11 else answers
