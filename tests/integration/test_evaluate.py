"""infer.py evaluate: what it asks, what it keeps, what it continues and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import infer
from mmchat.config import ConfigError, SourceConfig
from mmchat.conversation import Record
from mmchat.data.mixture import Mixture
from mmchat.inference.controls import ControlledRecords, Controls
from mmchat.inference.evaluate import _asked, evaluate, load_protocol
from mmchat.inference.load import Loaded, load
from mmchat.inference.progress import SAY_EVERY_S, Progress
from mmchat.tasks.question import Protocol
from tests import runs, tiny
from tests.evaluations import SHARD, SHORT, asked, awake, lines, metrics_of, shards


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return awake()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_files_say_what_was_asked_and_how(whole: Path, loaded: Loaded) -> None:
    found = lines(whole)
    assert [line["key"] for line in found] == [f"{i:06d}" for i in range(20)]
    assert found[0]["prompt"] == "<image>What colour?" and found[0]["reference"] in tiny.COLOURS
    assert all(line["answer"] and not line["error"] for line in found)
    metrics = metrics_of(whole)
    assert metrics["num_records"] == metrics["num_questions"] == 20 and metrics["not_answered"] == {}
    assert set(metrics["scores"]) >= {"exact_match", "token_f1"} and metrics["protocol"]["max_new_tokens"] == 4
    assert metrics["controls"] == Controls().model_dump(mode="json") and metrics["device"]
    mixture = Mixture([SourceConfig(name="evaluate", task="instruct", shards=SHARD)])
    assert metrics["shards_sha256"] == mixture.fingerprint()
    assert (whole / "index.html").read_text().startswith("<!doctype html>")
    assert not (whole / "submission.json").exists()


def test_an_answer_does_not_depend_on_its_batch(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    evaluate(loaded, "instruct", SHARD, tmp_path, SHORT, batch_size=7)
    assert lines(tmp_path) == lines(whole)
    # A finished run asks nothing again, whatever the batch.
    metrics = evaluate(loaded, "instruct", SHARD, tmp_path, SHORT, batch_size=3)
    assert metrics["timing"]["num_found_answered"] == 20 and lines(tmp_path) == lines(whole)


def test_the_hash_is_of_protocol_not_of_model_or_shards(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    one = evaluate(loaded, "instruct", ".cache/tiny/shards/000001.tar", tmp_path / "a", SHORT, limit=2)
    other = evaluate(loaded, "instruct", SHARD, tmp_path / "b", Protocol(max_new_tokens=4, iou=0.7), limit=2)
    assert one["protocol_sha256"] == metrics_of(whole)["protocol_sha256"] != other["protocol_sha256"]
    assert one["shards_sha256"] != other["shards_sha256"] and one["questions_sha256"] != other["questions_sha256"]


def test_a_seed_says_nothing_where_nothing_is_drawn(loaded: Loaded, tmp_path: Path) -> None:
    def hashed(name: str, **fields: Any) -> str:
        protocol = Protocol(max_new_tokens=4, **fields)
        metrics = evaluate(loaded, "instruct", SHARD, tmp_path / name, protocol, limit=1)
        assert metrics["protocol"]["seed"] == protocol.seed
        return metrics["protocol_sha256"]

    assert hashed("a") == hashed("b", seed=1) != hashed("c", phrasing="drawn")
    assert hashed("d", phrasing="drawn", seed=1) != hashed("e", phrasing="drawn")


def test_limit(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    metrics = evaluate(loaded, "instruct", SHARD, tmp_path, SHORT, limit=3, batch_size=4)
    assert metrics["num_records"] == 3 and lines(tmp_path) == lines(whole)[:3]


# ---- continuing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["between lines", "in a line", "everything there", "nothing there"])
def test_a_cut_run_continues_to_the_same_bytes(whole: Path, loaded: Loaded, tmp_path: Path, cut: str) -> None:
    text = (whole / "predictions.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    kept = {"between lines": ends[9], "in a line": ends[9] + 17, "everything there": len(text), "nothing there": 0}[cut]
    shutil.copy(whole / "run.json", tmp_path)
    (tmp_path / "predictions.jsonl").write_bytes(text[:kept])
    metrics = evaluate(loaded, "instruct", SHARD, tmp_path, SHORT, batch_size=4)
    # Half batches are asked again as whole ones.
    num_kept = {"between lines": 8, "in a line": 8, "everything there": 20, "nothing there": 0}[cut]
    assert metrics["timing"]["num_found_answered"] == num_kept
    for name in ("run.json", "predictions.jsonl", "index.html"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics_of(tmp_path) == metrics_of(whole)


def test_a_killed_process_continues(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "infer.py", "evaluate", "configs/tiny.yaml", "--task", "instruct", "--shards", SHARD,
               "--set", "max_new_tokens=4", "--batch-size", "1", "--out", str(tmp_path / "killed")]  # fmt: skip
    process = subprocess.Popen(command, cwd=tiny.ROOT, env=runs.ENVIRONMENT, stderr=subprocess.DEVNULL)
    predictions = tmp_path / "killed/predictions.jsonl"
    runs.wait_for(lambda: predictions.exists() and predictions.read_bytes().count(b"\n") >= 2, 120)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/metrics.json").exists()
    done = subprocess.run(command, cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 questions of 20 records" in done.stdout and "index.html" in done.stdout
    assert "\r" not in done.stderr  # no terminal: whole lines
    assert json.loads((tmp_path / "killed/metrics.json").read_text())["timing"]["num_found_answered"] >= 2
    evaluate(load("configs/tiny.yaml"), "instruct", [SHARD], tmp_path / "unbroken", SHORT, batch_size=1)
    for name in ("predictions.jsonl", "index.html", "run.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


def test_a_folder_of_another_evaluation_is_refused(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    before = (whole / "predictions.jsonl").read_bytes()
    others: list[tuple[str, dict[str, Any]]] = [
        ("protocol.iou: found 0.5, wanted 0.7", {"protocol": Protocol(max_new_tokens=4, iou=0.7)}),
        ("controls.swap: found [], wanted ['image']", {"controls": Controls(swap=("image",))}),
        ("limit: found None, wanted 5", {"limit": 5}),
        ("shards_sha256", {"shards": ".cache/tiny/shards/000001.tar"}),
        ("task: found 'instruct', wanted 'rec'", {"task": "rec"}),
    ]
    for message, change in others:
        arguments = {"task": "instruct", "shards": SHARD, "protocol": SHORT} | change
        with pytest.raises(ValueError, match="another evaluation") as refused:
            evaluate(loaded, out=whole, **arguments)
        assert message in str(refused.value)
    assert (whole / "predictions.jsonl").read_bytes() == before

    shutil.copy(whole / "predictions.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"has predictions.jsonl but no run.json"):
        evaluate(loaded, "instruct", SHARD, tmp_path, SHORT)


def test_facts_that_changed_since_are_noticed(loaded: Loaded, tmp_path: Path) -> None:
    """Another answer of the same length leaves the index, and with it the shards' hash, as it was."""
    picture = tiny.picture("red", random.Random(0))
    names = shards(tmp_path / "shards", [asked("a", picture, "red"), asked("b", picture, "red")])
    out = tmp_path / "out"
    evaluate(loaded, "instruct", names, out, SHORT, batch_size=1)
    before = (out / "predictions.jsonl").read_bytes()
    (tar,) = (tmp_path / "shards").glob("*.tar")
    data = tar.read_bytes()
    place = data.rindex(b'"red"')
    tar.write_bytes(data[:place] + b'"tan"' + data[place + 5 :])
    with pytest.raises(ValueError, match="another question was asked of 'b': its facts have changed"):
        evaluate(loaded, "instruct", names, out, SHORT, batch_size=1)
    assert (out / "predictions.jsonl").read_bytes() == before


def test_one_process_a_folder(whole: Path, loaded: Loaded, tmp_path: Path) -> None:
    from mmchat.inference.predictions import Predictions

    setting = json.loads((whole / "run.json").read_text())
    with Predictions(tmp_path, setting), pytest.raises(ValueError, match="another process evaluates"):
        evaluate(loaded, "instruct", SHARD, tmp_path, SHORT)


# ---- protocols ------------------------------------------------------------------------------------------------------


def test_protocol_files(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("iou: 0.7\nmax_new_tokens: 16\n")
    assert load_protocol(path, ["iou=0.6", "seed=3"]) == Protocol(iou=0.6, max_new_tokens=16, seed=3)
    assert load_protocol(None) == Protocol()
    for text, message in [
        ("max_new_token: 3", "max_new_token: unknown key; did you mean 'max_new_tokens'"),
        ("iou: 2", "iou: Input should be less than 1"),
        ("- iou", "wanted a mapping"),
        ("iou: [", "no valid YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_protocol(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_protocol(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="unknown key; did you mean 'phrasing'"):
        load_protocol(None, ["phrasin=first"])


@pytest.mark.parametrize("path", sorted(Path("configs/protocols").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_protocols_load(path: Path) -> None:
    load_protocol(tiny.ROOT / path)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the records were there already; a tenth took ten seconds; of the last record half is asked."""
    progress = Progress(100)
    progress.skip(50)
    progress.started, progress.said = time.monotonic() - 10, -SAY_EVERY_S - 1
    progress.say(120, 60)
    assert capsys.readouterr().err == "120 questions of 60/100 records, 0:00:40 left\n"
    progress.started, progress.said = time.monotonic() - 99, -SAY_EVERY_S - 1
    progress.say(199, 99.5)
    assert capsys.readouterr().err == "199 questions of 99/100 records, 0:00:01 left\n"
    progress.say(200, 100)
    progress.end(200)
    assert capsys.readouterr().err == "200 questions of 100 records\n"


def test_a_record_of_several_questions_is_done_in_parts(loaded: Loaded, tmp_path: Path) -> None:
    facts = {"question": "what", "answers": ["a"]}
    names = shards(tmp_path, [Record("two", facts | {"more": [facts]}), Record("bad", {}), Record("one", facts)])
    mixture = Mixture([SourceConfig(name="evaluate", task="vqa", shards=names)])
    records = ControlledRecords(mixture, loaded.template, 3, Controls())
    assert [one.done for one in _asked(records, mixture.tasks["evaluate"], SHORT)] == [0.5, 1, 2, 3]


def test_an_evaluation_without_an_answer_fails(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*records: Record) -> int:
        names, out = shards(tmp_path / f"{len(records)}", list(records)), str(tmp_path / f"out{len(records)}")
        monkeypatch.setattr(sys, "argv", ["infer.py", "evaluate", "configs/tiny.yaml", "--task", "instruct", "--shards",
                                          names, "--set", "max_new_tokens=2", "--out", out])  # fmt: skip
        return infer.main()

    bad, good = Record("bad", {"turns": 3}), asked("good", None)
    assert run(bad) == 1
    said = capsys.readouterr()
    assert "counted as wrong: 1 x unreadable facts" in said.out and "not one question was answered" in said.err
    metrics = json.loads((tmp_path / "out1/metrics.json").read_text())
    assert metrics["num_answered"] == 0 and metrics["scores"]["exact_match"] == 0
    assert run(bad, good) == 0
