"""Media as people have it, a path, a file's content, a picture or samples in memory, as items of a conversation."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from mmchat.conversation import MediaRef, Modality
from mmchat.data.chat_template import ChatTemplate
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.image import size_of, to_rgb

StoredFile = str | os.PathLike[str] | bytes
# [height, width] or [height, width, 3 or 4], uint8.
Picture = StoredFile | Image.Image | np.ndarray
# Samples [n] or [n, channels], floats from -1 to 1 or int16, and their rate in Hz.
Sound = StoredFile | tuple[np.ndarray, int]
Media = Picture | Sound


def read_media(modality: Modality, path: str | os.PathLike[str]) -> MediaRef:
    """One file. Raises ValueError where it cannot be read, or is meant as a picture and is none."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{modality} {path}: cannot be read ({error.strerror})") from error
    return _stored(modality, data, f"{modality} {path}")


def to_media(modality: Modality, given: Media | Sequence[Media] | None) -> list[MediaRef]:
    """The items of one modality, in order; a list is several, None is none.

    A picture or sound in memory is stored without loss, so that it is seen or heard as the same one in a file.

    Raises:
        ValueError: what cannot be read, or is of a kind that the modality does not take.
    """
    several = given if isinstance(given, list) else [] if given is None else [given]
    return [_item(modality, one, f"{modality} {number}") for number, one in enumerate(several, 1)]


def planned(item: MediaRef, template: ChatTemplate) -> tuple[MediaRef, MediaPlan | None]:
    """The item with its header, read once, and what it will become; without both where the model lacks the modality.

    Raises SampleError: an unreadable header, or an item that the model's limits refuse.
    """
    preprocess = template.preprocesses.get(item.modality)
    if preprocess is None:
        return item, None  # the template refuses it, and says what there is
    header = item.header or preprocess.header(item.read())
    return replace(item, header=header), preprocess.plan(header)


def _item(modality: Modality, given: Media, name: str) -> MediaRef:
    match given:
        case str() | os.PathLike():
            return read_media(modality, given)
        case bytes():
            return _stored(modality, given, name)
        case Image.Image() if modality == "image":
            return _stored(modality, _png(given, name), name)
        case np.ndarray() if modality == "image":
            return _stored(modality, _png(_picture(given, name), name), name)
        case (samples, int() | np.integer() as sample_rate_hz) if modality == "audio":
            return MediaRef(modality, _wav(np.asarray(samples), int(sample_rate_hz), name))
    more = {"image": ", a PIL image or an array", "audio": " or (samples, sample_rate_hz)", "video": ""}[modality]
    raise ValueError(f"{name}: found {_kind(given)}; wanted a path, the bytes of a file{more}, or a list of those")


def _kind(given: object) -> str:
    inner = f" of {', '.join(type(one).__name__ for one in given[:3])}" if isinstance(given, tuple) else ""
    return f"a {type(given).__name__}{inner}"


def _stored(modality: Modality, data: bytes, name: str) -> MediaRef:
    """An item of encoded bytes. Raises ValueError for a picture that is none."""
    if modality == "image":
        try:
            size_of(data)
        except SampleError as error:
            raise ValueError(f"{name}: {error}") from error
    return MediaRef(modality, data)


def _picture(pixels: np.ndarray, name: str) -> Image.Image:
    is_shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not is_shaped or not pixels.size:
        raise ValueError(
            f"{name}: found an array {list(pixels.shape)} of {pixels.dtype}; wanted [height, width] or "
            "[height, width, 3 or 4] of uint8, as numpy.asarray(picture) gives it"
        )
    return Image.fromarray(pixels)


def _png(image: Image.Image, name: str) -> bytes:
    """The pixels that the preprocess makes of it, with the orientation that its EXIF says."""
    out = io.BytesIO()
    try:
        image.load()
        to_rgb(image).save(out, "PNG", exif=image.getexif(), compress_level=1)
    except Exception as error:  # a file that PIL opened is decoded here, and its decoders raise whatever they meet
        raise ValueError(f"{name}: undecodable image: {type(error).__name__}: {error}") from error
    return out.getvalue()


def _wav(samples: np.ndarray, sample_rate_hz: int, name: str) -> bytes:
    is_float = np.issubdtype(samples.dtype, np.floating)
    is_shaped = samples.size > 0 and (samples.ndim == 1 or (samples.ndim == 2 and samples.shape[1] <= 16))
    if not is_shaped or not (is_float or samples.dtype == np.int16) or not 0 < sample_rate_hz < 1 << 31:
        raise ValueError(
            f"{name}: found an array {list(samples.shape)} of {samples.dtype} at {sample_rate_hz} Hz; wanted samples "
            "[n] or [n, channels], floats from -1 to 1 or int16, and their rate in Hz"
        )
    if is_float and not np.isfinite(samples).all():
        raise ValueError(f"{name}: found samples that are no finite numbers")
    out = io.BytesIO()
    samples = samples.astype(np.float32) if is_float else samples
    soundfile.write(out, samples, sample_rate_hz, format="WAV", subtype="FLOAT" if is_float else "PCM_16")
    return out.getvalue()
