"""Answers of an evaluation judged by a language model: yes or no with a score, or a score alone, of 0 to 5.

The form of Video-ChatGPT's evaluation (arXiv 2306.05424), with prompts of our own in configs/judges/*.yaml.
docs/judge.md says what a judge is not.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from mmchat.config import parse, read_values
from mmchat.errors import SampleError
from mmchat.inference.judge_endpoint import Judge, Reply, ReplyCache, json_sha256
from mmchat.inference.judge_verdict import MAX_SCORE, Verdict, parse_verdict
from mmchat.inference.predictions import PREDICTIONS, write_file
from mmchat.inference.progress import Progress
from mmchat.schema import Schema

CACHE = Path("~/.cache/mmchat/verdicts")
VERDICTS, RESULT = "verdicts.jsonl", "judge.json"
MAX_KEYS = 20  # listed for each reason
MAX_FAILURES = 20  # questions in a row that get no reply, after which the run stops

_MEDIA = re.compile(r"<(?:image|video|audio)>")
_OWN = {"model", "messages", "stream", "n"}


class JudgeProtocol(Schema):
    """How answers are judged; its hash stands in the result.

    shows: `answer`, each alone with its question and reference; `pair`, the answers to the two questions of a record,
        which ask the same in other words.
    verdict: `yes_no`, {"verdict": "yes" | "no", "score": 0 to 5}; `score`, {"score": 0 to 5}.
    instructions: the system message. What is judged follows as a JSON object in the user's message.
    request: further fields of the request, sent as they are: temperature, max_tokens and what else the judge wants.
    """

    shows: Literal["answer", "pair"]
    verdict: Literal["yes_no", "score"]
    instructions: str
    request: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if own := _OWN & self.request.keys():
            raise ValueError(f"request must not name {', '.join(sorted(own))}, which the command sets")
        return self

    @property
    def sha256(self) -> str:
        return json_sha256(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Item:
    """What gets one verdict.

    Attributes:
        shown: the JSON object that the judge sees.
        problem: "reason: detail" where there is nothing to judge; counts as no and 0.
    """

    keys: tuple[str, ...]
    shown: Mapping[str, str]
    problem: str = ""


@dataclass(frozen=True)
class Judged:
    """An item with its verdict, or with the "reason: detail" of why it has none.

    Attributes:
        request_sha256: what its reply is cached by; None where nothing was asked.
    """

    item: Item
    request_sha256: str | None
    reply: Reply | None
    verdict: Verdict | None
    problem: str

    def line(self) -> dict[str, Any]:
        """What verdicts.jsonl says of it."""
        return {
            "keys": self.item.keys,
            **self.item.shown,
            "score": self.verdict.score if self.verdict else 0,
            "is_right": self.verdict.is_right if self.verdict else None,
            "problem": self.problem,
            "reply": self.reply.text if self.reply else None,
            "answered_by": self.reply.model if self.reply else None,
            "request_sha256": self.request_sha256,
        }


def load_judge_protocol(path: Path) -> JudgeProtocol:
    """Raises ConfigError."""
    return parse(JudgeProtocol, read_values(path), str(path))


def default_out(folder: Path, protocol: Path, model: str) -> Path:
    """Where the verdicts of an evaluation's folder go, in a folder of their own by protocol and judge."""
    return folder / f"{protocol.stem}-{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}"


def judge_answers(
    folder: Path,
    judge: Judge,
    protocol: JudgeProtocol,
    out: Path,
    cache: Path = CACHE,
    limit: int | None = None,
    parallel: int = 4,
) -> dict[str, Any]:
    """Has the answers of a finished evaluation judged, and returns what judge.json says.

    Replies are kept in `cache` as they come, so that the same call continues what an earlier one left.

    Args:
        folder: what `infer.py evaluate` wrote.
        out: for verdicts.jsonl and judge.json.
        limit: the first so many answers, or pairs of them, only.
    Raises:
        ValueError: the evaluation is not finished, `out` has another judge's verdicts, or the endpoint is of no use.
    """
    started = time.perf_counter()
    evaluation, lines = read_predictions(folder)
    items = list(islice(_pairs(lines) if protocol.shows == "pair" else map(_alone, lines), limit))
    if not items:
        raise ValueError(f"{folder} has no answers to judge")
    _check_out(out, judge.model, protocol)
    kept = ReplyCache(cache.expanduser(), judge.model)
    requests = [_request(item, protocol) for item in items]
    wanted = [request for request, item in zip(requests, items, strict=True) if not item.problem]
    replies, cost = _replies(judge, kept, wanted, parallel)
    judged = [_judged(item, kept.name(r), replies, protocol) for item, r in zip(items, requests, strict=True)]
    metrics = _result(judged, protocol) | {
        "model": judge.model,
        "models_that_answered": dict(Counter(r.model for r in replies.values() if isinstance(r, Reply)).most_common()),
        "endpoint": judge.place,
        "protocol_sha256": protocol.sha256,
        "protocol": protocol.model_dump(mode="json"),
        "limit": limit,
        "mmchat_version": version("mmchat"),
        "evaluation": evaluation,
        "cost": cost | {"all_verdicts": _tokens(replies.values())},
        "wall_time_s": round(time.perf_counter() - started, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / VERDICTS, "".join(json.dumps(one.line(), ensure_ascii=False) + "\n" for one in judged))
    write_file(out / RESULT, json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    return metrics


def summary(metrics: Mapping[str, Any], out: Path) -> str:
    """What a person wants to know at once."""
    count, cost = metrics["num_questions"], metrics["cost"]
    lines = [f"{metrics['num_judged']:,} of {count:,} judged by {metrics['model']}; the scores are over all {count:,}"]
    lines += [f"  {name:<28}{value:>10.4f}" for name, value in metrics["scores"].items()]
    for reason, one in metrics["not_judged"].items():
        lines.append(f"  not judged, counted as 0: {one['count']:,} x {reason}")
        lines.append(f"    such as {one['keys'][0]}, {one['first']:.300}")
    if others := [name for name in metrics["models_that_answered"] if name != metrics["model"]]:
        lines.append(f"  the endpoint says that {', '.join(map(repr, others))} answered; --model pins one of them")
    tokens = cost["this_run"]
    lines.append(
        f"  {cost['num_requests']:,} requests, {tokens['prompt_tokens']:,} tokens read and "
        f"{tokens['completion_tokens']:,} written as the endpoint counts; {cost['num_cached']:,} verdicts known before"
    )
    return "\n".join([*lines, f"{out / RESULT} and {VERDICTS} beside it have the rest"])


# ---- what is judged -------------------------------------------------------------------------------------------------


def read_predictions(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What an evaluation was, for the result, and its lines. Raises ValueError where it is not finished or damaged."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        data = (folder / PREDICTIONS).read_bytes()
        lines = [json.loads(line) for line in data.splitlines()]
        wanted = metrics["num_questions"]
        named = {name: metrics[name] for name in ("task", "protocol_sha256", "questions_sha256", "checkpoint_sha256")}
        for line in lines:
            if not all(isinstance(line[name], str) for name in ("key", "prompt", "answer", "reference", "error")):
                raise TypeError(f"a text is none in {line!r:.200}")
            _ = line["record"]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is not there: {folder} is no finished evaluation") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is no readable evaluation ({error!r:.200}); run infer.py evaluate again") from error
    if len(lines) != wanted:
        raise ValueError(f"{folder} has {len(lines):,} answers to {wanted:,} questions; run infer.py evaluate again")
    return {"folder": str(folder), "predictions_sha256": hashlib.sha256(data).hexdigest(), **named}, lines


def _alone(line: dict[str, Any]) -> Item:
    shown = {"question": _words(line["prompt"]), "reference": line["reference"], "answer": line["answer"]}
    return Item((line["key"],), shown, _problem(line))


def _pairs(lines: Iterable[dict[str, Any]]) -> Iterator[Item]:
    """An item a record, whose two questions are its own and the one under "more"."""
    for _, group in groupby(lines, key=lambda line: line["record"]):
        found = list(group)
        keys = tuple(line["key"] for line in found)
        problem = next((problem for line in found if (problem := _problem(line))), "")
        if not problem and len(found) != 2:
            problem = f"no pair: wanted two questions of one record, found {len(found)}"
        if not problem and found[0]["reference"] != found[1]["reference"]:
            problem = f"unlike references: {found[0]['reference']!r:.80} and {found[1]['reference']!r:.80}"
        shown: dict[str, str] = {}
        if not problem:
            for number, line in enumerate(found, 1):
                shown |= {f"question_{number}": _words(line["prompt"]), f"answer_{number}": line["answer"]}
            shown["reference"] = found[0]["reference"]
        yield Item(keys, shown, problem)


def _problem(line: dict[str, Any]) -> str:
    """Why there is nothing to judge; "" where there is."""
    if line["error"]:
        return f"not answered: {line['error']}"
    if not line["answer"].strip():
        return "empty answer: the model said nothing, or ranked candidates"
    return "" if line["reference"].strip() else "no reference: there is nothing to compare with"


def _words(prompt: str) -> str:
    """The question without the marks where media stands in it."""
    return " ".join(_MEDIA.sub(" ", prompt).split())


# ---- asking ---------------------------------------------------------------------------------------------------------


def _request(item: Item, protocol: JudgeProtocol) -> dict[str, Any]:
    """The fields of the request but for the model. As JSON, no text of an answer can end its field."""
    said = [("system", protocol.instructions), ("user", json.dumps(item.shown, ensure_ascii=False, indent=1))]
    return {"messages": [{"role": role, "content": text} for role, text in said], **protocol.request}


def _replies(
    judge: Judge, cache: ReplyCache, requests: Sequence[dict[str, Any]], parallel: int
) -> tuple[dict[str, Reply | str], dict[str, Any]]:
    """By name, the reply to each request or why there is none; and what it cost. Equal requests are sent once."""
    found: dict[str, Reply | str] = {}
    wanted: dict[str, dict[str, Any]] = {}
    for request in requests:
        name = cache.name(request)
        if name in found or name in wanted:
            continue
        if (reply := cache.find(name)) is not None:
            found[name] = reply
        else:
            wanted[name] = request
    num_cached, sent_before = len(found), judge.num_requests
    new = _ask_all(judge, cache, wanted, parallel) if wanted else {}
    cost = {
        "num_requests": judge.num_requests - sent_before,
        "num_asked": len(wanted),
        "num_cached": num_cached,
        "this_run": _tokens(new.values()),
    }
    return found | new, cost


def _ask_all(
    judge: Judge, cache: ReplyCache, wanted: Mapping[str, dict[str, Any]], parallel: int
) -> dict[str, Reply | str]:
    """Asks in so many threads. Whatever stops it, a reply that came is kept first.

    Raises ValueError, of the endpoint, or where one question after the other gets no reply.
    """

    def ask(name: str) -> Reply:
        reply = judge.ask(wanted[name])
        cache.keep(name, reply)
        return reply

    found: dict[str, Reply | str] = {}
    progress, num_failed, in_a_row = Progress(len(wanted), "{done} verdicts, {num:,} failed"), 0, 0
    pool = ThreadPoolExecutor(parallel)
    try:
        futures: dict[Future[Reply], str] = {pool.submit(ask, name): name for name in wanted}
        for future in as_completed(futures):
            try:
                found[futures[future]], in_a_row = future.result(), 0
            except SampleError as error:
                found[futures[future]], in_a_row, num_failed = str(error), in_a_row + 1, num_failed + 1
                if in_a_row == MAX_FAILURES:
                    raise ValueError(
                        f"{in_a_row} questions in a row got no reply from {judge.place}, the last for this: {error}. "
                        "What was judged before is kept; the same command continues"
                    ) from error
            progress.say(num_failed, len(found))
        progress.end(num_failed)
    except BaseException:  # Ctrl-C too
        judge.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)  # what is under way ends, and is kept
    return found


# ---- reading and scoring --------------------------------------------------------------------------------------------


def scores(verdicts: Sequence[Verdict | None], protocol: JudgeProtocol) -> dict[str, float]:
    """Means over all, where None is no verdict: it counts as no and 0."""
    total = len(verdicts)
    found = {"mean_score": sum(verdict.score for verdict in verdicts if verdict) / total}
    if protocol.verdict == "yes_no":
        found = {"accuracy": sum(bool(verdict and verdict.is_right) for verdict in verdicts) / total} | found
    return found


def _judged(item: Item, name: str, replies: Mapping[str, Reply | str], protocol: JudgeProtocol) -> Judged:
    if item.problem:
        return Judged(item, None, None, None, item.problem)
    reply = replies[name]
    if isinstance(reply, str):
        return Judged(item, name, None, None, reply)
    try:
        return Judged(item, name, reply, parse_verdict(reply.text, protocol.verdict), "")
    except ValueError as error:
        reason = "cut verdict" if reply.finish_reason == "length" else "unreadable verdict"
        return Judged(item, name, reply, None, f"{reason}: {error}, in {reply.text!r:.120}")


def _result(judged: Sequence[Judged], protocol: JudgeProtocol) -> dict[str, Any]:
    """Scores and counts over all items."""
    verdicts = [one.verdict for one in judged]
    given = [verdict for verdict in verdicts if verdict is not None]
    return {
        "scores": scores(verdicts, protocol),
        "num_questions": len(judged),
        "num_judged": len(given),
        "num_not_strict": sum(not verdict.is_strict for verdict in given),
        "num_by_score": {str(n): sum(verdict.score == n for verdict in given) for n in range(MAX_SCORE + 1)},
        "not_judged": _by_reason([(one.item.keys[0], one.problem) for one in judged if one.problem]),
    }


# ---- the files ------------------------------------------------------------------------------------------------------


def _check_out(out: Path, model: str, protocol: JudgeProtocol) -> None:
    """Raises ValueError where the folder has the verdicts of another judge or protocol."""
    path = out / RESULT
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        same = (there["model"], there["protocol_sha256"]) == (model, protocol.sha256)
    except (ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{out} has the verdicts of another judge or protocol; use another --out, or remove it")


def _tokens(replies: Iterable[Reply | str]) -> dict[str, int]:
    """As the endpoint counts them; `num_without_count` replies came without a count."""
    given = [reply for reply in replies if isinstance(reply, Reply)]
    return {
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in given),
        "completion_tokens": sum(reply.completion_tokens or 0 for reply in given),
        "num_without_count": sum(None in (reply.prompt_tokens, reply.completion_tokens) for reply in given),
    }


def _by_reason(found: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Reason to how many it holds for, the first of their keys and the first one whole; commonest first."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for key, text in found:
        reasons.setdefault(text.partition(":")[0], []).append((key, text))
    ordered = sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return {
        reason: {"count": len(own), "keys": [key for key, _ in own[:MAX_KEYS]], "first": own[0][1]}
        for reason, own in ordered
    }
