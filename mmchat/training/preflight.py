"""Before step 1: the largest planned pack through a whole step, so that what would fail later fails now."""

from __future__ import annotations

import math
import resource
import time

import torch

from mmchat import distributed
from mmchat.batch import Batch
from mmchat.config import RunConfig, StageConfig
from mmchat.data.chat_template import ChatTemplate
from mmchat.data.loader import Loader
from mmchat.data.mixture import Mixture
from mmchat.data.pack import LanePacker, collate, join, load_media
from mmchat.errors import SampleError
from mmchat.training.engine import Engine
from mmchat.training.log import TrainLog, duration
from mmchat.training.trainable import Part

REHEARSED_PACKS = 4


def preflight(
    config: RunConfig,
    stage: StageConfig,
    engine: Engine,
    parts: list[Part],
    template: ChatTemplate,
    mixture: Mixture,
    loader: Loader,
    log: TrainLog,
) -> None:
    """Takes the largest of the first planned packs through a whole step at learning rate 0, and looks at the result.

    Raises:
        ValueError: the loss is not finite, or a part that learns has no gradient though its modality is there.
    """
    started = time.perf_counter()
    batch = _largest_pack(config, stage, template, mixture, loader)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result, gradients = engine.rehearse([batch] * loader.num_micro_batches)
    if not math.isfinite(result.loss_sum) or result.is_skipped:
        raise ValueError(
            f"preflight: the loss of the first packs is not finite ({result.loss_sum}): {', '.join(batch.keys[:8])}"
        )
    present = distributed.sum_over_ranks([int(name in batch.media) for name in engine.model.connectors])
    seen = {name for name, count in zip(engine.model.connectors, present, strict=True) if count}
    num_boxes = sum(distributed.sum_over_ranks([batch.num_boxes]))
    fusion_learns = any(part.name == "fusion" and part.rate for part in parts)
    silent: list[str] = []
    absent: list[str] = []
    for part in parts:
        if part.rate is None or any(gradients.get(name, 0.0) > 0 for name in part.parameters):
            continue
        modality = part.name.rpartition(".")[2]
        needs_media = part.name.startswith(("connectors.", "encoders.", "readouts."))
        if needs_media and engine.model.late is not None:
            # Late fusion's output starts at zero: what lies before it learns from its first steps on.
            if fusion_learns:
                continue
            raise ValueError(
                f"preflight: {part.name} learns through late fusion only; name `fusion` in this stage's train table, "
                "or train it in a stage before"
            )
        # What shards have no media for yet is fine: a modality's own parts, and where there is none at all, the rest.
        is_absent = modality not in seen if modality in engine.model.connectors else not seen
        if part.name.startswith("readouts.") or not stage.losses.answers:
            is_absent |= not num_boxes  # the only teacher
        (absent if is_absent else silent).append(part.name)
    if silent:
        raise ValueError(
            f"preflight: {', '.join(silent)} should learn but got no gradient from {', '.join(batch.keys[:4])}. "
            "A detached tensor, or nothing learned depends on it"
        )
    if absent:
        log.say(f"preflight: no media or boxes for {', '.join(absent)} in the first packs; nothing learns there yet")
    memory = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    media = {name: len(item.shapes) for name, item in batch.media.items()}
    log.say(
        f"preflight: largest of {REHEARSED_PACKS} packs a lane: {batch.token_ids.numel():,} tokens, "
        f"{batch.num_learned:,} learned, media {media or 'none'}; peak memory {memory / 1e9:.2f} GB; "
        f"{duration(time.perf_counter() - started)}"
    )


def _largest_pack(
    config: RunConfig, stage: StageConfig, template: ChatTemplate, mixture: Mixture, loader: Loader
) -> Batch:
    """The largest of the first packs of this rank's first lanes, joined as a micro-batch would be."""
    planned = []
    for number in loader.lanes[: stage.batch.packs_per_micro_batch]:
        lane = mixture.lane(config.seed, stage.name, number, stage.batch.lanes)
        packer = LanePacker(lane, mixture, template.without_dropout(), stage.batch, config.seed, stage.name)
        packs = [[sample for _, sample in packer.next()] for _ in range(REHEARSED_PACKS)]
        planned.append(max(packs, key=lambda pack: sum(len(s) + s.num_patches for s in pack)))
    batches = []
    for pack in planned:
        samples, media = [], []
        for sample in pack:
            try:
                media.append(load_media(sample, template))
                samples.append(sample)
            except SampleError:
                continue  # counted when the loop comes to it
        samples, media = (samples, media) if samples else ([template.stub("none")], [[]])
        batches.append(collate(samples, media))
    return join(batches)
