"""Ranks and the few collectives that are needed outside DeepSpeed; one process without a launcher counts as rank 0."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from torch import distributed


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def prepare_environment() -> None:
    """Fills in the rendezvous variables that a launcher would set, for `python train.py` without one."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def sum_over_ranks(values: list[int]) -> list[int]:
    """Element-wise sum of whole numbers over all ranks, exact."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=device())
    distributed.all_reduce(tensor)
    return tensor.tolist()


def sum_float(value: torch.Tensor) -> float:
    """Sum of a scalar over all ranks, in float64."""
    tensor = value.detach().double()
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return float(tensor)


def gather_to_main(value: Any) -> list[Any] | None:
    """Every rank's small picklable value, on rank 0; None elsewhere."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(value, gathered)
    return gathered


def from_main(value: Any) -> Any:
    """Rank 0's small picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()
