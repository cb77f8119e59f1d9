"""One training stage from start or resume to its last checkpoint. A stage is configuration; this is the loop."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch

from mmchat import distributed
from mmchat.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_weights,
    newest,
    prune,
    write_checkpoint,
)
from mmchat.config import LossConfig, RunConfig, StageConfig, dump_config
from mmchat.data.build import build_template
from mmchat.data.loader import Loader, Step
from mmchat.data.mixture import Mixture
from mmchat.models.connector import Connector
from mmchat.models.parts import names_in, part_of
from mmchat.models.probe import probe_logits
from mmchat.training.engine import Engine, gather, partition
from mmchat.training.flops import FlopCounter, peak_flops
from mmchat.training.log import TrainLog, duration
from mmchat.training.losses import Objective, kept_connectors
from mmchat.training.preflight import preflight
from mmchat.training.resume import bases, check_probe, check_same_run, last_of, refuse_later_stages
from mmchat.training.schedule import rate_factor
from mmchat.training.start import check_parts, open_start, origin
from mmchat.training.start_as import with_copies
from mmchat.training.trainable import select, table


class StopRequest:
    """SIGTERM and SIGUSR1 (SLURM's warning) end the run after the step in flight; a later one ends it at once.

    Repeats within seconds are the same request: a launcher passes on what its whole process group received.
    """

    REPEAT_S = 5.0

    def __init__(self) -> None:
        self.is_set = False
        self.received_s = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.is_set and now - self.received_s > self.REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.is_set:
            self.is_set, self.received_s = True, now


def train_stage(
    config: RunConfig,
    stage: StageConfig,
    previous: Path | None,
    stop: StopRequest,
    preflight_only: bool = False,
) -> Literal["done", "stopped", "rehearsed"]:
    """Trains one stage, or continues it, or finds it done.

    Args:
        previous: folder of the stage before it, whose last checkpoint it starts from.
    Returns:
        "done" (now or before), "stopped" where a stop was requested before the last step, or "rehearsed" after a
        preflight alone.
    Raises:
        ValueError: the configuration, the data or a checkpoint cannot be used.
    """
    folder = config.folder / stage.name
    resumed = newest(folder)
    if resumed is not None:
        check_same_run(config, stage, resumed)
        if resumed.step >= stage.steps:
            past = f", which is past its {stage.steps} steps" if resumed.step > stage.steps else ""
            _say(stage, f"done already: {resumed.folder}{past}")
            return "done"
        refuse_later_stages(config, stage, resumed)
    start = resumed or last_of(config, previous, stage)
    if resumed is None and start is not None:
        _say(stage, f"starts from {start.folder}")
    began_with = start.manifest.get("start") if start is not None else None
    is_other_run = start is None and config.start is not None
    if is_other_run:
        start = _open_start(config, stage)
        began_with = origin(start)
    step = resumed.step if resumed is not None else 0
    mixture = Mixture(stage.data, config.cache)

    model = config.model.build(getattr(torch, stage.dtype), config.seed, lambda: partition(stage), gather)
    is_full = config.model.fusion.kind == "full"
    held = set(start.manifest["parts"]) if start is not None else set()
    weights: dict[str, torch.Tensor] = {}
    if start is not None:
        weights = start.weights()
        if is_other_run:
            fresh = set(check_parts(model, start, is_full))
            weights = with_copies(weights, config.start_as, config.model.fusion)
            held = {part_of(name, is_full) for name in weights}
            anew = ", ".join(sorted(fresh - held)) or "nothing"
            _say(stage, f"not in that checkpoint, so begun anew: {anew}")
            for new, old in config.start_as.items():
                _say(stage, f"{new} begins as {old}")
        expected = names_in(model, held, is_full)
        load_weights(model, weights, expected, start.folder, lambda ps: gather(ps, modify=True))
    parts = select(model, stage, is_full)
    _check_losses(stage, {part.name for part in parts if part.rate})
    kept: dict[str, Connector] = {}
    if stage.losses.keep:
        began = weights if resumed is None else _weights_at_begin(config, stage, previous, resumed)
        kept = kept_connectors(model, began)
        del began
    held |= {part.name for part in parts if part.rate}
    _say(stage, f"{len(mixture.sources)} sources, {sum(s.num_samples for s in mixture.sources):,} samples")
    _say(stage, "\n" + table(parts))

    template = build_template(config)
    states = {int(lane): s for lane, s in resumed.state["lanes"].items()} if resumed is not None else None
    loader = Loader(stage, config.seed, template, distributed.rank(), distributed.world_size(), states, mixture)
    engine = Engine(model, parts, stage, loader.num_micro_batches)
    engine.model.train()
    if stage.losses != LossConfig():
        engine.model.objective = Objective(stage.losses, {m: part.to(engine.device) for m, part in kept.items()})
    if start is not None:
        check_probe(engine, start)
    log = TrainLog(folder, config.run, stage.name, stage.steps, step, config.log)
    preflight(config, stage, engine, parts, template, mixture, loader, log)
    engine.set_masters(weights)
    # What an earlier stage trained and this one leaves frozen is saved again as it was, in its full precision.
    learning = {part.name for part in parts if part.rate}
    frozen = {name: value for name, value in weights.items() if part_of(name, is_full) not in learning}
    del weights
    if resumed is not None:
        engine.set_moments(resumed.moments(), step)
        log.say(f"continues from {resumed.folder}")
    if preflight_only:
        log.close()
        engine.close()
        return "rehearsed"

    trainer = _Loop(config, stage, engine, loader, log, held, frozen, began_with, resumed)
    del start, resumed
    finished = trainer.run(step, stop)
    log.close()
    engine.close()
    return "done" if finished else "stopped"


class _Loop:
    """The loop and the counters that survive a resume."""

    def __init__(
        self,
        config: RunConfig,
        stage: StageConfig,
        engine: Engine,
        loader: Loader,
        log: TrainLog,
        held: set[str],
        frozen: dict[str, torch.Tensor],
        began_with: dict[str, Any] | None,
        resumed: Checkpoint | None,
    ) -> None:
        self.config, self.stage, self.engine, self.loader, self.log = config, stage, engine, loader, log
        self.held, self.frozen, self.began_with = held, frozen, began_with
        state = resumed.state if resumed is not None else {}
        self.lanes: dict[int, dict[str, Any]] = {int(k): v for k, v in state.get("lanes", {}).items()}
        self.num_seen = int(state.get("num_seen", 0))
        self.bad: Counter[str] = Counter(state.get("bad", {}))
        self.skipped_in_a_row = 0
        self.shards = loader.mixture.fingerprint()
        if resumed is not None and state["shards"] != self.shards:
            raise CheckpointError(
                f"{resumed.folder}: the shards are not those that it was trained on (others, or in another order), so "
                "its place in them means nothing. Restore them, or give the run another name (run=...)"
            )
        self.flops = FlopCounter(engine.model, bool(stage.losses.answers))
        self.peak = peak_flops()

    def run(self, step: int, stop: StopRequest) -> bool:
        while step < self.stage.steps:
            started = time.perf_counter()
            data = self.loader.next_step()
            factor = rate_factor(step, self.stage.steps, self.stage.schedule)
            totals = _totals(self.stage, data, stop, sum(self.flops.count(batch) for batch in data.batches))
            seed = _step_seed(self.config.seed, self.stage.name, step)
            result = self.engine.train_step(data.batches, totals["learned"], factor, seed)
            step += 1
            self.lanes.update(data.states)
            self._count_bad(step, data, totals)
            self._guard(step, data, result.is_skipped)
            seconds = time.perf_counter() - started
            loss = result.loss_sum / max(1, totals["learned"])
            self.log.step(
                step,
                {
                    "loss": loss if math.isfinite(loss) else None,
                    "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else 0.0,
                    "skipped": result.is_skipped,
                    "rate_factor": factor,
                    "tokens": totals["tokens"],
                    "learned": totals["learned"],
                    "samples": totals["samples"],
                    "samples_hash": totals["hash"],
                    "bad_samples": sum(self.bad.values()),
                    "padding": 1 - totals["tokens"] / totals["capacity"],
                    "tokens_per_s": totals["tokens"] / seconds,
                    "learned_per_s": totals["learned"] / seconds,
                    "wait_share": data.wait_s / seconds,
                    "gflops": totals["megaflops"] / 1e3,
                    "mfu": totals["megaflops"] * 1e6 / seconds / (self.peak * distributed.world_size())
                    if self.peak
                    else None,
                    "seconds": seconds,
                },
            )
            is_last = step == self.stage.steps
            if is_last or totals["stop"] or step % self.stage.save_every == 0:
                self._save(step, must=is_last or bool(totals["stop"]))
            if totals["stop"] and not is_last:
                self.log.say(f"stopped by request after step {step}; run the same command again to continue")
                return False
        return True

    def _count_bad(self, step: int, data: Step, totals: dict[str, int]) -> None:
        self.num_seen += totals["samples"]
        if totals["bad"]:
            for reported in distributed.gather_to_main(data.bad) or []:
                for bad in reported:
                    self.bad[bad.reason] += 1
                    self.log.bad_sample(step, bad.source, bad.key, bad.reason, bad.detail)
            self.bad = distributed.from_main(self.bad)
        total = sum(self.bad.values())
        # A share of a handful of samples says nothing: a single bad one never stops a run.
        if total > max(1, self.stage.bad_samples * max(self.num_seen, 100)):
            raise ValueError(
                f"stage {self.stage.name}: {total} of {self.num_seen} samples could not be used "
                f"({', '.join(f'{n} {reason}' for reason, n in self.bad.most_common())}), more than bad_samples: "
                f"{self.stage.bad_samples:g}. They are listed in {self.config.folder / self.stage.name / 'log.jsonl'}; "
                "repair the shards or raise the tolerance"
            )

    def _guard(self, step: int, data: Step, is_skipped: bool) -> None:
        if not is_skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        keys = distributed.gather_to_main([key for batch in data.batches for key in batch.keys])
        named = [key for rank_keys in keys or [] for key in rank_keys]
        self.log.event(step, {"not_finite": named})
        self.log.say(f"step {step}: loss or gradient is not finite; skipped on all ranks: {', '.join(named[:8])}")
        if self.skipped_in_a_row >= self.stage.nan_steps:
            raise ValueError(
                f"stage {self.stage.name}: {self.skipped_in_a_row} steps in a row were not finite (nan_steps). The "
                f"samples are listed in {self.config.folder / self.stage.name / 'log.jsonl'}. Lower the learning "
                "rates, or look at the samples"
            )

    def _save(self, step: int, must: bool) -> None:
        started = time.perf_counter()
        is_full = self.config.model.fusion.kind == "full"
        names = names_in(self.engine.model, self.held, is_full) - self.frozen.keys()
        weights = self.engine.weights(sorted(names)) | self.frozen
        moments = self.engine.moments()
        probe = probe_logits(self.engine.model, self.engine.device)
        lanes: dict[int, Any] = {}
        for rank_lanes in distributed.gather_to_main(self.lanes) or []:
            lanes.update(rank_lanes)
        folder = self.config.folder / self.stage.name / f"step-{step:06d}"
        failure = ""
        if distributed.is_main():
            state = {
                "step": step,
                "shards": self.shards,
                "lanes": lanes,
                "num_seen": self.num_seen,
                "bad": dict(self.bad),
            }
            facts = {
                "run": self.config.run,
                "stage": self.stage.name,
                "step": step,
                "is_last": step == self.stage.steps,
                "start": self.began_with,
                "parts": sorted(self.held),
                "fusion": self.config.model.fusion.model_dump(mode="json"),
                "bases": bases(self.config),
                "probe": {"dtype": self.stage.dtype, "logits": probe},
            }
            try:
                write_checkpoint(folder, dump_config(self.config), weights, moments, state, facts)
                prune(folder.parent, self.stage.keep)
            except OSError as error:
                failure = str(error)
        failure = distributed.from_main(failure)
        if failure and must:
            raise ValueError(f"cannot save {folder}: {failure}. The last good checkpoint is untouched")
        if failure:
            self.log.say(f"could NOT save {folder}: {failure}; training goes on and tries again at the next save")
        else:
            self.log.say(f"saved {folder} in {duration(time.perf_counter() - started)}")


def _check_losses(stage: StageConfig, learning: set[str]) -> None:
    """Raises ValueError where a part that learns could not, or where nothing that is kept does."""
    losses, faults = stage.losses, []
    silent = sorted(name for name in learning if name.startswith(("fusion", "llm")))
    if silent and not losses.answers:
        faults.append(f"answers: 0 does not run the LLM, so that {', '.join(silent)} cannot learn")
    readouts = sorted(name for name in learning if name.startswith("readouts."))
    if readouts and not losses.regions:
        faults.append(f"{', '.join(readouts)} learns from `regions` alone, which is 0")
    if losses.keep and not any(name.startswith("connectors.") for name in learning):
        faults.append("`keep` holds connectors that learn, and none does")
    if faults:
        raise ValueError(f"stage {stage.name}: losses: {'; '.join(faults)}. Change `train` or `losses`")


def _weights_at_begin(
    config: RunConfig, stage: StageConfig, previous: Path | None, resumed: Checkpoint
) -> dict[str, torch.Tensor]:
    """What a stage that is continued had begun with; nothing where all began anew."""
    if (before := last_of(config, previous, stage)) is not None:
        return before.weights()
    if config.start is None:
        return {}
    start = open_start(config)[0]
    if origin(start)["manifest_sha256"] != (resumed.manifest.get("start") or {}).get("manifest_sha256"):
        raise CheckpointError(
            f"start: {start.folder} is not the checkpoint that {resumed.folder} began with, which `losses.keep` needs "
            "again. Name that one, or restore it"
        )
    return with_copies(start.weights(), config.start_as, config.model.fusion)


def _open_start(config: RunConfig, stage: StageConfig) -> Checkpoint:
    """The other run's checkpoint; what its configuration has otherwise is said. Raises CheckpointError."""
    start, changed = open_start(config)
    _say(stage, f"starts from {start.folder}, of another run")
    for line in changed:
        _say(stage, f"warning: not as in that run: {line}")
    return start


def _totals(stage: StageConfig, data: Step, stop: StopRequest, flops: float) -> dict[str, int]:
    """Whole-step sums over all ranks, in one collective."""
    digest = 0
    for number in data.numbers:
        word = f"{number.source}/{number.epoch}/{number.index}".encode()
        digest += int.from_bytes(hashlib.blake2b(word, digest_size=4).digest(), "little")
    values = {
        "tokens": data.num_tokens,
        "learned": data.num_learned if stage.losses.answers else data.num_boxes,
        "capacity": data.capacity,
        "samples": len(data.numbers),
        "bad": len(data.bad),
        "hash": digest,  # a sum, so that it does not depend on who drew which sample
        "megaflops": round(flops / 1e6),
        "stop": int(stop.is_set),
    }
    return dict(zip(values, distributed.sum_over_ranks(list(values.values())), strict=True))


def _step_seed(seed: int, stage: str, step: int) -> int:
    word = f"{seed}/{stage}/{step}/{distributed.rank()}".encode()
    return int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "little")


def _say(stage: StageConfig, text: str) -> None:
    if distributed.is_main():
        print(f"{stage.name:<10} {text}", flush=True)
