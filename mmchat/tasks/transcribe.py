"""Transcripts: what is said in a recording.

Facts: {"text": "...", "speaker": "..."}; a text in capitals only, as some corpora have it, is learned in lower case.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import jiwer

from mmchat.conversation import Conversation, Record, Turn
from mmchat.errors import SampleError
from mmchat.tasks.facts import text_of

PROMPTS = (
    "What is said here?",
    "Write down what you hear.",
    "Transcribe the recording.",
    "Please give a transcript.",
    "Which words are spoken?",
)


class Transcribe:
    """One prompt, the words."""

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        return Conversation((Turn("user", (*record.media, rng.choice(PROMPTS))), Turn("assistant", (_text(record),))))

    def score(self, answers: Sequence[str], records: Sequence[Record]) -> dict[str, float]:
        """Word error rate (errors over all words of all records), and the share of records without an error.

        Case and punctuation do not count; apostrophes inside words do.
        """
        wanted = [_words(_text(record)) for record in records]
        heard = [_words(answer) for answer in answers]
        counts = jiwer.process_words(wanted, heard)
        exact = sum(a == b for a, b in zip(heard, wanted, strict=True))
        return {"word_error_rate": counts.wer, "exact_match": exact / len(records)}


def _text(record: Record) -> str:
    text = text_of(record, "text").strip()
    if not _words(text):
        raise SampleError("no text", f"{record.key}: no word in {text!r:.200}")
    return text.lower() if text.isupper() else text


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.lower().replace("\u2019", "'")))
