"""New modalities that begin as one that the start's checkpoint has: frames of a video as pictures, say."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmchat.conversation import Modality
from mmchat.models.fusion import AnyFusionConfig, FLoRAConfig


def with_copies(
    weights: Mapping[str, Tensor], start_as: Mapping[Modality, Modality], fusion: AnyFusionConfig
) -> dict[str, Tensor]:
    """A checkpoint's weights by name, and those of connector and fusion of each old modality under the new one's names.

    Args:
        start_as: new modality to the one that it begins as. Its pairs may have a lower rank: they begin as the best
            approximation of that rank.
    """
    found = dict(weights)
    for new, old in start_as.items():
        part = re.compile(rf"(connectors\.|.*\.fusion_[ab]_){old}(|\..*)")
        for name, weight in weights.items():
            if match := part.fullmatch(name):
                found[f"{match[1]}{new}{match[2]}"] = weight.clone()
        if isinstance(fusion, FLoRAConfig) and fusion.rank_of(new) < fusion.rank_of(old):
            for name_a in [name for name in found if name.endswith(f".fusion_a_{new}")]:
                name_b = name_a.replace(".fusion_a_", ".fusion_b_")
                found[name_a], found[name_b] = _reduced(found[name_a], found[name_b], fusion.rank_of(new))
    return found


def _reduced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] whose product is nearest to that of A [more, in] and B [out, more]."""
    out, upper_b = torch.linalg.qr(b.float())
    into, upper_a = torch.linalg.qr(a.float().t())
    u, s, v = torch.linalg.svd(upper_b @ upper_a.t())
    near_a, near_b = torch.zeros(rank, a.shape[1]), torch.zeros(b.shape[0], rank)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    near_a[:kept], near_b[:, :kept] = (root[:, None] * v[:kept]) @ into.t(), (out @ u[:, :kept]) * root
    # Channels that say nothing yet can learn as those of new pairs do: A as it was, B zero.
    silent = near_a.square().sum(1) <= 1e-12 * a.float().square().sum(1).mean()
    near_a[silent], near_b[:, silent] = a[:rank][silent].float(), 0.0
    return near_a.to(a.dtype), near_b.to(b.dtype)
