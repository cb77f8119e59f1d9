"""What a stage will consume, before any GPU is taken: its packs planned by the trainer's own packer, nothing decoded.

Sizes come from the shards' indexes and facts, parameters from a skeleton of the model on the meta device. No weight
file is opened, no process group started, no GPU touched.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmchat.batch import IGNORE, FeatureShape
from mmchat.checkpoint import checkpoints_in
from mmchat.config import RunConfig, StageConfig
from mmchat.conversation import MODALITIES, Modality
from mmchat.data.build import build_template
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.mixture import Mixture
from mmchat.data.pack import LanePacker
from mmchat.modalities import Excerpt
from mmchat.models.mmchat import MMChat
from mmchat.models.skeleton import skeleton
from mmchat.training.flops import PEAKS, FlopCounter
from mmchat.training.log import duration
from mmchat.training.memory import MicroBatch, activations, model_state
from mmchat.training.plan_table import plan_table
from mmchat.training.start import open_start, origin
from mmchat.training.trainable import Part, select

USUAL_RANKS = (1, 8, 64)
MANY_EPOCHS = 10
FEW_LEARNED = 0.01
# The time that is worked out from the FLOPs; 30 % of the peak is a usual share for packs with media.
GPU, UTILISATION = "H100", 0.3
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class PackPlan:
    """One planned pack. Counters hold its media by (modality, what), its samples by (source, what)."""

    lane: int
    keys: tuple[str, ...]
    lengths: tuple[int, ...]
    num_learned: int
    shapes: dict[Modality, list[FeatureShape]]
    media: Counter[tuple[Modality, str]]
    sources: Counter[tuple[str, str]]
    reasons: Counter[str]
    excerpts: tuple[Excerpt, ...]

    def size(self, what: str) -> int:
        """Its "tokens", or its encoder "patches"."""
        return sum(self.lengths) if what == "tokens" else sum(n for (_, w), n in self.media.items() if w == what)


def planned_steps(
    stage: StageConfig, seed: int, template: ChatTemplate, mixture: Mixture, workers: int = 0
) -> Iterator[list[PackPlan]]:
    """The packs of every step in the order of lanes, without end: what all ranks' loaders will deliver together."""
    source = _PlannedLanes(stage, seed, template, mixture)
    packs = iter(DataLoader(source, batch_size=None, num_workers=workers))
    while True:
        step = [pack for _ in range(max(1, workers)) for pack in next(packs)]
        yield sorted(step, key=lambda pack: pack.lane)


class _PlannedLanes(IterableDataset[list[PackPlan]]):
    """In each worker: one planned pack from each of its lanes, again and again."""

    def __init__(self, stage: StageConfig, seed: int, template: ChatTemplate, mixture: Mixture) -> None:
        self.stage, self.seed, self.template, self.mixture = stage, seed, template, mixture

    def __iter__(self) -> Iterator[list[PackPlan]]:
        info, stage = get_worker_info(), self.stage
        packers = {
            number: LanePacker(
                self.mixture.lane(self.seed, stage.name, number, stage.batch.lanes),
                self.mixture,
                self.template,
                stage.batch,
                self.seed,
                stage.name,
            )
            for number in range(stage.batch.lanes)[info.id if info else 0 :: info.num_workers if info else 1]
        }
        while True:
            yield [_pack_plan(number, packer) for number, packer in packers.items()]


def _pack_plan(lane: int, packer: LanePacker) -> PackPlan:
    planned = packer.next()
    shapes: dict[Modality, list[FeatureShape]] = {}
    media: Counter[tuple[Modality, str]] = Counter()
    sources: Counter[tuple[str, str]] = Counter()
    excerpts: list[Excerpt] = []
    for number, sample in planned:
        learned = sum(label != IGNORE for label in sample.labels)
        for what, count in (("samples", 1), ("tokens", len(sample)), ("learned", learned)):
            sources[number.source, what] += count
        for item in sample.media:
            shapes.setdefault(item.modality, []).append(item.plan.shape)
            excerpts += item.plan.excerpts
            for what, count in (("items", 1), ("tokens", item.num_placeholders), ("patches", item.plan.num_patches)):
                media[item.modality, what] += count
    bad = packer.take_bad()
    sources.update((sample.source, "left_out") for sample in bad)
    return PackPlan(
        lane,
        tuple(sample.key for _, sample in planned),
        tuple(len(sample) for _, sample in planned),
        sum(sources[source, what] for source, what in sources if what == "learned"),
        shapes,
        media,
        sources,
        Counter(sample.reason for sample in bad),
        tuple(excerpts),
    )


def print_plan(
    config: RunConfig, stages: Sequence[StageConfig], seconds: float, ranks: int | None, json_file: str | None
) -> None:
    """Prints the plan of each stage, and writes all of them to a file. Raises as plan_stage() does.

    Every stage's shards are looked for before the first is planned.
    """
    if json_file:
        check_writable(Path(json_file), "--plan-json")
    mixtures = [Mixture(stage.data, config.cache) for stage in stages]
    start = _start(config, stages)
    if start is not None:
        print(f"starts from {start['folder']} (run {start['run']}, stage {start['stage']}, step {start['step']})\n")
    plans = []
    for stage, mixture in zip(stages, mixtures, strict=True):
        plans.append(plan_stage(config, stage, seconds, ranks, mixture))
        print(plan_table(plans[-1]), end="\n\n", flush=True)
    if json_file:
        Path(json_file).write_text(json.dumps({"run": config.run, "start": start, "stages": plans}, indent=1) + "\n")


def _start(config: RunConfig, stages: Sequence[StageConfig]) -> dict[str, Any] | None:
    """What the first of the run's stages will begin with; None where it has begun, or is not planned."""
    first = config.stages[0]
    if config.start is None or first not in stages or checkpoints_in(config.folder / first.name):
        return None
    checkpoint, changed = open_start(config)
    for line in changed:
        print(f"warning: not as in the run it starts from: {line}")
    return origin(checkpoint)


def check_writable(path: Path, option: str) -> None:
    """Makes the folders of a file that is written when long work is done. Raises ValueError if it cannot be written."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_new or not path.is_fifo():  # opening a pipe waits for its reader
            path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror}; name another file") from error


class _Totals:
    """What packs add up to, and the largest of them."""

    def __init__(self, counter: FlopCounter) -> None:
        self.counter = counter
        self.media: Counter[tuple[Modality, str]] = Counter()
        self.sources: Counter[tuple[str, str]] = Counter()
        self.reasons: Counter[str] = Counter()
        self.excerpts: dict[tuple[str, str], list[float]] = {}  # by rule and unit: items, shown, whole
        self.flops = 0.0
        self.largest: dict[str, tuple[int, PackPlan]] = {}  # by what it has most of: step, pack

    def add(self, step: int, pack: PackPlan) -> None:
        self.media.update(pack.media)
        self.sources.update(pack.sources)
        self.reasons.update(pack.reasons)
        for one in pack.excerpts:
            counts = self.excerpts.setdefault((one.rule, one.unit), [0, 0, 0])
            counts[:] = [sum(pair) for pair in zip(counts, (1, one.shown, one.whole), strict=True)]
        sizes = {str(m): (sum(map(math.prod, s)), pack.media[m, "tokens"]) for m, s in pack.shapes.items()}
        self.flops += self.counter.count_sizes(pack.lengths, pack.num_learned, sizes)
        for what in ("tokens", "patches"):
            if what not in self.largest or pack.size(what) > self.largest[what][1].size(what):
                self.largest[what] = (step, pack)

    def scale(self, factor: float) -> None:
        """From the packs that were planned to all; not of `sources`, which are drawn by weight."""
        self.flops *= factor
        self.media = Counter({key: round(count * factor) for key, count in self.media.items()})
        self.reasons = Counter({key: round(count * factor) for key, count in self.reasons.items()})
        self.excerpts = {key: [count * factor for count in counts] for key, counts in self.excerpts.items()}


def plan_stage(
    config: RunConfig, stage: StageConfig, seconds: float, ranks: int | None = None, mixture: Mixture | None = None
) -> dict[str, Any]:
    """A stage's plan, as JSON.

    Args:
        seconds: time for planning packs. Where all steps do not fit, totals are extrapolated from the first ones.
        ranks: of the memory estimate; None: the usual numbers that divide the lanes.
        mixture: the stage's; None: it is opened here.
    Raises:
        ValueError: the configuration or the data cannot be used. RuntimeError: a lane has nothing but bad samples.
    """
    batch, joined = stage.batch, stage.batch.packs_per_micro_batch
    fitting = [n for n in (USUAL_RANKS if ranks is None else [ranks]) if n > 0 and batch.lanes % (n * joined) == 0]
    if not fitting:
        raise ValueError(
            f"stage {stage.name}: batch.lanes {batch.lanes} must be a multiple of ranks x packs_per_micro_batch "
            f"({ranks} x {joined})"
        )
    mixture = mixture or Mixture(stage.data, config.cache)  # what is missing here shows before a hub is asked
    template = build_template(config)
    model = skeleton(config.model, getattr(torch, stage.dtype))
    parts = select(model, stage, config.model.fusion.kind == "full")

    totals, done, started = _Totals(FlopCounter(model, bool(stage.losses.answers))), 0, time.monotonic()
    said = started
    workers = min(len(os.sched_getaffinity(0)), batch.lanes) if stage.workers else 0
    for packs in itertools.islice(planned_steps(stage, config.seed, template, mixture, workers), stage.steps):
        done += 1
        for pack in packs:
            totals.add(done, pack)
        now = time.monotonic()
        if now - started > seconds:
            break
        if now - said > SAY_EVERY_S:
            said = now
            left = min(seconds - (now - started), (now - started) / done * (stage.steps - done))
            print(f"{stage.name}: planned {done} of {stage.steps} steps, {duration(left)} left", file=sys.stderr)
    factor = stage.steps / done
    totals.scale(factor)

    micro_batches = [_micro_batch(pack, joined) for _, pack in totals.largest.values()]
    kept = activations(model, stage, micro_batches, config.model.llm.gradient_checkpointing)
    plan = {
        "stage": stage.name,
        "steps": stage.steps,
        "steps_planned": done,
        "is_exact": done == stage.steps,
        **_consumed(config, stage, mixture, totals, factor),
        "parts": [{"name": p.name, "parameters": p.num_parameters, "learns": p.rate is not None} for p in parts],
        "memory": [{"ranks": n, **model_state(stage, parts, n), **kept} for n in fitting],
        "flops": totals.flops,
        "time": {
            "gpu": GPU,
            "peak_flops": PEAKS[GPU],
            "utilisation": UTILISATION,
            "gpu_hours": totals.flops / (PEAKS[GPU] * UTILISATION) / 3600,
        },
    }
    return plan | {"warnings": _warnings(stage, plan, parts, model)}


def _micro_batch(pack: PackPlan, joined: int) -> MicroBatch:
    """A micro-batch of nothing but such packs."""
    media = {name: (shapes * joined, pack.media[name, "patches"] * joined) for name, shapes in pack.shapes.items()}
    return MicroBatch(pack.size("tokens") * joined, media)


def _consumed(
    config: RunConfig, stage: StageConfig, mixture: Mixture, totals: _Totals, factor: float
) -> dict[str, Any]:
    """The samples and media of the plan: in all, by source, by modality, by reason, and of the largest packs.

    factor: all steps to those planned. Where that is more than 1, a source's samples follow from its weight, and its
    tokens from the samples of it that were planned; they are None where there were none.
    """
    whats = ("samples", "left_out", "tokens", "learned")
    sums = {what: round(factor * sum(n for (_, w), n in totals.sources.items() if w == what)) for what in whats}
    sources = []
    for source, sizes, weight in zip(stage.data, mixture.sources, mixture.weights, strict=True):
        planned = {what: totals.sources[source.name, what] for what in whats}
        counts: dict[str, int | None] = {**planned}
        drawn: float = planned["samples"] + planned["left_out"]
        if factor > 1:
            expected = weight * (sums["samples"] + sums["left_out"])
            counts = {what: round(n * expected / drawn) if drawn else None for what, n in planned.items()}
            if not drawn:
                counts["samples"] = round(expected)
            drawn = expected
        epochs = drawn / sizes.num_samples
        facts = {"name": source.name, "task": source.task, "weight": weight, "in_shards": sizes.num_samples}
        sources.append({**facts, **counts, "epochs": epochs})
    return {
        "lanes": stage.batch.lanes,
        "pack_tokens": stage.batch.tokens,
        **sums,
        "padding": 1 - sums["tokens"] / (stage.steps * stage.batch.lanes * stage.batch.tokens),
        "sources": sources,
        "modalities": {
            modality: {what: totals.media[modality, what] for what in ("items", "tokens", "patches")}
            for modality in config.model.modalities.entries()
        },
        "left_out_by_reason": dict(totals.reasons.most_common()),
        "excerpts": [
            {"rule": rule, "items": round(items), "shown": shown, "whole": whole, "unit": unit}
            for (rule, unit), (items, shown, whole) in totals.excerpts.items()
        ],
        "largest": {
            what: {"step": step, "lane": pack.lane, "samples": list(pack.keys)}
            | {size: pack.size(size) for size in ("tokens", "patches")}
            for what, (step, pack) in totals.largest.items()
        },
    }


def _warnings(stage: StageConfig, plan: dict[str, Any], parts: Sequence[Part], model: MMChat) -> list[str]:
    found = []
    for source in plan["sources"]:
        name, left_out = source["name"], source["left_out"] or 0
        drawn = source["samples"] + left_out
        if source["epochs"] > MANY_EPOCHS:
            found.append(f"{name}: drawn {source['epochs']:.1f} times over; lower its weight or steps, or add data")
        if not drawn:
            found.append(f"{name}: never drawn; raise its weight")
        elif left_out > stage.bad_samples * drawn:
            found.append(
                f"{name}: {left_out:,} of {drawn:,} samples left out ({left_out / drawn:.1%}); "
                f"bad_samples: {stage.bad_samples:g} tolerates less, and the run may stop"
            )
        if source["tokens"] and source["learned"] < FEW_LEARNED * source["tokens"]:
            found.append(f"{name}: only {source['learned'] / source['tokens']:.2%} of its tokens are learned")
    unseen = any(source["tokens"] is None for source in plan["sources"])
    for part in [] if unseen else parts:  # a source of which nothing was planned may hold any modality
        kind, _, modality = part.name.partition(".")
        if part.rate is None or modality not in MODALITIES:
            continue
        users = [name for name in plan["modalities"] if kind == "encoders" and model.shared.get(name) == modality]
        if not any(plan["modalities"][name]["items"] for name in [modality, *users]):
            found.append(f"{part.name} should learn, but no {modality} is in the packs that were planned")
    return found
