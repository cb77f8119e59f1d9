"""Sound: sample formats, channels and containers; Whisper's own numbers; only the positions that sound."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.audio import AudioConfig, AudioPreprocess, WhisperEncoderConfig

# Windows of two seconds instead of thirty, so that tests are quick.
TINY = {
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "max_source_positions": 100,
    "max_target_positions": 8,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper")
    WhisperForConditionalGeneration(WhisperConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[AudioPreprocess]:
    process = AudioConfig(encoder=WhisperEncoderConfig(pretrained=str(folder)), max_duration_s=20).preprocess()
    yield process
    process.sandbox.close()


def tone(seconds: float, rate: int = 16_000, hz: float = 440) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16", format: str = "WAV") -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, rate, subtype=subtype, format=format)
    return file.getvalue()


def encoded(samples: np.ndarray, codec: str, format: str, rate: int, with_video: bool = False) -> bytes:
    file = BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if with_video:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            for _ in range(5):
                picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.rate = rate
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(piece))
    return file.getvalue()


def heard(process: AudioPreprocess, data: bytes) -> torch.Tensor:
    return process(data, process.plan(process.header(data)))


def reference(samples: np.ndarray) -> torch.Tensor:
    """Whisper's feature extractor on 16 kHz samples."""
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    return extractor(samples, sampling_rate=16_000, return_tensors="pt")["input_features"]


def test_features_are_whispers(process: AudioPreprocess) -> None:
    samples = tone(1.3)
    data = wav(samples, subtype="FLOAT")
    header = process.header(data)
    assert (header.sample_rate_hz, header.duration_s) == (16_000, 1.3)
    plan = process.plan(header)
    assert plan == MediaPlan(shape=(65, 1, 1), num_patches=100)
    features = process(data, plan)
    assert features.shape == (1, 8, 200) and features.dtype == torch.float32
    torch.testing.assert_close(features, reference(samples), rtol=0, atol=1e-6)


def test_long_sound_is_cut_into_windows(process: AudioPreprocess) -> None:
    samples = tone(4.5)
    samples[32_000:] *= 0.3
    data = wav(samples, subtype="FLOAT")
    plan = process.plan(process.header(data))
    assert plan == MediaPlan(shape=(225, 1, 1), num_patches=300)
    features = process(data, plan)
    assert features.shape == (3, 8, 200)
    for window in range(3):
        expected = reference(samples[window * 32_000 : (window + 1) * 32_000])[0]
        torch.testing.assert_close(features[window], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "subtype", "channels"),
    [
        (16_000, "PCM_U8", 1),
        (16_000, "PCM_24", 1),
        (16_000, "PCM_32", 2),
        (16_000, "DOUBLE", 1),
        (8_000, "PCM_16", 1),
        (44_100, "PCM_16", 2),
        (96_000, "PCM_24", 2),
        (48_000, "PCM_16", 6),
    ],
)
def test_sample_formats(process: AudioPreprocess, rate: int, subtype: str, channels: int) -> None:
    samples = np.repeat(tone(1.0, rate)[:, None], channels, axis=1)
    features = heard(process, wav(samples, rate, subtype))
    assert features.shape == (1, 8, 200)
    # The loudest mel channels agree; 8 bits and resampling differ below the noise floor only.
    expected = reference(tone(1.0))
    loud = expected > expected.max() - 0.5
    assert loud.sum() > 50
    torch.testing.assert_close(features[loud], expected[loud], rtol=0, atol=0.05)


def test_channels_are_averaged(process: AudioPreprocess) -> None:
    left, right = tone(1.0), tone(1.0, hz=1000)
    features = heard(process, wav(np.stack([left, right], axis=1), subtype="FLOAT"))
    torch.testing.assert_close(features, reference((left + right) / 2), rtol=0, atol=1e-5)
    silent = heard(process, wav(np.stack([left, -left], axis=1), subtype="FLOAT"))
    torch.testing.assert_close(silent, reference(np.zeros(16_000, np.float32)))


@pytest.mark.parametrize(
    ("codec", "format", "rate", "with_video"),
    [
        ("libmp3lame", "mp3", 44_100, False),
        ("aac", "ipod", 44_100, False),
        ("libopus", "webm", 48_000, False),
        ("libopus", "ogg", 48_000, False),
        ("flac", "flac", 16_000, False),
        ("aac", "mp4", 16_000, True),
        ("aac", "matroska", 48_000, True),
    ],
)
def test_containers(process: AudioPreprocess, codec: str, format: str, rate: int, with_video: bool) -> None:
    data = encoded(tone(1.0, rate), codec, format, rate, with_video)
    header = process.header(data)
    assert header.sample_rate_hz == rate and header.duration_s == pytest.approx(1.0, abs=0.08)
    features = heard(process, data)
    expected = reference(tone(1.0))
    middle = features[0, :, 20:80].mean(1)  # steady, away from what codecs do at the edges
    assert int(middle.argmax()) == int(expected[0, :, 20:80].mean(1).argmax())
    assert float((middle - expected[0, :, 20:80].mean(1)).abs().max()) < 0.4


def test_refusals(process: AudioPreprocess, tmp_path: Path) -> None:
    silent_video = BytesIO()
    with av.open(silent_video, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    broken = tone(1.0)
    broken[100] = np.nan
    for data, reason in [
        (b"", "undecodable audio"),
        (b"no sound", "undecodable audio"),
        (wav(np.zeros(0, np.float32)), "empty audio"),
        (wav(tone(21, 8000), 8000), "audio too long"),
        (silent_video.getvalue(), "no audio track"),
        (wav(broken, subtype="FLOAT"), "audio not finite"),
    ]:
        with pytest.raises(SampleError) as caught:
            heard(process, data)
        assert caught.value.reason == reason
    with pytest.raises(SampleError, match="header incomplete"):
        process.plan(MediaHeader())


def test_the_plan_decides_how_much_is_heard(process: AudioPreprocess) -> None:
    """A header that lies a little costs padding or a cut, never another shape."""
    for seconds in (1.5, 3.5):
        plan = process.plan(MediaHeader(duration_s=2.5, sample_rate_hz=16_000))
        assert process(wav(tone(seconds)), plan).shape == (2, 8, 200)


@pytest.mark.parametrize(("duration_s", "positions"), [(1e-4, 1), (0.02, 1), (0.021, 2), (1.1, 55), (2.0, 100)])
def test_positions(process: AudioPreprocess, duration_s: float, positions: int) -> None:
    assert process.plan(MediaHeader(duration_s=duration_s)).shape == (positions, 1, 1)


def test_encoder_equals_whispers_and_drops_the_silence(folder: Path) -> None:
    encoder = WhisperEncoderConfig(pretrained=str(folder)).build().eval()
    whisper = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.encoder.eval()
    windows = torch.randn(4, 8, 200, generator=torch.Generator().manual_seed(0))
    shapes = ((30, 1, 1), (230 - 30, 1, 1), (1, 1, 1))  # one window, two, one
    with torch.no_grad():
        features = encoder(windows, shapes)
        hidden = whisper(windows).last_hidden_state
    expected = torch.cat([hidden[0, :30], hidden[1], hidden[2], hidden[3, :1]])
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    assert encoder.feature_dim == 16
    data, shapes_of_stand_in = encoder.stand_in()
    features = encoder(data, shapes_of_stand_in)
    assert features.shape == (1, 16)
    features.sum().backward()
    trainable = [name for name, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None]
    assert trainable == []


def test_a_shorter_window_is_whispers_with_fewer_positions(folder: Path) -> None:
    config = AudioConfig(encoder=WhisperEncoderConfig(pretrained=str(folder), window_s=1))
    process = config.preprocess()
    plan = process.plan(MediaHeader(duration_s=1.5))
    assert (plan.shape, plan.num_patches) == ((75, 1, 1), 100)
    windows = process(wav(tone(1.5)), plan)
    assert windows.shape == (2, 8, 100)

    whole = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.encoder
    short = WhisperForConditionalGeneration(WhisperConfig(**{**TINY, "max_source_positions": 50})).model.encoder.eval()
    weights = whole.state_dict()
    short.load_state_dict({**weights, "embed_positions.weight": weights["embed_positions.weight"][:50]})
    with torch.no_grad():
        features = config.build_encoder().eval()(windows, (plan.shape,))
        torch.testing.assert_close(features, short(windows).last_hidden_state.flatten(0, 1)[:75], rtol=0, atol=0)
    process.sandbox.close()
    with pytest.raises(ValueError, match="hears 2 s at once"):
        WhisperEncoderConfig(pretrained=str(folder), window_s=3).spec()


def test_the_checkpoints_feature_extractor_is_used(folder: Path, tmp_path: Path) -> None:
    WhisperConfig(**TINY).save_pretrained(tmp_path)
    config = AudioConfig(encoder=WhisperEncoderConfig(pretrained=str(tmp_path)))
    assert config.preprocess().feature_extractor.chunk_length == 2
    WhisperFeatureExtractor(feature_size=8, chunk_length=2, dither=0.5).save_pretrained(tmp_path)
    assert config.preprocess().feature_extractor.dither == 0.5
    with pytest.raises(OSError):
        config.build_encoder()  # a config alone holds no weights
