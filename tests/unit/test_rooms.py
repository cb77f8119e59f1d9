from __future__ import annotations

import numpy as np
import pytest

from data_prep.rooms import (
    NOISES,
    RATE_HZ,
    SOUND_M_S,
    Room,
    direct_to_reverberant_db,
    draw_room,
    heard,
    impulse_response,
    loudspeaker,
    noise,
    place,
)

ROOM = Room("test", (6.0, 4.5, 2.6), (2.0, 2.0, 1.0), 0.5, 0.8)


def response(distance_m: float, facing_deg: float = 0.0, room: Room = ROOM) -> np.ndarray:
    mouth = np.array(room.device_m) + np.array([distance_m, 0.0, 0.0])
    return impulse_response(room, mouth, facing_deg, np.random.default_rng(0))


@pytest.mark.parametrize("distance_m", [0.5, 1.0, 2.0])
def test_sound_arrives_when_and_as_loud_as_it_must(distance_m: float) -> None:
    found = response(distance_m)
    arrival = round(distance_m / SOUND_M_S * RATE_HZ)
    assert np.abs(found[: arrival - 1]).max() < 0.05 / distance_m
    assert found[arrival] == pytest.approx(1 / distance_m, rel=0.05)


@pytest.mark.parametrize("decay_s", [0.25, 0.6])
def test_sound_dies_away_in_the_time_asked_for(decay_s: float) -> None:
    """By Schroeder's backward integral, from -10 to -30 dB."""
    room = Room("test", ROOM.size_m, ROOM.device_m, decay_s, 1.0)
    left = np.cumsum(np.square(response(2.0, room=room))[::-1])[::-1]
    levels = 10 * np.log10(left / left[0])
    seconds = (np.argmax(levels < -30) - np.argmax(levels < -10)) / RATE_HZ * 3
    assert seconds == pytest.approx(decay_s, rel=0.25)


def test_far_or_turned_away_is_more_of_the_room() -> None:
    ratios = [direct_to_reverberant_db(response(distance)) for distance in (0.5, 1.0, 2.0, 3.5)]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] - ratios[-1] > 8
    assert direct_to_reverberant_db(response(1.0, 170.0)) < direct_to_reverberant_db(response(1.0)) - 3

    def high_share(found: np.ndarray) -> float:
        power = np.square(np.abs(np.fft.rfft(found[: int(0.01 * RATE_HZ)])))
        return float(power[len(power) // 2 :].sum() / power.sum())

    assert high_share(response(1.0, 170.0)) < 0.6 * high_share(response(1.0))


def test_a_mouth_is_inside_the_room_and_as_far_as_said() -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        room = draw_room(f"test-{number}", (0.2, 0.7), rng)
        mouth, distance = place(room, float(rng.uniform(0.3, 7)), rng)
        assert np.linalg.norm(mouth - room.device_m) == pytest.approx(distance)
        assert (mouth > 0).all() and (mouth < room.size_m).all()


def test_convolution() -> None:
    samples, click = np.array([1.0, 2.0, 3.0], np.float32), np.array([0.0, 1.0, 0.5], np.float32)
    assert heard(samples, click) == pytest.approx([0, 1, 2.5, 4, 1.5], abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in NOISES if kind != "babble"])
def test_noise_has_a_power_of_one_and_its_own_sound(kind: str) -> None:
    first, again = (noise(kind, 16000, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first, again) and np.mean(first**2) == pytest.approx(1, rel=1e-3)
    assert not np.array_equal(first, noise(kind, 16000, np.random.default_rng(2)))
    with pytest.raises(ValueError, match="no noise drill"):
        noise("drill", 100, np.random.default_rng(0))


def test_a_loudspeaker_has_a_band() -> None:
    times = np.arange(16000) / RATE_HZ
    played = {hz: loudspeaker(np.sin(2 * np.pi * hz * times).astype(np.float32), 300, 4000) for hz in (60, 1000, 7500)}
    mixed = loudspeaker(sum(np.sin(2 * np.pi * hz * times) for hz in played).astype(np.float32), 300, 4000)
    power = np.square(np.abs(np.fft.rfft(mixed)))  # 1 Hz a bin
    assert power[1000] > 50 * power[60] and power[1000] > 50 * power[7500]
    assert {len(one) for one in played.values()} == {16000}
