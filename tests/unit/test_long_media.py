"""What is longer than its budget: which part is seen or heard, that it is said, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmchat.conversation import MediaHeader
from mmchat.errors import SampleError
from mmchat.modalities import MediaPlan
from mmchat.modalities.audio import AudioConfig, AudioPreprocess, AudioSpec, WhisperEncoderConfig
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.modalities.video import VideoConfig, VideoPreprocess
from tests import odd_media, tiny
from tests.odd_media import EIGHT_HOURS_S, wav

RATE = 16_000
SPEC = ImageSpec(32, (0.0,) * 3, (1.0,) * 3, "bilinear", 2, 2, 8)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox(SandboxLimits())
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_whisper(tmp_path_factory.mktemp("whisper"))


def hearing(whisper: Path, sandbox: Sandbox, window_s: int = 2, **settings: object) -> AudioPreprocess:
    """A preprocess whose encoder has windows of that many seconds."""
    encoder = WhisperEncoderConfig(pretrained=str(whisper))
    process = AudioPreprocess(
        AudioConfig.model_validate({"encoder": encoder, **settings}), AudioSpec(80, 50 * window_s, 8)
    )
    process.sandbox = sandbox
    return process


def seeing(sandbox: Sandbox, **settings: object) -> VideoPreprocess:
    process = VideoPreprocess(VideoConfig.model_validate({"resize": "squash", **settings}), SPEC)
    process.sandbox = sandbox
    return process


def noise(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Nowhere like itself, so that no piece passes for another."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)


# ---- sound ----------------------------------------------------------------------------------------------------------


def test_a_long_sound_is_refused_by_default(whisper: Path, sandbox: Sandbox) -> None:
    process = hearing(whisper, sandbox, max_duration_s=6)
    with pytest.raises(SampleError) as caught:
        process.header(wav(noise(7)))
    assert caught.value.reason == "audio too long" and "too_long: first or spread" in caught.value.detail


def test_the_first_part(whisper: Path, sandbox: Sandbox) -> None:
    process = hearing(whisper, sandbox, max_duration_s=6, too_long="first")
    samples = noise(20)
    plan = process.plan(process.header(wav(samples)))
    assert plan.shape == (300, 1, 1) and plan.num_patches == 300 and plan.spans_s == ()
    (excerpt,) = plan.excerpts
    assert str(excerpt) == "sound longer than max_duration_s, first part heard: 6 of 20 s (30.00%)"
    np.testing.assert_array_equal(process.samples(wav(samples), plan).reshape(-1), samples[: 6 * RATE, 0])


def test_windows_all_over_it(whisper: Path, sandbox: Sandbox) -> None:
    """Whole encoder windows, the last one a part, with equal gaps between them; none overlap."""
    process = hearing(whisper, sandbox, max_duration_s=7, too_long="spread")
    samples = noise(20)
    plan = process.plan(process.header(wav(samples)))
    assert plan.shape == (350, 1, 1) and plan.num_patches == 400
    assert plan.spans_s == ((1.625, 3.625), (6.875, 8.875), (12.125, 14.125), (17.375, 18.375))  # gaps of 3.25 s
    (excerpt,) = plan.excerpts
    assert str(excerpt) == "sound longer than max_duration_s, windows all over it heard: 7 of 20 s (35.00%)"
    heard = process.samples(wav(samples), plan)
    assert heard.shape == (4, 2 * RATE)
    for window, (start, end) in zip(heard, plan.spans_s, strict=True):
        piece = samples[round(start * RATE) : round(end * RATE), 0]
        np.testing.assert_array_equal(window[: len(piece)], piece)
        assert not window[len(piece) :].any()


def test_what_fits_is_planned_as_ever(whisper: Path, sandbox: Sandbox) -> None:
    header = MediaHeader(duration_s=5.99, sample_rate_hz=RATE)
    expected = MediaPlan((300, 1, 1), 300)
    for rule in ("refuse", "first", "spread"):
        assert hearing(whisper, sandbox, max_duration_s=6, too_long=rule).plan(header) == expected
    short = hearing(whisper, sandbox, max_duration_s=1, too_long="spread").plan(header)
    assert short.spans_s == ((2.495, 3.495),)  # less than a window: one piece, from the middle


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (96_000, 6), (22_050, 2)])
def test_a_piece_is_resampled_as_if_it_were_the_file(whisper: Path, sandbox: Sandbox, rate: int, channels: int) -> None:
    process = hearing(whisper, sandbox, max_duration_s=4, too_long="spread")
    samples = noise(10, rate, channels)
    plan = process.plan(process.header(wav(samples, rate)))
    whole = hearing(whisper, sandbox)
    for window, (start, end) in zip(process.samples(wav(samples, rate), plan), plan.spans_s, strict=True):
        piece = wav(samples[round(start * rate) : round(end * rate)], rate)
        alone = whole.samples(piece, MediaPlan((100, 1, 1), 100))[0]
        np.testing.assert_array_equal(window, alone)


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts"])
def test_pieces_of_a_films_track_are_where_they_should_be(whisper: Path, sandbox: Sandbox, format: str) -> None:
    """Packets between the pieces are not decoded; those that are stand at their time."""
    samples = odd_media.steps(20, RATE, [300, 600, 1200, 2400])
    data = odd_media.film(20, samples, format=format)
    process = hearing(whisper, sandbox, max_duration_s=6, too_long="spread")
    plan = process.plan(process.header(data))
    whole = hearing(whisper, sandbox)
    everything = whole.samples(data, whole.plan(whole.header(data))).reshape(-1)
    for window, (start, _) in zip(process.samples(data, plan), plan.spans_s, strict=True):
        expected = everything[round(start * RATE) :][: len(window)]
        lags = range(-400, 401, 8)
        errors = [float(np.abs(np.roll(expected, lag)[500:-500] - window[500:-500]).mean()) for lag in lags]
        assert abs(lags[int(np.argmin(errors))]) <= 160, "a hundredth of a second"
        assert min(errors) < 0.02


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_mb(sandbox: Sandbox) -> float:
    """Of the decoding child, in MB."""
    assert sandbox._child is not None
    lines = Path(f"/proc/{sandbox._child.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


@pytest.mark.parametrize("make", [odd_media.silent_flac, odd_media.silent_aac])
def test_eight_hours_of_silence(whisper: Path, make: object) -> None:
    """They would be 1.84 GB at 16 kHz; what is kept of them is 19 MB."""
    data = make(EIGHT_HOURS_S)  # type: ignore[operator]
    sandbox = Sandbox(SandboxLimits())
    try:
        for rule in ("first", "spread"):
            process = hearing(whisper, sandbox, window_s=30, too_long=rule)
            plan = process.plan(process.header(data))
            assert plan.shape == (15_000, 1, 1)
            (excerpt,) = plan.excerpts
            assert excerpt.shown == 300 and excerpt.whole == pytest.approx(EIGHT_HOURS_S, abs=1)
            assert float(np.abs(process.samples(data, plan)).max()) < 1e-3
        assert peak_mb(sandbox) < 200
        with pytest.raises(SampleError, match="audio too long"):
            hearing(whisper, sandbox).header(data)
    finally:
        sandbox.close()


def test_many_loud_channels_do_not_add_up() -> None:
    """Five minutes of six channels at 96 kHz would be 691 MB as they are decoded."""
    out = BytesIO()
    with soundfile.SoundFile(out, "w", 96_000, 6, "PCM_16", format="FLAC") as file:
        for _ in range(30):
            file.write(np.zeros((960_000, 6), np.int16))
    sandbox = Sandbox(SandboxLimits())
    try:
        _, samples = sandbox.call(
            "audio_samples", out.getvalue(), sample_rate_hz=RATE, max_duration_s=300.0, holds="whole"
        )
        assert len(samples) == 300 * RATE * 4 and peak_mb(sandbox) < 200
    finally:
        sandbox.close()


# ---- video ----------------------------------------------------------------------------------------------------------


def test_a_long_video(sandbox: Sandbox) -> None:
    """Eight hours of slides: refused, the first hour, or all over."""
    data = odd_media.slides(EIGHT_HOURS_S, every_s=10)
    with pytest.raises(SampleError) as caught:
        seeing(sandbox).header(data)
    assert caught.value.reason == "video too long" and "too_long: first or spread" in caught.value.detail
    first = seeing(sandbox, too_long="first")
    plan = first.plan(first.header(data))
    assert plan.times_s == tuple(225.0 + 450 * i for i in range(8))
    assert [str(one) for one in plan.excerpts] == [
        "video longer than max_duration_s, first part seen: 3,600 of 28,800 s (12.50%)"
    ]
    frames, times_s = first.frames(data, plan)
    assert frames.shape == (8, 3, 32, 32) and times_s == (220, 670, 1120, 1570, 2020, 2470, 2920, 3370)
    spread = seeing(sandbox, too_long="spread")
    plan = spread.plan(spread.header(data))
    assert plan.times_s[-1] == 27_000
    assert [str(one) for one in plan.excerpts] == [
        "video longer than max_duration_s, frames all over it seen: 8 of 2,880 frames (0.28%)"
    ]
    assert spread(data, plan).shape == (8, 3, 32, 32)
    assert peak_mb(sandbox) < 400


@pytest.mark.parametrize(
    ("settings", "shrink", "expected"),
    [
        ({}, 0, []),
        ({"sample": {"kind": "fps", "fps": 2}}, 0, []),
        ({"sample": {"kind": "fps", "fps": 2, "max_frames": 5}}, 0, ["frames limited by sample.max_frames: 5 of 20"]),
        ({"max_total_pixels": 2048}, 0, ["frames limited by max_total_pixels: 2 of 8"]),
        ({}, 1, ["frames limited by the pack's budget: 4 of 8"]),
        (
            {"max_duration_s": 5, "too_long": "first", "sample": {"kind": "fps", "fps": 2, "max_frames": 5}},
            0,
            [
                "video longer than max_duration_s, first part seen: 5 of 10",
                "frames limited by sample.max_frames: 5 of 10",
            ],
        ),
    ],
)
def test_what_limits_the_frames_is_said(
    sandbox: Sandbox, settings: dict[str, object], shrink: int, expected: list[str]
) -> None:
    header = MediaHeader(width=64, height=48, duration_s=10.0, num_frames=100)
    plan = seeing(sandbox, **settings).plan(header, shrink)
    said = [f"{one.rule.removesuffix(', seen further apart')}: {one.shown:g} of {one.whole:g}" for one in plan.excerpts]
    assert said == expected


def test_ten_thousand_frames(sandbox: Sandbox) -> None:
    """One long group of pictures, of which the frames in the middles of equal parts are seen."""
    process = seeing(sandbox)
    data = tiny.clip("right", num_frames=10_000, fps=25)
    plan = process.plan(process.header(data))
    frames, times_s = process.frames(data, plan)
    assert times_s == pytest.approx([25 + 50 * i for i in range(8)], abs=0.04)
    columns = frames[:, 0, 16].argmax(dim=1)  # where the white square begins
    assert torch.equal(columns, columns.sort().values) and columns[-1] > columns[0]
    assert peak_mb(sandbox) < 400
