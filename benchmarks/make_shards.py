"""make_shards.py on many records: memory that does not grow, and a killed run that ends with the bytes of a whole one.

python benchmarks/make_shards.py --out benchmarks/results/make_shards_cpu.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from benchmarks.measure import machine, say

ROOT = Path(__file__).resolve().parent.parent
NUM_PICTURES = 500
FEW = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmchat-make-shards-") as folder:
        figures = measure(Path(folder), args.records, args.workers)
    if args.out:
        command = f"python benchmarks/make_shards.py --records {args.records} --workers {args.workers}"
        result = {"command": command, "machine": machine() | {"cores": os.cpu_count()}, **figures}
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(folder: Path, num_records: int, num_workers: int) -> dict[str, Any]:
    """Makes the sources and the runs; every run but the killed one must give the expected bytes."""
    write_pictures(folder / "pictures")
    few, many, as_list = folder / "few.jsonl", folder / "many.jsonl", folder / "list.json"
    write_rows(few, FEW)
    write_rows(many, num_records)
    as_list.write_text("[" + ",\n".join(few.read_text().splitlines()) + "]")
    say(f"{num_records:,} records, every tenth with a picture; {many.stat().st_size / 1e6:.1f} MB of rows")

    def run(source: Path, out: str, kill_after: int | None = None) -> dict[str, float]:
        return watched(source, folder / out, num_workers, kill_after)

    figures: dict[str, Any] = {"num_records": num_records, "num_workers": num_workers}
    for name, source, count in (("few", few, FEW), ("many", many, num_records), ("list", as_list, FEW)):
        found = run(source, name)
        figures[name] = {"num_records": count, **found, "records_per_s": count / found["seconds"]}
        say(
            f"{name}: {count:,} records in {found['seconds']:.1f} s ({count / found['seconds']:,.0f} a second), peak "
            f"{found['main_mb']:.0f} MB in the first process, {found['worker_mb']:.0f} MB in a worker"
        )
    assert shards_of(folder / "list") == shards_of(folder / "few"), "a JSON list and JSON lines give the same shards"

    num_shards = len(shards_of(folder / "many")) // 2
    run(many, "killed", kill_after=num_shards // 2)
    left = len(list((folder / "killed").glob("*.tar")))
    assert 0 < left < num_shards and not (folder / "killed" / "report.json").exists(), "it was killed in the middle"
    resumed = run(many, "killed")
    found, expected = files_of(folder / "killed"), files_of(folder / "many")
    assert found == expected, sorted(dict(found.items() ^ expected.items()))
    say(
        f"killed after {left} of {num_shards} shards and continued in {resumed['seconds']:.1f} s: "
        f"all {len(found)} files equal those of the unbroken run"
    )
    figures["killed"] = {"num_shards": num_shards, "shards_when_killed": left, "resumed": resumed, "bytes_equal": True}
    report = json.loads((folder / "killed" / "report.json").read_text())
    assert report["num_samples"] == num_records and report["num_skipped"] == 0
    return figures


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    for i in range(NUM_PICTURES):
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        Image.new("RGB", (32 + i % 64, 24), colour).save(folder / f"{i}.jpg")


def write_rows(path: Path, count: int) -> None:
    """LLaVA rows: every tenth about a picture, the others text."""
    words = ["red", "green", "blue", "dog", "cat", "house", "tree", "car", "sky", "water"]
    rng = random.Random(1)
    with open(path, "w") as file:
        for i in range(count):
            question, answer = (" ".join(rng.choices(words, k=rng.randrange(4, 60))) for _ in range(2))
            row: dict[str, Any] = {"id": f"row-{i}"}
            if i % 10 == 0:
                row["image"] = f"pictures/{rng.randrange(NUM_PICTURES)}.jpg"
                question = "<image>\n" + question
            row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps(row) + "\n")


def watched(source: Path, out: Path, num_workers: int, kill_after: int | None) -> dict[str, float]:
    """Runs make_shards.py; seconds and the peaks of resident memory, shared pages counted in each process.

    kill_after: kill the whole process group once so many shards are there.
    """
    command = [sys.executable, "data_prep/make_shards.py", "instruct", source, out, "--workers", num_workers]
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in group(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_mb(pid))
        if kill_after is not None and len(list(out.glob("*.tar"))) >= kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    seconds = time.monotonic() - start
    assert process.stdout is not None
    output = process.stdout.read().decode()
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL), output
    main_mb = peaks.pop(process.pid)
    return {"seconds": seconds, "main_mb": main_mb, "worker_mb": max(peaks.values(), default=0.0)}


def group(leader: int) -> list[int]:
    """Processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.joinpath("stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(path.name))
        except (OSError, IndexError):
            continue  # it has ended
    return found


def peak_mb(pid: int) -> float:
    """VmHWM, the peak of resident memory so far; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def files_of(folder: Path) -> dict[str, str]:
    """Name to sha256 of every file, hidden ones too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def shards_of(folder: Path) -> dict[str, str]:
    """As files_of, for shards and their indexes."""
    return {name: digest for name, digest in files_of(folder).items() if ".tar" in name}


if __name__ == "__main__":
    sys.exit(main())
