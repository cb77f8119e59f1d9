from __future__ import annotations

import numpy as np
import pytest

from data_prep.packages import PackageError
from data_prep.voices import LEVEL_DBFS, RATE_HZ, say, speech_power, voices

TEXT = "Turn off the lights in the kitchen."
VOICED = "We are away all year, you know."
ESPEAK, LONG_TRACT = voices(["espeak.en-us+m1", "espeak.en-us+m1@0.8"])


def level(samples: np.ndarray) -> float:
    return 10 * np.log10(speech_power(samples))


def centroid(samples: np.ndarray) -> float:
    power = np.square(np.abs(np.fft.rfft(samples)))
    return float((power * np.fft.rfftfreq(len(samples), 1 / RATE_HZ)).sum() / power.sum())


def fundamental(samples: np.ndarray) -> float:
    """Median of what the autocorrelation of loud windows of 100 ms says, between 57 and 320 Hz."""
    found = []
    for start in range(0, len(samples) - 1600, 400):
        part = samples[start : start + 1600].astype(np.float64)
        if np.mean(part**2) >= speech_power(samples):
            spectrum = np.fft.rfft(part - part.mean(), 4096)
            correlation = np.fft.irfft(np.square(np.abs(spectrum)))[:1600] / np.arange(1600, 0, -1)
            lag = 50 + int(np.argmax(correlation[50:280]))
            found += [RATE_HZ / lag] if correlation[lag] > 0.5 * correlation[0] else []
    return float(np.median(found))


def test_names() -> None:
    (voice,) = voices(["flite.slt@1.05"])
    assert (voice.engine, voice.base, voice.warp) == ("flite", "slt", 1.05)
    for wrong in ("slt", "flite.", "festival.slt", "flite.slt@", "flite.slt@3", "flite.slt@high"):
        with pytest.raises(ValueError, match="is no voice: wanted ENGINE"):
            voices([wrong])


@pytest.mark.parametrize("name", ["hibari.heart", "espeak.en-us+f2", "flite.slt"])
def test_a_voice_says_the_same_whatever_it_said_before(name: str) -> None:
    (voice,) = voices([name])
    try:
        first = say(TEXT, voice)
    except PackageError as error:
        pytest.skip(f"not run, {name} cannot be had: {error}")  # flite comes by apt alone
    other = say("Something else, said in between.", voice, rate=1.3)
    again = say(TEXT, voice)
    assert np.array_equal(first, again) and len(other) != len(first)
    assert first.dtype == np.float32 and 1.2 < len(first) / RATE_HZ < 3.5
    assert level(first) == pytest.approx(LEVEL_DBFS, abs=0.3)
    assert np.abs(first[:160]).max() < 0.1 and speech_power(first[:3200]) > 1e-5  # speech begins at once


def test_rate_pitch_and_volume() -> None:
    plain = say(TEXT, ESPEAK)
    assert len(say(TEXT, ESPEAK, rate=1.5)) < 0.8 * len(plain)
    low, middle, high = (fundamental(say(VOICED, ESPEAK, pitch=pitch)) for pitch in (0.8, 1.0, 1.4))
    assert low / middle == pytest.approx(0.8**0.7, rel=0.05) and high / middle == pytest.approx(1.4**0.7, rel=0.05)
    loud = say(TEXT, ESPEAK, volume=9.0)
    assert level(loud) == pytest.approx(LEVEL_DBFS + 9, abs=0.5)
    assert centroid(loud) > 1.05 * centroid(plain)


def test_a_warp_moves_tones_and_leaves_the_pace() -> None:
    plain, warped = say(TEXT, ESPEAK), say(TEXT, LONG_TRACT)
    assert len(warped) == pytest.approx(len(plain), rel=0.12)
    assert centroid(warped) < 0.93 * centroid(plain)
    low, middle = (fundamental(say(VOICED, voice)) for voice in (LONG_TRACT, ESPEAK))
    assert low / middle == pytest.approx(0.8, rel=0.06)


def test_what_cannot_be_said() -> None:
    with pytest.raises(ValueError, match="says nothing for"):
        say(" ", ESPEAK)
    (unknown,) = voices(["espeak.xx-none"])
    with pytest.raises(ValueError, match="no voice xx-none"):
        say(TEXT, unknown)
    (unknown,) = voices(["hibari.fenrir"])
    with pytest.raises(ValueError, match="hibari has the voice heart"):
        say(TEXT, unknown)
