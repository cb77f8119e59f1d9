"""make_shards.py where it is hard: many records, kills, full disks, changed sources, clusters."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_shards import FEW, files_of, measure, write_pictures, write_rows
from data_prep import make_shards
from data_prep.journal import locked
from mmchat.conversation import Record
from mmchat.data.shard_writer import cut_chunks
from mmchat.data.shards import index_path

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 3,000 rows and the pictures that they name."""
    folder = tmp_path_factory.mktemp("source")
    write_pictures(folder / "pictures")
    write_rows(folder / "rows.jsonl", 3000)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file that an unbroken run of one process makes of `source`."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert make(source, out, "--workers", "1") == 0
    return files_of(out)


def make(source: Path, out: Path, *options: str) -> int:
    return make_shards.main(["instruct", str(source / "rows.jsonl"), str(out), "--samples-per-shard", "100", *options])


def start(source: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "data_prep/make_shards.py", "instruct", source / "rows.jsonl", out]
    return subprocess.Popen(
        [*map(str, command), "--samples-per-shard", "100", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[str] | None = None) -> None:
    """Until the journal knows that many: a tar that it does not know is made again."""
    journal = out / ".make_shards.jsonl"
    until = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + count:
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_hundred_thousand_records(tmp_path: Path) -> None:
    """Memory is flat; a run that is killed in the middle ends with the bytes of an unbroken one (in `measure`)."""
    figures = measure(tmp_path, 100_000, num_workers=2)
    assert figures["killed"]["bytes_equal"] and figures["few"]["num_records"] == FEW
    for process in ("main_mb", "worker_mb"):
        assert figures["many"][process] < 1.05 * figures["few"][process] + 10


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_is_continued(source: Path, whole: dict[str, str], tmp_path: Path, how: signal.Signals) -> None:
    """The first process alone gets the signal: its workers must end too, and leave nothing half."""
    for attempt in range(5):  # on a busy machine the run may be through before it is told to stop
        out = tmp_path / str(attempt)
        process = start(source, out, "--workers", "2")
        wait_for_shards(out, 2, process)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)  # returns when the last worker has closed the pipes
        if process.returncode != 0:
            break
    assert 0 < len(list(out.glob("*.tar"))) <= 30
    if how != signal.SIGKILL:
        assert process.returncode == 130 and "Run the same command again to continue" in said
        assert not list(out.glob(".*.partial")) and "Traceback" not in said
    assert make(source, out, "--workers", "2") == 0
    assert files_of(out) == whole


def test_one_run_at_a_time(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "out"):
        (tmp_path / "out" / ".work").mkdir()
        assert make(source, tmp_path / "out") == 1
    assert "another process is writing" in capsys.readouterr().err
    assert (tmp_path / "out" / ".work").is_dir(), "what the other run copied is not touched"


def test_a_killed_worker_is_an_error_that_can_be_continued(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out, "--workers", "2")
    wait_for_shards(out, 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "was killed; is there enough memory? Try fewer --workers" in said
    assert make(source, out) == 0 and files_of(out) == whole


def test_a_full_disk_is_an_error_that_can_be_continued(
    source: Path,
    whole: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, written = tmp_path / "out", []

    def sync(file: object) -> None:
        written.append(file)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("mmchat.data.shard_writer.sync", sync)
        assert make(source, out, "--workers", "1") == 1
    assert f"{out} is full; make room and run the same command again" in capsys.readouterr().err
    assert len(list(out.glob("*.tar"))) == 3 and not list(out.glob(".*.partial"))
    assert make(source, out) == 0 and files_of(out) == whole


def test_what_was_damaged_meanwhile_is_made_again(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(source, out) == 0
    (out / "000003.tar").write_bytes((out / "000003.tar").read_bytes()[:-512])
    (out / "000005.tar").unlink()
    index_path(out / "000007.tar").unlink()
    (out / ".000009.tar.elsewhere-1.partial").write_bytes(b"half")
    with open(out / ".make_shards.jsonl", "a") as file:
        file.write('{"number": 29, "dig')  # a line that a crash cut
    assert make(source, out) == 0 and files_of(out) == whole
    data = bytearray((out / "000004.tar").read_bytes())
    data[1000] ^= 1
    (out / "000004.tar").write_bytes(data)
    assert make(source, out) == 0 and files_of(out) != whole
    assert make(source, out, "--verify") == 0 and files_of(out) == whole


def test_a_source_that_changed_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(source, copy)
    rows = (copy / "rows.jsonl").read_text()
    assert make(copy, out) == 0
    (copy / "rows.jsonl").write_text(rows + rows)
    assert make(copy, out) == 1 and "source_bytes" in capsys.readouterr().err
    (copy / "rows.jsonl").write_text(rows.replace('"row-150"', '"row-999"'))
    (out / "000009.tar").unlink()
    assert make(copy, out) == 1 and "shard 1 in" in capsys.readouterr().err


def test_a_finished_run_says_that_it_did_not_look_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(source / "rows.jsonl", tmp_path)
    assert make(tmp_path, tmp_path / "out") == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("row-15", "row-99"))
    capsys.readouterr()
    assert make(tmp_path, tmp_path / "out") == 0
    assert "SOURCE was not read again (remove" in capsys.readouterr().out


def test_keys_are_unique_in_the_whole_source_however_it_is_cut(tmp_path: Path) -> None:
    keys = [f"{i:05d}" for i in range(20_000)]
    repeated = [*keys, "00007", "19999", "new"]
    for size in (7, 30_000):
        chunks = list(cut_chunks((Record(key, {}) for key in repeated), size))
        assert [record.key for chunk in chunks for record in chunk.records] == [*keys, "new"]
        assert sum(chunk.skipped.problems["duplicate key"] for chunk in chunks) == 2


def test_a_damaged_journal(source: Path, whole: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert make(source, out) == 0
    journal = out / ".make_shards.jsonl"
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], b"\0\xff\0\n", *lines[6:]]))
    assert make(source, out) == 0 and files_of(out) == whole
    said = capsys.readouterr()
    assert "has damaged lines" in said.err and "made 100 samples" in said.out
    journal.write_bytes(b"\0\xff\n" + data)
    assert make(source, out) == 1
    assert f"line 1 is damaged, as by a power cut, so what was asked is not known: remove {out}" in (
        capsys.readouterr().err
    )


def test_what_utf8_cannot_say_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"m\xfcll")
    folder.mkdir()
    good = '{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]}'
    bad = good.replace("x", r"\ud800").replace("?", "<image>").replace("{", r'{"image": "\ud800.jpg", ', 1)
    (folder / "rows.jsonl").write_text(f"{good}\n{bad}\n")
    out = folder / "out"
    assert make(folder, out) == 0 and make(folder, out) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["num_samples"], report["num_skipped"]) == (1, 1)
    assert report["asked"]["source"] == str(folder / "rows.jsonl")


def test_copies_of_compressed_tars(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are gone after an error that ends the run, and a good archive in the place of a bad one is read."""
    shutil.copy(source / "rows.jsonl", tmp_path)
    archive, out = tmp_path / "pictures.tar.gz", tmp_path / "out"
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        tar.add(source / "pictures", "pictures")
    whole = (tmp_path / "pictures.tar").read_bytes()
    (tmp_path / "pictures.tar").unlink()
    archive.write_bytes(gzip.compress(whole[:-20_480]))
    assert make(tmp_path, out, "--media", str(archive)) == 1
    said = capsys.readouterr().err
    assert f"copying {archive}" in said and f"make_shards: {archive}: " in said and ".work" not in said
    assert not (out / ".work").exists()
    archive.write_bytes(gzip.compress(whole))
    assert make(tmp_path, out, "--media", str(archive)) == 0
    assert "holds 3,000 samples" in capsys.readouterr().out and not (out / ".work").exists()
    assert make(tmp_path, out, "--media", str(archive)) == 0
    assert "copying" not in capsys.readouterr().err, "a finished run opens nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-shard-mb", "inf"], "wanted a number of megabytes above 0, found 'inf'"),
        (["--max-shard-mb", "nan"], "found 'nan'"),
        (["--max-shard-mb", "0"], "found '0'"),
        (["--max-shard-mb", "-3"], "found '-3'"),
        (["--samples-per-shard", "0"], "wanted a whole number above 0, found '0'"),
        (["--split", ""], "wanted a name, found nothing"),
    ],
)
def test_options_that_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        make(source, tmp_path / "out", *options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_out_that_is_a_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert make(source, out) == 1
        assert f"OUT {out} is not a folder, or lies below a file" in capsys.readouterr().err


def test_rows_that_the_source_skips_count_where_they_lie(source: Path, tmp_path: Path) -> None:
    lines = (source / "rows.jsonl").read_text().splitlines()[1:301:2]  # no pictures
    lines[5:5] = ["{"] * 40
    lines.append("[")
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for name, workers in (("a", "1"), ("b", "3")):
        assert make(tmp_path, tmp_path / name, "--workers", workers) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["num_samples"], report["num_shards"], report["num_skipped"]) == (150, 2, 41)
    assert len(report["skipped"][0]["examples"]) == 3
    journal = [json.loads(line) for line in (tmp_path / "a" / ".make_shards.jsonl").read_text().splitlines()]
    assert [line["problems"] for line in journal[1:]] == [{"unreadable row": 40}, {"unreadable row": 1}]


def test_archives_are_read_where_they_lie(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(source / "rows.jsonl", tmp_path)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((source / "pictures").iterdir()):
            archive.write(path, f"pictures/{path.name}")
    assert make(tmp_path, tmp_path / "out") == 0
    made = files_of(tmp_path / "out")
    assert {name: digest for name, digest in made.items() if ".tar" in name} == {
        name: digest for name, digest in whole.items() if ".tar" in name
    }


def test_a_few_rows_and_the_time_left(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(source, tmp_path / "few", "--limit", "150") == 0
    assert "holds 150 samples in 2 shards" in capsys.readouterr().out
    monkeypatch.setattr(make_shards.Progress.__init__, "__defaults__", ("the source", 0.0))
    assert make(source, tmp_path / "out", "--workers", "1") == 0
    said = capsys.readouterr().err.splitlines()
    assert any("samples" in line and "% of the source, about 0:00:" in line for line in said)
    assert said[-1].startswith("3,000 samples") and said[-1].endswith(" left")


def test_help_tells_the_formats_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_shards.main(["caption", "--help"])
    said = capsys.readouterr().out
    assert "captions: {split}/captions.jsonl" in said and "\n  instruct\n" not in said
    with pytest.raises(SystemExit):
        make_shards.main(["--help"])
    assert "\n  instruct\n" in capsys.readouterr().out


def test_a_cluster_that_is_not_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(source, tmp_path / "out", "--engine", "ray", "--ray-address", "127.0.0.1:9") == 1
    assert "the Ray cluster 127.0.0.1:9 cannot be used" in capsys.readouterr().err


def test_ray_that_is_not_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert make(source, tmp_path / "out", "--engine", "ray") == 1
    assert "pip install 'mmchat[ray]'" in capsys.readouterr().err
    assert make(source, tmp_path / "out", "--ray-address", "auto") == 1
    assert "--ray-address needs --engine ray" in capsys.readouterr().err


CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(node, allow_graceful=False)
print("removed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Two nodes on this machine; one is killed while its tasks run."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as cluster:
        assert cluster.stdin is not None and cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        try:
            out = tmp_path / "out"
            process = start(source, out, "--engine", "ray", "--ray-address", address)
            wait_for_shards(out, 4, process)
            print("", file=cluster.stdin, flush=True)
            assert cluster.stdout.readline().strip() == "removed"
            assert len(list(out.glob("*.tar"))) < 30, "a node was lost in the middle"
            said, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            assert "made 3,000 samples" in said
            assert files_of(out) == whole
        finally:
            cluster.stdin.close()  # both ends of its script
