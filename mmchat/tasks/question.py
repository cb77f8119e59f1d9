"""What an evaluation asks, what comes back, and by which rules the two are compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from mmchat.conversation import Conversation, Part, Record, Region, Turn
from mmchat.errors import SampleError
from mmchat.regions import check_region
from mmchat.schema import Schema


class Protocol(Schema):
    """How a task is evaluated; its hash stands in every result. configs/protocols/ has those of the papers.

    phrasing: `first` asks every question with the task's first prompt, `drawn` with one drawn from `seed` and the key.
    max_new_tokens: of a generated answer; decoding is greedy.
    iou: a box is found where its overlap with the true one is strictly above this, in original pixels.
    likelihood: of a candidate, the sum of its tokens' log-likelihoods, or their mean.
    num_candidates: that a ranked question must have; one with fewer counts as not answered.
    history: whether a question of a dialogue is asked with what was said before it; false is a control.
    match: `exact` compares normalised texts, `vqa_v2` is that set's normalisation and its min(matches / 3, 1).
    """

    phrasing: Literal["first", "drawn"] = "first"
    seed: int = 0
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    iou: Annotated[float, Field(ge=0, lt=1)] = 0.5
    likelihood: Literal["sum", "mean"] = "sum"
    num_candidates: Annotated[int, Field(gt=0)] = 100
    history: bool = True
    match: Literal["exact", "vqa_v2"] = "exact"

    def rng(self, key: str) -> random.Random:
        """What phrases the questions of the record with this key."""
        return _First() if self.phrasing == "first" else random.Random(f"{self.seed}/{key}")


@dataclass(frozen=True)
class Question:
    """One thing that is asked and scored; a record has one or several.

    Attributes:
        record: the facts of this question alone, with a key of its own ("KEY", or "KEY#2"), and the record's media.
        conversation: ends with the user's turn that is to be answered.
        reference: the right answer, text and regions; () where the set does not publish it.
        candidates: answers to rank by likelihood; () where the answer is generated.
        problem: why it cannot be asked, "reason: detail"; it is listed, and counts as wrong without asking the model.
        warning: what is listed although it is asked and scored.
    """

    record: Record
    conversation: Conversation
    reference: tuple[Part, ...] = ()
    candidates: tuple[str, ...] = ()
    problem: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model did with one question.

    Attributes:
        text: what it generated, regions as it wrote them; "" where candidates are ranked or there is no answer.
        regions: boxes and points in `text`, in original pixels; num_failed: marks that looked like one and were none.
        likelihoods: log-likelihood in nats of each candidate, by the protocol's rule.
        reference_likelihood: summed log-likelihood of the reference in nats, and its number of tokens.
        error: why there is no answer; "" where there is one. A question without an answer counts as wrong.
        excerpts: how much of media longer than the model's budget was seen or heard, "rule: how much".
    """

    text: str = ""
    regions: tuple[Region, ...] = ()
    num_failed: int = 0
    likelihoods: tuple[float, ...] = ()
    reference_likelihood: tuple[float, int] | None = None
    error: str = ""
    excerpts: tuple[str, ...] = ()

    @property
    def said(self) -> str | None:
        """The text as metrics take it: None where there is no answer, which no right text equals."""
        return None if self.error else self.text


def last_question(conversation: Conversation, record: Record, candidates: Sequence[str] = ()) -> Question:
    """Asks for the last assistant turn of a conversation, with all turns before it as they are.

    A place in them that cannot be is the question's problem (see `check_region`), where the picture's size is known.
    Raises SampleError where no assistant turn follows a user turn.
    """
    turns = conversation.turns
    for i in range(len(turns) - 1, 0, -1):
        if turns[i].role == "assistant":
            asked, problem = Conversation(turns[:i]), _impossible(Conversation(turns[: i + 1]))
            return Question(record, asked, turns[i].parts, tuple(candidates), problem)
    raise SampleError("no question", "wanted a user turn with an assistant turn after it")


def each_alone(record: Record) -> list[Record]:
    """The record's own facts and those under "more", each as a record of its own about the same media.

    In training several are asked in one conversation; in an evaluation no answer may stand in another's history.
    What is under "more" and is no facts stays, as a record without any.
    """
    own = {name: value for name, value in record.facts.items() if name != "more"}
    more = record.facts.get("more", [])
    others = [
        Record(f"{record.key}#{number}", facts if isinstance(facts, dict) else {}, record.media)
        for number, facts in enumerate(more if isinstance(more, list) else [more], 1)
    ]
    return [replace(record, facts=own), *others]


def asked_alone(record: Record, ask: Callable[[Record], Question]) -> list[Question]:
    """`ask` of each of a record's facts. Facts that cannot be asked are a question too, whose problem says why.

    So one bad fact costs one question, not all of its picture.
    """
    questions = []
    for one in each_alone(record):
        try:
            questions.append(ask(one))
        except SampleError as error:
            questions.append(Question(one, Conversation((Turn("user", one.media),)), problem=str(error)))
    return questions


def _impossible(conversation: Conversation) -> str:
    """Why a region of a conversation cannot be in its picture; "" where all can, or sizes are not known."""
    media = conversation.media
    for part in (part for turn in conversation.turns for part in turn.parts):
        if isinstance(part, Region) and part.media < len(media) and (header := media[part.media].header):
            try:
                if header.width and header.height:
                    check_region(part, header.width, header.height, header.duration_s)
            except SampleError as error:
                return str(error)
    return ""


class _First(random.Random):
    """Draws what comes first: a fixed phrasing from code that draws one."""

    def random(self) -> float:
        return 0.0

    def getrandbits(self, k: int) -> int:
        return 0

    def sample(self, population: Sequence[Any], k: int, *, counts: Any = None) -> list[Any]:
        return list(population)[:k]  # random's own draws until it finds one that is new

    def shuffle(self, x: Any) -> None:
        pass
