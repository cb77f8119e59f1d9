"""The loss head: logits only where something is learned, a chunk at a time, so that full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mmchat.batch import IGNORE, TokenLoss

# Learned positions whose logits are alive at one time. 256 x 152k x 4 bytes is 0.16 GB.
HEAD_CHUNK = 256


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[..., dim] -> [..., vocabulary], in float32."""
    logits = model.get_output_embeddings()(hidden).float()
    softcap = _softcap(model)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> TokenLoss:
    """Summed cross-entropy on the learned positions only.

    hidden: [rows, length, dim]; labels: [rows, length], the token to predict at each position, or IGNORE.
    """
    learned = labels != IGNORE
    chosen, targets = hidden[learned], labels[learned]  # [learned, dim], [learned]
    head = model.get_output_embeddings()
    # ZeRO-3's weight is whole only inside its own module's call; a softcap or a bias is rare.
    is_plain = isinstance(head, nn.Linear) and head.bias is None and not hasattr(head.weight, "ds_id")
    if is_plain and _softcap(model) is None:
        total = _LinearCrossEntropy.apply(chosen, head.weight, targets, torch.is_grad_enabled())
        return TokenLoss(total, len(targets))
    # The empty sum keeps the result in the graph without a learned position, so that backward works on every rank.
    total = chosen.sum().float() * 0.0

    def chunk_loss(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, part), target, reduction="sum")

    for start in range(0, len(targets), HEAD_CHUNK):
        part, target = chosen[start : start + HEAD_CHUNK], targets[start : start + HEAD_CHUNK]
        if len(targets) > HEAD_CHUNK and torch.is_grad_enabled():
            total = total + checkpoint(chunk_loss, part, target, use_reentrant=False)
        else:
            total = total + chunk_loss(part, target)
    return TokenLoss(total, len(targets))


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, with both gradients made while a chunk's logits exist.

    Nothing of the size of the logits outlives its chunk and nothing is computed twice: three matrix products in all,
    of which the last is spared where the head is frozen. Backward may run once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        """hidden [rows, dim], weight [vocabulary, dim], targets [rows] -> a scalar in float32.

        learns: torch.is_grad_enabled() of the caller; in here it is always off.
        """
        d_hidden = torch.empty_like(hidden) if learns and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if learns and ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), HEAD_CHUNK):
            part, target = hidden[start : start + HEAD_CHUNK], targets[start : start + HEAD_CHUNK]
            logits = (part @ weight.t()).float()  # [chunk, vocabulary]; becomes its own gradient in place
            rows = torch.arange(len(target), device=target.device)
            highest, chosen = logits.amax(1, keepdim=True), logits[rows, target]
            sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
            total += (sums.log() + highest).sum() - chosen.sum()
            if d_hidden is None and d_weight is None:
                continue
            logits.div_(sums)
            logits[rows, target] -= 1
            gradient = logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[start : start + HEAD_CHUNK])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), part)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (None if d is None else d.mul_(gradient) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None


def _softcap(model: PreTrainedModel) -> float | None:
    return model.config.to_dict().get("final_logit_softcapping")  # Gemma 2 and 3
