"""FLoRA fusion: one low-rank pair per modality on the LLM's linear layers, gated per token; and its baselines.

    y = W x + sum over modalities m of  g_m(t) * (alpha / rank) * B_m A_m x

W is frozen, B_m starts at zero and g_m(t) is 0 or 1. Where no modality is present every gate is 0 and the layer is W,
bitwise. Each pair is parameters of its own, so that one modality's can learn while the others are frozen; they are
joined where they are used, so that any number of modalities costs two matrix products and packs with mixed presence
need no branch.

The idea is FLoRA's (Palaskar et al., Interspeech 2024, arXiv 2406.09617: a pair per modality, adapter dropout for
missing data). The paper does not publish rank, matrices, gating or scope: those are choices of this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmchat.batch import Batch, MediaBatch
from mmchat.conversation import MODALITIES, Modality
from mmchat.schema import Schema

Probability = Annotated[float, Field(ge=0, le=1)]


class _FusionConfig(Schema):
    """modality_dropout: chance, by modality, that a training conversation loses all items of it (data side)."""

    modality_dropout: dict[Modality, Probability] = Field(default_factory=dict)


class FLoRAConfig(_FusionConfig):
    """One gated pair per modality.

    scope `segment`: m's gate is open on every token of a conversation that has m, text included; `own_tokens`: on
    m's own media tokens only. adapter_dropout: chance, by modality, that a training conversation has m's gates
    closed while its media tokens stay. targets: names of the linear layers to adapt inside the decoder; empty = all.
    ranks: of modalities whose pairs have another rank than `rank`; all pairs are scaled by alpha / rank.
    """

    kind: Literal["flora"] = "flora"
    rank: int = Field(16, gt=0)
    ranks: dict[Modality, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    alpha: float = Field(32.0, gt=0)
    scope: Literal["segment", "own_tokens"] = "segment"
    adapter_dropout: dict[Modality, Probability] = Field(default_factory=dict)
    targets: tuple[str, ...] = ()

    def rank_of(self, modality: Modality) -> int:
        return self.ranks.get(modality, self.rank)


class LoRAConfig(_FusionConfig):
    """Baseline: one plain LoRA pair, open on every token of every conversation (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[str, ...] = ()


class EarlyConfig(_FusionConfig):
    """Baseline: media tokens enter the sequence, nothing is added to the LLM (connector only)."""

    kind: Literal["early"] = "early"


class FullConfig(_FusionConfig):
    """Baseline: early fusion with the whole LLM as the fusion's trainable part (full fine-tuning)."""

    kind: Literal["full"] = "full"


class LateConfig(_FusionConfig):
    """Baseline: the LLM reads text alone; its last hidden states then attend to the media tokens.

    After Multi-Modal BlenderBot's late fusion (arXiv 2010.01082), with attention in place of concatenation because
    the decoder's output is the last layer here. The output projection starts at zero: at step 0 it is the base LLM.
    """

    kind: Literal["late"] = "late"
    num_heads: int = Field(8, gt=0)


FusionConfig = Annotated[FLoRAConfig | LoRAConfig | EarlyConfig | FullConfig | LateConfig, Field(discriminator="kind")]
AnyFusionConfig = FLoRAConfig | LoRAConfig | EarlyConfig | FullConfig | LateConfig


class Gates:
    """The gates of the forward pass in flight, shared by every adapted layer.

    Activation checkpointing runs layers again during backward, so the value stays until the next forward sets it.
    """

    def __init__(self, config: FLoRAConfig | LoRAConfig, modalities: Sequence[Modality]) -> None:
        """modalities: one pair each, in this order; plain LoRA has a single one, `all`, that is always open."""
        ranks: dict[str, int] = {"all": config.rank}
        self.columns: list[int] | None = None  # of presence, for each channel of all pairs
        if isinstance(config, FLoRAConfig):
            ranks = {m: config.rank_of(m) for m in modalities}
            self.columns = [MODALITIES.index(m) for m in modalities for _ in range(ranks[m])]
        self.ranks = ranks
        self.pairs = tuple(ranks)
        self.scale = config.alpha / config.rank
        self.scaled: Tensor | None = None

    def set(self, presence: Tensor, dtype: torch.dtype) -> None:
        """presence [rows, length, all modalities] -> per rank channel [rows, length, sum of ranks], scaled."""
        if self.columns is None:
            gates = presence.new_ones(*presence.shape[:-1], self.ranks["all"])
        else:
            gates = presence[..., self.columns]
        self.scaled = (gates * self.scale).to(dtype)


class LowRankFusion(nn.Module):
    """A linear layer with its low-rank pairs, `fusion_a_<pair>` [rank, in] and `fusion_b_<pair>` [out, rank].

    forward: x [rows, length, in] -> [rows, length, out]
    """

    def __init__(self, base: nn.Module, gates: Gates) -> None:
        super().__init__()
        in_features, out_features = linear_size(base)
        self.base = base
        self.gates = gates
        # The weight may be partitioned away under ZeRO-3; its dtype is still true.
        dtype = next(base.parameters()).dtype
        stacked = torch.empty(sum(gates.ranks.values()), in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(stacked, a=math.sqrt(5))
        # They are this module's own, because ZeRO-3 gathers what a module has when it is called, and an
        # nn.ParameterDict never is.
        for (pair, rank), a in zip(
            gates.ranks.items(), stacked.to(dtype).split(list(gates.ranks.values())), strict=True
        ):
            self.register_parameter(f"fusion_a_{pair}", nn.Parameter(a.clone()))
            b = torch.zeros(out_features, rank, dtype=dtype)
            self.register_parameter(f"fusion_b_{pair}", nn.Parameter(b))

    def pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] and B [out, rank] of one pair."""
        return getattr(self, f"fusion_a_{name}"), getattr(self, f"fusion_b_{name}")

    def forward(self, x: Tensor) -> Tensor:
        assert self.gates.scaled is not None, "the model sets the gates before its layers run"
        a, b = self.joined()
        low = F.linear(x, a) * self.gates.scaled  # [rows, length, sum of ranks]
        y = self.base(x)
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.t()).view_as(y)

    def joined(self) -> tuple[Tensor, Tensor]:
        """All pairs as A [sum of ranks, in] and B [out, sum of ranks]."""
        pairs = [self.pair(name) for name in self.gates.pairs]
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


class LateFusion(nn.Module):
    """Last hidden states attend to the media tokens of their own segment that came before them.

    forward: hidden [rows, length, dim], media tokens [tokens, dim], may_look [rows * length, tokens] -> hidden
    """

    def __init__(self, config: LateConfig, llm_dim: int) -> None:
        super().__init__()
        if llm_dim % config.num_heads:
            raise ValueError(f"late fusion: num_heads {config.num_heads} must divide the LLM's width {llm_dim}")
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(llm_dim)
        self.to_q = nn.Linear(llm_dim, llm_dim, bias=False)
        self.to_kv = nn.Linear(llm_dim, 2 * llm_dim, bias=False)
        self.out = nn.Linear(llm_dim, llm_dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor, media_tokens: Tensor, may_look: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)  # [rows * length, dim]
        q = self.to_q(self.norm(flat)).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        k, v = self.to_kv(media_tokens).unflatten(-1, (2, self.num_heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [heads, rows * length, tokens]
        # A position without media gets weight 0 everywhere, not the softmax of an empty row.
        weights = scores.masked_fill(~may_look, -torch.inf).softmax(-1).masked_fill(~may_look, 0.0)
        read = (weights @ v).transpose(0, 1).flatten(1)
        return (flat + self.out(read)).view_as(hidden)


def adapt(decoder: nn.Module, config: FLoRAConfig | LoRAConfig, modalities: Sequence[Modality]) -> Gates:
    """Replaces the target linear layers of `decoder` in place; W is not touched.

    Args:
        modalities: those of the model; FLoRA makes a pair for each, and adapts nothing where there are none.
    Raises:
        ValueError: no layer has one of the target names.
    """
    gates = Gates(config, modalities)
    if not gates.pairs:
        return gates
    adapted = 0
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child) and (not config.targets or name in config.targets):
                setattr(parent, name, LowRankFusion(child, gates))
                adapted += 1
    if not adapted:
        linear = sorted({path.rpartition(".")[2] for path, module in decoder.named_modules() if is_linear(module)})
        raise ValueError(
            f"fusion.targets {list(config.targets)} match no linear layer; this LLM has {linear}. "
            "Name some of these, or leave targets empty to adapt them all."
        )
    return gates


def is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear layer with a transposed weight.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_size(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer, also of one whose weight ZeRO-3 has partitioned away."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf  # type: ignore[return-value]


def merge(decoder: nn.Module, modality: Modality | None) -> None:
    """Adds one modality's pairs into W, in place, and takes the low-rank layers out.

    Exact where the modality is present on every token of every input the merged model will see; with more than one
    modality adapted, or with presence that varies, merging would change answers, and is refused.

    Args:
        modality: the modality to merge; None merges a plain LoRA pair.
    Raises:
        ValueError: another modality's pair has been trained too.
    """
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankFusion):
                setattr(parent, name, _merged(child, modality))


def _merged(layer: LowRankFusion, modality: Modality | None) -> nn.Module:
    pairs = layer.gates.pairs
    chosen = "all" if modality is None else modality
    if chosen not in pairs:
        raise ValueError(f"cannot merge {modality}: this model has pairs for {list(pairs)}")
    for other in pairs:
        if other != chosen and layer.pair(other)[1].any():
            raise ValueError(
                f"cannot merge {modality}: the pair of {other} is trained too, so the merged weights would depend on "
                "which modalities are present. Keep the model unmerged."
            )
    a, b = layer.pair(chosen)
    delta = (b.float() @ a.float()) * layer.gates.scale
    weight: Tensor = layer.base.weight  # type: ignore[assignment]
    with torch.no_grad():
        weight += (delta if isinstance(layer.base, nn.Linear) else delta.t()).to(weight.dtype)
    return layer.base


def late_visibility(batch: Batch, media: MediaBatch, token_counts: Tensor) -> Tensor:
    """Which media tokens each position may look at under late fusion: [rows * length, media_tokens], bool.

    A token looks at the items of its own segment that were placed at or before it.
    """
    rows, length = batch.segment_ids.shape
    row = torch.arange(rows, device=media.anchors.device).repeat_interleave(length)
    item_row, item_segment, item_position = media.anchors.unbind(1)
    visible = row[:, None] == item_row
    visible &= batch.segment_ids.flatten()[:, None] == item_segment
    visible &= batch.positions.flatten()[:, None] >= item_position
    return visible.repeat_interleave(token_counts, dim=1)
