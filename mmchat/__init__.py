"""mmchat: train, evaluate and chat with multimodal language models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mmchat import torchvision_repair

if TYPE_CHECKING:
    from mmchat.inference.python_api import Chat

torchvision_repair.install()


def load(
    checkpoint: str | os.PathLike[str],
    dtype: str | None = None,
    system: str | None = None,
    revision: str | None = None,
) -> Chat:
    """A model that can be asked: `mmchat.load("checkpoints/demo").ask("Where is the dog?", image="photo.jpg")`.

    Args:
        checkpoint: folder of a checkpoint, of a run or a stage (its newest is taken), or one that `infer.py export
            --format hub` wrote; a configuration file (.yaml) for the untrained model; or, where no such path exists,
            owner/name of a model on the Hugging Face hub, whose safetensors and text files are downloaded.
        dtype: "float32" or "bfloat16"; by default bfloat16 on a GPU and float32 on a CPU.
        system: said to the model before everything else.
        revision: branch, tag or commit on the hub.
    Raises:
        ValueError: nothing that can be loaded is there, or it is damaged.
    """
    # Here, so that importing mmchat does not import torch.
    from mmchat.inference.python_api import load_chat

    return load_chat(checkpoint, dtype, system, revision)
