"""A checkpoint is seen whole or not at all, and what is seen is what was written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mmchat.checkpoint import (
    CheckpointError,
    checkpoints_in,
    find,
    load_weights,
    newest,
    open_checkpoint,
    prune,
    write_checkpoint,
)
from tests import runs, tiny


def _write(folder: Path, step: int, megabytes: int = 1) -> Path:
    weights = {"a": torch.full((megabytes * 131072,), float(step)), "b": torch.tensor([step])}
    facts = {"step": step, "is_last": False, "parts": ["a"]}
    moments = {"exp_avg.a": torch.full((megabytes * 131072,), -float(step))}
    return write_checkpoint(folder / f"step-{step:06d}", "run: x\n", weights, moments, {"step": step}, facts)


def _save_forever(folder: Path) -> None:
    """Continues after the newest checkpoint, as training does."""
    found = newest(folder)
    step = found.step if found is not None else 0
    while True:
        step += 1
        _write(folder, step, megabytes=12)
        prune(folder, keep=2)
        print(step, flush=True)


def test_twenty_kills_at_random_moments_of_saves(tmp_path):
    rng, last, in_a_save = random.Random(0), 0, 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.test_checkpoint", str(tmp_path)],
            cwd=tiny.ROOT, env=runs.ENVIRONMENT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and int(process.stdout.readline()) == last + 1
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        in_a_save += bool(list(tmp_path.glob("*.partial")))
        for folder in checkpoints_in(tmp_path):  # the last good one, and the one before it
            checkpoint = open_checkpoint(folder)  # verifies sizes and hashes
            assert set(checkpoint.weights()["a"].tolist()) == {float(checkpoint.step)} == {checkpoint.state["step"]}
            assert set(checkpoint.moments()["exp_avg.a"].tolist()) == {-float(checkpoint.step)}
        assert checkpoint.step > last
        last = checkpoint.step
    assert in_a_save >= 5, f"only {in_a_save} kills fell into a save: the test shows little"


def test_no_space_leaves_the_last_good_one_alone(tmp_path, monkeypatch):
    import shutil

    _write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"are needed, 0\.00 are free"):
        _write(tmp_path, 2)
    monkeypatch.undo()
    assert newest(tmp_path).step == 1
    _write(tmp_path, 2)
    assert newest(tmp_path).step == 2 and not list(tmp_path.glob("*.partial"))


def test_a_runs_last_stage_is_found_where_earlier_ones_did_not_know_of_it(tmp_path):
    for stages in (["z"], ["z", "a"]):
        config = f"stages: [{', '.join(f'{{name: {name}}}' for name in stages)}]"
        write_checkpoint(tmp_path / stages[-1] / "step-000001", config, {}, None, None, {"step": 1})
    assert find(tmp_path) == tmp_path / "a/step-000001"
    (tmp_path / "z/step-000001/config.yaml").write_text("stages: [1")
    with pytest.raises(CheckpointError, match=r"z/step-000001/config\.yaml is damaged"):
        find(tmp_path)
    (tmp_path / "z/step-000001/manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is damaged: wanted a table"):
        open_checkpoint(tmp_path / "z/step-000001")


def test_keep_removes_the_oldest_only(tmp_path):
    for step in (1, 2, 3, 10):
        _write(tmp_path, step)
    prune(tmp_path, 2)
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["step-000003", "step-000010"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "config.yaml"])
def test_every_damage_is_named(tmp_path, name, damage):
    path = _write(tmp_path, 1) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif damage == "cut":
        path.write_bytes(bytes(data[:-1]))
    elif damage == "remove":
        path.unlink()
    else:
        (path.parent / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest" if damage == "manifest" else name):
        newest(tmp_path)


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    path = _write(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(bytes(damaged))
        try:
            open_checkpoint(path.parent)
        except CheckpointError:
            continue
        import json

        assert json.loads(bytes(damaged)) == json.loads(data), place  # white space


def test_weights_of_another_architecture_list_every_difference(tmp_path):
    model = nn.Linear(2, 3)
    weights = {"weight": torch.zeros(3, 4), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, {"weight", "bias"}, tmp_path)
    text = str(caught.value)
    for part in ("missing: bias", "unexpected: extra", "shape of weight: found (3, 4), wanted (3, 2)"):
        assert part in text
    assert model.weight.abs().sum() > 0  # nothing was touched


def test_a_folder_that_is_none_hints_at_one(tmp_path):
    made = _write(tmp_path / "run" / "align", 4)
    with pytest.raises(CheckpointError, match="did you mean"):
        open_checkpoint(tmp_path / "run")
    assert open_checkpoint(made).step == 4


if __name__ == "__main__":
    os.chdir(tiny.ROOT)
    _save_forever(Path(sys.argv[1]))
