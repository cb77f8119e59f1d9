"""predictions.jsonl: a line a question, appended batch by batch, so that an evaluation that was killed continues.

Beside it, run.json says what the lines belong to; a folder of another evaluation is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from mmchat.conversation import Conversation, MediaRef, Part, Region
from mmchat.tasks.facts import region_of
from mmchat.tasks.question import Answer, Question

RUN, PREDICTIONS = "run.json", "predictions.jsonl"
SYNC_EVERY_S = 5.0


@dataclass(frozen=True)
class Case:
    """A question with its answer.

    Attributes:
        record: number of the record in the shards.
        question: None where the record could not be read or asked about.
        judge: how right the answer is, 0 to 1, by the task.
    """

    record: int
    key: str
    question: Question | None
    answer: Answer
    judge: float = 0.0

    def line(self) -> dict[str, Any]:
        """What predictions.jsonl says of it; regions are in original pixels."""
        question, answer = self.question, self.answer
        conversation = question.conversation if question else Conversation(())
        reference, num_media = question.reference if question else (), len(conversation.media)
        return {
            "record": self.record,
            "key": self.key,
            "question_sha256": question_hash(self.key, question),
            "prompt": text_of(conversation.turns[-1].parts, num_media) if question else "",
            "answer": answer.text,
            "regions": [_facts(region) for region in answer.regions],
            "num_failed": answer.num_failed,
            "reference": text_of(reference, num_media),
            "reference_regions": [_facts(part) for part in reference if isinstance(part, Region)],
            "likelihoods": list(answer.likelihoods),
            "reference_likelihood": answer.reference_likelihood,
            "judge": self.judge,
            "error": answer.error,
            "excerpts": list(answer.excerpts),
        }


def answer_of(line: dict[str, Any]) -> Answer:
    """The answer that a line holds. Raises ValueError or LookupError for a line of another form."""
    pair = line["reference_likelihood"]
    return Answer(
        line["answer"],
        tuple(region_of(facts) for facts in line["regions"]),
        line["num_failed"],
        tuple(line["likelihoods"]),
        (pair[0], pair[1]) if pair else None,
        line["error"],
        tuple(line.get("excerpts", ())),  # lines of before have none
    )


def question_hash(key: str, question: Question | None) -> str:
    """Over everything that is asked and scored of one question; the content of its media is not in it."""
    asked: dict[str, Any] = {"key": key}
    if question is not None:
        turns = question.conversation.turns
        asked |= {"turns": [[turn.role, [_canonical(part) for part in turn.parts]] for turn in turns]}
        asked |= {"reference": [_canonical(part) for part in question.reference], "candidates": question.candidates}
        asked |= {"facts": question.record.facts, "problem": question.problem, "warning": question.warning}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _canonical(part: Part) -> Any:
    if isinstance(part, str):
        return part
    # Which item it is follows from the order; an absent one is asked about in the same words.
    return {"media": part.modality} if isinstance(part, MediaRef) else {"region": _facts(part)}


def text_of(parts: Sequence[Part], num_media: int = 1) -> str:
    """Parts as text, for people: <image> for a picture, <box 10 20 30 40> for a region in pixels.

    Of several media items, the number comes first, from 1: <box 2: 10 20 30 40>.
    """
    return "".join(_text(part, num_media) for part in parts)


def _text(part: Part, num_media: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, MediaRef):
        return f"<{part.modality}>"
    shape = "box" if part.box else "point" if part.point else "tube"
    number = [f"{part.media + 1}:"] if num_media > 1 else []
    return f"<{' '.join([shape, *number, *(f'{number:g}' for number in part.box or part.point or ())])}>"


def _facts(region: Region) -> dict[str, Any]:
    return {name: value for name, value in asdict(region).items() if value is not None}


class Predictions:
    """The file, opened for one evaluation: `found` are the lines that are there already; `cut` comes before `append`.

    Raises ValueError where the folder belongs to another evaluation, or one is at work in it.
    """

    def __init__(self, folder: Path, setting: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / PREDICTIONS).open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(folder, setting)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"another process evaluates into {folder}; wait for it, or use another --out") from error
        except ValueError:
            self._file.close()
            raise
        self.found, self._ends = _whole_lines(self._file)
        self._is_cut = False
        self._synced = time.monotonic()

    def cut(self, num_lines: int) -> None:
        """Leaves the first so many lines: what a kill or a crash left behind them goes. Only the first call counts."""
        if not self._is_cut:
            del self.found[num_lines:]
            self._file.truncate(self._ends[num_lines])
            self._is_cut = True

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Adds a batch; it is on the disk after a few seconds at the latest."""
        assert self._is_cut, "half a line may stand at the end"
        self._file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            self._sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._file.close()  # which frees the lock

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def write_file(path: Path, text: str) -> None:
    """Writes beside and renames, so that a half-written file is never seen."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _claim(folder: Path, setting: dict[str, Any]) -> None:
    """Writes run.json, or compares with the one that is there. Raises ValueError with what differs."""
    path = folder / RUN
    if not path.exists():
        if (folder / PREDICTIONS).stat().st_size:
            raise ValueError(f"{folder} has {PREDICTIONS} but no {RUN} that says of what; use another --out")
        write_file(path, json.dumps(setting, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder}, or use another --out") from error
    here = json.loads(json.dumps(setting))  # tuples and the like as JSON has them
    if faults := list(_differences(there, here)):
        raise ValueError(
            f"{folder} holds another evaluation; use another --out, or remove it. What differs:\n  "
            + "\n  ".join(faults)
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name}: found {there!r:.200}, wanted {here!r:.200}"


def _whole_lines(file: BinaryIO) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines up to the first one that is none, and where each begins in bytes, and the one after them."""
    file.seek(0)
    lines: list[dict[str, Any]] = []
    ends = [0]
    for text in file:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
        ends.append(ends[-1] + len(text))
    return lines, ends
