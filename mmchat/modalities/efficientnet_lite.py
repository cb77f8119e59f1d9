"""EfficientNet-Lite 0 to 2: the convolutional picture encoder with weights small enough to train beside on a CPU.

The architecture is EfficientNet (Tan and Le, arXiv 1905.11946) as its authors changed it for small devices
(tensorflow/tpu, models/official/efficientnet/lite): no squeeze-and-excitation, ReLU6 for swish, and a stem, a head and
first and last stages that do not grow with the variant. Dropout and stochastic depth, which only regularise the
training of the classifier, are left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# Stages of the unscaled network: blocks, kernel, stride, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM_CHANNELS = 32
_WIDTH_AND_DEPTH = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}

# Side in pixels of the pictures that the released weights of each variant were trained on.
IMAGE_SIZES = {0: 224, 1: 240, 2: 260}
# Of red, green and blue, on a scale of 0 to 1: pixels become (value - 127) / 128.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3
# One feature stands for a square of so many pixels.
STRIDE = 32
FEATURE_DIM = 1280
_FINE_STAGE = 4  # the last with two features where the head has one


def feature_dim(variant: int, fine: bool) -> int:
    """Channels of a feature, with or without the finer ones."""
    width, _ = _WIDTH_AND_DEPTH[variant]
    return FEATURE_DIM + 4 * _scaled(_STAGES[_FINE_STAGE][4], width) if fine else FEATURE_DIM


class EfficientNetLite(nn.Module):
    """Pictures [n, 3, height, width] to features [n, feature_dim, ceil(height / 32), ceil(width / 32)].

    `num_classes` None leaves out the classifier, which an encoder could never train. `fine` adds to each feature the
    four of the last layer with twice as fine a grid that lie in its square, side by side: 1280 + 4 * 112 of variant 0.
    """

    def __init__(self, variant: int, num_classes: int | None = None, fine: bool = False) -> None:
        super().__init__()
        if variant not in _WIDTH_AND_DEPTH:
            raise ValueError(f"EfficientNet-Lite has variants {sorted(_WIDTH_AND_DEPTH)} here; found {variant!r}")
        width, depth = _WIDTH_AND_DEPTH[variant]
        self.stem = _ConvNorm(3, _STEM_CHANNELS, kernel=3, stride=2)
        blocks = []
        channels = _STEM_CHANNELS
        for stage, (num_blocks, kernel, stride, expansion, base) in enumerate(_STAGES):
            out_channels = _scaled(base, width)
            is_fixed = stage in (0, len(_STAGES) - 1)
            for index in range(num_blocks if is_fixed else math.ceil(num_blocks * depth)):
                blocks.append(_Block(channels, out_channels, kernel, stride if index == 0 else 1, expansion))
                channels = out_channels
            if stage == _FINE_STAGE:
                self.num_fine_blocks = len(blocks)
        self.blocks = nn.Sequential(*blocks)
        self.head = _ConvNorm(channels, FEATURE_DIM)
        self.classifier = nn.Linear(FEATURE_DIM, num_classes) if num_classes is not None else None
        self.fine = fine
        self.feature_dim = feature_dim(variant, fine)

    def forward(self, pictures: Tensor) -> Tensor:
        fine = self.blocks[: self.num_fine_blocks](self.stem(pictures))  # [n, 112, about 2 h, about 2 w]
        features = self.head(self.blocks[self.num_fine_blocks :](fine))  # [n, 1280, h, w]
        if not self.fine:
            return features
        height, width = features.shape[2:]
        # An odd row or column too few is filled with zeros.
        fine = F.pad(fine, (0, 2 * width - fine.shape[3], 0, 2 * height - fine.shape[2]))
        return torch.cat([features, F.pixel_unshuffle(fine, 2)], dim=1)

    def classify(self, pictures: Tensor) -> Tensor:
        """Logits [n, num_classes] of pictures [n, 3, height, width]."""
        assert self.classifier is not None, "built without a classifier"
        return self.classifier(self(pictures)[:, :FEATURE_DIM].mean((2, 3)))


class _Block(nn.Module):
    """An inverted bottleneck: expand the channels, filter each, project to few, and add the input."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = _ConvNorm(channels, inner) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = _ConvNorm(inner, out_channels, use_relu=False)
        self.is_residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.is_residual else y


class _ConvNorm(nn.Module):
    """Convolution, normalisation, and ReLU6 unless told otherwise."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        use_relu: bool = True,
    ) -> None:
        super().__init__()
        # With stride 1 the 'same' padding is even, and the convolution does it without a copy.
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.norm = _Norm(out_channels)
        self.use_relu = use_relu

    def forward(self, x: Tensor) -> Tensor:
        # [n, channels, h, w] to [n, out_channels, ceil(h / stride), ceil(w / stride)]
        if self.conv.stride[0] > 1:
            x = _pad_same(x, self.conv.kernel_size[0], self.conv.stride[0])
        y = self.norm(self.conv(x))
        return F.relu6(y) if self.use_relu else y


class _Norm(nn.Module):
    """Batch normalisation with the stored statistics, in training too.

    A batch's own statistics would make the features of a picture depend on its neighbours, and differ between ranks.
    """

    EPSILON = 1e-3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, eps=self.EPSILON)


def load_efficientnet_lite(folder: Path | str, use_classifier: bool = False, fine: bool = False) -> EfficientNetLite:
    """The network in a folder with config.json and model.safetensors, as data_prep/base_models.py writes it.

    Raises ValueError for a folder that lacks one of them, or holds another kind of model; RuntimeError for weights
    that are not exactly those of the network.
    """
    config = read_config(folder)
    weights = load_file(Path(folder) / "model.safetensors")
    if not use_classifier:
        del weights["classifier.weight"], weights["classifier.bias"]
    model = EfficientNetLite(config["variant"], config["num_classes"] if use_classifier else None, fine)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def read_config(folder: Path | str) -> dict:
    """What config.json says: kind, variant, image_size, num_classes and how to preprocess. Raises ValueError."""
    folder = Path(folder)
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}; wanted an EfficientNet-Lite folder, which "
            "'python data_prep/base_models.py efficientnet_lite0' writes"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("kind") != "efficientnet_lite":
        raise ValueError(f"{folder / 'config.json'} has kind {config.get('kind')!r}; wanted 'efficientnet_lite'")
    return config


def _scaled(channels: int, width: float) -> int:
    """Channels times width, rounded to a multiple of 8 that is not more than a tenth below."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's 'same' padding: just enough for ceil(side / stride) outputs, the odd pixel right and below."""
    height, width = x.shape[2:]
    rows = max((math.ceil(height / stride) - 1) * stride + kernel - height, 0)
    columns = max((math.ceil(width / stride) - 1) * stride + kernel - width, 0)
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
