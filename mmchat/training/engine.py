"""DeepSpeed's engine behind a small face: one step, and state that does not depend on how it was partitioned.

The only file that imports deepspeed. Its own checkpoints are not used: they are written in place, loaded with pickle
and tied to the number of ranks. Whole fp32 weights and moments are read and set through its public per-parameter
functions instead, for every ZeRO level alike.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed asks at import, and warns where it has to guess

# isort: split
import deepspeed
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from mmchat import distributed
from mmchat.batch import Batch
from mmchat.config import StageConfig
from mmchat.models.mmchat import MMChat
from mmchat.models.parts import shape_of
from mmchat.training.trainable import Part, param_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """Sum of the loss (nats) over all ranks' learned tokens; gradient norm before clipping; whether it was skipped."""

    loss_sum: float
    grad_norm: float
    is_skipped: bool


def start_distributed() -> None:
    """Joins the process group: the launcher's, or one of a single process."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    distributed.prepare_environment()
    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory all-reduce at every first start (22 s, needs g++); gloo does the
        # same, in the same order of additions on every machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.device())


def deepspeed_config(stage: StageConfig, num_micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage; `stage.deepspeed` is merged last, dictionary by dictionary."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_batches,
        # At level 0 the engine clips by itself, after it has looked for NaN.
        "gradient_clipping": stage.max_grad_norm if stage.zero else 0.0,
        "zero_optimization": {"stage": stage.zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": stage.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    if stage.zero:
        # overlap_comm reorders additions between runs on GPUs; switch it on through `deepspeed` where that is fine.
        config["zero_optimization"]["overlap_comm"] = False
    return _merged(config, stage.deepspeed)


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def partition(stage: StageConfig) -> Any:
    """Under ZeRO-3, an object that makes transformers load models in partitions for as long as it is alive."""
    if stage.zero < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(deepspeed_config(stage, 1))


def gather(parameters: list[nn.Parameter], modify: bool = False) -> AbstractContextManager[Any]:
    """Makes partitioned parameters whole inside the context, to read or (every rank the same) to modify."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)
    return nullcontext()


class Engine:
    """One stage's optimizer and distribution around the model."""

    def __init__(self, model: MMChat, parts: list[Part], stage: StageConfig, num_micro_batches: int) -> None:
        self.stage = stage
        self.num_micro_batches = num_micro_batches
        self.trained = {name: p for part in parts if part.rate for name, p in part.parameters.items()}
        optimizer = torch.optim.AdamW(param_groups(parts), betas=stage.betas, eps=1e-8, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(stage, num_micro_batches)
        )
        self.model: MMChat = self._engine.module
        self.device = self._engine.device

    def train_step(self, batches: list[Batch], learned: int, rate_factor: float, seed: int) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        learned: learned tokens of the whole step, all ranks; the gradient is that of the mean over them, however the
        step is split. A step whose loss or gradient is not finite changes nothing, on every rank alike.
        """
        torch.manual_seed(seed)  # dropout is a function of the step, not of what ran before
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor
        scale = self.num_micro_batches * distributed.world_size() / max(1, learned)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        grad_norm = 0.0
        for number, batch in enumerate(batches):
            loss = self._engine(batch.to(self.device))
            total += loss.sum.detach().double()
            self._engine.backward(loss.sum * scale)
            if number == len(batches) - 1 and self.stage.zero == 0:
                grad_norm = self._clip()
            self._engine.step()
        if self.stage.zero:
            grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        loss_sum = distributed.sum_float(total)
        is_finite = torch.isfinite(torch.tensor([loss_sum, grad_norm])).all()
        return StepResult(loss_sum, grad_norm, not (self._engine.was_step_applied() and bool(is_finite)))

    def _clip(self) -> float:
        """Clips the reduced gradients, or removes them where they are not finite, so that the step changes nothing."""
        parameters = list(self.trained.values())
        limit = self.stage.max_grad_norm or torch.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not torch.isfinite(torch.tensor(norm)):
            for parameter in parameters:
                parameter.grad = None
        return norm

    def rehearse(self, batches: list[Batch]) -> tuple[StepResult, dict[str, float]]:
        """A whole step at learning rate 0 that leaves no trace: peak memory is real, the weights stay.

        Returns the result and the largest absolute gradient of every trained parameter.
        """
        gradients: dict[str, float] = {}
        for number, batch in enumerate(batches):
            for group in self._engine.optimizer.param_groups:
                group["lr"] = 0.0
            loss = self._engine(batch.to(self.device))
            self._engine.backward(loss.sum / max(1, batch.num_learned))
            if number == len(batches) - 1:
                for name, parameter in self.trained.items():
                    gradient = safe_get_full_grad(parameter)
                    gradients[name] = 0.0 if gradient is None else float(gradient.abs().max())
                if self.stage.zero == 0:
                    self._clip()
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0) if self.stage.zero else max(gradients.values())
        result = StepResult(distributed.sum_float(loss.sum), norm, not self._engine.was_step_applied())
        self._link_moments()
        self.set_moments(None, 0)
        return result, gradients

    def _link_moments(self) -> None:
        """Tells ZeRO 1 and 2 where each parameter's moments lie.

        They look for themselves after the first parameter group has stepped, when the other groups have none yet.
        """
        if self.stage.zero in (1, 2):
            zero = self._engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole weights on rank 0's CPU (an empty dict elsewhere): fp32 masters of trained ones, others as they are."""
        everything = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        whole = {}
        for name in names:
            parameter = everything[name]
            if name in self.trained and self.stage.zero:
                value = safe_get_full_fp32_param(parameter)
            else:
                with gather([parameter]):  # type: ignore[list-item]
                    value = parameter.detach().clone()
            if distributed.is_main():
                whole[name] = value.detach().to("cpu", copy=True).reshape(shape_of(parameter)).contiguous()
        return whole

    def moments(self) -> dict[str, Tensor]:
        """Adam's whole moments on rank 0's CPU, named `<moment>.<parameter>`."""
        whole = {}
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                if self.stage.zero:
                    value = safe_get_full_optimizer_state(parameter, moment)
                else:
                    state = self._engine.optimizer.state[parameter]
                    value = state[moment] if moment in state else torch.zeros_like(parameter)
                if distributed.is_main():
                    shape = shape_of(parameter)
                    whole[f"{moment}.{name}"] = value.detach().to("cpu", copy=True).reshape(shape).contiguous()
        return whole

    def set_moments(self, moments: dict[str, Tensor] | None, step: int) -> None:
        """Sets Adam's moments (None: zeros) and its step count. Needs one step, real or rehearsed, before it."""
        for name, parameter in self.trained.items():
            for moment in MOMENTS:
                if moments is None:
                    value = torch.zeros(shape_of(parameter), dtype=torch.float32, device=self.device)
                else:
                    value = moments[f"{moment}.{name}"].to(self.device, torch.float32)
                if self.stage.zero:
                    safe_set_full_optimizer_state(parameter, value, moment)
                elif moment in self._engine.optimizer.state[parameter]:
                    self._engine.optimizer.state[parameter][moment].copy_(value)
        for state in self._engine.basic_optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step

    def set_masters(self, weights: dict[str, Tensor]) -> None:
        """Sets the fp32 masters of trained parameters, where the level keeps masters apart from the weights."""
        if self.stage.zero:
            for name, parameter in self.trained.items():
                if name in weights:
                    safe_set_full_fp32_param(parameter, weights[name].to(self.device, torch.float32))

    def close(self) -> None:
        self._engine.destroy()
