"""The parts of a model that stages train and checkpoints hold: connectors.image, fusion.image, encoders.audio,
readouts.image, llm.

`fusion.<modality>` is that modality's low-rank pairs, `fusion.all` plain LoRA's, and `fusion` late fusion's layer, or
the whole LLM under full fine-tuning.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mmchat.models.mmchat import MMChat

_PAIR = re.compile(r".*\.fusion_[ab]_(\w+)")


def size_of(parameter: Tensor) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned away."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape_of(parameter: Tensor) -> torch.Size:
    """Whole shape, also of a parameter that ZeRO-3 has partitioned away."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(name: str, is_full: bool) -> str:
    """The part that a parameter or buffer of MMChat belongs to.

    is_full: the fusion is full fine-tuning, whose trainable part is the LLM itself.
    """
    head, _, rest = name.partition(".")
    if head in ("connectors", "encoders", "readouts"):
        return f"{head}.{rest.partition('.')[0]}"
    if pair := _PAIR.fullmatch(name):
        return f"fusion.{pair[1]}"
    return "fusion" if head == "late" or is_full else "llm"


def parts_of(model: MMChat, is_full: bool) -> dict[str, dict[str, nn.Parameter]]:
    """Parameters by part."""
    parts: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name, is_full), {})[name] = parameter
    return parts


def names_in(model: MMChat, parts: set[str], is_full: bool) -> set[str]:
    """Names of the parameters and saved buffers of the given parts: what a checkpoint of them holds."""
    saved = model.state_dict().keys() | dict(model.named_parameters()).keys()
    parameters = dict(model.named_parameters())  # tied weights occur once here
    buffers = dict(model.named_buffers())
    return {name for name in saved if (name in parameters or name in buffers) and part_of(name, is_full) in parts}
