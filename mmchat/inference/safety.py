"""The safety stage: what the model would say is judged before it is said, and replaced where it is unsafe.

It judges words alone, not pictures and not what the user asks. After the safety layer of Multi-Modal BlenderBot
(arXiv 2010.01082), which reports what such a
stage costs in engagement: `infer.py evaluate --safety` measures that.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from mmchat.tasks.question import Answer

WORD_LIST = "word-list"
REPLACEMENT = "I would rather not say that. Let us talk about something else."

_LIST = Path(__file__).with_name("unsafe_words.txt")
_LEET = str.maketrans("@$013457", "asoieast")
# Cyrillic and Greek letters that look like Latin ones.
_LOOKALIKES = str.maketrans("авеіорсухкмнтјѕαεικνορτυχ", "abeiopcyxkmhtjsaeikvoptux")
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc`\u00b4]")
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"')\]\u201d\u2019]*\s|[\u3002\uff01\uff1f]|\n")
# Labels of the harmless class in published classifiers, lower case, without marks and blanks.
_SAFE_LABELS = {"safe", "ok", "okay", "clean", "neutral", "normal", "none", "nontoxic", "nottoxic", "nonhate",
                "nothate", "notoffensive", "nonoffensive", "acceptable", "benign"}  # fmt: skip


class SafetyClassifier(Protocol):
    """Says how unsafe a text is."""

    def unsafe(self, text: str) -> float:
        """0 (harmless) to 1; an empty text is 0."""


class WordList:
    """Looks for coarse words, slurs, insults and threats of a list, in English; 1 where one is found, else 0.

    It finds whole words, so "Scunthorpe" and "class" are harmless, and sees through capitals, accents, digits for
    letters ("sh1t"), look-alikes of other alphabets, lengthened ("shiiiit"), starred ("sh*t"), broken ("s.h.i.t") and
    spelled-out words ("s h i t"). It knows no meaning: a polite sentence may be cruel, a quotation may be harmless,
    and what is not in the list, or not in English, it does not find. A word of another language that is spelled like
    one of the list is taken for it (French "retard"). It is a floor that needs no model, not a judgement.
    """

    def __init__(self, path: Path = _LIST) -> None:
        """path: a word or a phrase a line, * at the end for any ending, # for comments."""
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [_APOSTROPHES.sub("", line).strip().lower() for line in lines if line.strip() and line[0] != "#"]
        if not entries:
            raise ValueError(f"{path} has no word; wanted at least one, a word or a phrase a line")
        self._whole = re.compile(rf"(?<!\w)(?:{'|'.join(map(_pattern, entries))})(?!\w)")
        # In spelled-out letters the words have no borders; short ones would be found in everything.
        long = [entry.removesuffix("*") for entry in entries if " " not in entry and len(entry.strip("*")) > 3]
        self._inside = re.compile("|".join(map(_pattern, long)) or r"(?!)")

    def unsafe(self, text: str) -> float:
        return float(any(self._finds(reading) for reading in _readings(text)))

    def _finds(self, reading: str) -> bool:
        spelled = re.findall(r"(?<!\S)(?:\w ){2,}\w(?!\S)", reading)
        runs = [letters.replace(" ", "") for letters in spelled]
        return (
            self._whole.search(reading) is not None
            or any(self._whole.fullmatch(run) for run in runs)
            or any(self._inside.search(run) for run in runs)
        )


class HubClassifier:
    """Any text classifier of the Hugging Face hub, or of a folder, loaded when it is first asked.

    Unsafe is, of a model with one label a text, the probability of all labels but the harmless one; of a model with
    several, the highest probability of a label that is not harmless. Long texts are judged in overlapping windows, of
    which the worst counts.
    """

    def __init__(self, name: str, safe_labels: Sequence[str] = ()) -> None:
        """safe_labels: the harmless labels of the model; without them, names such as `safe` and `non-toxic` are."""
        self.name = name
        self.safe_labels = {_plain(label) for label in safe_labels} or _SAFE_LABELS

    def unsafe(self, text: str) -> float:
        """Raises ValueError where the model cannot be loaded or none of its labels is known as harmless."""
        if not text.strip():
            return 0.0
        tokenizer, model = _load_classifier(self.name)
        safe = [i for i, label in model.config.id2label.items() if _plain(label) in self.safe_labels]
        has_several = model.config.problem_type == "multi_label_classification"
        if not safe and not has_several:
            labels = ", ".join(model.config.id2label.values())
            raise ValueError(
                f"{self.name} has the labels {labels}; none is known to mean harmless. Use a model whose harmless "
                "label says so, or name it: HubClassifier(name, safe_labels=[...])"
            )
        positions = model.config.to_dict().get("max_position_embeddings", 514)
        length = min(tokenizer.model_max_length, positions - 2, 512)  # some models keep two positions for themselves
        windows = tokenizer(
            text, truncation=True, max_length=length, stride=length // 8, return_overflowing_tokens=True
        ).input_ids
        return max(_unsafe_share(model, ids, safe, has_several) for ids in windows)


def _unsafe_share(model: Any, token_ids: list[int], safe: list[int], has_several: bool) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids])).logits[0].float()  # [labels]
    shares = logits.sigmoid() if has_several else logits.softmax(-1)
    shares[safe] = 0.0
    return float((shares.max() if has_several else shares.sum()).clamp(0, 1))


@cache
def _load_classifier(name: str) -> tuple[Any, Any]:
    """Tokenizer and model, ready. Raises ValueError."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no text classifier {name!r} could be loaded ({error}). Wanted {WORD_LIST}, the name of a "
            "text-classification model of the Hugging Face hub, or its folder"
        ) from error
    return tokenizer, model.eval()


@dataclass(frozen=True)
class Guard:
    """Says something else where a text is as unsafe as `threshold` or more."""

    classifier: SafetyClassifier
    threshold: float = 0.5
    replacement: str = REPLACEMENT

    def is_unsafe(self, text: str) -> bool:
        score = self.classifier.unsafe(text)
        return math.isnan(score) or score >= self.threshold  # what cannot be judged is not said

    def said(self, text: str) -> str:
        """The text, or the replacement."""
        return self.replacement if self.is_unsafe(text) else text

    def stream(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces of an answer as whole sentences, each judged with all before it, before it is shown.

        Words come in parts, so pieces cannot be judged alone, and a whole answer would not be streamed. From the first
        sentence that makes the answer unsafe on, the replacement stands for the rest; `pieces` is not read further.
        """
        shown = waiting = ""
        for piece in pieces:
            waiting += piece
            ends = [match.end() for match in _SENTENCE_END.finditer(waiting)]
            if not ends:
                continue
            sentences, waiting = waiting[: ends[-1]], waiting[ends[-1] :]
            if self.is_unsafe(shown + sentences):
                yield self.replacement
                return
            yield sentences
            shown += sentences
        if waiting:
            yield self.replacement if self.is_unsafe(shown + waiting) else waiting


def build_safety(name: str) -> Guard:
    """`word-list`, or the name or folder of a Hugging Face text classifier, which is loaded when it is first asked.

    Raises ValueError for an empty name.
    """
    if not name.strip():
        raise ValueError(f"found no safety stage; wanted {WORD_LIST} or the name of a text classifier")
    return Guard(WordList() if name == WORD_LIST else HubClassifier(name))


def guarded(answers: Sequence[Answer], guard: Guard) -> tuple[list[Answer], int]:
    """The answers as they would be said, and how many are replaced; likelihoods stay, a replaced one has no regions."""
    said = [
        replace(answer, text=guard.replacement, regions=(), num_failed=0)
        if answer.text and guard.is_unsafe(answer.text)
        else answer
        for answer in answers
    ]
    return said, sum(new is not old for new, old in zip(said, answers, strict=True))


def _pattern(entry: str) -> str:
    """An entry as it may be spelled: vowels once or twice, and stars inside words of four letters and more."""
    words = []
    for word in entry.removesuffix("*").split():
        letters = [letter + "{1,2}" if letter in "aeiou" else re.escape(letter) for letter in word]
        if len(word) > 3:
            letters[1:-1] = [rf"(?:{letter}|\*)" for letter in letters[1:-1]]
        words.append("".join(letters))
    return " ".join(words) + (r"\w*" if entry.endswith("*") else "")


def _readings(text: str) -> set[str]:
    """The ways to read a text: as it stands and with signs as letters; its marks as blanks, and left out."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Mn", "Cf"))
    text = _APOSTROPHES.sub("", text.lower())
    readings = set()
    for one in (text, " ".join(map(_as_letters, text.split()))):
        for kept in (r"\1", r"\1\1"):  # of a letter that is written three times and more
            short = re.sub(r"([^\W\d_])\1{2,}", kept, one)
            joined = re.sub(r"(?<=\w)(?:[^\w\s]|_)+(?=\w)", "", short)
            readings |= {" ".join(re.sub(r"[^\w*]|_", " ", reading).split()) for reading in (short, joined)}
    return readings


def _as_letters(word: str) -> str:
    """Digits, signs and look-alikes as the Latin letters that they stand for, in a word that has one."""
    if not re.search("[a-z]", word):
        return word
    return re.sub(r"(?<=\w)[!|](?=\w)", "i", word.translate(_LOOKALIKES).translate(_LEET))


def _plain(label: str) -> str:
    return re.sub(r"[\W_]", "", label.lower())
