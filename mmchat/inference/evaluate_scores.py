"""What an evaluation counts: scores of all answers, by presence of media and behind a safety stage, reasons, DET."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from mmchat.inference.controls import Controls
from mmchat.inference.det_plot import det_svg
from mmchat.inference.predictions import Case
from mmchat.inference.safety import Guard, guarded
from mmchat.tasks import Task
from mmchat.tasks import question as ask
from mmchat.tasks.question import Answer, Question

MAX_KEYS = 20  # of questions without an answer, listed for each reason


@runtime_checkable
class Detects(Protocol):
    """A task that accepts or rejects by a score."""

    def trials(
        self, answers: Sequence[Answer], questions: Sequence[Question | None]
    ) -> tuple[list[float], list[float]]:
        """Scores of what should be accepted, and of what should be rejected."""


def columns(cases: Sequence[Case]) -> tuple[list[Answer], list[Question | None]]:
    """Answers and questions, as tasks take them."""
    return [case.answer for case in cases], [case.question for case in cases]


def scores(task: Task, cases: Sequence[Case], protocol: ask.Protocol, controls: Controls) -> dict[str, Any]:
    """Scores of all questions, and where media was taken from a share of the records, of either part too."""
    found: dict[str, Any] = {"scores": task.score(*columns(cases), protocol)}
    if controls.missing:
        found["scores_by_presence"] = {
            name: {"num_questions": len(part), "scores": task.score(*columns(part), protocol)}
            for name, part in _by_presence(cases, controls).items()
        }
    return found


def det_picture(task: Task, cases: Sequence[Case], controls: Controls) -> str:
    """DET curves as SVG of a task that detects, those of either part too; "" where nothing can be drawn."""
    if not isinstance(task, Detects):
        return ""
    parts = {"all": cases}
    if controls.missing:
        parts |= {f"media {name}": part for name, part in _by_presence(cases, controls).items()}
    trials = {name: task.trials(*columns(part)) for name, part in parts.items()}
    curves = {name: scores for name, scores in trials.items() if all(scores)}
    return det_svg(curves) if curves else ""


def _by_presence(cases: Sequence[Case], controls: Controls) -> dict[str, list[Case]]:
    """What media was taken from, and the rest."""
    parts: dict[str, list[Case]] = {}
    for name, is_missing in (("missing", True), ("present", False)):
        if part := [case for case in cases if _is_missing(case, controls) == is_missing]:
            parts[name] = part
    return parts


def _is_missing(case: Case, controls: Controls) -> bool:
    """Whether the control took something from the record of a question, or would have from one not read."""
    if case.question is None:
        return any(controls.is_missing(modality, case.key) for modality in controls.missing)
    return any(item.data is None and item.modality in controls.missing for item in case.question.record.media)


def by_reason(found: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Reason to how many questions it holds for, and the first of their keys; commonest first."""
    keys: dict[str, list[str]] = {}
    for key, text in found:
        if text:
            keys.setdefault(text.partition(":")[0], []).append(key)
    ordered = sorted(keys.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return {reason: {"count": len(found), "keys": found[:MAX_KEYS]} for reason, found in ordered}


def warnings_of(case: Case) -> list[str]:
    """What a task left out of the facts, or a budget of the media, while the question was asked."""
    return [*([] if case.question is None else [case.question.warning]), *case.answer.excerpts]


def guarded_scores(
    task: Task, cases: Sequence[Case], protocol: ask.Protocol, guard: Guard, name: str | None
) -> dict[str, Any]:
    """Scores of what would be said with the safety stage, and the share of the texts that it replaces."""
    answers, questions = columns(cases)
    said, num_replaced = guarded(answers, guard)
    num_texts = sum(bool(answer.text) for answer in answers)
    share = num_replaced / max(num_texts, 1)
    return {"safety": name, "share_replaced": share, "scores": task.score(said, questions, protocol)}
