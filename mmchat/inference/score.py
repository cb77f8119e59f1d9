"""Log-likelihoods of given answers behind one shared prompt: the conversation is read once, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmchat.batch import IGNORE, Batch
from mmchat.conversation import Conversation, MediaRef, Part, Turn
from mmchat.data.chat_template import ChatTemplate, Sample
from mmchat.data.pack import collate
from mmchat.errors import SampleError
from mmchat.inference.load import Loaded
from mmchat.models.head import HEAD_CHUNK, logits_of
from mmchat.models.mmchat import MMChat

# Keys and values of a layer that are alive at one time, in tokens: every answer of a chunk looks at the whole prompt.
CHUNK_TOKENS = 32768


def candidate_likelihoods(
    loaded: Loaded, sample: Sample, media: Sequence[Tensor], candidates: Sequence[str]
) -> list[tuple[float, int]]:
    """Summed log-likelihood in nats and number of tokens, end marker included, of each candidate, in their order.

    Args:
        sample: the prompt, `template.render(conversation, key, answer=True)`.
        media: its decoded items, `load_media(sample, template)`.
    Raises:
        SampleError: the LLM has no room for one of them.
    """
    template = loaded.template
    texts = list(dict.fromkeys(candidates))  # a text that occurs twice is a tie, to the last bit
    found = likelihoods(loaded, sample, media, [template.answer_ids(text) + template.end_ids for text in texts])
    by_text = dict(zip(texts, found, strict=True))
    return [by_text[text] for text in candidates]


def reference_likelihood(
    loaded: Loaded, sample: Sample, media: Sequence[Tensor], conversation: Conversation, reference: Sequence[Part]
) -> tuple[float, int]:
    """The same of one answer that may hold regions; perplexity is exp(-sum / tokens).

    Args:
        conversation: that `sample` was rendered from.
    Raises:
        SampleError: a region of the reference has no picture or lies outside of it, the reference shows media, or the
            LLM has no room for it.
    """
    return likelihoods(loaded, sample, media, [answer_ids(loaded.template, conversation, reference)])[0]


def answer_ids(template: ChatTemplate, conversation: Conversation, parts: Sequence[Part]) -> list[int]:
    """Ids that an assistant turn of these parts would teach after the conversation, end marker included.

    Raises SampleError as `reference_likelihood` does.
    """
    if any(isinstance(part, MediaRef) for part in parts):
        raise SampleError("media in an answer", "wanted text and regions only, which is what the model can say")
    turns = (*conversation.turns, Turn("assistant", tuple(parts), learn=True))
    asked = len(template.render(conversation, answer=True))
    labels = template.render(Conversation(turns)).labels
    return [label for label in labels[asked - 1 :] if label != IGNORE]


def check_room(loaded: Loaded, sample: Sample, num_tokens: int) -> None:
    """Raises SampleError where the LLM has no positions for the prompt and so many tokens after it."""
    room = int(loaded.model.llm.config.max_position_embeddings)
    if len(sample) + num_tokens > room:
        raise SampleError(
            "conversation too long",
            f"{sample.key}: {len(sample)} tokens and {num_tokens} of an answer; the LLM has {room} positions",
        )


@torch.no_grad()
def likelihoods(
    loaded: Loaded, sample: Sample, media: Sequence[Tensor], answers: Sequence[Sequence[int]]
) -> list[tuple[float, int]]:
    """Summed log-likelihood in nats and number of tokens of each answer, given as ids with the end marker.

    The prompt and its media are encoded once; the answers are read in padded rows on top of its keys and values, each
    the same as if it were read alone. Raises SampleError where the LLM has no room for the longest.
    """
    if not answers:
        return []
    check_room(loaded, sample, max(map(len, answers)))
    model = loaded.model
    prompt = collate([sample], [media]).to(loaded.device)
    tokens = model.media_tokens(prompt)
    cache = _PromptCache(config=model.llm.config)
    last = model.hidden(prompt, cache, None, tokens)[:, -1]
    cache.is_read = True
    # The prompt's last position predicts the first token of every answer.
    firsts = logits_of(model.llm, last)[0].log_softmax(-1)
    sums = [float(firsts[ids[0]]) for ids in answers]
    for chunk in _chunks([len(ids) for ids in answers], len(sample)):
        for place, total in zip(chunk, _rest(model, prompt, tokens, cache, [answers[i] for i in chunk]), strict=True):
            sums[place] += total
    return [(total, len(ids)) for total, ids in zip(sums, answers, strict=True)]


class _PromptCache(DynamicCache):
    """Keys and values of the prompt. Once that is read, they are lent to every row, and what rows add is not kept.

    So a layer's copies of the prompt live only while that layer runs, and the next rows find the prompt as it was.
    """

    is_read = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_read:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, rows = self.layers[layer_idx], len(key_states)
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        keys, values = (kept.expand(rows, -1, -1, -1) for kept in (layer.keys, layer.values))
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def _chunks(lengths: Sequence[int], prompt_length: int) -> Iterator[list[int]]:
    """Places of the answers that are read together: within CHUNK_TOKENS, each counted with the prompt.

    None is half as long as the longest, so that little is padding. Those of one token are left out: the prompt has
    predicted it.
    """
    chunk: list[int] = []
    # Longest first: the first of a chunk sets its width.
    for place in sorted((i for i, length in enumerate(lengths) if length > 1), key=lambda i: -lengths[i]):
        if chunk:
            longest = lengths[chunk[0]]
            is_full = (len(chunk) + 1) * (prompt_length + longest) > CHUNK_TOKENS
            if is_full or 2 * (lengths[place] - 1) <= longest - 1:
                yield chunk
                chunk = []
        chunk.append(place)
    if chunk:
        yield chunk


def _rest(
    model: MMChat, prompt: Batch, tokens: dict[str, Tensor], cache: _PromptCache, answers: Sequence[Sequence[int]]
) -> list[float]:
    """Summed log-likelihood of every token but the first of each answer, which have at least two."""
    rows, length = len(answers), max(len(ids) for ids in answers) - 1
    device, known = prompt.token_ids.device, prompt.token_ids.shape[1]

    def padded(ids: Sequence[Sequence[int]], fill: int) -> Tensor:
        # [rows, length]; padding is on the right, where causal attention lets no token look at it.
        return torch.tensor([[*row, *([fill] * (length - len(row)))] for row in ids], device=device)

    targets = padded([ids[1:] for ids in answers], IGNORE)
    batch = replace(
        prompt,
        token_ids=padded([ids[:-1] for ids in answers], 0),
        labels=targets,
        segment_ids=torch.zeros_like(targets),
        positions=torch.arange(known, known + length, device=device).expand(rows, -1),
        # An answer has its conversation's gates under the scope `segment`, none under `own_tokens`.
        presence=prompt.presence[:, -1:].expand(rows, length, -1),
        media={},
    )
    hidden = model.hidden(batch, cache, None, {})
    if model.late is not None and tokens:
        everything = torch.cat([t.to(hidden.dtype) for t in tokens.values()])
        # All media stands before the answer, so that every token of it may look at everything.
        visible = torch.ones(rows * length, len(everything), dtype=torch.bool, device=device)
        hidden = model.late(hidden, everything, visible)
    is_said = targets != IGNORE
    found = _token_likelihoods(model.llm, hidden[is_said], targets[is_said])
    counts = is_said.sum(dim=1).tolist()
    return [float(part.sum()) for part in found.split(counts)]


def _token_likelihoods(llm: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [tokens, dim], targets [tokens] -> log-likelihoods [tokens] in float64; logits exist a chunk at a time."""
    found = []
    for part, ids in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        logits = logits_of(llm, part)
        found.append(logits.gather(1, ids[:, None])[:, 0].double() - logits.logsumexp(-1).double())
    return torch.cat(found)
