"""infer.py judge, against a real server on this machine: scores, cache, faults, and what is never lost or shown."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import infer
from mmchat.conversation import Conversation, MediaHeader, MediaRef, Record, Turn
from mmchat.errors import SampleError
from mmchat.inference import judge_endpoint
from mmchat.inference.evaluate import evaluate
from mmchat.inference.judge import JudgeProtocol, default_out, judge_answers, load_judge_protocol, summary
from mmchat.inference.judge_endpoint import Endpoint
from mmchat.inference.predictions import Case
from mmchat.tasks.question import Answer, Question
from tests import runs, tiny
from tests.evaluations import SHORT, awake, say, shards
from tests.judge_server import JudgeServer, judging

QA = load_judge_protocol(tiny.ROOT / "configs/judges/qa.yaml")
PAIR = load_judge_protocol(tiny.ROOT / "configs/judges/consistency.yaml")
KEY = "sk-test-4711-do-not-show"


def mark(shown: dict[str, str]) -> str:
    """A judge that compares letter by letter: yes and 5, or no and the number of letters in common at the start."""
    same = shown["answer"] == shown["reference"]
    pairs = zip(shown["answer"], shown["reference"], strict=False)
    score = 5 if same else min(4, next((i for i, (a, b) in enumerate(pairs) if a != b), 4))
    return json.dumps({"verdict": "yes" if same else "no", "score": score})


def evaluation(folder: Path, answers: list[tuple[str, str]], error: str = "") -> Path:
    """A finished evaluation of these (reference, answer), lines as an evaluation writes them; the first has `error`."""
    folder.mkdir(exist_ok=True)
    clip = MediaRef("video", None)
    lines = []
    for i, (reference, answer) in enumerate(answers):
        asked = Conversation((Turn("user", (clip, f"What is number {i}?")),))
        question = Question(Record(f"k{i}", {}, (clip,)), asked, (reference,))
        lines.append(Case(i, f"k{i}", question, Answer(answer, error=error if i == 0 else "")).line())
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"num_questions": len(lines), "task": "vqa", "protocol_sha256": "p", "questions_sha256": "q"}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"checkpoint_sha256": "c"}))
    return folder


FOUR = [("red", "red"), ("blue", "blot"), ("a dog", "cat"), ("run", "run")]  # scores 5, 2, 0, 5


def judged(
    server: JudgeServer, folder: Path, protocol: JudgeProtocol = QA, parallel: int = 4, limit: int | None = None,
    attempts: int = 3, timeout_s: float = 20.0, model: str = "judge-2026-01-01",
) -> dict[str, Any]:  # fmt: skip
    """Into FOLDER/out, with the cache beside FOLDER."""
    endpoint = Endpoint(server.url, model, None, timeout_s, attempts, first_wait_s=0.01)
    return judge_answers(folder, endpoint, protocol, folder / "out", folder.parent / "cache", limit, parallel)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/verdicts.jsonl").read_text().splitlines()]


def command(*arguments: Any) -> list[str]:
    return ["judge", *map(str, arguments), "--model", "judge-1", "--protocol", "configs/judges/qa.yaml"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["infer.py", *command(*arguments)])
    return infer.main()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_means_over_all_and_the_judge_sees_what_was_asked(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        metrics = judged(server, folder)
        assert metrics["scores"] == {"accuracy": 0.5, "mean_score": 3.0}
        assert metrics["num_judged"] == metrics["num_questions"] == 4 and metrics["not_judged"] == {}
        assert metrics["num_by_score"] == {"0": 1, "1": 0, "2": 1, "3": 0, "4": 0, "5": 2}
        wanted = [{"question": f"What is number {i}?", "reference": r, "answer": a} for i, (r, a) in enumerate(FOUR)]
        assert sorted(server.shown(), key=str) == sorted(wanted, key=str)
        body = server.requests[0][1]
        assert body["model"] == "judge-2026-01-01" and body["temperature"] == 0 and body["max_tokens"] == 100
        assert body["messages"][0] == {"role": "system", "content": QA.instructions}
        assert "Authorization" not in server.requests[0][0]
    assert metrics["cost"]["num_requests"] == 4
    assert metrics["cost"]["this_run"] == {"prompt_tokens": 400, "completion_tokens": 28, "num_without_count": 0}
    assert metrics["protocol_sha256"] == QA.sha256 and metrics["models_that_answered"] == {"judge-2026-01-01": 4}
    found = rows(folder)
    assert [row["keys"] for row in found] == [["k0"], ["k1"], ["k2"], ["k3"]]
    assert [row["score"] for row in found] == [5, 2, 0, 5] and [row["is_right"] for row in found][:2] == [True, False]
    assert json.loads((folder / "out/judge.json").read_text()) == metrics


def test_what_is_not_answered_is_not_asked_and_stays_in_the_denominator(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", [*FOUR, ("red", "  "), ("", "red")], error="undecodable video: cut")
    with judging(mark) as server:
        metrics = judged(server, folder)
        assert len(server.requests) == 3
    assert metrics["scores"] == {"accuracy": 1 / 6, "mean_score": 7 / 6}
    reasons = {reason: one["keys"] for reason, one in metrics["not_judged"].items()}
    assert reasons == {"not answered": ["k0"], "empty answer": ["k4"], "no reference": ["k5"]}
    assert rows(folder)[0]["problem"] == "not answered: undecodable video: cut"


def test_an_evaluation_of_this_project_is_judged_in_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    """Two wordings of one question, the second under `more`, asked alone; the judge sees both answers at once."""
    picture = MediaRef("image", tiny.picture("red", random.Random(0)), MediaHeader(48, 32))

    def record(key: str, *questions: str, answers: tuple[str, ...] = ("red", "red")) -> Record:
        first, *more = [{"question": q, "answers": [a]} for q, a in zip(questions, answers, strict=False)]
        return Record(key, first | ({"more": more} if more else {}), (picture,))

    records = [record("same", "Which colour", "What colour"), record("other", "Which colour", "What colour")]
    records += [record("one", "Which colour"), record("unlike", "Which colour", "Where", answers=("red", "here"))]
    names = shards(tmp_path / "shards", records)
    loaded = awake()
    evaluate(loaded, "vqa", names, tmp_path / "e", SHORT)
    said = {"same": "red", "same#1": "red", "other": "red", "other#1": "blue", "unlike": "red", "unlike#1": "here"}
    say(tmp_path / "e", said | {"one": "red"})
    evaluate(loaded, "vqa", names, tmp_path / "e", SHORT)
    with judging(lambda shown: f'{{"score": {5 if shown["answer_1"] == shown["answer_2"] else 1}}}') as server:
        metrics = judged(server, tmp_path / "e", PAIR)
        shown = sorted(server.shown(), key=lambda one: one["answer_2"])[0]
    assert shown["answer_1"] == "red" and shown["answer_2"] == "blue" and shown["reference"] == "red"
    assert shown["question_1"].startswith("Which colour?") and shown["question_2"].startswith("What colour?")
    assert metrics["scores"] == {"mean_score": 6 / 4} and metrics["num_questions"] == 4
    reasons = {reason: one["keys"] for reason, one in metrics["not_judged"].items()}
    assert reasons == {"no pair": ["one"], "unlike references": ["unlike"]}
    assert metrics["evaluation"]["task"] == "vqa" and len(metrics["evaluation"]["checkpoint_sha256"]) == 64


# ---- cache and resumption -------------------------------------------------------------------------------------------


def test_a_known_verdict_is_not_asked_for_again(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        first = judged(server, folder)
        again = judged(server, folder)
        assert len(server.requests) == 4
        assert again["scores"] == first["scores"] and again["cost"]["num_cached"] == 4
        assert again["cost"]["this_run"]["prompt_tokens"] == 0
        assert again["cost"]["all_verdicts"]["prompt_tokens"] == 400
        # Another answer, another judge or another prompt is another verdict.
        judged(server, evaluation(tmp_path / "e", [("red", "rad"), *FOUR[1:]]))
        assert len(server.requests) == 5
        other = evaluation(tmp_path / "f", FOUR)
        judged(server, other, model="judge-2")
        assert len(server.requests) == 9
        judged(server, evaluation(tmp_path / "g", FOUR), QA.model_copy(update={"instructions": "Mark it."}))
        assert len(server.requests) == 13
        for path in list((tmp_path / "cache").rglob("*.json"))[:13]:
            path.write_text('{"text": "cut')
        judged(server, other, model="judge-2")
        assert len(server.requests) == 17  # a damaged one is none


def test_equal_questions_are_asked_once_and_both_counted(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    (folder / "predictions.jsonl").write_text("\n".join([*lines[:3], lines[0]]) + "\n")
    with judging(mark) as server:
        assert judged(server, folder)["scores"]["mean_score"] == (5 + 2 + 0 + 5) / 4
        assert len(server.requests) == 3


def test_a_killed_run_continues_and_nothing_is_lost(tmp_path: Path) -> None:
    answers = [("red", "red" if i % 3 else "rod") for i in range(30)]
    folder = evaluation(tmp_path / "e", answers)
    with judging(mark) as server:
        server.wait_s = 0.2
        options = ["--out", folder / "out", "--cache", tmp_path / "cache", "--parallel", 2]
        words = [sys.executable, "infer.py", *command(folder, "--endpoint", server.url, *options)]
        words[words.index("judge-1")] = "judge-2026-01-01"
        process = subprocess.Popen(words, cwd=tiny.ROOT, env={**runs.ENVIRONMENT, "no_proxy": "*"})
        deadline = time.monotonic() + 120
        while server.num_said < 6 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -9, "it was to be killed amid its work"
        time.sleep(0.5)  # the server ends what it was asked
        num_sent = len(server.requests)
        assert 6 <= num_sent < 30 and not (folder / "out/judge.json").exists()
        assert server.most_at_once <= 2
        server.wait_s = 0
        metrics = judged(server, folder)
        assert metrics["cost"]["num_cached"] + metrics["cost"]["num_asked"] == 30
        assert metrics["cost"]["num_cached"] >= num_sent - 2, "no reply that came is asked for again"
        assert len(server.requests) == num_sent + metrics["cost"]["num_asked"]
    assert metrics["num_judged"] == 30 and metrics["scores"]["accuracy"] == 20 / 30


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_busy_and_broken_servers_are_asked_again(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        server.faults = [(429, {"Retry-After": "0.3"}, "slow down"), (503, {}, "")]
        server.faults += [(200, {}, "<html>a proxy</html>")]
        started = time.monotonic()
        metrics = judged(server, folder, parallel=1, attempts=4)
        assert time.monotonic() - started > 0.3, "it waits as long as it is told to"
        assert len(server.requests) == metrics["cost"]["num_requests"] == 7
    assert metrics["scores"] == {"accuracy": 0.5, "mean_score": 3.0}


def test_a_server_that_stays_out_of_order_is_counted_and_asked_again_later(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        server.always = 500
        metrics = judged(server, folder, attempts=3)
        assert len(server.requests) == 12
        assert metrics["scores"] == {"accuracy": 0.0, "mean_score": 0.0} and metrics["num_judged"] == 0
        assert metrics["not_judged"]["http 500"]["count"] == 4
        assert "4 x http 500\n    such as k0, http 500: out of order" in summary(metrics, folder)
        server.always = 0
        assert judged(server, folder)["scores"]["accuracy"] == 0.5


def test_a_run_stops_where_nothing_comes_back_any_more(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", [("red", f"red {i}") for i in range(100)])
    with judging(mark) as server:
        server.always = 500
        with pytest.raises(ValueError, match=r"20 questions in a row got no reply from .*http 500: out of order"):
            judged(server, folder, attempts=1)
        assert len(server.requests) < 40
        assert not (folder / "out").exists()


def test_one_question_that_is_refused_costs_one_question(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        server.faults = [(400, {}, "x" * 5000)]
        metrics = judged(server, folder, parallel=1)
        assert len(server.requests) == 4, "what was refused is not asked again"
    assert metrics["not_judged"]["http 400"]["keys"] == ["k0"] and metrics["scores"]["accuracy"] == 0.25
    assert len(rows(folder)[0]["problem"]) <= len("http 400: ") + 200


@pytest.mark.parametrize("drip", [False, True])
def test_a_slow_server_is_a_timeout(tmp_path: Path, drip: bool) -> None:
    folder = evaluation(tmp_path / "e", FOUR[:2])
    with judging(mark) as server:
        server.wait_s, server.drip = (0.1, True) if drip else (3.0, False)
        started = time.monotonic()
        metrics = judged(server, folder, attempts=2, timeout_s=0.5)
        assert time.monotonic() - started < 3
        assert len(server.requests) == 4
    first = "timeout: no whole reply within 0.5 s"
    assert metrics["not_judged"] == {"timeout": {"count": 2, "keys": ["k0", "k1"], "first": first}}
    assert metrics["num_questions"] == 2


def test_nobody_there(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        pass  # its port is free again
    assert judged(server, folder, attempts=2)["not_judged"]["broken connection"]["count"] == 4


def test_replies_that_are_no_verdict_are_counted_as_wrong(tmp_path: Path) -> None:
    replies = {
        "k0": '{"verdict": "yes", "score": 4.8}',
        "k1": "I would say yes.",
        "k2": 'Here it is:\n```json\n{"verdict": "Yes", "score": "4", "reason": "same"}\n```',
        "k3": '{"verdict": "yes", "score": 5}',
    }

    def says(shown: dict[str, str]) -> str:
        return replies[f"k{shown['question'].removesuffix('?')[-1]}"]

    folder = evaluation(tmp_path / "e", FOUR)
    with judging(says) as server:
        metrics = judged(server, folder)
        assert metrics["scores"] == {"accuracy": 0.5, "mean_score": 9 / 4}
        assert metrics["not_judged"]["unreadable verdict"]["keys"] == ["k0", "k1"] and len(metrics["not_judged"]) == 1
        assert (
            "wanted a whole score of 0 to 5, found 4.8, in '{" in metrics["not_judged"]["unreadable verdict"]["first"]
        )
        assert metrics["num_not_strict"] == 1 and rows(folder)[1]["reply"] == "I would say yes."
        # It is the judge's reply, and is not asked for until it suits.
        judged(server, folder)
        assert len(server.requests) == 4


def test_refusals_cut_replies_and_other_models_are_named(tmp_path: Path) -> None:
    def says(shown: dict[str, str]) -> str | dict[str, Any]:
        content, reason = {"red": (None, "content_filter"), "blot": ('{"verd', "length")}.get(
            shown["answer"], ('{"verdict": "yes", "score": 5}', "stop")
        )
        return {"model": "judge-x", "choices": [{"message": {"content": content}, "finish_reason": reason}]}

    folder = evaluation(tmp_path / "e", FOUR)
    with judging(says) as server:
        metrics = judged(server, folder)
    assert {name: one["keys"] for name, one in metrics["not_judged"].items()} == {
        "unreadable verdict": ["k0"], "cut verdict": ["k1"]
    }  # fmt: skip
    assert metrics["models_that_answered"] == {"judge-x": 4} and "'judge-x' answered" in summary(metrics, folder)
    assert metrics["cost"]["this_run"]["num_without_count"] == 4


# ---- keys and URLs --------------------------------------------------------------------------------------------------


def test_a_wrong_key_stops_at_once_and_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = evaluation(tmp_path / "e", [("red", f"red {i}") for i in range(50)])
    (tmp_path / "key").write_text(KEY + "\n")
    with judging(mark) as server:
        options = ["--endpoint", server.url, "--api-key-file", tmp_path / "key", "--cache", tmp_path / "cache"]
        server.key = "Bearer another"
        assert run(monkeypatch, folder, *options) == 1
        said = capsys.readouterr()
        assert "401: the API key is missing or wrong" in said.err and "Incorrect API key: Bearer ***" in said.err
        assert KEY not in said.err + said.out and len(said.err) < 500
        assert len(server.requests) <= 8, "four at a time, and none after the first refusal was seen"
        server.key = f"Bearer {KEY}"
        assert run(monkeypatch, folder, *options, "--limit", 3) == 0
        said = capsys.readouterr()
    out = default_out(folder, Path("qa.yaml"), "judge-1")
    assert out == folder / "qa-judge-1" and json.loads((out / "judge.json").read_text())["num_questions"] == 3
    assert "3 of 3 judged by judge-1" in said.out and "3 verdicts, 0 failed" in said.err
    written = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert len(written) >= 7 and not any(KEY in text for text in written)


def test_a_key_that_a_reply_repeats_is_not_kept(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(lambda _: f"your key is {KEY}") as server:
        endpoint = Endpoint(server.url, "m", KEY)
        judge_answers(folder, endpoint, QA, folder / "out", tmp_path / "cache")
        assert server.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    assert rows(folder)[0]["reply"] == "your key is ***"
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json*"))


def test_a_key_is_hidden_also_where_json_or_a_redirect_has_it(tmp_path: Path) -> None:
    """A slash may be escaped, and a sign may be a number: then the key is only there when the JSON is read."""
    key = "sk-test/4711+x"
    escaped = json.dumps(key).replace("/", "\\/").replace("+", "\\u002b")
    body = f'{{"model": {escaped}, "choices": [{{"message": {{"content": {escaped}}}}}]}}'
    with judging(mark) as server:
        endpoint = Endpoint(server.url, "m", key, attempts=1)
        moved = {"Location": f"https://login/?token={key}"}
        broken = body.replace("\\u002b", "+").replace("choices", "chosen")
        server.faults = [(200, {}, body), (302, moved, ""), (200, {}, broken)]
        reply = endpoint.ask({"messages": []})
        assert (reply.text, reply.model) == ("***", "***")
        for fault in (ValueError, SampleError):
            with pytest.raises(fault) as error:
                endpoint.ask({"messages": []})
            assert "***" in str(error.value) and "4711" not in str(error.value)


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server, judging(mark) as other:
        for status in (302, 307):
            server.faults = [(status, {"Location": f"{other.url}/chat/completions"}, "")] * 9
            with pytest.raises(ValueError, match="is not followed"):
                judged(server, folder)
        assert other.requests == []


@pytest.mark.parametrize("text", ["", "two words", "sk-1\nsk-2", "schlüssel", "\x00"])
def test_a_file_that_is_no_key_is_refused_without_its_content(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="wanted an API key") as error:
        judge_endpoint.read_key(tmp_path / "key")
    assert not text.strip() or text.strip() not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/v1", "localhost:8000/v1", "https://", "https://me:pass@host/v1",
     "https://host/v1?key=pass", "https://host/v 1", "https://host:port/v1"],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ValueError) as error:
        Endpoint(url, "m")
    assert "pass@" not in str(error.value) and "key=pass" not in str(error.value)


def test_a_wrong_path_stops_at_once(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        server.url = server.url.removesuffix("/v1")
        with pytest.raises(ValueError, match="404: is the URL right"):
            judged(server, folder, parallel=1)
        assert len(server.requests) <= 2, "the second one was sent before the first refusal was seen"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_evaluation_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        lines = (folder / "predictions.jsonl").read_text()
        for text in (lines[: lines.rindex("\n", 0, -1) + 1], lines[:-30], "[]\n" * 4):
            (folder / "predictions.jsonl").write_text(text)
            with pytest.raises(ValueError, match=r"run infer\.py evaluate again"):
                judged(server, folder)
        (folder / "metrics.json").unlink()
        with pytest.raises(ValueError, match="no finished evaluation"):
            judged(server, folder)
        assert server.requests == []


def test_verdicts_of_another_judge_are_not_overwritten(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "e", FOUR)
    with judging(mark) as server:
        judged(server, folder)
        with pytest.raises(ValueError, match="another judge or protocol"):
            judged(server, folder, model="judge-2")
        assert len(server.requests) == 4
