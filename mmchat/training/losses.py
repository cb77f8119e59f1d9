"""What a step minimises besides the loss of the answers: see LossConfig."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from mmchat.batch import Batch, TokenLoss
from mmchat.config import LossConfig
from mmchat.models.box_readout import BoxReadout
from mmchat.models.connector import Connector
from mmchat.models.head import head_loss
from mmchat.models.mmchat import MMChat


class Objective:
    """Weighted sum of the losses of a batch; the LLM runs only where answers count.

    Args:
        kept: connectors as the stage began with them, by modality; `keep` holds the model's tokens to theirs.
    """

    def __init__(self, config: LossConfig, kept: Mapping[str, Connector]) -> None:
        self.config = config
        self.kept = kept

    def __call__(self, model: MMChat, batch: Batch) -> TokenLoss:
        encoded = model.encoded(batch)
        tokens = {modality: model.connectors[modality](*inputs) for modality, inputs in encoded.items()}
        count, terms = batch.num_boxes, []
        if self.config.answers:
            answers = head_loss(model.llm, model.hidden(batch, tokens=tokens), batch.labels)
            count, terms = answers.count, [self.config.answers * answers.sum]
        if self.config.regions:
            terms += [self.config.regions * _regions(model, batch, name, tokens[name]) for name in model.readouts]
        for modality, connector in self.kept.items():
            weight = self.config.keep if modality in batch.media else 0.0  # a stand-in teaches nothing
            terms.append(weight * _distance(tokens[modality], connector(*encoded[modality])))
        return TokenLoss(torch.stack(terms).sum(), count)


def kept_connectors(model: MMChat, weights: Mapping[str, Tensor]) -> dict[str, Connector]:
    """Frozen copies of the connectors that learn, with the weights that a stage began with (by the model's names).

    Raises:
        ValueError: a connector that learns is not among them.
    """
    kept = {}
    for modality, connector in model.connectors.items():
        assert isinstance(connector, Connector)
        if not any(parameter.requires_grad for parameter in connector.parameters()):
            continue
        prefix = f"connectors.{modality}."
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not state:
            raise ValueError(
                f"losses.keep: connectors.{modality} begins anew in this stage, so there is nothing to keep"
            )
        kept[modality] = copy.deepcopy(connector).requires_grad_(False)
        kept[modality].load_state_dict(state)
    return kept


def _regions(model: MMChat, batch: Batch, modality: str, tokens: Tensor) -> Tensor:
    readout, connector = model.readouts[modality], model.connectors[modality]
    assert isinstance(readout, BoxReadout) and isinstance(connector, Connector)
    media = batch.media.get(modality)
    if media is None:  # the stand-in's tokens: every rank calls every module
        return readout(tokens).sum() * 0.0
    grids = [connector.config.grid(shape) for shape in media.shapes]
    return readout.loss(tokens, media.boxes, [grid for grid in grids if grid is not None])


def _distance(tokens: Tensor, before: Tensor) -> Tensor:
    """Sum over tokens of the squared distance to what they were, in shares of their squared length."""
    tokens, before = tokens.float(), before.float()
    return ((tokens - before).square().sum(-1) / before.square().sum(-1)).sum()
