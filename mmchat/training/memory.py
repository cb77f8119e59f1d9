"""An estimate of the memory of a rank, line by line, from a skeleton of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmchat.batch import FeatureShape
from mmchat.config import StageConfig
from mmchat.conversation import Modality
from mmchat.models.head import HEAD_CHUNK
from mmchat.models.llm import token_embedding
from mmchat.models.mmchat import MMChat
from mmchat.models.skeleton import kept_bytes
from mmchat.training.trainable import Part


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of one forward pass: LLM tokens; by modality, the shape of every item and the patches of all."""

    num_tokens: int
    media: Mapping[Modality, tuple[Sequence[FeatureShape], int]]


def model_state(stage: StageConfig, parts: Sequence[Part], ranks: int) -> dict[str, int]:
    """Bytes of the model's state on each rank under the stage's ZeRO level (after DeepSpeed 0.19's runtime/zero)."""
    size, level = getattr(torch, stage.dtype).itemsize, stage.zero
    held = sum(part.num_parameters for part in parts)
    learning = sum(part.num_parameters for part in parts if part.rate)
    given = stage.deepspeed.get("zero_optimization", {})
    state = {
        "weights": held * size // (ranks if level == 3 else 1),
        "gradients": learning * size // (ranks if level > 1 else 1),
        "optimizer": learning * 12 // ranks if level else learning * 8,
    }
    if level:
        state["step_gradients"] = learning * 4 // ranks
        buffers = 2 if given.get("overlap_comm") else 1
        state["reduce_bucket"] = int(float(given.get("reduce_bucket_size", 5e8))) * size * buffers
    if level == 3:
        state["gathered"] = min(held, int(float(given.get("stage3_max_live_parameters", 1e9)))) * size
    return state


def activations(
    model: MMChat, stage: StageConfig, micro_batches: Sequence[MicroBatch], is_checkpointed: bool
) -> dict[str, int | None]:
    """Bytes kept for backward by the largest of the micro-batches, and of the loss head's logits.

    None is not known. A fused attention is assumed: what short segments keep in bfloat16 on a CPU
    (`mmchat.models.llm.PRODUCTS_MAX_LENGTH`) comes on top. is_checkpointed: gradient checkpointing in the LLM.
    """
    kept = [kept_bytes(model, one.num_tokens, one.media, is_checkpointed) for one in micro_batches]
    inside, around = max(kept, key=lambda pair: pair[0] + (pair[1] or 0))
    size = getattr(torch, stage.dtype).itemsize
    # A chunk's logits in fp32, and their gradient in the weights' dtype where that is another.
    logits = HEAD_CHUNK * token_embedding(model.llm).num_embeddings * (4 + (size if size < 4 else 0))
    if not stage.losses.answers:  # the LLM does not run
        inside = logits = 0
    return {"llm_activations": inside, "media_activations": around, "logits": logits}
