"""A fixed question to a model: its answer is stored in a checkpoint, and must come out again when that is loaded."""

from __future__ import annotations

from collections.abc import Collection

import torch

from mmchat.batch import IGNORE, Batch, MediaBatch
from mmchat.conversation import MODALITIES
from mmchat.models.connector import Connector
from mmchat.models.llm import token_embedding
from mmchat.models.mmchat import MMChat

NUM_TEXT = 24
NUM_LOGITS = 32


@torch.no_grad()
def probe_logits(model: MMChat, device: torch.device, modalities: Collection[str] | None = None) -> list[float]:
    """Some logits after one noise item of each modality and a few token ids: every part of the model has a say.

    modalities: those that are asked about; None: all of the model's. Under ZeRO-3 all ranks must call this together.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    length, media, present = NUM_TEXT, {}, torch.zeros(len(MODALITIES))
    for modality, connector in model.connectors.items():
        if modalities is not None and modality not in modalities:
            continue
        assert isinstance(connector, Connector)
        data, shapes = model.encoders[model.shared.get(modality, modality)].stand_in()  # type: ignore[operator]
        noise = torch.rand(data.shape, generator=generator) * 2 - 1
        num_tokens = sum(connector.config.num_tokens(shape) for shape in shapes)
        # Late fusion keeps media out of the sequence; the item then stands before the first token.
        index = torch.arange(0) if model.late is not None else torch.arange(length, length + num_tokens)
        media[modality] = MediaBatch(noise, shapes, index, torch.zeros(len(shapes), 3, dtype=torch.int64))
        length += len(index)
        present[list[str](MODALITIES).index(modality)] = 1.0
    batch = Batch(
        token_ids=(torch.arange(length)[None] * 7) % token_embedding(model.llm).num_embeddings,
        labels=torch.full((1, length), IGNORE),
        segment_ids=torch.zeros(1, length, dtype=torch.int64),
        positions=torch.arange(length)[None],
        presence=present.expand(1, length, -1).contiguous(),
        media=media,
    )
    logits = model.logits(batch.to(device))[0, -1]
    model.train(was_training)
    return [round(float(x), 6) for x in logits[:: max(1, len(logits) // NUM_LOGITS)][:NUM_LOGITS]]


def probe_agrees(found: list[float], stored: list[float], is_same_dtype: bool) -> bool:
    """Whether two answers are the same model's: within 2 % of their spread, 30 % between bfloat16 and float32."""
    expected = torch.tensor(stored)
    limit = (0.02 if is_same_dtype else 0.3) * float(expected.std()) + 1e-6
    return len(found) == len(stored) and float((torch.tensor(found) - expected).abs().max()) <= limit
