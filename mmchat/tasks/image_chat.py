"""Open-domain chat about a picture between two speakers, each in a style of their own (Image-Chat, arXiv 1811.00945).

Facts: {"turns": [{"style": "Sweet", "text": "..."}, ...], "candidates": [["...", ...], ...]}; the speakers take turns.
Candidates are, for each turn, the hundred texts that a retrieval model is to choose from, the right one among them. A
record without a picture is a chat in words alone (persona chat: the style is then what is known of the speaker).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.ranking import CUTS, Place, place_of, ranking_scores
from mmchat.metrics.text import perplexity, score_chat, token_f1
from mmchat.tasks.question import Answer, Protocol, Question, last_question

OPENINGS = (
    "Say something about this picture.",
    "What do you think of this?",
    "Look at this.",
    "Talk with me about this.",
    "What comes to your mind when you see this?",
    "Here is a picture for you.",
    "I would like to hear what you say to this.",
    "See what I have found.",
    "Your thoughts on this?",
    "How does this strike you?",
    "Tell me something about this.",
    "Let us talk about this picture.",
    "What would you say to this?",
)
OPENINGS_IN_WORDS = (
    "Say something.",
    "Talk with me.",
    "What is on your mind?",
    "Let us talk.",
    "Tell me something.",
    "You begin.",
    "Start a conversation with me.",
    "I am listening.",
    "What would you like to talk about?",
    "Shall we chat a little?",
    "Hello!",
    "Tell me what you think about these days.",
)
STYLES = (
    "Your style: {}.",
    "Be {} in what you say.",
    "Talk in this manner: {}.",
    "Let what you say be {}.",
    "You are somebody who is {}.",
    "Answer in a style that is {}.",
    "Speak as one who is {}.",
    "Your mood: {}.",
    "Your character: {}.",
    "Sound {}.",
    "Keep to this style: {}.",
    "Style: {}.",
    "Now be {}.",
)


class ImageChat:
    """The model is one of the speakers, whose style is said in front."""

    needs_reference_likelihood = True

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """The model is the first or the second speaker, by chance; the talk ends with its last turn."""
        said = _turns(record)
        return _phrased(record, said[: len(said) - rng.randrange(min(len(said), 2))], rng)

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """Every turn, as its speaker: KEY#1 and on, to be generated, and KEY#1/candidates, to be ranked.

        A turn that cannot be asked, or not be ranked, is a question whose problem says why: one that cannot be read,
        those behind it, and those without candidates. `protocol.history` False leaves out all turns before the one
        that is asked.
        """
        listed, said = _listed(record), list[tuple[str, str]]()
        asked = []
        for number, turn in enumerate(listed, 1):
            key = f"{record.key}#{number}"
            own = Record(key, {"turn": number}, record.media)
            if len(said) < number - 1:
                questions = _unread(own, f"unreadable history: turn {len(said) + 1}")
            elif (found := _turn(turn)) is None:
                questions = _unread(own, f"unreadable turn: wanted style and text, found {turn!r:.200}")
            else:
                said.append(found)
                own.facts.update(style=found[0], text=found[1])
                told = said if protocol.history else [found]
                questions = _questions(record, own, _phrased(record, told, protocol.rng(key)), protocol)
            asked += questions if "candidates" in record.facts else questions[:1]
        return asked

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """Token F1 of what was generated, reciprocal rank of the right candidate."""
        if _is_ranked(question):
            return _place(answer, question, protocol).reciprocal_rank
        return token_f1(answer.said, _wanted(question))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Token F1, BLEU-4 and ROUGE-L of the generated turns; MRR, R@1, R@5, R@10 and mean rank of the ranked ones.

        `perplexity` is that of all texts that have a likelihood, over their tokens, and `perplexity_share` is their
        share of the turns. A ranked question that could not be asked or answered stands last of all.
        """
        pairs = list(zip(answers, questions, strict=True))
        generated = [(answer, question) for answer, question in pairs if question is None or not _is_ranked(question)]
        ranked = [(answer, question) for answer, question in pairs if question is not None and _is_ranked(question)]
        wanted = [_wanted(question) for _, question in generated]
        scores = score_chat([answer.said for answer, _ in generated], wanted) if generated else {}
        if likelihoods := [answer.reference_likelihood for answer, _ in generated if answer.reference_likelihood]:
            share = len(likelihoods) / len(generated)
            scores |= {"perplexity": perplexity(likelihoods), "perplexity_share": share}
        if ranked:
            unread = [_last(protocol) for question in questions if question is None]
            scores |= ranking_scores([*(_place(*pair, protocol) for pair in ranked), *unread])
        return scores


def _phrased(record: Record, said: Sequence[tuple[str, str]], rng: random.Random) -> Conversation:
    """The model says the last turn and every other one before it."""
    style = rng.choice(STYLES).format(said[-1][0].lower())
    if len(said) % 2:
        opening = rng.choice(OPENINGS if record.media else OPENINGS_IN_WORDS)
        turns = [Turn("user", (*record.media, f"{style} {opening}"))]
    else:
        turns = [Turn("user", (*record.media, f"{style}\n{said[0][1]}"))]
        said = said[1:]
    turns += [Turn("assistant" if number % 2 == 0 else "user", (text,)) for number, (_, text) in enumerate(said)]
    return Conversation(tuple(turns))


def _listed(record: Record) -> list[Any]:
    turns = record.facts.get("turns")
    if not isinstance(turns, list) or not turns:
        raise SampleError("no turns", f"{record.key}: wanted a list of turns, found {turns!r:.200}")
    return turns


def _turns(record: Record) -> list[tuple[str, str]]:
    """Style and text in order. Raises SampleError."""
    said = []
    for turn in _listed(record):
        if (found := _turn(turn)) is None:
            raise SampleError("unreadable turn", f"{record.key}: wanted style and text, found {turn!r:.200}")
        said.append(found)
    return said


def _turn(turn: Any) -> tuple[str, str] | None:
    match turn:
        case {"style": str(style), "text": str(text)} if style.strip() and text.strip():
            return style.strip(), text.strip()
    return None


def _questions(record: Record, own: Record, conversation: Conversation, protocol: Protocol) -> list[Question]:
    """A turn to be generated and, where the record has candidates, to be ranked."""
    asked = [last_question(conversation, own)]
    if "candidates" in record.facts:
        candidates, problem = _candidates(record, own.facts["turn"], own.facts["text"], protocol)
        asked.append(replace(last_question(conversation, _to_rank(own), candidates), problem=problem))
    return asked


def _unread(own: Record, problem: str) -> list[Question]:
    """Both questions of a turn that cannot be asked."""
    nothing = Conversation((Turn("user", own.media),))
    return [Question(one, nothing, problem=problem) for one in (own, _to_rank(own))]


def _to_rank(own: Record) -> Record:
    return Record(f"{own.key}/candidates", own.facts | {"ranked": True}, own.media)


def _wanted(question: Question | None) -> list[str]:
    """The right text; none where it cannot be read."""
    return [] if question is None or not question.reference else [question.record.facts["text"]]


def _candidates(record: Record, number: int, text: str, protocol: Protocol) -> tuple[list[str], str]:
    """The candidates of turn `number`, from 1, and why they cannot be ranked ("" where they can).

    The right text comes once, whatever the list says: a second copy would be a rival that is right.
    """
    lists = record.facts["candidates"]
    found = lists[number - 1] if isinstance(lists, list) and number <= len(lists) else None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return [], f"no candidates: wanted a list of texts for turn {number}, found {found!r:.200}"
    place = next((i for i, one in enumerate(found) if one.strip() == text), None)
    candidates = [one for i, one in enumerate(found) if i == place or one.strip() != text]
    if len(candidates) < protocol.num_candidates:
        copies = f" and {num} copies of the right one" if (num := len(found) - len(candidates)) else ""
        wanted = f"wanted {protocol.num_candidates} for turn {number}"
        return [], f"too few candidates: {wanted}, found {len(candidates)}{copies}"
    if place is None:
        return [], f"no right candidate: none of the {len(found)} of turn {number} is {text!r:.200}"
    return candidates, ""


def _is_ranked(question: Question) -> bool:
    return bool(question.record.facts.get("ranked"))


def _place(answer: Answer, question: Question, protocol: Protocol) -> Place:
    """Where the right candidate stands; last of all where there is no likelihood for each of them."""
    if answer.error or not question.candidates or len(answer.likelihoods) != len(question.candidates):
        return _last(protocol)
    texts = [candidate.strip() for candidate in question.candidates]
    return place_of(answer.likelihoods, texts.index(question.record.facts["text"]))


def _last(protocol: Protocol) -> Place:
    """Last of all; behind the longest cut also where there are fewer candidates than that."""
    return Place(max(protocol.num_candidates - 1, *CUTS))
