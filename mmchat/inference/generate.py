"""Token by token: one prefill, then steps over a shared key-value cache, for one conversation or a padded batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from mmchat.batch import Batch
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.pack import collate
from mmchat.models.head import logits_of
from mmchat.models.mmchat import MMChat

# Logits divided by less would no longer be numbers, and the likeliest token has all of the mass anyway.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. temperature 0 takes the likeliest; otherwise the smallest set of mass top_p is sampled.

    Raises ValueError for a number that cannot be used.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: found {self.max_new_tokens}; wanted 1 or more")
        if not 0 <= self.temperature < math.inf:  # also of nan, this is false
            raise ValueError(f"temperature: found {self.temperature}; wanted 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}; wanted more than 0 and at most 1")


class TokenStream:
    """Generates on top of a cache; iterate to get [rows] token ids a step, until every row has said its end.

    After iteration, `cache` holds the prompt and every generated token but the last.
    """

    def __init__(
        self,
        model: MMChat,
        batch: Batch,
        attention_mask: Tensor | None,
        end_ids: Sequence[int],
        decoding: Decoding,
        cache: DynamicCache | None = None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.attention_mask = attention_mask
        self.end_ids = torch.tensor(list(end_ids), device=batch.token_ids.device)
        self.decoding = decoding
        self.cache = cache if cache is not None else DynamicCache(config=model.llm.config)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.decoding.seed)
        model, batch, mask = self.model, self.batch, self.attention_mask
        tokens = model.media_tokens(batch)
        said = torch.empty(len(batch.token_ids), 0, dtype=torch.int64, device=batch.token_ids.device)
        is_done = torch.zeros(len(said), dtype=torch.bool, device=said.device)
        # A new token has its conversation's gates under the scope `segment`, none under `own_tokens`.
        presence = batch.presence[:, -1:]
        for _ in range(self.decoding.max_new_tokens):
            hidden = model.hidden(batch, self.cache, mask, tokens)
            chosen = choose(logits_of(model.llm, hidden[:, -1]), self.decoding, generator)
            chosen = torch.where(is_done, self.end_ids[-1], chosen)
            said = torch.cat([said, chosen[:, None]], dim=1)
            yield chosen
            ended = said[:, -len(self.end_ids) :] == self.end_ids if said.shape[1] >= len(self.end_ids) else None
            if ended is not None:
                is_done |= ended.all(dim=1)
            if is_done.all():
                return
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=1)
            batch = replace(
                batch,
                token_ids=chosen[:, None],
                labels=batch.labels[:, -1:],
                segment_ids=batch.segment_ids[:, -1:],
                positions=batch.positions[:, -1:] + 1,
                presence=presence,
                media=batch.media if model.late is not None else {},
            )
            tokens = tokens if model.late is not None else {}


def choose(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    """logits [rows, vocabulary] -> token ids [rows]"""
    if decoding.temperature < _LEAST_TEMPERATURE:
        return logits.argmax(-1)
    chances = (logits / decoding.temperature).softmax(-1).cpu()
    ordered, ids = chances.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= decoding.top_p] = 0  # the likeliest always stays
    picked = torch.multinomial(ordered, 1, generator=generator)
    return ids.gather(-1, picked)[:, 0].to(logits.device)


def pad_left(samples: Sequence[Sample], media: Sequence[Sequence[Tensor]]) -> tuple[Batch, Tensor]:
    """Prompts of different lengths as rows that end together; and the mask [rows, length], 0 at padding."""
    packed = collate(samples, media)
    length = max(len(sample) for sample in samples)
    pads = [length - len(sample) for sample in samples]
    segments = packed.segment_ids[0]
    # Where each token of the pack stands among the rows, flattened.
    place = segments * length + torch.tensor(pads)[segments] + packed.positions[0]

    def spread(values: Tensor, fill: int) -> Tensor:
        rows = values.new_full((len(samples) * length, *values.shape[2:]), fill)
        rows[place] = values[0]
        return rows.view(len(samples), length, *values.shape[2:])

    owners = {
        modality: replace(
            item,
            index=place[item.index],
            anchors=torch.stack([item.anchors[:, 1], torch.zeros_like(item.anchors[:, 1]), item.anchors[:, 2]], dim=1),
        )
        for modality, item in packed.media.items()
    }
    batch = Batch(
        token_ids=spread(packed.token_ids, 0),
        labels=spread(packed.labels, -100),
        segment_ids=spread(torch.zeros_like(packed.segment_ids), -1),
        positions=spread(packed.positions, 0),
        presence=spread(packed.presence, 0),
        media=owners,
        keys=packed.keys,
    )
    return batch, (batch.segment_ids >= 0).long()


def generate(
    model: MMChat,
    template: ChatTemplate,
    samples: Sequence[Sample],
    media: Sequence[Sequence[Tensor]],
    device: torch.device,
    decoding: Decoding,
) -> list[str]:
    """Answers to a batch of prompts, each the same as if it were asked alone."""
    batch, mask = pad_left(samples, media)
    stream = TokenStream(model, batch.to(device), mask.to(device), template.end_ids, decoding)
    said = torch.stack(list(stream), dim=1).tolist()
    return [decode(template, ids) for ids in said]


def decode(template: ChatTemplate, ids: Sequence[int]) -> str:
    """Text up to the end marker."""
    ids, end = list(ids), template.end_ids
    for i in range(len(ids) - len(end) + 1):
        if ids[i : i + len(end)] == end:
            ids = ids[:i]
            break
    return str(template.tokenizer.decode(ids, skip_special_tokens=True)).strip()
