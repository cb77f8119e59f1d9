"""Pictures: what is refused before decoding, every picture mode, EXIF, and the geometry of the resize."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmchat.errors import SampleError
from mmchat.modalities.image import ImageConfig, ImagePreprocess, square_geometry
from mmchat.modalities.image_encoders import ImageSpec, TimmConfig

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
SPEC = ImageSpec(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 4, 4, 8)


def preprocess(**settings: object) -> ImagePreprocess:
    config = ImageConfig.model_validate(
        {"encoder": {"kind": "timm", "model": "test_vit", "pretrained": False}, **settings}
    )
    return ImagePreprocess(config, SPEC)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode(data: bytes, **settings: object) -> Tensor:
    """[3, 64, 64] in 0 to 255."""
    process = preprocess(**settings)
    tensor = process(data, process.plan(process.header(data)))
    assert tensor.shape == (1, 3, 64, 64) and tensor.dtype == torch.float32
    return (tensor[0] * 0.5 + 0.5) * 255


def quarters(width: int = 80, height: int = 40) -> Image.Image:
    """Red top left, green top right, blue bottom left, yellow bottom right."""
    image = Image.new("RGB", (width, height), YELLOW)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def colour(picture: Tensor, x: float, y: float) -> tuple[int, ...]:
    return tuple(round(float(value)) for value in picture[:, int(y), int(x)])


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises these sizes and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


# Where the corners of the stored picture stand in the upright one, from the EXIF standard.
UPRIGHT_CORNERS = {
    1: (RED, GREEN, BLUE, YELLOW),
    2: (GREEN, RED, YELLOW, BLUE),
    3: (YELLOW, BLUE, GREEN, RED),
    4: (BLUE, YELLOW, RED, GREEN),
    5: (RED, BLUE, GREEN, YELLOW),
    6: (BLUE, RED, YELLOW, GREEN),
    7: (YELLOW, GREEN, BLUE, RED),
    8: (GREEN, YELLOW, RED, BLUE),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_exif_orientation_and_geometry(orientation: int, format: str, resize: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    data = encode(quarters(), format, exif=exif, **options)
    process = preprocess(resize=resize)
    header = process.header(data)
    upright = (40, 80) if orientation >= 5 else (80, 40)
    assert (header.width, header.height) == upright
    plan = process.plan(header)
    assert plan.shape == (1, 4, 4) and plan.num_patches == 16 and plan.geometry is not None
    picture = decode(data, resize=resize)
    for index, expected in enumerate(UPRIGHT_CORNERS[orientation]):
        original = (upright[0] * (0.25 + 0.5 * (index % 2)), upright[1] * (0.25 + 0.5 * (index // 2)))
        x, y = plan.geometry.to_input(*original)
        assert plan.geometry.to_original(x, y) == pytest.approx(original)
        assert colour(picture, x, y) == pytest.approx(expected, abs=4)


def test_pad_fills_with_the_mean_colour_and_centres() -> None:
    picture = decode(encode(quarters(80, 40)))
    assert colour(picture, 32, 5) == colour(picture, 32, 58) == (127, 127, 127)
    assert colour(picture, 5, 20) == RED and colour(picture, 60, 44) == YELLOW


def test_crop_keeps_the_centre() -> None:
    geometry = square_geometry(80, 40, 64, "crop")
    assert geometry.to_input(20, 0) == (0, 0) and geometry.to_input(60, 40) == (64, 64)
    picture = decode(encode(quarters(80, 40)), resize="crop")
    assert [colour(picture, *at) for at in ((8, 8), (56, 8), (8, 56), (56, 56))] == [RED, GREEN, BLUE, YELLOW]


@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
@pytest.mark.parametrize("size", [(5000, 400), (333, 217)])
def test_geometry_finds_a_mark(resize: str, size: tuple[int, int]) -> None:
    """A white disc in a black picture lands where the geometry says, also when the canvas is shrunk first."""
    image = Image.new("RGB", size)
    x, y, radius = size[0] * 0.52, size[1] * 0.4, size[1] * 0.2
    image.paste((255, 255, 255), tuple(round(v) for v in (x - radius, y - radius, x + radius, y + radius)))
    geometry = square_geometry(*size, 64, resize)
    light = decode(encode(image), resize=resize)[0]
    light[light < 140] = 0  # the padding is grey
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    found = (float((columns * light).sum() / light.sum()), float((rows * light).sum() / light.sum()))
    assert found == pytest.approx(geometry.to_input(x, y), abs=0.8)


@pytest.mark.parametrize(
    ("mode", "format", "value", "expected"),
    [
        ("1", "PNG", 1, (255, 255, 255)),
        ("L", "PNG", 90, (90, 90, 90)),
        ("LA", "PNG", (90, 0), (255, 255, 255)),
        ("LA", "PNG", (90, 255), (90, 90, 90)),
        ("RGBA", "PNG", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", "PNG", (0, 0, 0, 128), (127, 127, 127)),
        ("RGBA", "WEBP", (10, 20, 30, 0), (255, 255, 255)),
        ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "TIFF", (255, 0, 255, 0), (0, 255, 0)),
        ("YCbCr", "TIFF", (76, 85, 255), (254, 0, 0)),
        ("I;16", "PNG", 0x8080, (128, 128, 128)),
        ("I;16", "TIFF", 0xFFFF, (255, 255, 255)),
        ("RGB", "BMP", (1, 2, 3), (1, 2, 3)),
        ("L", "JPEG", 60, (60, 60, 60)),
    ],
)
def test_modes(mode: str, format: str, value: object, expected: tuple[int, int, int]) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    picture = decode(encode(Image.new(mode, (32, 32), value), format, **options))
    assert colour(picture, 30, 30) == pytest.approx(expected, abs=2)


def test_palette_with_transparency() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert colour(decode(encode(image)), 30, 30) == (200, 100, 50)
    assert colour(decode(encode(image, transparency=1)), 30, 30) == (255, 255, 255)


def test_float_tiff_is_stretched() -> None:
    values = np.linspace(-3, 5, 32 * 32, dtype=np.float32).reshape(32, 32)
    picture = decode(encode(Image.fromarray(values), "TIFF"))
    assert float(picture.min()) < 8 and float(picture.max()) > 247


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert colour(decode(data), 30, 30) == pytest.approx(RED, abs=3)


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (1, 20_000, "picture too small"),
        (1, 1, "picture too small"),
        (20_001, 20_000, "picture too large"),
        (20_000, 8_000, "picture too large"),  # beyond the size at which PIL warns
        (60_000, 60_000, "picture too large"),  # and beyond the one at which it raises
        (10_000, 150, "picture too elongated"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_limits_hold_before_decoding(width: int, height: int, reason: str) -> None:
    process = preprocess()
    with pytest.raises(SampleError) as caught:
        process.header(png_header(width, height))
    assert caught.value.reason == reason


def test_limits_hold_for_a_stored_header() -> None:
    generous, strict = preprocess(), preprocess(max_pixels=100)
    data = encode(quarters())
    header = generous.header(data)
    with pytest.raises(SampleError, match="picture too large"):
        strict.plan(header)
    with pytest.raises(SampleError, match="picture too large"):
        strict(data, generous.plan(header))


def test_truncated_and_foreign_files() -> None:
    process = preprocess()
    data = encode(Image.effect_noise((200, 200), 80), "JPEG")
    plan = process.plan(process.header(data))
    for bad in (data[: len(data) // 2], encode(Image.effect_noise((200, 200), 80))[:3000]):
        with pytest.raises(SampleError) as caught:
            process(bad, plan)
        assert caught.value.reason == "undecodable image"
    for bad in (b"", b"hello", encode(quarters(), "PPM"), data[:20]):
        with pytest.raises(SampleError) as caught:
            process.header(bad)
        assert caught.value.reason == "undecodable image"


def test_header_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        assert preprocess().header(encode(quarters(), format)).width == 80


def test_a_plan_of_another_picture_is_refused() -> None:
    process = preprocess()
    plan = process.plan(process.header(encode(quarters(80, 40))))
    with pytest.raises(SampleError, match="index the shard again"):
        process(encode(quarters(40, 80)), plan)


def photograph(seed: int, width: int = 1024, height: int = 768) -> Image.Image:
    """What photographs have: a spectrum that falls with frequency, in colour, and objects with edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    pixels = np.empty((height, width, 3))
    for channel in range(3):
        spectrum = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**1.4
        pixels[:, :, channel] = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 128 + 45 * pixels / pixels.std()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        x, y, radius = rng.integers(width), rng.integers(height), rng.integers(20, 180)
        pixels[np.hypot(columns - x, rows - y) < radius] += rng.normal(0, 60, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("options", "mean", "largest"),
    [({"fast_resize": True}, 0.01, 2), ({"draft": True}, 1.5, 48), ({"draft": True, "fast_resize": True}, 1.5, 48)],
)
@pytest.mark.parametrize("resize", ["pad", "squash", "crop"])
def test_approximate_options_are_close(options: dict[str, bool], mean: float, largest: float, resize: str) -> None:
    """In levels of 255; docs/training.md states these bounds."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = [encode(photograph(seed), "JPEG", quality=90, exif=exif) for seed in range(2)]
    exact, close = preprocess(resize=resize), preprocess(resize=resize, **options)
    exact.spec = close.spec = replace(SPEC, size=336)
    plans = [exact.plan(exact.header(item)) for item in data]
    difference = torch.stack([(exact(*item) - close(*item)).abs() for item in zip(data, plans, strict=True)])
    assert 0 < float(difference.mean()) * 127.5 < mean and float(difference.max()) * 127.5 < largest + 0.01


def test_fast_resize_knows_every_filter() -> None:
    for interpolation in ("bilinear", "bicubic", "lanczos", "nearest"):
        process = preprocess(fast_resize=True)
        process.spec = replace(SPEC, interpolation=interpolation)
        exact = preprocess()
        exact.spec = process.spec
        for size in ((80, 40), (30, 50)):  # enlarged too
            data = encode(quarters(*size))
            plan = exact.plan(exact.header(data))
            difference = (process(data, plan) - exact(data, plan)).abs().max()
            assert float(difference) * 127.5 < 1.01


def test_preprocess_needs_no_weights() -> None:
    config = ImageConfig(encoder=TimmConfig(model="vit_base_patch16_224", pretrained=True))
    assert config.preprocess().spec.patches == 196
