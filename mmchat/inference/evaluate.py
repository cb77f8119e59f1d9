"""A task's protocol over shards: questions asked in batches, answers kept as they come, then scores and a page."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmchat.config import SourceConfig, dump_config, override, parse, read_values
from mmchat.data.chat_template import Sample
from mmchat.data.mixture import Mixture
from mmchat.data.pack import load_media
from mmchat.errors import SampleError
from mmchat.inference.controls import ControlledRecords, Controls
from mmchat.inference.evaluate_page import page
from mmchat.inference.evaluate_scores import by_reason, columns, det_picture, guarded_scores, scores, warnings_of
from mmchat.inference.generate import Decoding, generate
from mmchat.inference.load import Loaded
from mmchat.inference.predictions import Case, Predictions, answer_of, question_hash, write_file
from mmchat.inference.progress import Progress
from mmchat.inference.safety import build_safety
from mmchat.inference.score import candidate_likelihoods, check_room, reference_likelihood
from mmchat.metrics.text import BLEU_SIGNATURE
from mmchat.tasks import Task
from mmchat.tasks import question as ask
from mmchat.tasks.question import Answer, Question


@runtime_checkable
class Submits(Protocol):
    """A task whose test answers are judged by a server."""

    def submission(self, answers: Sequence[Answer], questions: Sequence[Question | None]) -> Any:
        """What the server takes, for JSON."""


@runtime_checkable
class MeasuresPerplexity(Protocol):
    """A task that scores how likely the right answers are."""

    needs_reference_likelihood: bool


@dataclass(frozen=True)
class _Asked:
    """What is asked next; without a question, or with a problem, it counts as not answered.

    done: records that are done with it, the last of them perhaps in part.
    """

    record: int
    key: str
    question: Question | None
    problem: str
    done: float


def load_protocol(path: Path | None, overrides: Sequence[str] = ()) -> ask.Protocol:
    """The protocol of a YAML file, or the default one, with `field=value` overrides. Raises ConfigError."""
    values = override({} if path is None else read_values(path), overrides)
    return parse(ask.Protocol, values, str(path or "the protocol"))


def evaluate(
    loaded: Loaded,
    task: str,
    shards: str | list[str],
    out: Path,
    protocol: ask.Protocol | None = None,
    controls: Controls | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    safety: str | None = None,
) -> dict[str, Any]:
    """Asks what the task asks about each record, and returns what metrics.json says.

    A call with the same arguments continues what an earlier one left; the files are those of an unbroken one.

    Args:
        out: folder for run.json, predictions.jsonl, metrics.json, index.html; submission.json and det.svg where the
            task has one.
        limit: the first so many records only.
        safety: name of a stage that replaces unsafe answers; scores with it are added.
    Raises:
        ValueError: unknown task, unusable shards, or `out` belongs to another evaluation.
    """
    protocol, controls = protocol or ask.Protocol(), controls or Controls()
    guard = build_safety(safety) if safety is not None else None
    if guard is not None:
        guard.is_unsafe("hello")  # one that cannot be loaded is refused now, not after hours
    mixture = Mixture([SourceConfig(name="evaluate", task=task, shards=shards)], loaded.config.cache)
    scorer = mixture.tasks["evaluate"]
    total = min(limit or mixture.sources[0].num_samples, mixture.sources[0].num_samples)
    records = ControlledRecords(mixture, loaded.template, total, controls)
    setting = _setting(loaded, task, mixture, protocol, controls, limit)
    started = time.perf_counter()
    with Predictions(out, setting) as file:
        cases = _cases(loaded, scorer, records, protocol, file, batch_size)
        num_found = len(file.found)
    metrics = {
        **scores(scorer, cases, protocol, controls),
        "num_records": total,
        "num_questions": len(cases),
        "num_answered": sum(not case.answer.error for case in cases),
        "questions_sha256": _questions_hash(cases),
        "not_answered": by_reason([(case.key, case.answer.error) for case in cases]),
        "warnings": by_reason([(case.key, warning) for case in cases for warning in warnings_of(case)]),
        "num_with_malformed_regions": sum(case.answer.num_failed > 0 for case in cases),
        **({"guarded": guarded_scores(scorer, cases, protocol, guard, safety)} if guard is not None else {}),
        "changed_records": dict(sorted(records.num_changed.items())),
        **setting,
        "checkpoint_folder": str(loaded.checkpoint.folder) if loaded.checkpoint else None,
        "named_shards": shards,
    }
    if "bleu_4" in metrics["scores"]:
        metrics["bleu_signature"] = f"{BLEU_SIGNATURE}|version:{version('sacrebleu')}"
    metrics = _finite(metrics)
    (out / "submission.json").unlink(missing_ok=True)
    if isinstance(scorer, Submits):
        answers, questions = columns(cases)
        write_file(out / "submission.json", json.dumps(scorer.submission(answers, questions)) + "\n")
    picture = det_picture(scorer, cases, controls)
    (out / "det.svg").unlink(missing_ok=True)
    if picture:
        write_file(out / "det.svg", picture)
    write_file(out / "index.html", page(metrics, cases, loaded.template, picture))
    timing = {"wall_time_s": round(time.perf_counter() - started, 1), "num_found_answered": num_found}
    metrics |= {"device": _device(loaded), "timing": timing}
    write_file(out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


def summary(metrics: Mapping[str, Any], out: Path) -> str:
    """What a person wants to know at once."""
    failed = {reason: one["count"] for reason, one in metrics["not_answered"].items()}
    lines = [f"{metrics['task']}: {metrics['num_questions']:,} questions of {metrics['num_records']:,} records"]
    lines += [f"  {line}" for line in Controls.model_validate(metrics["controls"]).described()]
    for name, value in metrics["scores"].items():
        # Counts are whole numbers.
        shown = "not finite" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        lines.append(f"  {name:<28}{shown:>10}")
    lines += [f"  not answered, counted as wrong: {count:,} x {reason}" for reason, count in failed.items()]
    lines += [f"  warning: {one['count']:,} x {reason}" for reason, one in metrics["warnings"].items()]
    return "\n".join([*lines, f"{out / 'index.html'} is the page to look at"])


# ---- asking ---------------------------------------------------------------------------------------------------------


def _cases(
    loaded: Loaded,
    task: Task,
    records: ControlledRecords,
    protocol: ask.Protocol,
    file: Predictions,
    batch_size: int,
) -> list[Case]:
    """All questions with their answers: those in the file, and then new ones, which are added to it.

    Half a batch is asked again as a whole one, so that the batches of a continued run are those of an unbroken one.
    """
    cases: list[Case] = []
    progress = Progress(records.total)
    for batch in _batches(_asked(records, task, protocol), batch_size):
        known = file.found[len(cases) : len(cases) + len(batch)]
        if len(known) == len(batch):
            cases += [_known(one, line) for one, line in zip(batch, known, strict=True)]
            progress.skip(batch[-1].done)
            continue
        file.cut(len(cases))
        answers = _answers(loaded, task, batch, protocol, records.controls)
        new = [
            Case(one.record, one.key, one.question, answer, _judge(task, answer, one.question, protocol))
            for one, answer in zip(batch, answers, strict=True)
        ]
        file.append([case.line() for case in new])
        cases += new
        progress.say(len(cases), batch[-1].done)
    file.cut(len(cases))
    progress.end(len(cases))
    return cases


def _asked(records: ControlledRecords, task: Task, protocol: ask.Protocol) -> Iterator[_Asked]:
    """Every question in order; a record that cannot be asked about stands as one."""
    for i in range(records.total):
        try:
            record = records.record(i)
            questions = task.questions(record, protocol)
        except SampleError as error:
            yield _Asked(i, records.key(i), None, str(error), i + 1)
            continue
        assert questions, f"{record.key}: a task asks one question at least"
        for number, question in enumerate(questions, 1):
            yield _Asked(i, question.record.key, question, question.problem, i + number / len(questions))


def _batches(asked: Iterator[_Asked], size: int) -> Iterator[list[_Asked]]:
    batch: list[_Asked] = []
    for one in asked:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _known(one: _Asked, line: dict[str, Any]) -> Case:
    """The case of a line that is there already. Raises ValueError where it is of another question."""
    try:
        if (line["record"], line["key"]) != (one.record, one.key):
            raise ValueError(f"the line is of {line['key']!r}, the question is {one.key!r}")
        if line["question_sha256"] != question_hash(one.key, one.question):
            raise ValueError(f"another question was asked of {one.key!r}: its facts have changed since")
        return Case(one.record, one.key, one.question, answer_of(line), float(line["judge"]))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"predictions.jsonl does not fit these shards ({error}); use another --out") from error


def _answers(
    loaded: Loaded, task: Task, batch: Sequence[_Asked], protocol: ask.Protocol, controls: Controls
) -> list[Answer]:
    """One answer each; what cannot be asked gets the reason as its error."""
    answers = [Answer(error=one.problem) for one in batch]
    places: list[int] = []
    samples: list[Sample] = []
    media: list[list[Tensor]] = []
    measures = isinstance(task, MeasuresPerplexity) and task.needs_reference_likelihood
    for place, one in enumerate(batch):
        if one.question is None or one.problem:
            continue
        try:
            sample = _prompt(loaded, one.question, protocol)
            tensors = controls.shuffled(sample, load_media(sample, loaded.template), one.key)
            likely = _likely(loaded, one.question, sample, tensors, protocol, measures)
            excerpts = dict.fromkeys(str(excerpt) for item in sample.media for excerpt in item.plan.excerpts)
            answers[place] = replace(likely, excerpts=tuple(excerpts))
        except SampleError as error:
            answers[place] = Answer(error=str(error))
            continue
        except OSError as error:  # a header that the index lacks, of a shard that cannot be read
            answers[place] = Answer(error=f"unreadable shard: {error}")
            continue
        if not one.question.candidates:
            places.append(place)
            samples.append(sample)
            media.append(tensors)
    if samples:
        decoding = Decoding(protocol.max_new_tokens)
        said = generate(loaded.model, loaded.template, samples, media, loaded.device, decoding)
        for place, text in zip(places, said, strict=True):
            question = batch[place].question
            assert question is not None
            parsed = loaded.template.read_regions(text, question.conversation)
            regions = tuple(parsed.regions)
            answers[place] = replace(answers[place], text=text, regions=regions, num_failed=parsed.num_failed)
    return answers


def _prompt(loaded: Loaded, question: Question, protocol: ask.Protocol) -> Sample:
    """The question as tokens. Raises SampleError, also where the model has no room for it and its answer."""
    sample = loaded.template.render(question.conversation, question.record.key, answer=True)
    if not question.candidates:
        check_room(loaded, sample, protocol.max_new_tokens)  # for what is given, those who score it look
    return sample


def _likely(
    loaded: Loaded,
    question: Question,
    sample: Sample,
    media: Sequence[Tensor],
    protocol: ask.Protocol,
    measures_reference: bool,
) -> Answer:
    """The likelihoods that are wanted of a question, without a text. Raises SampleError."""
    likelihoods = [
        total / count if protocol.likelihood == "mean" else total
        for total, count in candidate_likelihoods(loaded, sample, media, question.candidates)
    ]
    reference = None
    if measures_reference and question.reference and not question.candidates:
        reference = reference_likelihood(loaded, sample, media, question.conversation, question.reference)
    return Answer(likelihoods=tuple(likelihoods), reference_likelihood=reference)


def _judge(task: Task, answer: Answer, question: Question | None, protocol: ask.Protocol) -> float:
    return 0.0 if question is None or answer.error else float(task.judge(answer, question, protocol))


# ---- what the result says of itself ---------------------------------------------------------------------------------


def _setting(
    loaded: Loaded, task: str, mixture: Mixture, protocol: ask.Protocol, controls: Controls, limit: int | None
) -> dict[str, Any]:
    """What the answers depend on; the protocol's hash is over how they are asked for, not over model and shards."""
    asked = {
        "task": task,
        "protocol": protocol.model_dump(mode="json"),
        "chat": loaded.config.chat.model_dump(mode="json"),
        "decoding": "greedy",
        "dtype": str(loaded.model.llm.dtype).removeprefix("torch."),
        "mmchat_version": version("mmchat"),
    }
    if loaded.checkpoint is not None:
        model = str(loaded.checkpoint.manifest["sha256"])
    else:
        model = hashlib.sha256(dump_config(loaded.config).encode()).hexdigest()
    hashed = dict(asked)
    if protocol.phrasing == "first":  # nothing is drawn, so the seed says nothing
        hashed["protocol"] = protocol.model_dump(mode="json", exclude={"seed"})
    return {
        **asked,
        "protocol_sha256": hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest(),
        "checkpoint_sha256": model,
        "shards_sha256": mixture.fingerprint(),
        "controls": controls.model_dump(mode="json"),
        "limit": limit,
    }


def _questions_hash(cases: Sequence[Case]) -> str:
    """Over everything that was asked and scored but the media's content: equal hashes, equal questions."""
    found = hashlib.sha256()
    for case in cases:
        found.update(question_hash(case.key, case.question).encode())
    return found.hexdigest()


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with null for each number that JSON cannot write; `not_finite` says where, and what it was."""
    found: dict[str, str] = {}

    def cleaned(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(one, f"{name}.{key}" if name else key) for key, one in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            found[name] = str(value)
            return None
        return value

    return cleaned(metrics, "") | ({"not_finite": found} if found else {})


def _device(loaded: Loaded) -> str:
    return torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu"
