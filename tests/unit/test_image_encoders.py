"""Every encoder equals its library's own call, and nothing behind the chosen layer is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from mmchat.modalities.efficientnet_lite import EfficientNetLite
from mmchat.modalities.image_encoders import (
    EfficientNetLiteConfig,
    ImageEncoder,
    ImageEncoderConfig,
    OpenClipConfig,
    TimmConfig,
    TransformersConfig,
)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def pictures(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def encode(encoder: ImageEncoder, data: Tensor) -> Tensor:
    """[n, grid_h * grid_w, feature_dim], after what must hold for every encoder is checked."""
    spec = encoder.spec
    shape = (1, spec.grid_height, spec.grid_width)
    encoder.eval()
    stand_in, shapes = encoder.stand_in()
    assert shapes == (shape,) and stand_in.shape == (1, 3, spec.size, spec.size)
    features = encoder(stand_in, shapes)
    assert features.shape == (spec.patches, encoder.feature_dim) and encoder.feature_dim == spec.feature_dim
    features.sum().backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None] == []
    return encoder(data, (shape,) * len(data)).detach().unflatten(0, (len(data), -1))


def clip_folder(folder: Path) -> CLIPModel:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_transformers_clip_layers(tmp_path: Path, layer: int) -> None:
    model = clip_folder(tmp_path)
    encoder = TransformersConfig(pretrained=str(tmp_path), layer=layer).build()
    data = pictures(24)
    with torch.no_grad():
        states = model.vision_model(data, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encode(encoder, data), states[layer][:, 1:], rtol=0, atol=0)
    assert encoder.spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_transformers_equals_llava(tmp_path: Path) -> None:
    """LlavaForConditionalGeneration with vision_feature_layer -2 and the 'default' strategy."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPConfig(vision_config=VISION).vision_config,
        text_config=LlamaConfig(**TEXT),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.save_pretrained(tmp_path)
    llava.model.multi_modal_projector = nn.Identity()
    data = pictures(24)
    with torch.no_grad():
        expected = torch.stack(list(llava.get_image_features(data).pooler_output))
    encoder = TransformersConfig(pretrained=str(tmp_path)).build()
    torch.testing.assert_close(encode(encoder, data), expected, rtol=0, atol=0)


def test_transformers_keeps_the_class_token_on_request(tmp_path: Path) -> None:
    model = clip_folder(tmp_path)
    encoder = TransformersConfig(pretrained=str(tmp_path), drop_class_token=False).build()
    data = pictures(24)
    with torch.no_grad():
        expected = model.vision_model(data, output_hidden_states=True).hidden_states[-2]
    assert (encoder.spec.grid_height, encoder.spec.grid_width) == (1, 10)
    torch.testing.assert_close(encode(encoder, data), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-2, None])
def test_transformers_siglip(tmp_path: Path, layer: int | None) -> None:
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path)
    encoder = TransformersConfig(pretrained=str(tmp_path), layer=layer).build()
    data = pictures(24)
    with torch.no_grad():
        output = model.vision_model(data, output_hidden_states=True)
    expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
    torch.testing.assert_close(encode(encoder, data), expected, rtol=0, atol=0)
    assert encoder.spec.mean == (0.5, 0.5, 0.5)


def test_transformers_siglip2_takes_patches(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    torch.manual_seed(0)
    vision = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 9}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path)
    encoder = TransformersConfig(pretrained=str(tmp_path)).build()
    data = pictures(24)
    patches = torch.from_numpy(np.stack([convert_image_to_patches(image.numpy(), 8) for image in data]))
    with torch.no_grad():
        expected = model.vision_model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(2, 9, dtype=torch.int64),
            spatial_shapes=torch.tensor([[3, 3]] * 2),
            output_hidden_states=True,
        ).hidden_states[-2]
    torch.testing.assert_close(encode(encoder, data), expected)


def test_transformers_reads_the_preprocessor(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    CLIPImageProcessor(**facts).save_pretrained(tmp_path)
    spec = TransformersConfig(pretrained=str(tmp_path)).spec()
    assert (spec.mean, spec.std, spec.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert spec.fill == (25, 51, 76)


def test_transformers_refuses_lost_weights_and_foreign_models(tmp_path: Path) -> None:
    model = clip_folder(tmp_path)
    weights = {name.replace("layer_norm1", "norm"): value for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights of its vision tower"):
        TransformersConfig(pretrained=str(tmp_path)).build()
    with pytest.raises(ValueError, match="layer -5"):
        TransformersConfig(pretrained=str(tmp_path), layer=-5).build()
    LlamaConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama"):
        TransformersConfig(pretrained=str(tmp_path)).spec()


@pytest.mark.parametrize("layer", [None, -1, -2])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_timm(tmp_path: Path, name: str, layer: int | None) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config = TimmConfig(model=name, pretrained=str(tmp_path / "weights.safetensors"), layer=layer)
    data = pictures(config.spec().size)
    with torch.no_grad():
        # The last stage without normalisation, or the library's normalised one.
        expected = model.forward_intermediates(data, [layer or -1], norm=layer is None, intermediates_only=True)[0]
        if layer is None and name == "test_vit":
            torch.testing.assert_close(expected.flatten(2).mT, model.forward_features(data)[:, 1:])
    torch.testing.assert_close(encode(config.build(), data), expected.flatten(2).mT, rtol=0, atol=0)


def test_timm_image_size() -> None:
    spec = TimmConfig(model="test_vit", pretrained=False, image_size=64).spec()
    assert (spec.size, spec.grid_height, spec.grid_width) == (64, 4, 4)


OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 24, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("layer", [None, -1, -2])
def test_open_clip(tmp_path: Path, layer: int | None) -> None:
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": facts}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = OpenClipConfig(model=f"local-dir:{tmp_path}", pretrained=None, layer=layer)
    data = pictures(24)
    with torch.no_grad():
        hidden: list[Tensor] = []
        block = model.visual.transformer.resblocks[layer or -1]
        block.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        model.visual(data)
        expected = (model.visual.ln_post(hidden[0]) if layer is None else hidden[0])[:, 1:]
    # Attention without a graph takes another kernel, so that the last bits differ.
    torch.testing.assert_close(encode(config.build(), data), expected)
    spec = config.spec()
    assert (list(spec.mean), list(spec.std), spec.interpolation) == tuple(facts.values())


def test_open_clip_needs_the_weights_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    with pytest.raises(RuntimeError):
        OpenClipConfig(model=f"local-dir:{tmp_path}", pretrained=None).build()


def test_open_clip_tag_facts_without_weights() -> None:
    """SigLIP's statistics come from the tag, its tower from timm."""
    spec = OpenClipConfig(model="ViT-B-16-SigLIP", pretrained="webli").spec()
    assert spec.mean == (0.5, 0.5, 0.5) and (spec.grid_height, spec.feature_dim) == (14, 768)
    spec = OpenClipConfig(model="ViT-L-14-336", pretrained="openai").spec()
    assert (spec.size, spec.grid_height, spec.feature_dim) == (336, 24, 1024)


def test_open_clip_random_weights_and_refusals() -> None:
    encoder = OpenClipConfig(model="ViT-B-32", pretrained=None, layer=-11, image_size=64).build()
    assert encode(encoder, pictures(64)).shape == (2, 4, 768)
    with pytest.raises(ValueError, match="no vision transformer"):
        OpenClipConfig(model="RN50", pretrained=None).spec()


def test_efficientnet_lite(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EfficientNetLite(0, num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    facts = {"image_size": 100, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    config = {"kind": "efficientnet_lite", "variant": 0, "num_classes": 5, **facts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = EfficientNetLiteConfig(pretrained=str(tmp_path)).build()
    assert (encoder.spec.size, encoder.spec.patches, encoder.spec.mean) == (100, 16, (0.1, 0.2, 0.3))
    data = pictures(100)
    coarse = model(data).detach()
    torch.testing.assert_close(encode(encoder, data), coarse.flatten(2).mT, rtol=0, atol=0)

    fine = encode(EfficientNetLiteConfig(pretrained=str(tmp_path), fine=True).build(), data).unflatten(1, (4, 4))
    torch.testing.assert_close(fine[..., :1280], coarse.permute(0, 2, 3, 1), rtol=0, atol=0)
    with torch.no_grad():
        layer = model.blocks[:11](model.stem(data))  # before the stage that halves the grid a last time
    assert layer.shape[1:] == (112, 7, 7)  # the eighth row and column are zeros
    four = fine[..., 1280:].unflatten(-1, (112, 2, 2))
    torch.testing.assert_close(four[:, 1, 2], layer[:, :, 2:4, 4:6], rtol=0, atol=0)
    torch.testing.assert_close(four[:, 3, 3, :, 0, 0], layer[:, :, 6, 6], rtol=0, atol=0)
    assert not four[:, 3, 3, :, 1].any()


def test_the_union_is_chosen_by_kind() -> None:
    adapter: TypeAdapter[ImageEncoderConfig] = TypeAdapter(ImageEncoderConfig)
    assert isinstance(adapter.validate_python({"kind": "timm", "model": "test_vit"}), TimmConfig)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "open_clip", "model": "ViT-L-14"})  # weights are never left unsaid
    with pytest.raises(ValidationError):
        TimmConfig(model="test_vit", layer=3)
