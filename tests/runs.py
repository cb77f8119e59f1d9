"""Real training runs in processes of their own, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def command(folder: Path, *overrides: str, ranks: int = 1, config: str = "configs/tiny.yaml") -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "train.py", config, f"checkpoints={folder}", *overrides]


def train(folder: Path, *overrides: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *overrides, ranks=ranks),
        cwd=tiny.ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *overrides),
        cwd=tiny.ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(process: subprocess.Popen[str], reached: str, number: signal.Signals = signal.SIGKILL) -> str:
    """Sends the signal when a line of output contains `reached`; returns the output and waits for the end."""
    output = []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if reached in line:
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=120)
    return "".join(output) + rest


def log(folder: Path, stage: str) -> list[dict]:
    """Steps of a stage's log, in order."""
    lines = (folder / "tiny" / stage / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "event" not in line]


def wait_for(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)
