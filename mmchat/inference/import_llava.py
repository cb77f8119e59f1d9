"""A LLaVA of transformers (llava-hf/llava-1.5-7b-hf and its kin) as a checkpoint here, to ask and to fine-tune.

OUT/llm       the LLM, a causal LM of transformers like any other
OUT/encoder   the vision tower with its preprocessor
OUT           a checkpoint: the connector's weights, config.yaml, manifest.json
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPImageProcessor, CLIPImageProcessorPil

from mmchat.checkpoint import load_weights
from mmchat.config import RunConfig, dump_config, parse_config
from mmchat.conversation import Conversation
from mmchat.data.build import build_template
from mmchat.inference.export import (
    MAX_SHARD,
    QUESTION,
    Say,
    add_checkpoint,
    check_out,
    check_space,
    finish,
    identity_within,
    partial_of,
)
from mmchat.inference.hub import download, is_hub_name
from mmchat.inference.llava_check import (
    differences,
    different_ids,
    drawn_picture,
    hear,
    load_llava,
    load_processor,
    prompts,
)
from mmchat.inference.load import load, with_base_models
from mmchat.models.parts import names_in
from mmchat.models.probe import probe_logits

LLM, ENCODER = "llm", "encoder"
FORMATS = ("llava", "auto", "chatml", "vicuna", "plain")
SUFFIXES = ("\n", "", " ")  # what templates write behind a picture
# A stage to change and to train: what comes first when somebody goes on from here.
STAGE: dict[str, Any] = {
    "name": "tune",
    "train": {"connectors": 2.0e-5},
    "data": [{"name": "mine", "task": "instruct", "shards": "path/to/my/shards/*.tar"}],
    "steps": 1000,
    "batch": {"lanes": 8, "tokens": 2048, "patches": 16384},
    "schedule": {"warmup_steps": 30},
}


def import_llava(
    source: str,
    out: Path,
    chat_format: str | None = None,
    picture: bytes | None = None,
    question: str = QUESTION,
    say: Say = print,
) -> None:
    """Writes a checkpoint that answers as a LLaVA folder does, after comparing them.

    Args:
        source: a folder, or a name on the hub, whose safetensors are downloaded.
        chat_format: how prompts are written; None takes the one that makes the ids of the folder's own template.
    Raises:
        ValueError: it is no LLaVA that fits, with every reason; no chat format makes its ids; `out` is not empty; what
            was written answers differently.
    """
    check_out(out)
    folder = _folder_of(source)
    config = _read_config(folder)
    if reasons := obstacles(config, _resize_of(folder, config.vision_config)):
        raise ValueError(f"{source} cannot become a checkpoint here:\n  - " + "\n  - ".join(reasons))
    say(f"loading {source}")
    llava: Any = load_llava(folder)
    processor = load_processor(folder)
    partial = partial_of(out)
    check_space(partial, llava, "float32")
    say(f"writing {sum(p.numel() for p in llava.parameters()) / 1e6:,.0f} million weights")
    stored = config.dtype if config.dtype is not None else torch.float32
    _write_llm(llava, processor.tokenizer, partial / LLM, stored)
    _write_encoder(llava, processor, partial / ENCODER)
    weights, is_mlp = _connector(llava.model.multi_modal_projector, config.projector_hidden_act)
    del llava

    values = _values(partial, config, _resize_of(folder, config.vision_config), is_mlp)
    asked = prompts(picture or drawn_picture(), question)
    # Behind an answer, templates of LLaVA leave out the token that ends it, which was there in training.
    asked = [asked[0], asked[2]]
    if chat_format is None:
        try:
            values["chat"] |= _chat_of(values, partial, processor, asked, config.image_token_id, source)
        except ValueError:
            shutil.rmtree(partial)
            raise
    else:
        values["chat"] |= {"format": chat_format}
    run = parse_config(values, "import")
    _write_checkpoint(partial, run, weights, say)

    say("loading both, and comparing")
    heard = hear(load(partial, "float32"), asked, config.image_token_id)
    found, largest = differences(folder, heard, with_ids=chat_format is None)
    if found:
        raise ValueError(
            f"{partial} does not answer as {source} does:\n  - " + "\n  - ".join(found) + "\nIt is left there to look "
            f"at, and removed by the next import to {out}"
        )
    finish(partial, out)
    say(f"{out}: logits differ by {largest:.1g} at most, chat format {run.chat.format}")
    say(f"python infer.py chat {out} --image photo.jpg\nTo train on: start: {out}, with the model of {out}/config.yaml")


@dataclass(frozen=True)
class _Resize:
    """How the folder's image processor brings pictures to a square; kind None: in no way that is known here."""

    kind: str | None
    size: int
    values: dict[str, Any]


def obstacles(config: Any, resize: _Resize) -> list[str]:
    """Every reason why a LLaVA is not one that fits; empty where it is."""
    vision, found = config.vision_config, []
    if config.model_type != "llava":
        return [f"model_type {config.model_type}; wanted llava (LlavaForConditionalGeneration)"]
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return [f"a vision tower of {vision.model_type}; wanted CLIP or SigLIP"]
    if not isinstance(config.vision_feature_layer, int):
        found.append(f"vision_feature_layer {config.vision_feature_layer}: features of several layers; wanted one")
    elif config.vision_feature_layer == 0 or abs(config.vision_feature_layer) > vision.num_hidden_layers:
        found.append(
            f"vision_feature_layer {config.vision_feature_layer}; wanted a layer from 1 to {vision.num_hidden_layers}, "
            "or counted from the end from -1"
        )
    if vision.model_type == "siglip_vision_model" and config.vision_feature_select_strategy == "default":
        found.append("vision_feature_select_strategy default leaves out SigLIP's first patch, which is no class token")
    if config.projector_hidden_act not in ("gelu", "linear"):
        found.append(f"projector_hidden_act {config.projector_hidden_act}; wanted gelu or linear")
    if resize.kind is None or resize.size != vision.image_size:
        found.append(
            f"an image processor with {resize.values}; wanted pictures padded, squashed or cropped to a square of "
            f"{vision.image_size} pixels"
        )
    return found


def _folder_of(source: str) -> Path:
    """The folder, after a download where it is a name on the hub."""
    if Path(source).is_dir() or not is_hub_name(source):
        return Path(source)
    return download(source)


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: wanted a folder with the config.json of a LLaVA, or its name on the hub "
            f"({str(error).splitlines()[0]})"
        ) from error


def _resize_of(folder: Path, vision: Any) -> _Resize:
    values, _ = CLIPImageProcessor.get_image_processor_dict(folder)
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    shown = {key: values.get(key) for key in ("do_pad", "do_resize", "size", "do_center_crop", "crop_size")}
    edge = size.get("shortest_edge")
    is_square = edge is None and size.get("height") == size.get("width") and size.get("height") is not None
    is_cropped = bool(values.get("do_center_crop")) and crop.get("height") == crop.get("width")
    if values.get("do_pad") and is_square:
        return _Resize("pad", size["height"], shown)
    if is_square and not values.get("do_pad"):
        return _Resize("squash", size["height"], shown)
    if edge is not None and is_cropped and edge == crop.get("height") and not values.get("do_pad"):
        return _Resize("crop", edge, shown)
    return _Resize(None, 0, shown)


def _write_llm(llava: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """The LLM on its own, in the precision of the folder it comes from."""
    config = copy.deepcopy(llava.config.text_config)
    config.tie_word_embeddings = llava.config.tie_word_embeddings
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(config)
    setattr(llm, llm.base_model_prefix, llava.model.language_model)
    llm.set_output_embeddings(llava.lm_head)
    llm.generation_config = llava.generation_config
    llm.to(dtype).save_pretrained(folder, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(folder)


def _write_encoder(llava: Any, processor: Any, folder: Path) -> None:
    llava.model.vision_tower.save_pretrained(folder)
    images = processor.image_processor
    size = llava.config.vision_config.image_size
    # Mean, spread and filter are what is read from it; the rest is `resize` in config.yaml.
    CLIPImageProcessorPil(
        image_mean=images.image_mean,
        image_std=images.image_std,
        resample=images.resample,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
    ).save_pretrained(folder)


def _connector(projector: Any, activation: str) -> tuple[dict[str, Tensor], bool]:
    """The connector's weights under their names here, and whether it is an mlp; one layer where the two are one."""

    def bias(layer: nn.Linear) -> Tensor:
        return layer.bias if layer.bias is not None else torch.zeros(layer.out_features)

    first, second = projector.linear_1, projector.linear_2
    prefix = "connectors.image.projection"
    with torch.no_grad():
        if activation != "linear":
            named = {"0.weight": first.weight, "0.bias": bias(first), "2.weight": second.weight, "2.bias": bias(second)}
        else:
            joined = second.weight @ bias(first) + bias(second)
            named = {"weight": second.weight @ first.weight, "bias": joined}
        return {f"{prefix}.{name}": value.float().contiguous() for name, value in named.items()}, activation != "linear"


def _values(folder: Path, config: Any, resize: _Resize, is_mlp: bool) -> dict[str, Any]:
    """The configuration, with the chat format still to be found. Base models are named relative to the checkpoint."""
    num_layers, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    encoder: dict[str, Any] = {
        "kind": "transformers",
        "pretrained": ENCODER,
        # Of the num_layers + 1 hidden states, counted from the end.
        "layer": layer if layer < 0 else layer - num_layers - 1,
    }
    if config.vision_config.model_type == "clip_vision_model":
        encoder["drop_class_token"] = config.vision_feature_select_strategy == "default"
    image = {"encoder": encoder, "resize": resize.kind, "connector": {"kind": "mlp" if is_mlp else "linear"}}
    return {
        "run": "imported",
        "model": {"llm": {"pretrained": LLM}, "modalities": {"image": image}, "fusion": {"kind": "early"}},
        # LLaVA-1.5 says places with two decimals of the padded square.
        "chat": {"region_dialect": "shikra", "region_decimals": 2, "region_frame": "padded_square"},
        "stages": [copy.deepcopy(STAGE)],
    }


def _chat_of(
    values: dict[str, Any], folder: Path, processor: Any, asked: Sequence[Conversation], image_id: int, source: str
) -> dict[str, Any]:
    """The chat format whose ids are those of the folder's own template."""
    closest: list[str] = []
    if processor.chat_template is None:
        raise ValueError(f"{source} has no chat template; name a format with --chat-format ({', '.join(FORMATS)})")
    for name in FORMATS:
        for suffix in SUFFIXES:
            chosen = {"format": name, "media_suffix": {"image": suffix}}
            run = parse_config({**values, "chat": {**values["chat"], **chosen}}, "import")
            try:
                template = build_template(with_base_models(run, folder))
            except ValueError as error:
                closest.append(f"{name}: {error}")
                break
            found = [_ids_differ(template, one, processor, image_id) for one in asked]
            if not any(found):
                return chosen
            closest.append(f"{name}, {suffix!r} behind a picture: {next(one for one in found if one)}")
    raise ValueError(
        f"{source}: no chat format here makes the ids of its template:\n  - "
        + "\n  - ".join(closest)
        + f"\nName one with --chat-format ({', '.join(FORMATS)}); prompts then differ from those it was trained with"
    )


def _ids_differ(template: Any, conversation: Conversation, processor: Any, image_id: int) -> str | None:
    sample = template.render(conversation, answer=True)
    ids = torch.tensor(sample.token_ids)
    for item in sample.media:
        ids[list(item.places)] = image_id
    return different_ids(ids, processor, conversation)


def _write_checkpoint(folder: Path, run: RunConfig, weights: dict[str, Tensor], say: Say) -> None:
    """The checkpoint around the base models that lie in `folder` already."""
    say("asking the model, for the checkpoint's probe")
    resolved = with_base_models(run, folder)
    model = resolved.model.build(torch.float32, run.seed).eval()
    load_weights(model, weights, names_in(model, {"connectors.image"}, is_full=False), folder)
    logits = probe_logits(model, torch.device("cpu"))
    facts = {
        "run": run.run,
        "stage": run.stages[0].name,
        "step": 0,
        "is_last": True,
        "parts": ["connectors.image"],
        "fusion": run.model.fusion.model_dump(mode="json"),
        "bases": {"llm": identity_within(folder, LLM), "image": identity_within(folder, ENCODER)},
        "probe": {"dtype": "float32", "logits": logits},
    }
    add_checkpoint(folder, dump_config(run), weights, facts)
