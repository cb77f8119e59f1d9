"""The parts of transformers' LlavaForConditionalGeneration folder, made of an mmchat model's own modules.

Nothing is copied but what must change: the exported model shares the tensors of the one that it is made of.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mmchat.inference.jinja_chat import jinja_template
from mmchat.inference.load import Loaded
from mmchat.modalities.image_encoders import ImageEncoder, TransformersConfig, TransformersTower
from mmchat.models.connector import LinearConfig, MLPConfig
from mmchat.models.fusion import FLoRAConfig, LateConfig, LowRankFusion
from mmchat.models.llm import decoder_of, token_embedding

IMAGE_TOKEN = "<image>"


def obstacles(loaded: Loaded) -> list[str]:
    """Every reason why this model is no LLaVA of transformers, whatever its fusion; empty where it is one."""
    entries = loaded.config.model.modalities.entries()
    found = [f"{modality}: LLaVA has pictures alone" for modality in entries if modality != "image"]
    image = loaded.config.model.modalities.image
    if image is None:
        return [*found, "image: the model has none"]
    if image.stored_features:
        found.append("image.stored_features: the encoder is not in the model; LLaVA needs its weights")
    encoder = image.encoder
    if not isinstance(encoder, TransformersConfig):
        found.append(
            f"image.encoder: kind {encoder.kind}; LLaVA holds a vision tower of transformers (kind transformers)"
        )
    elif not image.stored_features:
        tower = loaded.model.encoders["image"].tower
        if not isinstance(tower, TransformersTower):
            found.append("image.encoder: SigLIP 2 with pictures of any size; LLaVA needs CLIP, or a SigLIP of one size")
        elif isinstance(tower.model.post_layernorm, nn.LayerNorm):
            found.append(
                "image.encoder.layer: null takes features behind the last normalisation; LLaVA takes them before it"
            )
    found += _connector_obstacles(loaded)
    llm = loaded.model.llm
    head = llm.get_output_embeddings()
    if not hasattr(decoder_of(llm), "embed_tokens"):
        found.append(f"llm: a {type(llm).__name__}; LLaVA needs one of the Llama build, with embed_tokens")
    if getattr(head, "bias", None) is not None:
        found.append("llm: its output layer has a bias, LLaVA's has none")
    if llm.config.to_dict().get("final_logit_softcapping"):
        found.append("llm: it caps its logits (final_logit_softcapping), LLaVA does not")
    if len(loaded.template.end_ids) > 1:
        found.append(
            f"chat.format: the end of an answer is {len(loaded.template.end_ids)} tokens of this tokenizer, and "
            "generation stops at one"
        )
    return found


def _connector_obstacles(loaded: Loaded) -> list[str]:
    assert loaded.config.model.modalities.image is not None
    connector = loaded.config.model.modalities.image.connector
    name = "image.connector"
    if not isinstance(connector, LinearConfig | MLPConfig):
        return [f"{name}: kind {connector.kind}; LLaVA's is linear or mlp"]
    found = [
        f"{name}.{option}: LLaVA's has none"
        for option in ("norm_input", "norm_output", "places")
        if connector.model_dump()[option]
    ]
    llm_dim = token_embedding(loaded.model.llm).embedding_dim
    if isinstance(connector, MLPConfig) and connector.hidden_dim not in (None, llm_dim):
        found.append(f"{name}.hidden_dim: {connector.hidden_dim}; LLaVA's is the LLM's width, {llm_dim}")
    return found


def fusion_obstacles(loaded: Loaded, assumed: str | None) -> list[str]:
    """Why the fusion cannot be merged into the LLM's weights; empty where it can, or where there is nothing to merge.

    assumed: a modality that the user says is present in every prompt.
    """
    fusion = loaded.config.model.fusion
    if assumed is not None and not isinstance(fusion, FLoRAConfig):
        return [f"--assume-present {assumed}: fusion {fusion.kind} does not depend on presence; leave the option out"]
    if isinstance(fusion, LateConfig):
        return ["fusion: late keeps media out of the prompt and adds a layer behind the LLM"]
    if not isinstance(fusion, FLoRAConfig):
        return []
    if fusion.scope == "own_tokens":
        return ["fusion: FLoRA of scope own_tokens acts on media tokens alone; merged weights act on every token"]
    if assumed is None:
        named = " or ".join(loaded.config.model.modalities.entries())
        return [
            "fusion: FLoRA acts only where its modality is present, and merged weights always act. If every prompt has "
            f"it, say so: --assume-present {named}. Answers to prompts without it then change"
        ]
    if assumed not in loaded.config.model.modalities.entries():
        return [f"--assume-present {assumed}: the model has no such modality"]
    layers = [module for module in loaded.model.llm.modules() if isinstance(module, LowRankFusion)]
    trained = [m for m in loaded.config.model.modalities.entries() if any(layer.pair(m)[1].any() for layer in layers)]
    return [
        f"fusion: the pairs of {other} are trained too; merged weights hold those of one modality"
        for other in trained
        if other != assumed
    ]


def exported_tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    """A copy of the LLM's tokenizer with a token for pictures, and the chat template of the model's format."""
    tokenizer = copy.deepcopy(loaded.template.tokenizer)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    suffix = loaded.template.config.media_suffix.get("image", "")
    chat, begin = loaded.template.format, loaded.template.format.begin
    added = tokenizer("x").input_ids
    if added != tokenizer("x", add_special_tokens=False).input_ids:  # it puts a beginning before each prompt
        # transformers has it leave that out where the template has written it already.
        if not (tokenizer.bos_token and begin.startswith(tokenizer.bos_token)):
            tokenizer.add_bos_token = False
        elif begin == tokenizer.bos_token and added != tokenizer(f"{begin}x", add_special_tokens=False).input_ids:
            # Behind a beginning that is written out, it makes other ids of the first word.
            chat = replace(chat, begin="", begin_system=chat.begin_system.removeprefix(begin))
    tokenizer.chat_template = jinja_template(chat, loaded.template.config.system, IMAGE_TOKEN, suffix)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.get_vocab()[IMAGE_TOKEN])


def exported_processor(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Image processor, tokenizer and chat template in one."""
    image = loaded.config.model.modalities.image
    assert image is not None
    encoder: Any = loaded.model.encoders["image"]
    spec = encoder.spec
    square = {"height": spec.size, "width": spec.size}
    common: dict[str, Any] = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": int(spec.resample),
    }
    images: Any
    if image.resize == "pad":
        images = LlavaImageProcessorPil(size=square, crop_size=square, do_pad=True, **common)
    elif image.resize == "crop":
        images = CLIPImageProcessorPil(size={"shortest_edge": spec.size}, crop_size=square, **common)
    else:
        images = CLIPImageProcessorPil(size=square, crop_size=square, **common)
    tower = encoder.tower.model
    is_clip = tower.config.model_type == "clip_vision_model"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if encoder.tower.num_dropped else "full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(is_clip),
    )


def exported_model(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """The model, made of the modules of one whose fusion is merged; the LLM may grow by the picture's token.

    The vision tower is cut behind the layer that is looked at, so that layer is the last (vision_feature_layer -1).
    """
    encoder: Any = loaded.model.encoders["image"]
    assert isinstance(encoder, ImageEncoder)
    tower: Any = encoder.tower
    llm: Any = loaded.model.llm
    image_id = image_token_id(tokenizer)
    text_config = copy.deepcopy(llm.config)
    vision_config = copy.deepcopy(tower.model.config)
    for part in (text_config, vision_config):
        part._name_or_path = ""  # where it lay on this machine
    text_config.use_cache = True
    text_config.vocab_size = max(token_embedding(llm).num_embeddings, image_id + 1)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=encoder.spec.patches,
        projector_hidden_act="gelu" if _is_mlp(loaded) else "linear",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if tower.num_dropped else "full",
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    with torch.device("meta"):
        llava: Any = LlavaForConditionalGeneration(config)
    vision = tower.model
    if not isinstance(vision.post_layernorm, nn.LayerNorm):  # behind the layer that is looked at: any will do
        vision.post_layernorm = nn.LayerNorm(vision.config.hidden_size, eps=vision.config.layer_norm_eps)
    llava.model.vision_tower = vision
    _grow(llm, text_config.vocab_size)
    llava.model.language_model = decoder_of(llm)
    llava.lm_head = llm.get_output_embeddings()
    _set_projector(llava.model.multi_modal_projector, loaded.model.connectors["image"].projection)
    llava.generation_config = _generation(loaded, tokenizer)
    return llava.eval()


def _is_mlp(loaded: Loaded) -> bool:
    image = loaded.config.model.modalities.image
    return image is not None and isinstance(image.connector, MLPConfig)


def _set_projector(projector: Any, projection: Any) -> None:
    if isinstance(projection, nn.Sequential):
        projector.linear_1, projector.linear_2 = projection[0], projection[2]
        return
    # One linear layer is two with nothing between them, the second of which changes nothing.
    projector.linear_1 = projection
    dim, like = projection.out_features, projection.weight
    second = nn.Linear(dim, dim, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        second.weight.copy_(torch.eye(dim))
        second.bias.zero_()
    projector.linear_2 = second


def _grow(llm: Any, size: int) -> None:
    """Adds rows to the vocabulary, each the mean of the others: their logit is never the highest."""
    embedding, head = token_embedding(llm), llm.get_output_embeddings()
    if size == embedding.num_embeddings:
        return
    is_tied = head.weight is embedding.weight
    embedding.weight = _with_means(embedding.weight, size)
    embedding.num_embeddings = size
    head.weight = embedding.weight if is_tied else _with_means(head.weight, size)
    head.out_features = size


def _with_means(weight: Tensor, size: int) -> nn.Parameter:
    mean = weight.detach().float().mean(0, keepdim=True).to(weight.dtype)
    return nn.Parameter(torch.cat([weight.detach(), mean.expand(size - len(weight), -1)]), requires_grad=False)


def _generation(loaded: Loaded, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, up to the end of the answer, as infer.py answers."""
    end: Sequence[int] = loaded.template.end_ids
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end[0], pad_token_id=pad, do_sample=False, max_new_tokens=256
    )
