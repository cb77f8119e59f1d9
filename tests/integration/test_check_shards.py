"""check_shards.py as people run it: what it finds, where it stops, and that it agrees with training."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from PIL import Image

from data_prep import check_shards
from data_prep.make_shards import media_header
from data_prep.progress import Progress
from mmchat import storage
from mmchat.conversation import MediaRef, Record
from mmchat.data.check import ShardChecker
from mmchat.data.mixture import Mixture
from mmchat.data.shard_index import index_shard
from mmchat.data.shard_writer import write_shards
from mmchat.data.shards import index_path
from tests import runs, tiny
from tests.integration.test_faults import _members, _tar
from tests.range_server import serving


def pictures(count: int, seed: int = 0, first: int = 0) -> list[Record]:
    """Instruct records about a picture each, all different."""
    rng = random.Random(seed)
    records = []
    for i in range(first, first + count):
        media = (MediaRef("image", tiny.picture(rng.choice(list(tiny.COLOURS)), rng, (64 + i, 48))),)
        facts = tiny._turns([{"media": 0}, {"text": f"What is in picture {i} of {seed}?"}], "a circle")
        records.append(Record(f"{i:06d}", facts, media))
    return records


def write(folder: Path, records: list[Record], per_shard: int = 1000) -> list[Path]:
    return write_shards(records, folder, per_shard, header_of=media_header).shards


def check(tmp_path: Path, *arguments: object, workers: int = 1) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "report.json"
    out.unlink(missing_ok=True)
    status = check_shards.main([*map(str, arguments), "--workers", str(workers), "--json", str(out)])
    return status, json.loads(out.read_text()) if out.exists() else {}


def found(report: dict[str, Any], severity: str | None = None) -> dict[str, int]:
    return {f["reason"]: f["count"] for f in report["findings"] if severity in (None, f["severity"])}


def config(tmp_path: Path, *sources: dict[str, Any], **batch: int) -> Path:
    """tiny.yaml with one stage that reads these sources."""
    values = yaml.safe_load((tiny.ROOT / "configs/tiny.yaml").read_text())
    values["stages"] = values["stages"][:1]
    values["stages"][0]["data"] = list(sources)
    values["stages"][0]["batch"].update(batch)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def source(name: str, shards: object, task: str = "instruct") -> dict[str, Any]:
    return {"name": name, "task": task, "shards": str(shards)}


def test_the_script_as_people_run_it(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "good", pictures(12), per_shard=5)
    command = [sys.executable, "data_prep/check_shards.py", str(tmp_path / "good"), "--deep"]
    options = ["--task", "instruct", "--config", "configs/tiny.yaml", "--json", str(tmp_path / "report.json")]
    done = subprocess.run([*command, *options], cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "3 shards, 12 samples (12 image)" in done.stdout and "0 errors" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["errors"], report["warnings"], report["findings"]) == (1, 0, 0, [])
    (totals,) = report["sources"].values()
    assert (totals["shards"], totals["samples"], totals["media"], totals["bad_samples"]) == (3, 12, {"image": 12}, 0)
    done = subprocess.run([*command[:2], "--help"], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Exit status" in done.stdout


def test_the_same_report_from_any_number_of_processes(tiny_folder: Path, tmp_path: Path) -> None:
    members = _members(12, lambda i, sample: sample.update({f"{i:04d}.json": b"{"}) if i % 3 == 0 else None)
    for number in range(3):
        path = _tar(tmp_path / f"{number}.tar", members[number * 8 : number * 8 + 8])
        index_shard(path, media_header)
    run = config(tmp_path, source("a", tmp_path / "*.tar"))
    reports = [check(tmp_path, "--config", run, "--deep", workers=workers) for workers in (1, 2, 3)]
    assert reports[0] == reports[1] == reports[2]
    status, report = reports[0]
    assert status == 1 and found(report, "error") == {"unreadable facts": 4}
    (finding,) = (finding for finding in report["findings"] if finding["severity"] == "error")
    assert finding["sources"] == {"a": 4} and len(finding["examples"]) == 3
    assert finding["examples"][0]["key"] == "0000" and finding["examples"][0]["shard"].endswith("0.tar")
    assert report["sources"]["a"]["bad_samples"] == 4 and report["sources"]["a"]["errors"] == 4


def test_without_an_index_the_tar_is_checked_and_the_command_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _tar(tmp_path / "a.tar", _members(4, lambda i, s: s.update({f"{i:04d}.json": b"{"}) if i == 2 else None))
    status, report = check(tmp_path, path)
    assert status == 1 and found(report) == {"no index": 1, "unreadable facts": 1}
    assert f"index_shards.py {path}" in capsys.readouterr().out
    assert report["sources"][str(tmp_path)]["samples"] == 4
    assert not index_path(path).exists(), "a check changes nothing"


@pytest.mark.parametrize("where", ["inside a member", "at a member boundary"])
@pytest.mark.parametrize("indexed", [True, False])
def test_truncated_tars(tmp_path: Path, where: str, indexed: bool) -> None:
    path = _tar(tmp_path / "a.tar", _members(4))
    if indexed:
        index_shard(path, media_header)
    cut = 2 * 512 + 512 + 100 if where == "inside a member" else 2 * 512
    path.write_bytes(path.read_bytes()[:cut])
    status, report = check(tmp_path, path)
    assert status == 1 and found(report) == {"unusable index" if indexed else "no index": 1, "damaged tar": 1}
    assert all(str(path) in json.dumps(finding) for finding in report["findings"])


def test_only_a_deep_check_sees_what_changed_behind_the_index(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "a", pictures(4))
    good, index = path.read_bytes(), index_path(path).read_text()
    at = good.index(b"a circle")
    path.write_bytes(good[:at] + b"A CIRCLE" + good[at + 8 :])
    assert check(tmp_path, path) == (0, check(tmp_path, path)[1]) and not found(check(tmp_path, path)[1])
    status, report = check(tmp_path, path, "--deep")
    assert status == 1 and found(report) == {"stale index": 1}

    path.write_bytes(good)  # and an index that was edited
    first, second = (line.partition('"json":')[2].partition("]")[0] for line in index.splitlines()[1:3])
    index_path(path).write_text(index.replace(first, "@").replace(second, first).replace("@", second))
    status, report = check(tmp_path, path, "--deep")
    assert status == 1 and found(report, "error") == {"stale index": 1}


def test_an_index_may_leave_keys_out(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", _members(4))
    index_shard(path, media_header, excluded=frozenset({"0001"}))
    status, report = check(tmp_path, path, "--deep")
    assert status == 0 and report["sources"][str(tmp_path)]["samples"] == 3


def test_undecodable_media_is_found_by_a_deep_check(tiny_folder: Path, tmp_path: Path) -> None:
    """The headers are whole, the data behind them is not."""

    def damage(i: int, sample: dict[str, bytes]) -> None:
        if i == 1:
            picture = io.BytesIO()
            Image.effect_noise((200, 200), 80).save(picture, "JPEG")
            sample["0001.0.jpg"] = picture.getvalue()[:-3000]
        if i == 2:
            del sample["0002.0.jpg"]
            sound = io.BytesIO()
            soundfile.write(sound, np.full(16_000, np.nan, np.float32), 16_000, "FLOAT", format="WAV")
            sample["0002.0.wav"] = sound.getvalue()

    path = _tar(tmp_path / "a.tar", _members(4, damage))
    index_shard(path, media_header)
    for options in ([], ["--task", "instruct"], ["--config", config(tmp_path, source("a", path))]):
        assert check(tmp_path, path, *options)[0] == 0
        status, report = check(tmp_path, path, "--deep", *options)
        assert status == 1 and found(report, "error") == {"undecodable image": 1, "audio not finite": 1}


def test_duplicates(tmp_path: Path) -> None:
    """Within a source a second copy of a shard is an error, as it is for training; everything else is to be judged."""
    a = write(tmp_path / "a", pictures(6), per_shard=3)
    (tmp_path / "b").mkdir()
    for path in (a[0], index_path(a[0])):
        shutil.copy(path, tmp_path / "b" / path.name)
        shutil.copy(path, tmp_path / "a" / path.name.replace("000000", "copy"))
    status, report = check(tmp_path, tmp_path / "a")
    assert status == 1 and found(report) == {"duplicate shard": 1}
    with pytest.raises(ValueError, match="same content"):
        Mixture([check_shards.load_config(config(tmp_path, source("a", tmp_path / "a"))).stages[0].data[0]])

    status, report = check(tmp_path, a[0], a[1], tmp_path / "b")
    assert status == 0 and found(report, "warning") == {"duplicate shard": 1}
    assert check(tmp_path, a[0], a[1], tmp_path / "b", "--strict")[0] == 1

    # Samples that come again in other shards, under their own key or another one.
    again = [Record(f"again-{i}", record.facts, record.media) for i, record in enumerate(pictures(6)[:2])]
    overlapping = write(tmp_path / "c", [*pictures(2, seed=7, first=20), *again, pictures(6)[5]])
    shutil.copy(overlapping[0], tmp_path / "a" / "overlap.tar")
    shutil.copy(index_path(overlapping[0]), tmp_path / "a" / "overlap.tar.index.jsonl")
    (tmp_path / "a" / "copy.tar").unlink()
    status, report = check(tmp_path, tmp_path / "a", "--deep")
    assert status == 0 and found(report) == {"duplicate sample": 3, "key in several shards": 1}
    (finding,) = (finding for finding in report["findings"] if finding["reason"] == "duplicate sample")
    assert finding["examples"][0]["key"] == "again-0" and "000000.tar: 000000" in finding["examples"][0]["detail"]
    # Without --deep no media is read, so that nothing can be said.
    assert found(check(tmp_path, tmp_path / "a")[1]) == {"key in several shards": 1}


def test_overlap_with_evaluation_media(tmp_path: Path) -> None:
    train, evaluation = pictures(8), pictures(4, seed=3, first=50)
    leaked = Record("renamed", tiny._turns([{"media": 0}, {"text": "Other words"}], "x"), train[5].media)
    write(tmp_path / "train", train, per_shard=4)
    write(tmp_path / "eval", evaluation)
    arguments = (tmp_path / "train", "--against", tmp_path / "eval")
    assert check(tmp_path, *arguments)[0] == 0
    shutil.rmtree(tmp_path / "eval")
    write(tmp_path / "eval", [*evaluation, leaked])
    status, report = check(tmp_path, *arguments, workers=2)
    assert status == 1 and found(report) == {"media also in evaluation": 1}
    (example,) = report["findings"][0]["examples"]
    assert example["key"] == "000005" and example["detail"].endswith("eval/000000.tar: renamed")
    assert check(tmp_path, tmp_path / "train")[0] == 0
    # A source of the config that has eval in its name is looked at in the same way.
    sources = source("train", tmp_path / "train"), source("held-out-eval", tmp_path / "eval")
    status, report = check(tmp_path, "--config", config(tmp_path, *sources))
    assert status == 1 and found(report) == {"media also in evaluation": 1}
    assert not check_shards.is_evaluation("medieval") and check_shards.is_evaluation("Eval_2")


def test_members_apart_are_whole_here_and_split_by_others(tmp_path: Path) -> None:
    members = _members(3)  # json, jpg, json, jpg, ...
    members.insert(0, members.pop(3))  # the second picture comes first
    path = _tar(tmp_path / "a.tar", members)
    index_shard(path, media_header)
    status, report = check(tmp_path, path, "--task", "instruct")
    assert status == 0 and found(report, "warning") == {"members apart": 1}
    assert report["findings"][0]["examples"][0]["key"] == "0001"
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert sum(sample["__key__"] == "0001" for sample in theirs) == 2, "the other reader still splits it"


def test_budgets_and_what_they_cost(tiny_folder: Path, tmp_path: Path) -> None:
    long = tiny._turns([{"text": "word " * 40}], "yes")
    long = {"turns": long["turns"] * 4}
    (path,) = write(tmp_path / "a", [*pictures(3), Record("long", long), Record("huge", tiny._turns([], "x" * 5000))])
    status, report = check(tmp_path, "--config", config(tmp_path, source("a", path), tokens=500))
    assert status == 1
    assert found(report, "error") == {"does not fit the budget": 1}
    assert found(report, "warning") == {"shortened to fit": 1}
    status, report = check(tmp_path, "--config", config(tmp_path, source("a", path), tokens=6000, patches=1))
    assert found(report, "error") == {"does not fit the budget": 3}
    assert check(tmp_path, "--config", config(tmp_path, source("a", path), tokens=6000))[0] == 0


def test_what_a_task_shows(tmp_path: Path) -> None:
    """Without a model: no learned turn, media that is in no turn, placeholders that stayed text."""
    media = pictures(1)[0].media
    samples = [
        Record("silent", {"turns": [{"role": "user", "parts": [{"media": 0}]}]}, media),
        Record("hidden", tiny._turns([{"text": "What?"}], "x"), media),
        Record("missing", tiny._turns([{"media": 1}], "x"), media),
        Record("text", tiny._turns([{"text": "<image>\nWhat?"}], "x")),
        Record("outside", tiny._turns([{"media": 0}, {"region": {"media": 0, "box": [0, 0, 400, 20]}}], "x"), media),
    ]
    (path,) = write(tmp_path / "a", samples)
    assert check(tmp_path, path)[0] == 0
    status, report = check(tmp_path, path, "--task", "instruct")
    assert status == 1
    assert found(report, "error") == {"nothing to learn": 1, "unreadable facts": 1, "region outside the picture": 1}
    assert found(report, "warning") == {"media not shown": 1, "placeholder left as text": 1}


def test_boxes_that_no_task_reads_yet(tmp_path: Path) -> None:
    facts = {
        "caption": "x",
        "objects": [{"label": "dog", "box": [1, 1, 20, 20]}, {"label": "cat", "box": [9, 9, 3, 20]}],
    }
    (path,) = write(tmp_path / "a", [Record("a", facts, pictures(1)[0].media)])
    status, report = check(tmp_path, path, "--task", "caption")
    assert status == 0 and found(report, "warning") == {"inverted region": 1}


@pytest.mark.parametrize("box", [None, "box", [1, 2, 3], [1, 2, "x", 4], [1, 2, 3, 10**400], {"x": 1}, 7])
def test_boxes_that_are_none_are_said_and_stop_nothing(tmp_path: Path, box: object) -> None:
    facts = {"caption": "x", "notes": [{"box": box}, {"box": [1, 1, 2, 2], "media": 10**400}]}
    (path,) = write(tmp_path / "a", [Record("a", facts, pictures(1)[0].media)])
    status, report = check(tmp_path, path, "--task", "caption")
    assert status == 0 and found(report) == {"unreadable region": 1}
    assert report["findings"][0]["examples"][0]["key"] == "a"


def test_what_data_says_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [Record("a", {"caption": "x", "notes": {"box": "\x1b[31m\u202e"}}, pictures(1)[0].media)]
    write(tmp_path / os.fsdecode(b"odd\xff\x1b[2J"), records)
    index_path(next(tmp_path.glob("odd*/*.tar"))).unlink()
    status, report = check(tmp_path, tmp_path)
    assert (status, report) == (2, {})  # no shards lie in it
    status, report = check(tmp_path, next(tmp_path.glob("odd*")))
    assert status == 1 and found(report) == {"no index": 1, "unreadable region": 1}
    out = capsys.readouterr().out
    assert "\\udcff\\x1b[2J" in out and all(char.isprintable() or char == "\n" for char in out)
    assert "\udcff\x1b[2J" in report["findings"][0]["examples"][0]["shard"]


def test_a_reader_that_has_read_enough(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", pictures(2))
    command = [sys.executable, "data_prep/check_shards.py", str(tmp_path / "a"), "--json", str(tmp_path / "x.json")]
    process = subprocess.Popen(
        command, cwd=tiny.ROOT, env=runs.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert json.loads((tmp_path / "x.json").read_text())["errors"] == 0


def test_a_terminal_of_another_encoding(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "ü→", pictures(1))
    command = [sys.executable, "data_prep/check_shards.py", str(tmp_path / "ü→"), "--json", str(tmp_path / "x.json")]
    environment = runs.ENVIRONMENT | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and "ü\\u2192: 1 shards".encode("latin-1") in done.stdout, done.stderr
    assert any("ü→" in name for name in json.loads((tmp_path / "x.json").read_text())["sources"])


def test_it_says_why_it_could_not_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write(tmp_path / "a", pictures(1))
    for arguments, expected in [
        ([tmp_path / "none-{0..1}.tar"], "none-1.tar"),
        ([path, "--task", "captoin"], "captoin"),
        ([path, "--config", tmp_path / "none.yaml"], "none.yaml"),
        ([path, "--config", "configs/tiny.yaml"], "say with --task how it is read"),
        ([path, "--against", tmp_path / "none.tar"], "none.tar"),
    ]:
        assert check_shards.main([*map(str, arguments), "--workers", "1"]) == 2
        assert expected in capsys.readouterr().err
    for arguments in ([], ["--config", "configs/tiny.yaml", "--task", "instruct"], [path, "--json", "/no/such/x.json"],
                      [path, "--json", tmp_path], [path, "--workers", "0"], [path, "--workers", "-1"]):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            check_shards.main(list(map(str, arguments)))
        assert ended.value.code == 2


def test_progress_says_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", pictures(12), per_shard=4)
    monkeypatch.setattr(check_shards, "Progress", partial(Progress, every_s=0.0))
    assert check(tmp_path, tmp_path / "a")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"12 samples, [\d,]+ a second, .* \d+% of all shards, about 0:00:00 left", lines[-1]), lines


def test_a_killed_process_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", pictures(4), per_shard=2)
    monkeypatch.setattr(ShardChecker, "check", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert check(tmp_path, tmp_path / "a", workers=2) == (2, {})
    assert "was killed; is there enough memory?" in capsys.readouterr().err


def test_shards_behind_urls(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "a", pictures(3))
    url = path.as_uri()
    for options in ([], ["--deep"]):
        status, report = check(tmp_path, url, "--task", "instruct", *options)
        assert status == 0 and not report["findings"] and report["sources"][url.rpartition("/")[0]]["samples"] == 3
    index_path(path).unlink()
    status, report = check(tmp_path, url)
    assert status == 1 and found(report) == {"no index": 1}
    assert next(iter(report["sources"].values()))["samples"] == 3


def test_shards_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.01, 0.01))
    write(tmp_path / "a", pictures(2))
    with serving(tmp_path / "a") as server:
        for options in ([], ["--deep"]):
            status, report = check(tmp_path, f"{server.url}/none.tar", *options)
            assert status == 1 and found(report) == {"no such shard": 1}
        assert not capsys.readouterr().err
        server.fail["/000000.tar.index.jsonl"] = [503] * 40
        status, report = check(tmp_path, f"{server.url}/000000.tar", "--deep")
        assert status == 1 and found(report) == {"unreachable shard": 1}
    capsys.readouterr()
    status, report = check(tmp_path, "http://127.0.0.1:9/a.tar", "--deep")  # nobody listens there
    assert status == 1 and found(report) == {"unreachable shard": 1}
    assert capsys.readouterr().err.count("Trying again") == 2, "asked once, with its two retries"
    blocks = tmp_path / "file"
    blocks.write_text("x")
    monkeypatch.setattr(check_shards, "CacheConfig", partial(storage.CacheConfig, folder=str(blocks)))
    assert check(tmp_path, "http://127.0.0.1:9/a.tar") == (2, {})
    assert f"cache.folder {blocks} cannot be used" in capsys.readouterr().err


def test_an_interrupt_ends_it_cleanly(tiny_folder: Path, tmp_path: Path) -> None:
    records = [record for i in range(80) for record in tiny.records(5, seed=i)]
    shards = write(tmp_path / "a", [Record(f"{i:06d}", r.facts, r.media) for i, r in enumerate(records)], per_shard=20)
    assert len(shards) == 20
    (tmp_path / "tmp").mkdir()
    for wait_s in (0.3, 0.1, 0.0, 0.0):  # on a busy machine it may be through before it is interrupted
        process = subprocess.Popen(
            [sys.executable, "data_prep/check_shards.py", str(tmp_path / "a"), "--deep", "--workers", "2"],
            cwd=tiny.ROOT, env=runs.ENVIRONMENT | {"TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        runs.wait_for(lambda: any((tmp_path / "tmp").rglob("*.tar")))
        time.sleep(wait_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone
        out, err = process.communicate(timeout=30)
        if process.returncode != 0:
            break
    assert process.returncode == 130 and "stopped" in err and "Traceback" not in err and not out, err
    assert not any((tmp_path / "tmp").iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of them is left


MEASURE = """
import resource, sys
from data_prep import check_shards
assert check_shards.main([sys.argv[1], "--task", "instruct", "--workers", "1"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_flat_in_the_number_of_samples(tmp_path: Path) -> None:
    peaks = {}
    for count in (1_000, 31_000):
        records = (Record(f"{i:08d}", tiny._turns([{"text": f"Say {i}."}], "x" * 200)) for i in range(count))
        write_shards(records, tmp_path / str(count), samples_per_shard=1000)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / str(count))],
            cwd=tiny.ROOT, env=runs.ENVIRONMENT | {"PYTHONPATH": str(tiny.ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.split()[-1]) * 1024
    assert (peaks[31_000] - peaks[1_000]) / 30_000 < 400, peaks  # bytes a sample; the facts alone would be 2 kB


def test_shards_without_samples(tmp_path: Path) -> None:
    write(tmp_path / "a", pictures(2))
    index_shard(_tar(tmp_path / "a" / "none.tar", []))
    status, report = check(tmp_path, tmp_path / "a")
    assert status == 0 and found(report, "warning") == {"empty shard": 1}
    status, report = check(tmp_path, tmp_path / "a" / "none.tar", "--deep")
    assert status == 1 and found(report, "error") == {"empty source": 1}


def test_one_shard_in_two_sources_is_checked_once_for_both_tasks(tiny_folder: Path, tmp_path: Path) -> None:
    records = [
        Record(r.key, r.facts | ({} if i else {"caption": "A circle."}), r.media) for i, r in enumerate(pictures(3))
    ]
    (path,) = write(tmp_path / "a", records)
    run = config(tmp_path, source("talk", path), source("tell", path, "caption"))
    status, report = check(tmp_path, "--config", run)
    assert status == 1 and found(report) == {"no caption": 2}
    assert report["sources"]["talk"]["samples"] == report["sources"]["tell"]["samples"] == 3
    assert np.all([totals["errors"] == 2 for totals in report["sources"].values()])
