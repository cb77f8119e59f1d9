"""Features that an encoder computed beforehand, stored in shards where the picture, video or sound would be.

An item is one array [time, height, width, feature_dim] as safetensors, or as npy without pickle. Its header in the
index stays that of the real item, so it is planned by the real preprocess: tokens, times and geometry are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mmchat.batch import FeatureShape
from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan, Preprocess
from mmchat.schema import Schema

NPY_MAGIC = b"\x93NUMPY"
TENSOR = "features"
# Of a modality's configuration, what the values depend on; limits and the connector are not among them.
_MATTERS = ("encoder", "resize", "draft", "fast_resize", "sample", "max_total_pixels", "too_long", "backend", "seek")


class StoredFeatures:
    """Reads stored features in place of decoding and encoding; implements Preprocess.

    Args:
        real: the preprocess of the encoder that made them.
        feature_dim: of that encoder.
        made_by: what `describe` says of that modality; features of another one are refused where they say.
    """

    def __init__(self, real: Preprocess, feature_dim: int, made_by: str) -> None:
        self.real = real
        self.feature_dim = feature_dim
        self.made_by = made_by

    def header(self, data: bytes) -> MediaHeader:
        """Raises SampleError: features do not tell the size or length of what they are of, and files cannot be read."""
        raise SampleError(
            "header incomplete",
            "a model with stored_features: true takes items of shards that data_prep/cache_features.py wrote, whose "
            "index has their headers; it has no encoder for a file",
        )

    def plan(self, header: MediaHeader, shrink: int = 0) -> MediaPlan:
        """As the real item is planned; `shrink` changes nothing. Raises SampleError."""
        return self.real.plan(header)

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """One item as [time * height * width, feature_dim] float32. Raises SampleError."""
        features, made_by = read_features(data)
        if made_by not in (None, self.made_by):
            raise SampleError(
                "features of another encoder",
                f"made by {made_by}, wanted {self.made_by}; run data_prep/cache_features.py with this configuration",
            )
        wanted = math.prod(plan.shape)
        if features.shape[-1:] != (self.feature_dim,) or features.numel() != wanted * self.feature_dim:
            raise SampleError(
                "features of another size",
                f"found {tuple(features.shape)}, wanted {(*plan.shape, self.feature_dim)} or the same flattened",
            )
        features = features.reshape(wanted, self.feature_dim).float()
        if not features.isfinite().all():
            raise SampleError("features not finite", "found NaN or infinity among stored features")
        return features


class FeatureReader(nn.Module):
    """Stands where the encoder would: what comes in are its features already."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim

    def stand_in(self) -> tuple[Tensor, tuple[FeatureShape, ...]]:
        """One position."""
        return torch.zeros(1, self.feature_dim), ((1, 1, 1),)

    def forward(self, data: Tensor, shapes: tuple[FeatureShape, ...]) -> Tensor:
        """data [sum of t * h * w, feature_dim] of all items, as it is."""
        return data


def describe(config: Schema, image: Schema | None = None) -> str:
    """Names what makes features: the encoder, and a hash of all that their values depend on.

    Of a local model folder the name counts, not where it lies.

    Args:
        config: of the modality. image: of the image modality, where video shares its encoder.
    """
    values = config.model_dump(mode="json")
    chosen = {name: values[name] for name in _MATTERS if name in values}
    if chosen.get("too_long", "refuse") != "refuse":  # then this limit says which part is heard or seen
        chosen["max_duration_s"] = values["max_duration_s"]
    if chosen["encoder"]["kind"] == "shared" and image is not None:
        chosen["encoder"] = image.model_dump(mode="json")["encoder"]
    encoder: dict[str, Any] = chosen["encoder"]
    if "pretrained" in encoder:
        encoder["pretrained"] = Path(encoder["pretrained"]).name
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
    return f"{encoder['kind']} {encoder.get('pretrained') or encoder.get('model', '')} {digest}"


def write_features(features: Tensor, shape: FeatureShape, made_by: str) -> bytes:
    """An item's features [t * h * w, feature_dim] as safetensors of [t, h, w, feature_dim]."""
    return bytes(save({TENSOR: features.reshape(*shape, -1).contiguous()}, metadata={"made_by": made_by}))


def features_type(data: bytes) -> Literal["npy", "safetensors"] | None:
    """File type by the first bytes; None for what is neither."""
    if data.startswith(NPY_MAGIC):
        return "npy"
    is_header = data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8
    return "safetensors" if is_header else None


def read_features(data: bytes) -> tuple[Tensor, str | None]:
    """The array, and what made it where the file says. Nothing is unpickled. Raises SampleError."""
    try:
        return (_read_npy(data), None) if features_type(data) == "npy" else _read_safetensors(data)
    except (ValueError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise SampleError(
            "unreadable features",
            f"{error}; wanted one array of floats as safetensors or npy, found {len(data)} bytes that start with "
            f"{data[:12]!r}",
        ) from error


def _read_npy(data: bytes) -> Tensor:
    """Read by hand: numpy would set aside what a header claims before it looks at what is there."""
    file = BytesIO(data)
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy of version {version}")
    shape, is_fortran, dtype = read[version](file)
    _check_dtype(dtype.kind == "f" and dtype.itemsize in (2, 4, 8), str(dtype))
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of {shape} in {len(data) - file.tell()} bytes")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(values.astype(np.float32))


def _read_safetensors(data: bytes) -> tuple[Tensor, str | None]:
    tensors = load(data)
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors {sorted(tensors)}")
    features = next(iter(tensors.values()))
    _check_dtype(features.is_floating_point(), str(features.dtype))
    length = int.from_bytes(data[:8], "little")
    return features, json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("made_by")


def _check_dtype(is_float: bool, found: str) -> None:
    if not is_float:
        raise ValueError(f"values of type {found}")
