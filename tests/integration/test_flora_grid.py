"""The FLoRA experiment on a tiny scale: real WAVs, a tiny LLM and Whisper, killed and continued."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.flora import runner
from benchmarks.flora.grid import STAGE, Grid, load_grid
from benchmarks.flora.prepare import Workshop
from data_prep.make_shards import media_header
from mmchat.conversation import MediaRef, Record
from mmchat.data.shard_writer import write_shards
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate
from mmchat.training.stage import StopRequest
from tests import evaluations, models, runs, tiny

TOLD = ("turn on the light", "what time is it", "play some music")
# Rank 16, one layer of width 64, with 2 of 4 heads for keys and values and 128 inside the MLP.
NUM_IN_PAIRS = 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
TALK = ("did you see her", "i was at home", "the light was on")


def speech(count: int, seed: int) -> list[Record]:
    """High tones are directed; the words tell too, but not always."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        directed = i % 2 == 0
        words = rng.choice(TOLD if directed == (rng.random() < 0.8) else TALK)
        hz = (1200.0 if directed else 250.0) + rng.random() * 100
        facts = {"text": words, "directed": directed, "kind": "command" if directed else "to_person"}
        records.append(Record(f"s{seed}-{i:04d}", facts, (MediaRef("audio", tiny.tone(hz, 0.3 + rng.random() / 2)),)))
    return records


@pytest.fixture(scope="module")
def grid_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped grid with tiny models, and cells that take a second or two each."""
    folder = tmp_path_factory.mktemp("grid")
    for split, count, seed in (("train", 24, 1), ("test", 16, 2)):
        write_shards(speech(count, seed), folder / split, header_of=media_header)
    values = yaml.safe_load((tiny.ROOT / "benchmarks/flora/grid.yaml").read_text())
    stage = {"steps": 4, "save_every": 2, "dtype": "float32", "zero": 0,
             "batch": {"lanes": 2, "tokens": 512, "packs_per_micro_batch": 2, "lookahead": 2}}  # fmt: skip
    values |= {
        "work": str(folder / "work"),
        "results": str(folder / "results"),
        "llm": ".cache/tiny/llm",
        "data": {"train": str(folder / "train"), "test": str(folder / "test")},
        "num_test": 14,
        "features_dtype": "float32",
        "audio": values["audio"] | {"encoder": {"kind": "whisper", "pretrained": ".cache/tiny/whisper"}},
        "sizes": {"small": {"layers": [1], "heal_steps": 2, "tokens_per_s": 9000, "test_s": 0.01},
                  "large": {"tokens_per_s": 9000, "test_s": 0.01}},
        "cells": [{"sizes": ["small"], "seeds": [0], "methods": ["flora", "full"]},
                  {"sizes": ["large"], "seeds": [0], "methods": ["audio"]}],
    }  # fmt: skip
    values["stage"] |= stage
    values["heal"] |= stage
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(grid: Path, *more: str) -> list[str]:
    return [sys.executable, "benchmarks/flora/run.py", "--grid", str(grid), "--device", "cpu", *more]


def run(grid: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(grid, *more), cwd=tiny.ROOT, env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def results(grid: Grid) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in sorted(grid.results.glob("*.json"))]
    return {one["cell"]["name"]: one for one in found}


@pytest.fixture(scope="module")
def killed(grid_file: Path) -> str:
    """Killed in the middle of FLoRA's training, after its first checkpoint; then given again. What that said."""
    process = subprocess.Popen(
        command(grid_file), cwd=tiny.ROOT, env=runs.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if "saved" in line and "flora" in line and "step-000002" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(said)
    grid = load_grid(grid_file)
    assert list(results(grid)) == ["small-text-r16-s0"]
    before = (grid.results / "small-text-r16-s0.json").stat().st_mtime_ns
    again = run(grid_file)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert (grid.results / "small-text-r16-s0.json").stat().st_mtime_ns == before
    return again.stdout


def test_a_killed_grid_continues_and_every_cell_has_its_result(grid_file, killed):
    grid = load_grid(grid_file)
    assert "continues from" in killed and "[2/4] small-flora-r16-segment-s0" in killed
    found = results(grid)
    assert list(found) == sorted(cell.name for cell in grid.all_cells()) and len(found) == 4
    for result in found.values():
        assert list(result["missing"]) == ["0", "0.25", "0.5", "0.75", "1"]
        assert all(0 <= scores["eer"] <= 1 and scores["num_answered"] == 14 for scores in result["missing"].values())
        assert result["training"]["steps"] == 4 and result["training"]["samples"] > 4


def test_parts_and_bases_are_what_the_methods_say(grid_file, killed):
    found = results(load_grid(grid_file))
    flora, full, text = (found[f"small-{name}-s0"] for name in ("flora-r16-segment", "full", "text-r16"))
    assert full["parameters"]["share"] == 1.0
    assert 0 < flora["parameters"]["trained"] < full["parameters"]["total"]
    assert flora["parameters"]["total"] - full["parameters"]["total"] == NUM_IN_PAIRS
    # Without recordings FLoRA is the text-only model that it starts from.
    assert flora["missing"]["1"]["accuracy"] == text["missing"]["1"]["accuracy"]
    assert flora["missing"]["1"]["eer"] == pytest.approx(text["missing"]["1"]["eer"], abs=1e-6)
    assert text["missing"]["0"] == text["missing"]["1"]


def test_the_recording_is_heard(grid_file, killed):
    (folder,) = (load_grid(grid_file).work / "evaluations").glob("small-flora-*")
    with_, without = (evaluations.lines(folder / f"missing-{share}") for share in (0, 1))
    assert all(a["likelihoods"] != b["likelihoods"] for a, b in zip(with_, without, strict=True))


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_is_finished_is_never_run_again(grid_file, killed, stop, capfd):
    grid = load_grid(grid_file)
    before = {path: path.stat().st_mtime_ns for path in grid.results.iterdir()}
    assert runner.run_cells(grid, grid.all_cells(), stop) == 0
    assert {path: path.stat().st_mtime_ns for path in grid.results.iterdir()} == before and not capfd.readouterr().out
    listed = runner.listing(grid, grid.chosen("small-f*"))
    assert listed.count("done") == 3 and "3 cells, 0 to do" in listed


def test_an_unbroken_grid_has_the_same_results(grid_file, killed, tmp_path):
    grid = load_grid(grid_file)
    places = [f"work={tmp_path / 'work'}", f"results={tmp_path / 'results'}"]
    done = run(grid_file, *places, "--cells", "small-flora*")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    before, now = results(grid), results(load_grid(grid_file, places))
    assert list(now) == ["small-flora-r16-segment-s0", "small-text-r16-s0"]
    for name, result in now.items():
        for key in ("missing", "training", "parameters", "config_sha256", "data_sha256"):
            assert result[key] == before[name][key], key


@pytest.mark.parametrize(
    ("override", "message"), [("stage.steps=5", "are of another grid.yaml"), ("data.test=TRAIN", "are of other shards")]
)
def test_results_of_another_grid_or_other_shards_are_not_mixed(grid_file, killed, stop, override, message):
    changed = override.replace("TRAIN", load_grid(grid_file).data.train)
    grid = load_grid(grid_file, [changed, "cells.0.seeds=[0, 1]"])
    with pytest.raises(ValueError, match=message):
        runner.run_cells(grid, grid.all_cells(), stop)


def test_a_cell_that_fails_does_not_stop_the_others(grid_file, killed, stop, process_group, tmp_path, capfd):
    """Its checkpoint is damaged; the next cell is run all the same."""
    grid = load_grid(grid_file, [f"results={tmp_path}"])
    text, early = grid.text_cell(grid.cell("small", "early", 0)), grid.cell("small", "early", 0)
    workshop = Workshop(grid, stop)
    broken = workshop.run(early).folder / STAGE / "step-000004"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="1 cells failed: small-early-s0"):
        runner.run_cells(grid, [text, early, grid.cell("small", "flora", 0)], stop)
    assert "small-early-s0 failed: " in capfd.readouterr().out
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["small-flora-r16-segment-s0", "small-text-r16-s0"]


def test_a_mixture_of_two_evaluations_is_the_evaluation_with_a_share_missing(grid_file, tmp_path):
    """So that three of the five shares need no asking."""
    loaded, test = evaluations.awake(), load_grid(grid_file).data.test
    models.wake(loaded.model, seed=1)

    def scores(out: Path, share: float) -> dict[str, Any]:
        found = evaluate(loaded, "directed", test, out, None, Controls(missing={"audio": share}))
        return {name: found[name] for name in ("scores", "scores_by_presence", "changed_records") if name in found}

    for share in (0.0, 1.0):
        scores(runner._folder(tmp_path, share), share)
    runner._mix(tmp_path, 0.5)
    whole = scores(tmp_path / "whole", 0.5)
    assert 0 < whole["changed_records"]["missing audio"] < 16
    assert scores(runner._folder(tmp_path, 0.5), 0.5) == whole


def test_time_left_follows_measured_cells(grid_file, killed):
    grid = load_grid(grid_file)
    flora, audio = grid.cell("small", "flora", 0), grid.cell("small", "audio", 0)
    measured = results(grid)["small-flora-r16-segment-s0"]["seconds"]["wall"]
    assert runner.estimate_s(grid, flora) == pytest.approx(measured)
    assert runner.estimate_s(grid, audio) != grid.expected_s(audio)
