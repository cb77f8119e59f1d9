"""Learning-rate schedule: linear warm-up, then a cosine."""

from __future__ import annotations

import math

from mmchat.config import ScheduleConfig


def rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Share of the full learning rate at `step` (from 0) of `steps`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1 - schedule.min_ratio) * cosine
