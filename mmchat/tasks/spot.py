"""Spotting captions (Shikra, arXiv 2306.15195) and phrase grounding (Flickr30k Entities, arXiv 1505.04870): a caption
in which each phrase is followed by its boxes. The first is asked to write it, the second is given its words.

Facts: {"caption": "...", "phrases": [{"start": 0, "end": 5, "boxes": [[x1, y1, x2, y2], ...]}, ...]}; start and end
count characters of the caption, phrases do not overlap, and one without boxes is left as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from mmchat.conversation import Conversation, Part, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.metrics.boxes import Box, assigned, iou, matched, merged
from mmchat.metrics.text import WORD, composed, score_texts, token_f1
from mmchat.regions import in_place
from mmchat.tasks.facts import boxes_of, shown_in, text_of
from mmchat.tasks.prompts import GROUND, SPOT
from mmchat.tasks.question import Answer, Protocol, Question, last_question
from mmchat.tasks.rec import region_parts


@dataclass(frozen=True)
class Phrase:
    """A part of a caption that names something: caption[start:end], and its boxes."""

    start: int
    end: int
    boxes: list[Box]


class Spot:
    """One prompt, one caption with regions."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        media = shown_in(record)
        caption, rest = text_of(record, "caption"), 0
        answer: list[Part] = []
        for phrase in phrases_of(record):
            if phrase.boxes:
                answer += [caption[rest : phrase.end] + " ", *region_parts(phrase.boxes, media)]
                rest = phrase.end
        answer += [caption[rest:]] if rest < len(caption) else []
        asked = Turn("user", (*record.media, self._prompt(caption, rng)))
        return Conversation((asked, Turn("assistant", tuple(answer))))

    def _prompt(self, caption: str, rng: random.Random) -> str:
        return rng.choice(SPOT)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        return [last_question(self.conversation(record, protocol.rng(record.key)), record)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """The share of phrases that are found by `any`, or token F1 of the words where no phrase has boxes."""
        phrases = [phrase for phrase in phrases_of(question.record) if phrase.boxes]
        if phrases:
            return found_phrases(answer, question.record, protocol.iou)[0] / len(phrases)
        return token_f1(_words(answer), [text_of(question.record, "caption")])

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """The words against the caption, and how much of what it names is found.

        phrase_recall_any, phrase_recall_merged: Flickr30k Entities' recall@1. The first box behind the phrase is
        near one of its true boxes; or the smallest box around all behind it is near the one around all true ones.
        Papers report one or the other without saying which. Near is an IoU strictly above the protocol's, where that
        set's own code counts the limit too. A phrase that the answer does not say is not found.
        box_recall: the share of all true boxes that are found, whichever phrase they stand behind.
        parse_failures: the share of answers with a broken mark, or without a box where the caption has one.
        A question that could not be read counts as a phrase and a box that are not found.
        """
        num_any = num_merged = num_boxes = num_phrases = num_wanted = failed = 0
        references: list[list[str]] = []
        for answer, question in zip(answers, questions, strict=True):
            if question is None:
                num_phrases, num_wanted, references = num_phrases + 1, num_wanted + 1, [*references, []]
                continue
            references.append([text_of(question.record, "caption")])
            phrases = [phrase for phrase in phrases_of(question.record) if phrase.boxes]
            wanted = [box for phrase in phrases for box in phrase.boxes]
            num_phrases, num_wanted = num_phrases + len(phrases), num_wanted + len(wanted)
            boxes = _boxes(answer.regions, shown_in(question.record))
            failed += not answer.error and (answer.num_failed > 0 or bool(wanted and not boxes))
            by_any, by_merged = found_phrases(answer, question.record, protocol.iou)
            num_any, num_merged = num_any + by_any, num_merged + by_merged
            num_boxes += len(matched(boxes, wanted, protocol.iou))
        return score_texts([_words(answer) for answer in answers], references) | {
            "phrase_recall_any": num_any / num_phrases if num_phrases else 0.0,
            "phrase_recall_merged": num_merged / num_phrases if num_phrases else 0.0,
            "box_recall": num_boxes / num_wanted if num_wanted else 0.0,
            "parse_failures": failed / len(questions),
        }


class Ground(Spot):
    """The same answer, to a prompt that says the caption: phrase grounding."""

    def _prompt(self, caption: str, rng: random.Random) -> str:
        return rng.choice(GROUND).replace("{}", caption)


def phrases_of(record: Record) -> list[Phrase]:
    """The phrases in order. Raises SampleError."""
    length, found, last = len(text_of(record, "caption")), record.facts.get("phrases"), 0
    phrases = []
    for phrase in sorted(found, key=_start) if isinstance(found, list) else [None]:
        match phrase:
            case {"start": int(start), "end": int(end), "boxes": boxes} if last <= start < end <= length:
                phrases.append(Phrase(start, end, boxes_of(Record(record.key, {"boxes": boxes}), "boxes")))
                last = end
            case _:
                raise SampleError(
                    "unreadable phrases", f"{record.key}: wanted start, end and boxes in order, found {phrase!r:.200}"
                )
    return phrases


def found_phrases(answer: Answer, record: Record, threshold: float) -> tuple[int, int]:
    """How many phrases that have boxes the answer finds, by any of their boxes and by the one around them all.

    The boxes of a phrase are those right behind its words in the answer, each run of boxes for one phrase. Longer
    phrases choose first, so that "man" does not take what stands behind "the old man". Phrases of the same words ("A
    pig and a pig") share as many runs, in the order that finds most: nothing says which of the two comes first.
    """
    caption, runs = text_of(record, "caption"), _runs(answer, shown_in(record))
    phrases: dict[str, list[list[Box]]] = {}
    for one in phrases_of(record):
        if one.boxes:
            phrases.setdefault(_plain(caption[one.start : one.end]), []).append(one.boxes)
    by_any = by_merged = 0
    for text, wanted in sorted(phrases.items(), key=lambda phrase: -len(phrase[0])):
        taken = [i for i, (before, _) in enumerate(runs) if f" {before}".endswith(f" {text}")][: len(wanted)]
        found = [boxes for boxes in (runs[i][1] for i in taken) if boxes]
        runs = [run for i, run in enumerate(runs) if i not in taken]
        by_any += _num_pairs(found, wanted, lambda a, b: any(iou(a[0], box) > threshold for box in b))
        by_merged += _num_pairs(found, wanted, lambda a, b: iou(merged(a), merged(b)) > threshold)
    return by_any, by_merged


def _num_pairs(
    found: Sequence[list[Box]], wanted: Sequence[list[Box]], fits: Callable[[list[Box], list[Box]], bool]
) -> int:
    return len(assigned([[j for j, b in enumerate(wanted) if fits(a, b)] for a in found]))


def _runs(answer: Answer, media: int) -> list[tuple[str, list[Box]]]:
    """Boxes that stand together in an answer, and the words before them since the last ones."""
    runs: list[tuple[str, list[Box]]] = []
    said = ""
    for part in in_place(answer.text, answer.regions, answer.num_failed) or []:
        if isinstance(part, str):
            said += part
        elif _plain(said) or not runs:
            runs.append((_plain(said), _boxes([part], media)))
            said = ""
        else:
            runs[-1][1].extend(_boxes([part], media))
    return runs


def _words(answer: Answer) -> str | None:
    """The answer without its regions, and the blank before each; None where there is no answer."""
    if answer.error:
        return None
    parts = in_place(answer.text, answer.regions, answer.num_failed)
    if parts is None:
        return answer.text
    return "".join(part.rstrip(" ") if isinstance(part, str) else "" for part in parts)


def _plain(text: str) -> str:
    """Words in lower case, a blank apart."""
    return " ".join(regex.findall(WORD, composed(text)))


def _boxes(regions: Sequence[Region], media: int) -> list[Box]:
    """The boxes among the regions that lie in this media item."""
    return [region.box for region in regions if region.box is not None and region.media == media]


def _start(phrase: object) -> int:
    start = phrase.get("start") if isinstance(phrase, dict) else None
    return start if isinstance(start, int) else -1
