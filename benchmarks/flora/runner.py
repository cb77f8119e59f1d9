"""Runs cells: training by train.py's own code, evaluation by infer.py's, one result a cell, and what is left to do."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.flora.grid import STAGE, Cell, Grid, read_result
from benchmarks.flora.prepare import Stopped, Workshop, train
from benchmarks.measure import machine
from mmchat.checkpoint import checkpoints_in
from mmchat.config import RunConfig
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate
from mmchat.inference.load import load
from mmchat.inference.predictions import PREDICTIONS, RUN, write_file
from mmchat.models.packed import pack
from mmchat.models.skeleton import skeleton
from mmchat.training.log import duration
from mmchat.training.resume import claim
from mmchat.training.stage import StopRequest
from mmchat.training.trainable import select

SCORES = ("eer", "far_at_frr_10", "accuracy")


def status(grid: Grid, cell: Cell) -> str:
    """`done`, `to do`, or `other configuration`: a result that this grid.yaml does not describe."""
    found = read_result(grid.result(cell))
    if found is None:
        return "to do"
    return "done" if found["config_sha256"] == grid.config_sha256(cell) else "other configuration"


def listing(grid: Grid, cells: Sequence[Cell]) -> str:
    """A line a cell, in the order in which they run, with the time that each takes or should take."""
    lines = [f"{'cell':<36}{'state':<22}time"]
    for cell in cells:
        found = read_result(grid.result(cell))
        shown = duration(found["seconds"]["wall"]) if found else f"about {duration(estimate_s(grid, cell))}"
        lines.append(f"{cell.name:<36}{status(grid, cell):<22}{shown}")
    left = [cell for cell in cells if status(grid, cell) == "to do"]
    whole = sum(estimate_s(grid, cell) for cell in left)
    return "\n".join([*lines, f"{len(cells)} cells, {len(left)} to do, about {duration(whole)} left"])


def estimate_s(grid: Grid, cell: Cell) -> float:
    """Seconds that a cell should take: as measured ones of its size did against what was expected of them."""
    ratios: dict[bool, list[float]] = {True: [], False: []}  # of the same method, and of others of the size
    for other in grid.all_cells():
        if other.size == cell.size and (found := read_result(grid.result(other))) is not None:
            ratios[other.method == cell.method].append(found["seconds"]["wall"] / grid.expected_s(other))
    measured = ratios[True] or ratios[False]
    return grid.expected_s(cell) * (statistics.median(measured) if measured else 1.0)


def run_cells(grid: Grid, cells: Sequence[Cell], stop: StopRequest, hours: float | None = None) -> int:
    """Runs what is to do, in order; returns the number of cells that are left.

    Args:
        hours: no cell is begun that should not be done by then.
    Raises:
        ValueError: a result is of another grid.yaml or other shards, another process is at work in `work`, or, when all
            others are done, a cell failed.
        Stopped: on request; the same command continues.
    """
    started = time.monotonic()
    if changed := [cell.name for cell in cells if status(grid, cell) == "other configuration"]:
        raise ValueError(
            f"{len(changed)} results in {grid.results} are of another grid.yaml: {', '.join(changed[:8])}. Move them "
            "away to run these cells again, or put grid.yaml back"
        )
    left = [cell for cell in cells if status(grid, cell) == "to do"]
    if not left:
        return 0
    claimed = claim(grid.work)
    workshop = Workshop(grid, stop)
    if other := [cell.name for cell in cells if _is_of_other_data(grid, cell, workshop)]:
        raise ValueError(
            f"{len(other)} results in {grid.results} are of other shards: {', '.join(other[:8])}. Move them away to "
            "run these cells again, or name those shards in grid.yaml"
        )
    failed: list[str] = []
    for number, cell in enumerate(left):
        whole = sum(estimate_s(grid, one) for one in left[number:])
        seconds = time.monotonic() - started
        if hours is not None and number and seconds + estimate_s(grid, cell) > 3600 * hours:
            print(f"{duration(seconds)} are over; {len(left) - number} cells are left, about {duration(whole)}")
            return len(left) - number
        if stop.is_set:  # while the last cell was evaluated
            raise Stopped
        place = len(cells) - len(left) + number + 1
        print(f"\n[{place}/{len(cells)}] {cell.name}; about {duration(whole)} left", flush=True)
        try:
            result = run_cell(grid, cell, workshop)
        except (ValueError, RuntimeError) as error:  # hours of other cells should not be lost for one
            print(f"{cell.name} failed: {error}", flush=True)
            failed.append(cell.name)
            continue
        shown = "  ".join(f"{float(share):.0%} {scores['eer']:.4f}" for share, scores in result["missing"].items())
        print(f"{cell.name}: EER by share of audio missing: {shown}; {duration(result['seconds']['wall'])}", flush=True)
        gc.collect()
    del claimed
    if failed:
        raise ValueError(f"{len(failed)} cells failed: {', '.join(failed)}. The same command tries them again")
    return 0


def run_cell(grid: Grid, cell: Cell, workshop: Workshop) -> dict[str, Any]:
    """Trains and evaluates one cell and writes its result, from wherever an earlier run of it stopped."""
    config = workshop.run(cell)
    started = time.monotonic()
    if not checkpoints_in(config.folder / STAGE):  # what an earlier training left is of another model
        shutil.rmtree(_evaluations(grid, config), ignore_errors=True)
    train(config, workshop.stop)
    gc.collect()
    if cell == grid.text_cell(cell):
        workshop.keep_base(cell, config.folder)
    trained_s = time.monotonic() - started
    missing = evaluate_cell(grid, cell, config, workshop)
    evaluation_s = time.monotonic() - started - trained_s
    steps = _steps(config)
    # As the log has it, where training was done in several goes.
    training_s = max(trained_s, sum(step["seconds"] for step in steps))
    result = {
        "cell": {name: getattr(cell, name) for name in ("name", "size", "method", "rank", "scope", "seed")},
        "config_sha256": grid.config_sha256(cell),
        "data_sha256": workshop.data_sha256,
        "parameters": parameters(config),
        "missing": missing,
        "training": {
            "steps": len(steps),
            "samples": sum(step["samples"] for step in steps),
            "tokens": sum(step["tokens"] for step in steps),
            "last_loss": statistics.fmean(step["loss"] for step in steps[-20:] if step["loss"] is not None),
        },
        "seconds": {
            "training": round(training_s, 1),
            "evaluation": round(evaluation_s, 1),
            "wall": round(training_s + evaluation_s, 1),
        },
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "mmchat": version("mmchat"),
    }
    grid.results.mkdir(parents=True, exist_ok=True)
    write_file(grid.result(cell), json.dumps(result, indent=1, allow_nan=False) + "\n")
    for folder in (config.folder / STAGE).glob("step-*"):
        shutil.rmtree(folder)  # the log stays
    return result


def evaluate_cell(grid: Grid, cell: Cell, config: RunConfig, workshop: Workshop) -> dict[str, dict[str, Any]]:
    """Scores by the share of recordings that are missing, "0" to "1".

    Every question is asked alone, with its recording and without; those are two evaluations. A share between takes each
    answer from one of them, as `infer.py evaluate --missing` draws the records, and is scored by the same code; where
    nothing is heard anyway, one evaluation says all.
    """
    method = grid.methods[cell.method]
    out = _evaluations(grid, config)
    loaded = load(config.folder, "float32")
    pack(loaded.model)
    shards = workshop.features("test") if method.hears else grid.data.test

    def scores(share: float) -> dict[str, Any]:
        controls = Controls(missing={"audio": share} if method.hears else {})
        found = evaluate(loaded, method.task, shards, _folder(out, share), None, controls, grid.num_test)
        counts = {name: found[name] for name in ("num_questions", "num_answered")}
        return {name: found["scores"][name] for name in SCORES} | counts

    if not method.hears:
        alike = scores(0.0)
        return {f"{share:g}": alike for share in grid.missing}
    ends = {share: scores(share) for share in (0.0, 1.0)}
    found = {}
    for share in sorted(grid.missing):
        if share not in ends:
            _mix(out, share)
        found[f"{share:g}"] = ends.get(share) or scores(share)
    return found


def parameters(config: RunConfig) -> dict[str, float]:
    """Of the model without its encoder: all, those that the cell trains, and their share."""
    (stage,) = config.stages
    parts = select(skeleton(config.model, torch.float32), stage, config.model.fusion.kind == "full")
    total = sum(part.num_parameters for part in parts if not part.name.startswith("encoders."))
    trained = sum(part.num_parameters for part in parts if part.rate)
    return {"total": total, "trained": trained, "share": trained / total}


def _mix(out: Path, share: float) -> None:
    """Lays the answers of an evaluation with this share missing together from those of none and all missing.

    `evaluate` finds them as its own, compares every question with its records, and scores them.
    """
    controls = Controls(missing={"audio": share})
    present, absent = ((_folder(out, end) / PREDICTIONS).read_text().splitlines() for end in (0.0, 1.0))
    setting = json.loads((_folder(out, 0.0) / RUN).read_text()) | {"controls": controls.model_dump(mode="json")}
    folder = _folder(out, share)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = [
        without if controls.is_missing("audio", json.loads(with_)["key"]) else with_
        for with_, without in zip(present, absent, strict=True)
    ]
    write_file(folder / RUN, json.dumps(setting, indent=1, ensure_ascii=False) + "\n")
    write_file(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))


def _evaluations(grid: Grid, config: RunConfig) -> Path:
    return grid.work / "evaluations" / config.run


def _folder(out: Path, share: float) -> Path:
    return out / f"missing-{share:g}"


def _steps(config: RunConfig) -> list[dict[str, Any]]:
    """Every step of the cell's training, from its log."""
    lines = map(json.loads, (config.folder / STAGE / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "event" not in line]


def _is_of_other_data(grid: Grid, cell: Cell, workshop: Workshop) -> bool:
    found = read_result(grid.result(cell))
    return found is not None and found["data_sha256"] != workshop.data_sha256
