"""Picture encoders of several libraries in one shape: [n, 3, size, size] to features [n * patches, dim].

What an encoder needs of its input (`spec`) is read from metadata alone, so that data workers never hold
weights. Each library is imported where it is used: they take seconds to import, and a run needs one of them.

`layer` counts from the end, the same in every library: -1 is the output of the last block, -2 of the one
before (what LLaVA, arXiv 2304.08485, takes), None the library's final features, behind its last
normalisation. What lies behind the chosen layer is dropped: it could never be trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from mmchat.batch import FeatureShape
from mmchat.modalities.efficientnet_lite import STRIDE, feature_dim, load_efficientnet_lite, read_config
from mmchat.schema import Schema

Layer = Annotated[int, Field(le=-1)] | None


@dataclass(frozen=True)
class ImageSpec:
    """What an encoder takes and gives.

    Attributes:
        size: side of the square input in pixels.
        mean, std: of red, green, blue, on a scale of 0 to 1.
        interpolation: PIL's name of the resampling filter, in lower case.
        grid_height, grid_width: features of one picture, row-major.
        feature_dim: width of one feature.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    grid_height: int
    grid_width: int
    feature_dim: int

    @property
    def patches(self) -> int:
        """Features of one picture, the unit of the patch budget."""
        return self.grid_height * self.grid_width

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour, 0 to 255: what padding is filled with, so that it becomes about zero."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Pixels [n, height, width, 3] uint8 to [n, 3, height, width] float32."""
        scaled = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)).div_(255)
        return scaled.sub_(torch.tensor(self.mean)[:, None, None]).div_(torch.tensor(self.std)[:, None, None])

    def pictures(self, pixels: Tensor) -> list[Image.Image]:
        """Encoder input [n, 3, height, width] as pictures: the inverse of `normalise`."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        levels = ((pixels.numpy() * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
        return [Image.fromarray(picture) for picture in np.ascontiguousarray(levels.transpose(0, 2, 3, 1))]


class ImageEncoder(nn.Module):
    """A tower, which turns [n, 3, size, size] into [n, dim, grid_height, grid_width], with its spec."""

    def __init__(self, tower: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.tower = tower
        self.spec = spec
        self.feature_dim = spec.feature_dim

    def stand_in(self) -> tuple[Tensor, tuple[FeatureShape, ...]]:
        """One grey picture."""
        size = self.spec.size
        return torch.zeros(1, 3, size, size), ((1, self.spec.grid_height, self.spec.grid_width),)

    def forward(self, data: Tensor, shapes: tuple[FeatureShape, ...]) -> Tensor:
        """data [n, 3, size, size], pictures or frames alike, to [n * patches, feature_dim]."""
        features = self.tower(data)
        assert features.shape[1:] == (self.feature_dim, self.spec.grid_height, self.spec.grid_width)
        return rearrange(features, "n dim h w -> (n h w) dim")


class TimmTower(nn.Module):
    """A timm model cut behind one of its layers."""

    def __init__(self, model: Any, layer: int | None) -> None:
        super().__init__()
        self.use_norm = layer is None
        self.model = model
        # The index from the front, which cutting the model does not change.
        self.indices = self.model.prune_intermediate_layers(
            [layer or -1], prune_norm=not self.use_norm, prune_head=True
        )

    def forward(self, data: Tensor) -> Tensor:
        """[n, 3, size, size] to [n, dim, grid_height, grid_width]."""
        return self.model.forward_intermediates(data, self.indices, norm=self.use_norm, intermediates_only=True)[0]


class OpenClipTower(nn.Module):
    """An open_clip VisionTransformer cut behind one of its layers."""

    def __init__(self, model: Any, layer: int | None) -> None:
        super().__init__()
        self.use_norm = layer is None
        self.model = model
        # The index from the front, which cutting the model does not change.
        self.indices = self.model.prune_intermediate_layers(
            [layer or -1], prune_norm=not self.use_norm, prune_head=True
        )

    def forward(self, data: Tensor) -> Tensor:
        """[n, 3, size, size] to [n, dim, grid_height, grid_width]."""
        output = self.model.forward_intermediates(
            data, self.indices, normalize_intermediates=self.use_norm, intermediates_only=True
        )
        return output["image_intermediates"][0]


class TransformersTower(nn.Module):
    """A CLIP or SigLIP vision model of transformers; its last hidden state is the chosen layer."""

    def __init__(self, model: nn.Module, num_dropped: int, grid_height: int) -> None:
        super().__init__()
        self.model = model
        self.num_dropped = num_dropped  # leading tokens that are no patches
        self.grid_height = grid_height

    def forward(self, data: Tensor) -> Tensor:
        """[n, 3, size, size] to [n, dim, grid_height, grid_width]."""
        features = self.model(pixel_values=data).last_hidden_state[:, self.num_dropped :]
        return rearrange(features, "n (h w) dim -> n dim h w", h=self.grid_height)


class Siglip2Tower(nn.Module):
    """A SigLIP 2 'naflex' vision model: it takes patches and the shape of their grid instead of pictures."""

    def __init__(self, model: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.model = model
        self.patch_size = patch_size

    def forward(self, data: Tensor) -> Tensor:
        """[n, 3, size, size] to [n, dim, grid_height, grid_width]."""
        height, width = (side // self.patch_size for side in data.shape[2:])
        patches = rearrange(data, "n c (h p) (w q) -> n (h w) (p q c)", h=height, w=width)
        features = self.model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int64, device=data.device),
            spatial_shapes=torch.tensor([[height, width]] * len(data), device=data.device),
        ).last_hidden_state
        return rearrange(features, "n (h w) dim -> n dim h w", h=height)


class TimmConfig(Schema):
    """A model of timm by name ('vit_base_patch16_siglip_224', 'hf-hub:...', 'local-dir:FOLDER').

    `pretrained` True takes timm's own weights, a path those of a local file, False none. `image_size`
    replaces the model's input size where the architecture allows.
    """

    kind: Literal["timm"] = "timm"
    model: str
    pretrained: bool | str = True
    layer: Layer = None
    image_size: int | None = None

    def spec(self) -> ImageSpec:
        from timm.data import resolve_model_data_config

        with torch.device("meta"):
            tower = self._tower(False)
        size = {"img_size": self.image_size} if self.image_size else {}
        data = resolve_model_data_config(tower.model, size)
        return _measured_spec(tower, data["input_size"][1:], data["mean"], data["std"], data["interpolation"])

    def build(self) -> ImageEncoder:
        return ImageEncoder(self._tower(self.pretrained), self.spec())

    def _tower(self, pretrained: bool | str) -> TimmTower:
        import timm

        overlay = {"file": pretrained} if isinstance(pretrained, str) else None
        model: Any = timm.create_model(
            self.model, pretrained=bool(pretrained), pretrained_cfg_overlay=overlay, num_classes=0
        )
        if self.image_size is not None and hasattr(model, "set_input_size"):
            model.set_input_size(self.image_size)  # convolutional networks have no such method and take any size
        return TimmTower(model, self.layer)


class OpenClipConfig(Schema):
    """A model of open_clip by name ('ViT-L-14', 'hf-hub:...', 'local-dir:FOLDER').

    `pretrained` is a tag of open_clip ('openai'), a local file, or null for random weights; names with a
    prefix bring their own weights. `image_size` replaces the model's input size.
    """

    kind: Literal["open_clip"] = "open_clip"
    model: str
    pretrained: str | None
    layer: Layer = -2
    image_size: int | None = None

    def spec(self) -> ImageSpec:
        with torch.device("meta"):
            tower, data = self._tower(load_weights=False)
        size = data["size"] if isinstance(data["size"], tuple | list) else (data["size"],) * 2
        return _measured_spec(tower, size, data["mean"], data["std"], data["interpolation"])

    def build(self) -> ImageEncoder:
        return ImageEncoder(self._tower(load_weights=True)[0], self.spec())

    def _tower(self, load_weights: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The tower and open_clip's preprocessing facts."""
        import open_clip

        tag = open_clip.get_pretrained_cfg(self.model, self.pretrained) if self.pretrained else {}
        has_weights = self.pretrained is not None or ":" in self.model
        logging.disable(logging.WARNING)  # open_clip's report on weights: those wanted are required below
        try:
            model = open_clip.create_model(
                self.model,
                # A tag would be downloaded also where no weights are wanted.
                pretrained=self.pretrained if load_weights else None,
                load_weights=load_weights,
                require_pretrained=load_weights and has_weights,
                device="cpu" if load_weights else "meta",
                # OpenAI's weights want another activation than their model's name says; open_clip only warns.
                force_quick_gelu=tag.get("quick_gelu", False),
                force_image_size=self.image_size,
                pretrained_text=False,
            )
        finally:
            logging.disable(logging.NOTSET)
        facts = model.visual.preprocess_cfg | {key: tag[key] for key in ("mean", "std", "interpolation") if key in tag}
        if isinstance(model.visual, open_clip.timm_model.TimmModel):
            return TimmTower(model.visual.trunk, self.layer), facts
        if not isinstance(model.visual, open_clip.transformer.VisionTransformer):
            raise ValueError(
                f"open_clip's {self.model} has no vision transformer; choose one that has, such as ViT-L-14"
            )
        return OpenClipTower(model.visual, self.layer), facts


class TransformersConfig(Schema):
    """The vision tower of a CLIP, SigLIP or SigLIP 2 checkpoint of transformers, by hub name or local folder.

    The default is what LLaVA takes: the last layer but one without the class token. `drop_class_token` false
    keeps CLIP's class token in front, and the grid is then one row. SigLIP has no class token.
    """

    kind: Literal["transformers"] = "transformers"
    pretrained: str
    layer: Layer = -2
    drop_class_token: bool = True

    def spec(self) -> ImageSpec:
        from transformers import CLIPImageProcessor
        from transformers.image_utils import (
            IMAGENET_STANDARD_MEAN,
            IMAGENET_STANDARD_STD,
            OPENAI_CLIP_MEAN,
            OPENAI_CLIP_STD,
        )

        config = self._config()
        is_clip = config.model_type == "clip_vision_model"
        try:
            processor, _ = CLIPImageProcessor.get_image_processor_dict(self.pretrained)
        except OSError:  # a checkpoint saved without its preprocessor: the numbers all of its family share
            processor = {}
        # SigLIP 2 'naflex' takes any grid; its position table's own is the one that needs no interpolation.
        side = math.isqrt(config.num_patches) if config.model_type == "siglip2_vision_model" else 0
        size = side * config.patch_size or config.image_size
        height = width = size // config.patch_size
        if is_clip and not self.drop_class_token:
            height, width = 1, height * width + 1
        return ImageSpec(
            size=size,
            mean=tuple(processor.get("image_mean", OPENAI_CLIP_MEAN if is_clip else IMAGENET_STANDARD_MEAN)),
            std=tuple(processor.get("image_std", OPENAI_CLIP_STD if is_clip else IMAGENET_STANDARD_STD)),
            interpolation=Image.Resampling(processor.get("resample", Image.Resampling.BICUBIC)).name.lower(),
            grid_height=height,
            grid_width=width,
            feature_dim=config.hidden_size,
        )

    def build(self) -> ImageEncoder:
        from transformers import CLIPVisionModel, Siglip2VisionModel, SiglipVisionModel
        from transformers.utils import logging as transformers_logging

        config = self._config()
        classes: dict[str, Any] = {
            "clip_vision_model": CLIPVisionModel,
            "siglip_vision_model": SiglipVisionModel,
            "siglip2_vision_model": Siglip2VisionModel,
        }
        config.vision_use_head = False  # SigLIP's pooling; CLIP has no such setting
        if self.layer is not None:
            config.num_hidden_layers += self.layer + 1
            if config.num_hidden_layers < 0:
                raise ValueError(f"layer {self.layer} is more than {self.pretrained} has")
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it would list every weight of the parts left out
        try:
            model, report = classes[config.model_type].from_pretrained(
                self.pretrained, config=config, dtype=torch.float32, output_loading_info=True
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(f"{self.pretrained} lacks weights of its vision tower: {report}")
        if self.layer is not None or config.model_type == "clip_vision_model":
            # A hidden layer is taken before it; CLIP applies it to the pooled class token only.
            model.post_layernorm = nn.Identity()
        spec = self.spec()
        if config.model_type == "siglip2_vision_model":
            return ImageEncoder(Siglip2Tower(model, config.patch_size), spec)
        num_dropped = int(config.model_type == "clip_vision_model" and self.drop_class_token)
        return ImageEncoder(TransformersTower(model, num_dropped, spec.grid_height), spec)

    def _config(self) -> Any:
        """The vision tower's own config, of one of the three families."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.pretrained, trust_remote_code=False)
        if config.model_type in ("clip", "siglip", "siglip2"):
            config = config.vision_config
        if config.model_type not in ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model"):
            raise ValueError(f"{self.pretrained} is a {config.model_type}; wanted CLIP, SigLIP or SigLIP 2")
        return config


class EfficientNetLiteConfig(Schema):
    """An EfficientNet-Lite from a folder that data_prep/base_models.py wrote (see efficientnet_lite.py).

    fine: features hold those of a layer with twice as fine a grid too, for as many tokens. What is there, the last
        layer tells; where exactly, only the finer one (docs/experiments.md).
    """

    kind: Literal["efficientnet_lite"] = "efficientnet_lite"
    pretrained: str
    fine: bool = False

    def spec(self) -> ImageSpec:
        facts = read_config(self.pretrained)
        grid = math.ceil(facts["image_size"] / STRIDE)
        return ImageSpec(
            size=facts["image_size"],
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            interpolation=facts["interpolation"],
            grid_height=grid,
            grid_width=grid,
            feature_dim=feature_dim(facts["variant"], self.fine),
        )

    def build(self) -> ImageEncoder:
        return ImageEncoder(load_efficientnet_lite(self.pretrained, fine=self.fine), self.spec())


ImageEncoderConfig = Annotated[
    OpenClipConfig | TimmConfig | TransformersConfig | EfficientNetLiteConfig, Field(discriminator="kind")
]


def _measured_spec(
    tower: nn.Module,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> ImageSpec:
    """The spec of a tower on the meta device: a forward pass that computes nothing tells the grid."""
    if size[0] != size[1]:
        raise ValueError(f"the encoder takes {size[1]} x {size[0]} pixels; only squares are supported")
    with torch.no_grad():
        _, feature_dim, height, width = tower(torch.empty(1, 3, *size, device="meta")).shape
    return ImageSpec(size[0], tuple(mean), tuple(std), interpolation, height, width, feature_dim)
