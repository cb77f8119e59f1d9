"""Answers to the questions of shards, in batches, with the task's own score."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmchat.config import SourceConfig
from mmchat.conversation import Conversation, MediaRef, Modality, Record
from mmchat.data.chat_template import Sample
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.data.pack import load_media
from mmchat.errors import SampleError
from mmchat.inference.generate import Decoding, generate
from mmchat.inference.load import Loaded


@dataclass(frozen=True)
class Summary:
    """Scores over all records, bad ones included, and how many could not be answered and why."""

    num_records: int
    scores: dict[str, float]
    bad: dict[str, int]


def answer_shards(
    loaded: Loaded,
    task: str,
    shards: str | list[str],
    out: Path,
    decoding: Decoding,
    batch_size: int = 16,
    limit: int | None = None,
    swap: Modality | None = None,
    seed: int = 0,
) -> Summary:
    """Answers the last question of every record and writes one JSON line each: key, prompt, answer, reference.

    Args:
        swap: gives every record the media of this modality of another record: a control that shows whether the
            answers come from the media.
        seed: of the questions' phrasing and of the swap, the same in every run.
    Raises:
        ValueError: unknown task or unusable shards.
    """
    mixture = Mixture([SourceConfig(name="answer", task=task, shards=shards)], loaded.config.cache)
    scorer = mixture.tasks["answer"]
    total = min(limit or mixture.sources[0].num_samples, mixture.sources[0].num_samples)
    records = [_record(mixture, i) for i in range(total)]
    if swap is not None:
        records = _swapped(records, swap, seed)
    answers: list[str] = []
    bad: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with out.open("w") as file:
        for start in range(0, total, batch_size):
            chunk = records[start : start + batch_size]
            lines = _answer(loaded, scorer, chunk, decoding, seed)
            for line in lines:
                if line["error"]:
                    bad[line["error"].partition(":")[0]] += 1
                answers.append(line["answer"])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            done = start + len(chunk)
            left = (time.perf_counter() - started) / done * (total - done)
            print(f"\ranswered {done}/{total}, {left:.0f} s left   ", end="", flush=True)
    print(flush=True)
    good = [record if isinstance(record, Record) else Record("", {}) for record in records]
    return Summary(total, scorer.score(answers, good), dict(bad))


def _record(mixture: Mixture, index: int) -> Record | SampleError:
    try:
        return mixture.record(SampleId("answer", 0, index))
    except SampleError as error:
        return error


def _answer(
    loaded: Loaded, task: Any, records: Sequence[Record | SampleError], decoding: Decoding, seed: int
) -> Iterator[dict[str, Any]]:
    """One line for each record, in order; records that cannot be used get an empty answer and the reason."""
    samples: list[Sample] = []
    media, lines = [], []
    for record in records:
        line: dict[str, Any] = {"key": "", "prompt": "", "answer": "", "reference": "", "error": ""}
        lines.append(line)
        try:
            if isinstance(record, SampleError):
                raise record
            line["key"] = record.key
            conversation = task.conversation(record, random.Random(f"{seed}/{record.key}"))
            asked, reference = split_last_answer(conversation)
            line["prompt"] = _text(asked.turns[-1].parts)
            line["reference"] = reference
            sample = loaded.template.render(asked, record.key, answer=True)
            tensors = load_media(sample, loaded.template)
        except SampleError as error:
            line["error"] = str(error)
            continue
        samples.append(sample)
        media.append(tensors)
        line["place"] = len(samples) - 1
    if samples:
        said = generate(loaded.model, loaded.template, samples, media, loaded.device, decoding)
        for line in lines:
            if "place" in line:
                line["answer"] = said[line.pop("place")]
    return iter(lines)


def split_last_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """The conversation up to its last assistant turn, and that turn's text.

    Raises:
        SampleError: there is no assistant turn after a user turn.
    """
    for i in range(len(conversation.turns) - 1, 0, -1):
        if conversation.turns[i].role == "assistant":
            return Conversation(conversation.turns[:i]), _text(conversation.turns[i].parts)
    raise SampleError("no question", "wanted a user turn with an assistant turn after it")


def _text(parts: Sequence[Any]) -> str:
    return "".join(
        part if isinstance(part, str) else f"<{part.modality}>" if isinstance(part, MediaRef) else "<region>"
        for part in parts
    )


def _swapped(records: Sequence[Record | SampleError], modality: Modality, seed: int) -> list[Record | SampleError]:
    """Every record gets another one's media, at random, with the same number of items of the modality."""

    def own(record: Record) -> list[MediaRef]:
        return [item for item in record.media if item.modality == modality]

    groups: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        if isinstance(record, Record) and own(record):
            groups.setdefault(len(own(record)), []).append(i)
    swapped = list(records)
    for places in groups.values():
        if len(places) < 2:
            raise ValueError(f"--swap {modality}: a record has no other with as many items to swap with; raise --limit")
        random.Random(seed).shuffle(places)
        for n, place in enumerate(places):  # the next one in a random circle: never its own
            record, other = records[place], records[places[(n + 1) % len(places)]]
            assert isinstance(record, Record) and isinstance(other, Record)
            given = iter(own(other))
            media = tuple(next(given) if item.modality == modality else item for item in record.media)
            swapped[place] = replace(record, media=media)
    return swapped
