"""Model FLOPs of a training step, counted from shapes, and the peak they are compared with.

A matrix product of N parameters with T tokens is 2 N T forward; backward adds 2 N T for the activations' gradient where
anything before it learns, and 2 N T for the weights' gradient where they learn. Recomputation does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mmchat.batch import Batch
from mmchat.models.llm import decoder_of
from mmchat.models.mmchat import MMChat
from mmchat.models.parts import shape_of, size_of

# Dense bfloat16 FLOP/s by device name (vendors' data sheets).
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}


def peak_flops() -> float | None:
    """Peak of this GPU in FLOP/s; None where it is not known, and always on a CPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)


class FlopCounter:
    """Counts the FLOPs of batches for one model with its present requires_grad flags.

    runs_llm: False where a stage's losses do not.
    """

    def __init__(self, model: MMChat, runs_llm: bool = True) -> None:
        config = model.llm.config
        decoder = decoder_of(model.llm)
        embedding = {id(p) for p in model.llm.get_input_embeddings().parameters()}
        self.decoder = [
            (size_of(p), p.requires_grad)
            for p in decoder.parameters()
            if id(p) not in embedding and len(shape_of(p)) > 1
        ]
        head = model.llm.get_output_embeddings().weight
        self.head = (size_of(head), head.requires_grad)
        self.attention = 4 * config.num_hidden_layers * config.hidden_size
        self.encoders = {
            name: [(size_of(p), p.requires_grad) for p in encoder.parameters() if len(shape_of(p)) > 1]
            for name, encoder in model.encoders.items()
        }
        self.connectors = {
            name: [(size_of(p), p.requires_grad) for p in connector.parameters() if len(shape_of(p)) > 1]
            for name, connector in model.connectors.items()
        }
        self.shared = model.shared
        self.runs_llm = runs_llm

    def count(self, batch: Batch) -> float:
        """FLOPs of one forward and backward over the batch."""
        media = {name: (sum(map(math.prod, item.shapes)), len(item.index)) for name, item in batch.media.items()}
        return self.count_sizes(torch.bincount(batch.segment_ids.flatten()).tolist(), batch.num_learned, media)

    def count_sizes(self, lengths: Sequence[int], num_learned: int, media: Mapping[str, tuple[int, int]]) -> float:
        """The same from sizes alone.

        lengths: tokens of every conversation. num_learned: learned tokens of all. media: by modality, encoder positions
        and media tokens in the sequence (none under late fusion).
        """
        if not self.runs_llm:
            lengths, num_learned = (), 0
        tokens = sum(lengths)
        pairs = sum(length * (length + 1) / 2 for length in lengths)  # causal: each token with itself and those before
        upstream = any(learns for parts in self.connectors.values() for _, learns in parts)
        learns = any(learns for _, learns in self.decoder)
        flops = _matmul(self.decoder, tokens, upstream)
        flops += self.attention * pairs * (3 if upstream or learns else 1)
        flops += _matmul([self.head], num_learned, upstream or learns)
        for name, (positions, media_tokens) in media.items():
            flops += _matmul(self.encoders[self.shared.get(name, name)], positions, False)
            flops += _matmul(self.connectors[name], media_tokens or positions, False)
        return flops


def _matmul(parts: list[tuple[int, bool]], rows: int, upstream: bool) -> float:
    """upstream: something before these layers learns, so that the gradient passes through them."""
    passes = upstream or any(learns for _, learns in parts)
    return float(sum(size * rows * (2 + 2 * passes + 2 * learns) for size, learns in parts))
