"""The data side of a run: the chat template with its tokenizer and preprocessing, without any weights."""

from __future__ import annotations

from mmchat.config import RunConfig
from mmchat.data.chat_template import ChatTemplate
from mmchat.models.llm import load_tokenizer


def build_template(config: RunConfig) -> ChatTemplate:
    """One template for training, inference and serving."""
    modalities = config.model.modalities
    return ChatTemplate(
        load_tokenizer(config.model.llm),
        config.chat,
        modalities.preprocesses(),
        {modality: entry.connector for modality, entry in modalities.entries().items()},
        config.model.fusion,
    )
