"""Pictures: limits checked before decoding, the geometry of the resize, and the preprocess of both."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.decode import Resize, cropped_size, fit_square
from mmchat.modalities.image_encoders import ImageEncoderConfig, ImageSpec
from mmchat.regions import Geometry
from mmchat.schema import Schema

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# PIL warns above this size and raises at twice of it. The limits below are checked before any decoding, so
# the warning says nothing new; the error bounds what `max_pixels` may be.
PIL_MAX_PIXELS = 89_478_485
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageLimits(Schema):
    """What a picture may measure, in pixels; `max_aspect` is the longer side divided by the shorter."""

    max_pixels: int = Field(default=50_000_000, ge=1, le=2 * PIL_MAX_PIXELS)
    max_side: int = Field(default=20_000, ge=1)
    min_side: int = Field(default=2, ge=1)
    max_aspect: float = Field(default=50.0, ge=1)

    def check(self, width: int, height: int) -> None:
        """Raises SampleError where a picture of this size is refused."""
        found = f"{width} x {height} pixels"
        if min(width, height) < self.min_side:
            raise SampleError("picture too small", f"{found}, the shorter side is below {self.min_side}")
        if max(width, height) > self.max_side:
            raise SampleError("picture too large", f"{found}, the longer side is above {self.max_side}")
        if width * height > self.max_pixels:
            raise SampleError("picture too large", f"{found}, above {self.max_pixels} pixels in all")
        if max(width, height) > self.max_aspect * min(width, height):
            raise SampleError("picture too elongated", f"{found}, the aspect is above {self.max_aspect:g}")


class ImageConfig(ImageLimits):
    """How pictures are seen.

    Two options are faster, with slightly other pixels. draft: decodes JPEGs at a half, a quarter or an eighth of their
    scale where that suffices. fast_resize: resizes with torch's integer arithmetic where the encoder's interpolation is
    bilinear or bicubic, which moves some values by a level of 255. docs/training.md has the figures.
    """

    encoder: ImageEncoderConfig
    resize: Resize = "pad"
    draft: bool = False
    fast_resize: bool = False

    def preprocess(self) -> ImagePreprocess:
        """The preprocess of the encoder; reads the encoder's metadata, no weights."""
        return ImagePreprocess(self, self.encoder.spec())

    def build_encoder(self) -> nn.Module:
        """The encoder with its weights (see mmchat.modalities.Encoder)."""
        return self.encoder.build()


def square_geometry(width: int, height: int, size: int, resize: Resize) -> Geometry:
    """The map that `fit_square` applies to a picture of this size, to pixels of the square."""
    scale_x, scale_y, offset_x, offset_y = size / width, size / height, 0.0, 0.0
    if resize == "pad":
        side = max(width, height)
        scale_x = scale_y = size / side
        offset_x, offset_y = (side - width) // 2 * scale_x, (side - height) // 2 * scale_y
    elif resize == "crop":
        full_width, full_height = cropped_size(width, height, size)
        scale_x, scale_y = full_width / width, full_height / height
        offset_x, offset_y = -float(round((full_width - size) / 2)), -float(round((full_height - size) / 2))
    return Geometry(width, height, size, size, scale_x, scale_y, offset_x, offset_y)


class ImagePreprocess:
    """Encoded picture to [1, 3, size, size] float32, normalised for the encoder; implements Preprocess."""

    def __init__(self, config: ImageConfig, spec: ImageSpec) -> None:
        self.config = config
        self.spec = spec

    def header(self, data: bytes) -> MediaHeader:
        """Width and height after EXIF transposition, from the file's header. Raises SampleError."""
        image, orientation = self._open(data)
        width, height = _upright_size(image, orientation)
        return MediaHeader(width=width, height=height)

    def plan(self, header: MediaHeader, shrink: int = 0) -> MediaPlan:
        """Shape (1, grid_height, grid_width), the same for every picture; `shrink` changes nothing."""
        if header.width is None or header.height is None:
            raise SampleError("header incomplete", "a picture's header needs width and height")
        self.config.check(header.width, header.height)
        return MediaPlan(
            shape=(1, self.spec.grid_height, self.spec.grid_width),
            num_patches=self.spec.patches,
            geometry=square_geometry(header.width, header.height, self.spec.size, self.config.resize),
        )

    def __call__(self, data: bytes, plan: MediaPlan) -> Tensor:
        """Decodes one picture to [1, 3, size, size]; of an animation, its first frame. Raises SampleError."""
        size = self.spec.size
        image, orientation = self._open(data)
        width, height = _upright_size(image, orientation)
        assert plan.geometry is not None, "a picture's plan has a geometry"
        if (width, height) != (plan.geometry.width, plan.geometry.height):
            raise SampleError(
                "file and index differ",
                f"the picture has {width} x {height} pixels, its header said"
                f" {plan.geometry.width} x {plan.geometry.height}; index the shard again",
            )
        try:
            if self.config.draft:
                # Down to the scale at which the side that is fitted to the square still has its pixels.
                fitted = max(image.size) if self.config.resize == "pad" else min(image.size)
                image.draft(None, (image.width * size // fitted, image.height * size // fitted))
            image.load()
            image = to_rgb(image)
        except Exception as error:  # PIL's decoders raise whatever their parsers stumble over
            raise SampleError("undecodable image", f"{type(error).__name__}: {error}") from error
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        scaled = _scaled_by_torch if self.config.fast_resize else Image.Image.resize
        square = fit_square(image, size, self.config.resize, self.spec.fill, self.spec.resample, scaled)
        return self.spec.normalise(np.asarray(square)[None])

    def _open(self, data: bytes) -> tuple[Image.Image, int]:
        """The opened, undecoded picture within the limits, and its EXIF orientation (1 to 8)."""
        image, orientation = _opened(data)
        self.config.check(*_upright_size(image, orientation))
        return image, orientation


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height after EXIF transposition, from the header alone. Raises SampleError."""
    return _upright_size(*_opened(data))


def upright(data: bytes) -> Image.Image:
    """The picture whose pixels regions count: decoded, RGB, turned as its EXIF says. Raises SampleError."""
    image, orientation = _opened(data)
    try:
        image.load()
        image = to_rgb(image)
    except Exception as error:
        raise SampleError("undecodable image", f"{type(error).__name__}: {error}") from error
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _opened(data: bytes) -> tuple[Image.Image, int]:
    """The opened, undecoded picture, and its EXIF orientation (1 to 8)."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        # PIL applies a TIFF's orientation itself, already to the size. The base class's getexif reads
        # what the header had: PNG's own would decode the picture in search of a chunk behind it.
        orientation = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("picture too large", str(error)) from error
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise SampleError("undecodable image", f"found none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:
        raise SampleError("undecodable image", f"{type(error).__name__}: {error}") from error
    return image, orientation


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.height, image.width) if orientation in (5, 6, 7, 8) else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded picture as 8-bit RGB: transparency on white, 16 bits scaled to 8 instead of clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        # 32-bit integers and floats have no full scale: the values found are stretched over the range.
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # PIL would copy it


def _scaled_by_torch(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """An RGB picture, resized with antialiasing as PIL does, several times faster on CPUs with AVX2."""
    mode = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}.get(resample)
    if mode is None:
        return image.resize(size, resample)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, height, width], channels last in memory
    scaled = functional.interpolate(pixels, size=(size[1], size[0]), mode=mode, antialias=True)
    return Image.fromarray(scaled[0].permute(1, 2, 0).contiguous().numpy())
