"""Boxes read from media tokens without the LLM: so a connector learns where things are for a fraction of the cost.

What the LLM asks of a connector it learns slowly: after hours it told the kinds of things and left their extent to the
LLM, which put it together from many tokens, badly (docs/experiments.md). Asked directly, it tells extents in minutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmchat.batch import FeatureShape
from mmchat.conversation import Box

NUM_BINS = 50
# Standard deviation of the target around the true side, in shares of the picture: neighbouring bins count too.
SPREAD = 0.02


class BoxReadout(nn.Module):
    """LayerNorm without weights, linear: from a media token the box of what it shows.

    forward: tokens [n, llm_dim] -> logits [n, 4, NUM_BINS] of x0, y0, x1 and y1, each over equal parts of the input.
    """

    def __init__(self, llm_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(llm_dim, 4 * NUM_BINS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(F.layer_norm(tokens, tokens.shape[-1:])).unflatten(-1, (4, NUM_BINS)).float()

    def loss(self, tokens: Tensor, boxes: Sequence[Sequence[Box]], grids: Sequence[FeatureShape]) -> Tensor:
        """Nats, summed over the boxes of all items: of each the mean over its sides and over the tokens that show it.

        tokens: [sum(t * h * w of grids), llm_dim]. boxes, grids: of each item; see `targets`.
        """
        sides, weights = (part.to(tokens.device) for part in targets(boxes, grids))
        middles = (torch.arange(NUM_BINS, device=tokens.device) + 0.5) / NUM_BINS
        wanted = (-((sides[..., None] - middles) ** 2) / (2 * SPREAD**2)).softmax(-1)  # [n, 4, NUM_BINS]
        nats = -(wanted * self(tokens).log_softmax(-1)).sum(-1).mean(-1)
        return (nats * weights).sum()


def targets(boxes: Sequence[Sequence[Box]], grids: Sequence[FeatureShape]) -> tuple[Tensor, Tensor]:
    """For each token the box that it shows, [n, 4], and how much it counts, [n]: 1 a box in all, 0 where there is none.

    A token shows the smallest box that its middle lies in: what is smaller lies in front, mostly. A box that no token
    would show gets the one nearest to its middle that has not been given away so.

    boxes: of each item, (x0, y0, x1, y1) in shares of the encoder's input. grids: (1, h, w) of each item's tokens; an
    item of another time may have no boxes.
    """
    sides, weights = [], []
    for own, (time, height, width) in zip(boxes, grids, strict=True):
        shown = torch.full((time * height * width,), -1)
        rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        ranked = sorted(range(len(own)), key=lambda i: -(own[i][2] - own[i][0]) * (own[i][3] - own[i][1]))
        for number in ranked:
            x0, y0, x1, y1 = own[number]
            is_in = ((rows >= y0) & (rows <= y1))[:, None] & ((columns >= x0) & (columns <= x1))
            shown[is_in.flatten()] = number
        taken: list[int] = []
        for number in ranked:
            if not (shown == number).any():
                x0, y0, x1, y1 = own[number]
                away = (rows - (y0 + y1) / 2)[:, None] ** 2 + (columns - (x0 + x1) / 2) ** 2
                away = away.flatten().index_fill(0, torch.tensor(taken, dtype=torch.int64), torch.inf)
                taken.append(int(away.argmin()))
                shown[taken[-1]] = number
        counts = torch.bincount(shown[shown >= 0], minlength=1)
        sides.append(torch.tensor([own[i] if i >= 0 else (0.0,) * 4 for i in shown.tolist()]).reshape(-1, 4))
        weights.append(torch.where(shown >= 0, 1.0 / counts[shown.clamp(min=0)].clamp(min=1), 0.0))
    total = sum(math.prod(grid) for grid in grids)
    return torch.cat(sides or [torch.zeros(total, 4)]), torch.cat(weights or [torch.zeros(total)])
