"""The model without its weights, built on the meta device from configurations alone: true sizes, no computation.

What autograd would keep for the backward pass is measured on it, not guessed: a forward pass over shapes runs through
PyTorch's own code, and the tensors that it saves are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from mmchat.batch import FeatureShape
from mmchat.conversation import MODALITIES, Modality
from mmchat.modalities.audio import WhisperEncoder, WhisperEncoderConfig
from mmchat.modalities.efficientnet_lite import EfficientNetLite, read_config
from mmchat.modalities.image_encoders import (
    EfficientNetLiteConfig,
    ImageEncoder,
    OpenClipConfig,
    Siglip2Tower,
    TimmConfig,
    TransformersConfig,
    TransformersTower,
)
from mmchat.modalities.video import SharedEncoder
from mmchat.models.build import ModelConfig
from mmchat.models.connector import Connector
from mmchat.models.fusion import FLoRAConfig, LateConfig, LateFusion, LoRAConfig, adapt
from mmchat.models.llm import check_supported, decoder_of, token_embedding
from mmchat.models.mmchat import MMChat

SHAPES = "mmchat_shapes"  # the attention of skeletons; a name with "flash" in it would be looked for on the hub


def skeleton(config: ModelConfig, dtype: torch.dtype) -> MMChat:
    """The model of a configuration on the meta device, as ModelConfig.build() would make it.

    Raises ValueError or OSError where a part's configuration cannot be read.
    """
    try:
        llm_config = AutoConfig.from_pretrained(
            config.llm.pretrained, revision=config.llm.revision, trust_remote_code=False
        )
    except OSError as error:
        raise ValueError(
            f"model.llm.pretrained: no config.json in {config.llm.pretrained!r} ({str(error).splitlines()[0]})"
        ) from error
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation=SHAPES)
        check_supported(llm)
        llm_dim = token_embedding(llm).embedding_dim
        encoders: dict[str, nn.Module] = {}
        connectors: dict[str, Connector] = {}
        shared: dict[str, str] = {}
        for modality, entry in config.modalities.entries().items():
            if (reader := config.modalities.reader(modality)) is not None:
                encoders[modality] = reader
            elif isinstance(entry.encoder, SharedEncoder):
                shared[modality] = "image"
            else:
                encoders[modality] = _encoder(entry.encoder).to(dtype)
            feature_dim = int(encoders[shared.get(modality, modality)].feature_dim)  # type: ignore[arg-type]
            connectors[modality] = entry.connector.build(feature_dim, llm_dim, 1.0).to(dtype)
        gates, late = None, None
        if isinstance(config.fusion, FLoRAConfig | LoRAConfig):
            gates = adapt(decoder_of(llm), config.fusion, tuple(config.modalities.entries()))
        elif isinstance(config.fusion, LateConfig):
            late = LateFusion(config.fusion, llm_dim).to(dtype)
        readouts = {name: readout.to(dtype) for name, readout in config.modalities.readouts(llm_dim).items()}
        return MMChat(llm, encoders, connectors, shared, gates, late, readouts).train()


def _encoder(config: Any) -> nn.Module:
    """An encoder as its build() makes it, without weights."""
    if isinstance(config, TimmConfig):
        return ImageEncoder(config._tower(False), config.spec())
    if isinstance(config, OpenClipConfig):
        return ImageEncoder(config._tower(load_weights=False)[0], config.spec())
    if isinstance(config, EfficientNetLiteConfig):
        return ImageEncoder(
            EfficientNetLite(read_config(config.pretrained)["variant"], fine=config.fine), config.spec()
        )
    if isinstance(config, WhisperEncoderConfig):
        whisper = AutoModel.from_config(config._config(), attn_implementation=SHAPES)
        return WhisperEncoder(whisper.get_encoder(), config.spec())
    assert isinstance(config, TransformersConfig)
    spec, tower = config.spec(), config._config()
    tower.vision_use_head = False
    if config.layer is not None:
        tower.num_hidden_layers += config.layer + 1
    model = AutoModel.from_config(tower, attn_implementation=SHAPES)
    if config.layer is not None or tower.model_type == "clip_vision_model":
        model.post_layernorm = nn.Identity()
    if tower.model_type == "siglip2_vision_model":
        return ImageEncoder(Siglip2Tower(model, tower.patch_size), spec)
    num_dropped = int(tower.model_type == "clip_vision_model" and config.drop_class_token)
    return ImageEncoder(TransformersTower(model, num_dropped, spec.grid_height), spec)


def kept_bytes(
    model: MMChat, tokens: int, media: Mapping[Modality, tuple[Sequence[FeatureShape], int]], is_checkpointed: bool
) -> tuple[int, int | None]:
    """Bytes that autograd keeps of a forward pass over one row: in the LLM; in what learns around it.

    The second is None where an encoder learns whose code looks at values (SigLIP 2's), so that it is not known.

    Args:
        model: a skeleton with its requires_grad flags set.
        tokens: length of the row.
        media: by modality, the shape of every item and the encoder patches of all of them.
        is_checkpointed: keeps the input of each layer of the LLM, and one layer at a time in full.
    """
    dtype = next(model.llm.parameters()).dtype
    with torch.device("meta"):
        around, is_known = 0, True
        read = [torch.empty(0, token_embedding(model.llm).embedding_dim, dtype=dtype)]
        for modality, (shapes, patches) in media.items():
            encoder: Any = model.encoders[model.shared.get(modality, modality)]
            learns = any(p.requires_grad for p in encoder.parameters())
            if learns:
                part, part_shapes = encoder.stand_in()  # one picture, frame or window
                size = encoder.spec.window_positions if isinstance(encoder, WhisperEncoder) else encoder.spec.patches
                try:
                    around += _kept(model, partial(encoder, part.to(dtype), part_shapes))[0] * math.ceil(patches / size)
                except NotImplementedError:
                    is_known = False
            features = torch.empty(sum(map(math.prod, shapes)), encoder.feature_dim, dtype=dtype, requires_grad=learns)
            connector = model.connectors[modality]
            kept, media_tokens = _kept(model, partial(connector, features, shapes))
            around += kept
            read.append(media_tokens)
        before = [model.connectors, *model.encoders.values()] if model.late is None else []
        upstream = any(p.requires_grad for module in [*before, token_embedding(model.llm)] for p in module.parameters())
        hidden = torch.empty(1, tokens, read[0].shape[1], dtype=dtype, requires_grad=upstream)
        if model.gates is not None:
            model.gates.set(torch.empty(1, tokens, len(MODALITIES)), dtype)
        mask = torch.empty(1, 1, 1, 1)  # any made mask: transformers would look at values to make one
        decoder = decoder_of(model.llm)
        inside, output = _kept(
            model, lambda: decoder(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state
        )
        if is_checkpointed:
            layers = int(model.llm.config.num_hidden_layers)
            inside = inside // layers + (layers * hidden.nbytes if output.requires_grad else 0)
        if model.late is not None:
            everything, late = torch.cat(read), model.late
            may_look = torch.empty(tokens, len(everything), dtype=torch.bool)
            around += _kept(model, lambda: late(output, everything, may_look))[0]
    return inside, around if is_known else None


def _kept(model: MMChat, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the distinct storages saved for backward, the model's own left out; and the output."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own), output


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output.transpose(1, 2)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value), None


AttentionInterface.register(SHAPES, _attend)
AttentionMaskInterface.register(SHAPES, lambda **_: None)
