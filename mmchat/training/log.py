"""One console line a step, one JSON line a step, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mmchat import distributed
from mmchat.config import LogConfig


class TrainLog:
    """The log of one stage, on rank 0; on other ranks it does nothing.

    folder/log.jsonl holds every step exactly once, also after a resume: lines of steps that will be done again are
    cut off first.
    """

    def __init__(self, folder: Path, run: str, stage: str, steps: int, first_step: int, config: LogConfig) -> None:
        self.config = config
        self.stage = stage
        self.steps = steps
        self.started = time.perf_counter()
        self.first_step = first_step
        self.is_main = distributed.is_main()
        if not self.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        self.wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if config.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("log.wandb: the package wandb is not installed; pip install mmchat[wandb]") from error
            self.wandb = wandb.init(project="mmchat", name=f"{run}-{stage}", id=f"{run}-{stage}", resume="allow")

    def step(self, step: int, values: dict[str, Any]) -> None:
        """step: number of steps done; values: numbers of this step."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        scalars = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.board is not None:
            for name, value in scalars.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)
        if step % self.config.every == 0 or step in (self.first_step + 1, self.steps):
            print(self._line(step, values), flush=True)

    def bad_sample(self, step: int, source: str, key: str, reason: str, detail: str) -> None:
        self.event(step, {"bad": key, "source": source, "reason": reason, "detail": detail})
        self.say(f"step {step}: left out {key}: {reason}: {detail}")

    def event(self, step: int, values: dict[str, Any]) -> None:
        if self.is_main:
            self.file.write(json.dumps({"step": step, "event": True, **values}) + "\n")

    def say(self, text: str) -> None:
        """A message on the console."""
        if self.is_main:
            print(f"{self.stage:<10} {text}", flush=True)

    def close(self) -> None:
        if self.is_main:
            self.file.close()
            if self.board is not None:
                self.board.close()
            if self.wandb is not None:
                self.wandb.finish()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        done = step - self.first_step
        left = (time.perf_counter() - self.started) / done * (self.steps - step)
        mfu = values.get("mfu")
        parts = [
            f"{self.stage:<10} step {step}/{self.steps}",
            "loss    -   " if values["loss"] is None else f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.2f}",
            f"lr x{values['rate_factor']:.2f}",
            f"{values['tokens_per_s']:,.0f} tok/s ({values['learned_per_s']:,.0f} learned)",
            f"padding {100 * values['padding']:.0f} %",
            f"data wait {100 * values['wait_share']:.0f} %",
            *([f"MFU {100 * mfu:.1f} %"] if mfu is not None else []),
            f"left {duration(left)}",
        ]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """3725.0 -> '1h02m'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 60  # a line that a crash cut short
