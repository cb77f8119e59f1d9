"""Device-directed speech detection: is what was said meant for the assistant? FLoRA's own task (arXiv 2406.09617).

Facts: {"text": "turn on the light", "directed": true, "kind": "command"} and a recording. The kind is what such speech
is called, `command`, `to_person`, `background` or `dialogue`; further facts (speaker, voice, source) are for people.

The same facts are three tasks: `directed` gives the recording and its transcript, `directed_audio` the recording alone,
and `directed_text` the transcript alone. A recording that is missing is absent in the first two, as anywhere.

The answer is "yes" or "no", and its score is log-likelihood("yes") - log-likelihood("no") in nats: a threshold over it,
not the likelier word, is what an operating point is. The error rates are those of `mmchat/metrics/detection.py`. What
has no answer is wrong at every threshold: its score is minus infinity where "yes" is right, plus infinity elsewhere.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from mmchat.conversation import Conversation, Part, Record, Turn
from mmchat.errors import SampleError
from mmchat.metrics.detection import eer, far_at_frr
from mmchat.tasks.facts import text_of
from mmchat.tasks.question import Answer, Protocol, Question, last_question
from mmchat.tasks.spoken import Given

TRANSCRIPTS = (
    "Somebody says: {}",
    "What is said: {}",
    "Transcript: {}",
    "The words are: {}",
    "A voice in the room says: {}",
    "Heard: {}",
    "In words: {}",
    "The recogniser writes: {}",
    "Spoken words: {}",
    "This was said: {}",
    "As text: {}",
    "The microphone picked up: {}",
    "One hears: {}",
)
QUESTIONS = (
    "Is this said to you? Answer yes or no.",
    "Are you meant? Yes or no.",
    "Is somebody talking to you here? Say yes or no.",
    "Is this for the assistant? Yes or no.",
    "Should you act on this? Answer yes or no.",
    "Yes or no: is the speaker addressing you?",
    "Does this call for an answer of yours? Yes or no.",
    "Is the assistant spoken to? Answer with yes or no.",
    "Yes or no: was this meant for you?",
    "Are these words for you, and not for somebody else? Yes or no.",
    "Is it you who is asked to do something? Say yes or no.",
    "Would the speaker want you to react? Yes or no.",
    "Tell whether this is directed at you: yes or no.",
)
CANDIDATES = ("yes", "no")
FRR = 0.1  # at which false accepts are reported, as the field does


class Directed:
    """Asks whether speech is for the assistant; `given` is what the question shows of it."""

    def __init__(self, given: Given = "both") -> None:
        self.given = given

    def conversation(self, record: Record, rng: random.Random) -> Conversation:
        """The recording, its transcript, the question; and yes or no."""
        if self.given == "audio" and not record.media:
            raise SampleError("no recording", f"{record.key}: wanted a recording to judge by; it has no media")
        parts: list[Part] = [] if self.given == "text" else [*record.media]
        question = rng.choice(QUESTIONS)
        if self.given != "audio":
            question = f"{rng.choice(TRANSCRIPTS).format(text_of(record, 'text').strip())}\n{question}"
        answer = CANDIDATES[0] if _is_directed(record) else CANDIDATES[1]
        return Conversation((Turn("user", (*parts, question)), Turn("assistant", (answer,))))

    def questions(self, record: Record, protocol: Protocol) -> list[Question]:
        """One, with "yes" and "no" as its candidates."""
        conversation = self.conversation(record, protocol.rng(record.key))
        return [last_question(conversation, record, CANDIDATES)]

    def judge(self, answer: Answer, question: Question, protocol: Protocol) -> float:
        """The probability of the right one of the two words."""
        score = _score(answer)
        if score is None:
            return 0.0
        return 1 / (1 + math.exp(min(-score if _is_directed(question.record) else score, 700.0)))

    def score(
        self, answers: Sequence[Answer], questions: Sequence[Question | None], protocol: Protocol
    ) -> dict[str, float]:
        """`eer`, `far_at_frr_10` (false accepts where 10 % of what is directed is rejected) and `accuracy` at 0.

        A score of 0 is no decision, and wrong. Of each kind: how many there are, the accuracy, and of kinds that are
        not directed the false accepts at that same threshold. A record that could not be read is of no known kind: in
        the error rates it is wrong on both sides, a reject among the directed and an accept among the others.
        Where one side has nothing, its rates are NaN.
        """
        targets, nontargets = self.trials(answers, questions)
        kinds = defaultdict[str, list[tuple[Answer, Question]]](list)
        for answer, question in zip(answers, questions, strict=True):
            if question is not None:
                kinds[_kind(question.record)].append((answer, question))
        num_right = sum(_is_right(*pair) for pairs in kinds.values() for pair in pairs)
        found = {"eer": math.nan, "far_at_frr_10": math.nan, "accuracy": num_right / len(answers)}
        if targets and nontargets:
            found |= {"eer": eer(targets, nontargets), "far_at_frr_10": far_at_frr(targets, nontargets, FRR)}
        for kind, pairs in sorted(kinds.items()):
            num_right = sum(_is_right(*pair) for pair in pairs)
            found |= {f"num_{kind}": len(pairs), f"accuracy_{kind}": num_right / len(pairs)}
            _, others = self.trials([answer for answer, _ in pairs], [question for _, question in pairs])
            if targets and others:
                found[f"far_at_frr_10_{kind}"] = far_at_frr(targets, others, FRR)
        return found

    def trials(
        self, answers: Sequence[Answer], questions: Sequence[Question | None]
    ) -> tuple[list[float], list[float]]:
        """Scores of what is directed, and of what is not; what has no score is wrong at every threshold."""
        targets, nontargets = list[float](), list[float]()
        for answer, question in zip(answers, questions, strict=True):
            score = None if question is None else _score(answer)
            if question is None or _is_directed(question.record):
                targets.append(-math.inf if score is None else score)
            if question is None or not _is_directed(question.record):
                nontargets.append(math.inf if score is None else score)
        return targets, nontargets


def _score(answer: Answer) -> float | None:
    """log-likelihood("yes") - log-likelihood("no"); None where the answer has not both, or they are no numbers."""
    if answer.error or len(answer.likelihoods) != len(CANDIDATES):
        return None
    score = answer.likelihoods[0] - answer.likelihoods[1]
    return score if math.isfinite(score) else None


def _is_right(answer: Answer, question: Question) -> bool:
    score = _score(answer)
    return score is not None and (score > 0 if _is_directed(question.record) else score < 0)


def _is_directed(record: Record) -> bool:
    """Raises SampleError."""
    found = record.facts.get("directed")
    if not isinstance(found, bool):
        raise SampleError("no label", f"{record.key}: wanted true or false under 'directed', found {found!r:.200}")
    return found


def _kind(record: Record) -> str:
    """What the speech is called; where nothing is said, after its label."""
    found = record.facts.get("kind")
    if isinstance(found, str) and found.strip():
        return "_".join(found.split())
    return "directed" if _is_directed(record) else "other"
