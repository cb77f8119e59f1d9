"""Sounds and videos that cannot be used are refused with a reason that says why; what is merely odd is used.

Elsewhere: bytes that are no media, sample formats, rates and channels (test_audio); containers, variable frame rates,
rotation, damaged packets (test_video); crashes and playlists (test_sandbox); what is longer than its budget, and the
memory that it takes (test_long_media); all of it through shards and the loader (test_malformed_data).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mmchat.errors import SampleError
from mmchat.modalities.audio import AudioConfig, AudioPreprocess, AudioSpec, WhisperEncoderConfig
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.sandbox import SandboxLimits
from mmchat.modalities.video import VideoConfig, VideoPreprocess
from tests import odd_media, tiny
from tests.odd_media import wav

RATE = 16_000
TONE = odd_media.steps(6, RATE, [300, 600])


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AudioPreprocess]:
    encoder = WhisperEncoderConfig(pretrained=str(tiny.build_whisper(tmp_path_factory.mktemp("whisper"))))
    process = AudioPreprocess(AudioConfig(encoder=encoder), AudioSpec(80, 1500, 32))
    yield process
    process.sandbox.close()


@pytest.fixture(scope="module")
def seeing() -> Iterator[VideoPreprocess]:
    process = VideoPreprocess(VideoConfig(), ImageSpec(32, (0.0,) * 3, (1.0,) * 3, "bilinear", 2, 2, 8))
    yield process
    process.sandbox.close()


def refusal(process: AudioPreprocess | VideoPreprocess, data: bytes) -> SampleError:
    with pytest.raises(SampleError) as caught:
        process(data, process.plan(process.header(data)))
    assert caught.value.detail
    return caught.value


def test_a_film_without_sound(hearing: AudioPreprocess) -> None:
    error = refusal(hearing, odd_media.film(1))
    assert error.reason == "no audio track" and "video" in error.detail


def test_a_recording_without_pictures(seeing: VideoPreprocess) -> None:
    error = refusal(seeing, odd_media.silent_aac(2))
    assert error.reason == "no video track" and "audio" in error.detail


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mov"])
def test_no_frames(seeing: VideoPreprocess, format: str) -> None:
    assert refusal(seeing, odd_media.without_frames(format)).reason in ("empty video", "undecodable video")


def test_no_samples(hearing: AudioPreprocess) -> None:
    assert refusal(hearing, wav(np.zeros((0, 6), np.float32))).reason == "empty audio"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3 * RATE, 6 * RATE - 1])
def test_samples_that_are_no_numbers(hearing: AudioPreprocess, bad: float, place: int) -> None:
    samples = TONE.copy()
    samples[place] = bad
    assert refusal(hearing, wav(samples)).reason == "audio not finite"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the overflow
@pytest.mark.parametrize("height", [1e19, 3e38])
def test_samples_too_large_for_a_spectrum(hearing: AudioPreprocess, height: float) -> None:
    """Each is a number, but their power is none."""
    assert (
        refusal(hearing, wav(np.full((RATE, 6), height, np.float32) * TONE[:RATE, None])).reason == "audio not finite"
    )


def test_a_film_that_says_it_is_longer(seeing: VideoPreprocess, hearing: AudioPreprocess) -> None:
    """Behind the end of a little too much, the last frame and silence; far too much is refused."""
    film = odd_media.film(6, TONE)
    for process, reason in ((seeing, "truncated video"), (hearing, "truncated audio")):
        assert refusal(process, odd_media.says(film, 60)).reason == reason
        a_little = odd_media.says(film, 7)
        plan = process.plan(process.header(a_little))
        assert process(a_little, plan).isfinite().all()
    heard = hearing.samples(a_little, hearing.plan(hearing.header(a_little))).reshape(-1)
    assert heard[: 6 * RATE].any() and not heard[round(6.2 * RATE) :].any()


def test_a_film_that_says_it_is_shorter(seeing: VideoPreprocess, hearing: AudioPreprocess) -> None:
    """What would be left out without a word is refused."""
    film = odd_media.film(6, TONE)
    for process in (seeing, hearing):
        error = refusal(process, odd_media.says(film, 1))
        assert error.reason == "longer than its header" and "its header says 1.000 s" in error.detail
        near = odd_media.says(film, 5)
        assert process(near, process.plan(process.header(near))).isfinite().all()


def test_a_films_sound_may_end_before_its_pictures(hearing: AudioPreprocess) -> None:
    """Matroska tells one length for all tracks; behind the sound there is silence."""
    film = odd_media.film(20, TONE)
    header = hearing.header(film)
    assert header.duration_s == pytest.approx(20, abs=0.2)
    heard = hearing.samples(film, hearing.plan(header)).reshape(-1)
    assert np.abs(heard[: 6 * RATE]).max() > 0.3 and not heard[round(6.2 * RATE) :].any()


@pytest.mark.parametrize("silent_first", [True, False])
def test_the_length_of_bare_aac_is_counted_not_guessed(hearing: AudioPreprocess, silent_first: bool) -> None:
    """From the size and the first packets, FFmpeg takes these twenty seconds for five, or for five hundred."""
    samples = np.zeros(20 * RATE, np.float32)
    noise = np.random.default_rng(0).normal(0, 0.2, 10 * RATE).clip(-1, 1)
    samples[slice(10 * RATE, None) if silent_first else slice(None, 10 * RATE)] = noise
    data = odd_media.bare_aac(samples)
    header = hearing.header(data)
    assert header.duration_s == pytest.approx(20, abs=0.2)
    assert hearing(data, hearing.plan(header)).shape == (1, 80, 3000)


def test_surround_eight_bit_and_96_khz(hearing: AudioPreprocess) -> None:
    """Six channels are averaged: a tone in one of them is heard at a sixth of its height."""
    times = np.arange(96_000) / 96_000
    channels = np.zeros((96_000, 6), np.float32)
    channels[:, 2] = 0.6 * np.sin(2 * np.pi * 500 * times)
    for subtype, tolerance in (("PCM_U8", 0.01), ("PCM_24", 1e-3)):
        data = wav(channels, 96_000, subtype)
        heard = hearing.samples(data, hearing.plan(hearing.header(data))).reshape(-1)
        expected = 0.1 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)
        np.testing.assert_allclose(heard[500 : RATE - 500], expected[500:-500], rtol=0, atol=tolerance)


def test_a_decoder_that_takes_too_long_is_killed(hearing: AudioPreprocess) -> None:
    """The time limit ends the work on a real file; the next one is decoded as if nothing had been."""
    data = odd_media.silent_aac(2 * 3600)
    process = AudioPreprocess(hearing.config.model_copy(update={"max_duration_s": 7200}), hearing.spec)
    sound, long = (process.plan(process.header(one)) for one in (wav(TONE), data))
    try:
        process.sandbox.limits = SandboxLimits(decode_timeout_s=0.1)  # when the child is up
        started = time.monotonic()
        with pytest.raises(SampleError) as caught:
            process(data, long)
        assert caught.value.reason == "decoding timed out" and time.monotonic() - started < 5
        process.sandbox.limits = hearing.config
        assert process(wav(TONE), sound).isfinite().all()
    finally:
        process.sandbox.close()


def test_half_a_file(hearing: AudioPreprocess, seeing: VideoPreprocess, tmp_path: Path) -> None:
    """What a broken download leaves: refused, or what is there is used."""
    film = odd_media.film(6, TONE)
    for process in (hearing, seeing):
        for share in (0.02, 0.3):
            assert refusal(process, film[: int(share * len(film))]).reason
        most = film[: int(0.9 * len(film))]
        assert process(most, process.plan(process.header(most))).isfinite().all()
