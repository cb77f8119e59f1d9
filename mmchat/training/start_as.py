"""New modalities that begin as one that the start's checkpoint has: frames of a video as pictures, say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mmchat.conversation import Modality


def with_copies(weights: Mapping[str, Tensor], start_as: Mapping[Modality, Modality]) -> dict[str, Tensor]:
    """A checkpoint's weights by name, and those of connector and fusion of each old modality under the new one's names.

    Args:
        start_as: new modality to the one that it begins as.
    """
    found = dict(weights)
    for new, old in start_as.items():
        part = re.compile(rf"(connectors\.|.*\.fusion_[ab]_){old}(|\..*)")
        for name, weight in weights.items():
            if match := part.fullmatch(name):
                found[f"{match[1]}{new}{match[2]}"] = weight.clone()
    return found
