"""Which part of the model learns, and how fast."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from mmchat.config import Rate, StageConfig
from mmchat.models.mmchat import MMChat
from mmchat.models.parts import parts_of, shape_of, size_of


@dataclass(frozen=True)
class Part:
    """One part of the model (`connectors.image`, `fusion`, ...): its parameters by name, and its rate or None."""

    name: str
    parameters: dict[str, nn.Parameter]
    rate: Rate | None

    @property
    def num_parameters(self) -> int:
        return sum(size_of(parameter) for parameter in self.parameters.values())


def select(model: MMChat, stage: StageConfig, is_full: bool) -> list[Part]:
    """Applies a stage's `train` table: sets requires_grad everywhere and returns all parts.

    Raises:
        ValueError: an entry names no part of this model.
    """
    parts = parts_of(model, is_full)
    unknown = [name for name in stage.train if not any(_covers(name, part) for part in parts)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], parts, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"stage {stage.name}: train names {unknown}, this model's parts are {sorted(parts)}{hint}")
    selected = []
    for name, parameters in sorted(parts.items()):
        covering = [entry for entry in stage.train if _covers(entry, name)]
        rate = stage.train[max(covering, key=len)] if covering else None
        if rate is not None and rate.lr == 0:
            rate = None
        for parameter in parameters.values():
            parameter.requires_grad_(rate is not None)
        selected.append(Part(name, parameters, rate))
    if not any(part.rate for part in selected):
        raise ValueError(f"stage {stage.name}: train leaves nothing to learn; name at least one of {sorted(parts)}")
    return selected


def param_groups(parts: list[Part]) -> list[dict[str, object]]:
    """Optimizer groups; vectors (biases, norms) are never decayed."""
    groups: list[dict[str, object]] = []
    for part in parts:
        if part.rate is None:
            continue
        for decays in (True, False):
            chosen = [p for p in part.parameters.values() if (len(shape_of(p)) > 1) == decays]
            if chosen:
                decay = part.rate.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": part.rate.lr, "base_lr": part.rate.lr, "weight_decay": decay})
    return groups


def table(parts: list[Part]) -> str:
    """What learns, what is frozen, and the share that learns, for a person."""
    total = sum(part.num_parameters for part in parts)
    learning = sum(part.num_parameters for part in parts if part.rate)
    lines = [f"{'part':<20} {'parameters':>14}  learning"]
    for part in parts:
        rate = "frozen" if part.rate is None else f"lr {part.rate.lr:g}, weight decay {part.rate.weight_decay:g}"
        lines.append(f"{part.name:<20} {part.num_parameters:>14,}  {rate}")
    lines.append(f"{'all':<20} {total:>14,}  {learning:,} learn ({100 * learning / total:.2f} %)")
    return "\n".join(lines)


def _covers(entry: str, part: str) -> bool:
    return part == entry or part.startswith(entry + ".")
