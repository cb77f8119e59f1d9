"""Transcripts: what is said in a recording.

Facts: {"text": "...", "speaker": "..."}; a text in capitals only, as some corpora have it, is learned in lower case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import jiwer
import regex

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.text import WORD, composed
from mmchat.tasks.facts import text_of
from mmchat.tasks.question import Answer, Protocol, Question, last_question

PROMPTS = (
    "What is said here?",
    "Write down what you hear.",
    "Transcribe the recording.",
    "Please give a transcript.",
    "Which words are spoken?",
    "Write out what is said.",
    "Put this recording into writing.",
    "What does the speaker say?",
    "Tell me word for word what you hear.",
    "Give me the words of this recording.",
    "Type what is being said.",
    "Take this down, please.",
    "What are the words here?",
)


class Transcribe:
    """One prompt, the words."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return Conversation((Turn("user", (*record.media, rng.choice(PROMPTS))), Turn("assistant", (_text(record),))))

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One: the words."""
        return [last_question(self.conversation(record, protocol.rng(record.key)), record)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """1 minus the word error rate, at least 0."""
        return max(0.0, 1 - jiwer.wer(_words(_text(question.record)), _words(answer.said or "")))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """Word error rate (errors over all words of all records), character error rate, and the share without an error.

        Case and punctuation do not count; apostrophes inside words do. Characters are those of the same words, with one
        blank between two; marks count by themselves. A record that could not be read counts as one of mean length with
        everything wrong.
        """
        pairs = [(_words(_text(q.record)), _words(a.said or "")) for a, q in zip(answers, questions, strict=True) if q]
        total, unread = len(questions), len(questions) - len(pairs)
        both = [wanted for wanted, _ in pairs], [said for _, said in pairs]
        words = jiwer.process_words(*both).wer if pairs else 0.0
        characters = jiwer.process_characters(*both).cer if pairs else 0.0
        return {
            "word_error_rate": (words * len(pairs) + unread) / total,
            "character_error_rate": (characters * len(pairs) + unread) / total,
            "exact_match": sum(wanted == said for wanted, said in pairs) / total,
        }


def _text(record: Record) -> str:
    text = text_of(record, "text").strip()
    if not _words(text):
        raise SampleError("no text", f"{record.key}: no word in {text!r:.200}")
    return text.lower() if text.isupper() else text


def _words(text: str) -> str:
    return " ".join(regex.findall(rf"{WORD}(?:'{WORD})*", composed(text).replace("\u2019", "'")))
