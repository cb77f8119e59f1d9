"""Rooms, microphones and noise, simulated: what a device hears of somebody who speaks near or far from it.

A room is a box. Sound comes straight, by its mirror images in the walls (Allen and Berkley, 1979) for the first 80 ms,
and then as noise that decays exponentially. A mouth sends high tones forwards: who faces away sounds duller, and more
by way of the walls. All samples are float32 at 16 kHz, [samples].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE_HZ = 16_000
SOUND_M_S = 343.0
NOISES = ("quiet", "fan", "hum", "street", "babble", "music")

_EARLY_S = 0.08
_ORDER = 5  # images in a row, on either side
_BAND_HZ = 1000.0  # between the low and the high tones of a mouth and of walls
_BEHIND_DB = (4.0, 16.0)  # how much less a mouth sends backwards than forwards, low and high tones


@dataclass(frozen=True)
class Room:
    """A box with a device in it.

    Attributes:
        size_m: length, width, height.
        device_m: where the microphone is.
        decay_s: time in which sound falls by 60 dB (RT60), of the low tones.
        high_decay: share of it for the high tones.
    """

    name: str
    size_m: tuple[float, float, float]
    device_m: tuple[float, float, float]
    decay_s: float
    high_decay: float


def draw_room(name: str, decay_s: tuple[float, float], rng: np.random.Generator) -> Room:
    """A living room, kitchen or the like, with the device somewhere on a table, a shelf or the floor."""
    length, width, height = rng.uniform(3.0, 8.0), rng.uniform(2.4, 5.0), rng.uniform(2.3, 3.0)
    device = (rng.uniform(0.3, length - 0.3), rng.uniform(0.3, width - 0.3), rng.uniform(0.2, 1.6))
    return Room(name, (length, width, height), device, rng.uniform(*decay_s), rng.uniform(0.55, 0.85))


def place(room: Room, distance_m: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Where a mouth may be, [3] in metres, and its true distance: as asked for, or the farthest that was found."""
    device, best = np.array(room.device_m), (np.zeros(3), -1.0)
    for _ in range(100):
        angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, min(1.8, room.size_m[2] - 0.2))
        rise = np.clip(height - device[2], -0.95 * distance_m, 0.95 * distance_m)
        across = np.sqrt(distance_m**2 - rise**2)
        spot = device + np.array([across * np.cos(angle), across * np.sin(angle), rise])
        spot[:2] = np.clip(spot[:2], 0.15, np.array(room.size_m[:2]) - 0.15)
        found = float(np.linalg.norm(spot - device))
        if abs(found - distance_m) < 0.1:
            return spot, found
        if found > best[1]:
            best = (spot, found)
    return best


def impulse_response(room: Room, mouth_m: np.ndarray, facing_deg: float, rng: np.random.Generator) -> np.ndarray:
    """What the device hears of a click that is 1 at a metre, from a mouth turned this far away from it."""
    device = np.array(room.device_m)
    towards = (device - mouth_m) / np.linalg.norm(device - mouth_m)
    turn = np.radians(facing_deg) * rng.choice((-1, 1))
    cosine, sine = np.cos(turn), np.sin(turn)
    facing = np.array([cosine * towards[0] - sine * towards[1], sine * towards[0] + cosine * towards[1], towards[2]])
    bands = []
    for behind_db, decay_s in zip(_BEHIND_DB, (room.decay_s, room.decay_s * room.high_decay), strict=True):
        bands.append(_band(room, mouth_m, facing, behind_db, decay_s, rng))
    length = max(map(len, bands))
    low, high = (np.fft.rfft(band, length) for band in bands)
    hz = np.fft.rfftfreq(length, 1 / RATE_HZ)
    share = (hz / _BAND_HZ) ** 2 / (1 + (hz / _BAND_HZ) ** 2)
    return np.fft.irfft(low * (1 - share) + high * share, length).astype(np.float32)


def _band(
    room: Room, mouth_m: np.ndarray, facing: np.ndarray, behind_db: float, decay_s: float, rng: np.random.Generator
) -> np.ndarray:
    """The response for one band of tones."""
    size = np.array(room.size_m)
    volume, surface = size.prod(), 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])
    # Eyring's formula, turned round; a wall reflects this share of the amplitude.
    reflection = np.sqrt(np.exp(-0.161 * volume / (surface * decay_s)))
    counts = np.arange(-_ORDER, _ORDER + 1)
    cells = np.stack(np.meshgrid(counts, counts, counts, indexing="ij"), -1).reshape(-1, 1, 3)
    mirrored = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(1, -1, 3)
    images = (1 - 2 * mirrored) * mouth_m + 2 * cells * size  # [cells, 8, 3]
    num_walls = (np.abs(cells - mirrored) + np.abs(cells)).sum(-1)
    path = np.array(room.device_m) - images
    metres = np.linalg.norm(path, axis=-1)
    # An image looks where the mirrored mouth looks.
    cosine = ((1 - 2 * mirrored) * facing * path).sum(-1) / metres
    sent = 10 ** (-behind_db * (1 - cosine) / 2 / 20)
    delay = np.round(metres / SOUND_M_S * RATE_HZ).astype(int)
    early, whole = int(_EARLY_S * RATE_HZ), int((_EARLY_S + decay_s) * RATE_HZ)
    kept = delay < early
    response = np.zeros(whole)
    np.add.at(response, delay[kept], (sent * reflection**num_walls / metres)[kept])
    # The tail goes on where the images end, as loud as the last quarter of them.
    before = response[early * 3 // 4 : early]
    power = np.mean(before**2) if before.any() else 0.0
    times = np.arange(whole - early * 7 // 8) / RATE_HZ
    tail = rng.standard_normal(len(times)) * np.sqrt(power) * 10 ** (-3 * times / decay_s)
    response[early * 7 // 8 :] += tail
    response[early * 7 // 8 : early] *= np.sqrt(0.5)
    return response


def heard(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """[samples + response - 1] as the device hears them."""
    length = len(samples) + len(response) - 1
    size = 1 << (length - 1).bit_length()
    both = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(both, size)[:length].astype(np.float32)


def direct_to_reverberant_db(response: np.ndarray) -> float:
    """Energy of the first 2.5 ms from the first sound over that of the rest."""
    first = int(np.flatnonzero(np.abs(response) > 0.2 * np.abs(response).max())[0]) + 40
    return float(10 * np.log10(np.square(response[:first]).sum() / (np.square(response[first:]).sum() + 1e-12)))


def loudspeaker(samples: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """What a television plays of them: without the lowest and highest tones, with quiet and loud closer together."""
    hz = np.fft.rfftfreq(len(samples), 1 / RATE_HZ)
    gain = 1 / np.sqrt((1 + (low_hz / np.maximum(hz, 1)) ** 6) * (1 + (hz / high_hz) ** 6))
    played = np.fft.irfft(np.fft.rfft(samples) * gain, len(samples))
    level = max(float(np.sqrt(np.mean(played**2))), 1e-6)
    squeezed = np.tanh(1.5 * played / (4 * level)) * 4 * level / 1.5
    return (squeezed * level / max(float(np.sqrt(np.mean(squeezed**2))), 1e-6)).astype(np.float32)


def noise(kind: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """One of NOISES but babble, with a mean power of 1. Babble is made of voices: see directed_speech.py."""
    white = rng.standard_normal(num_samples)
    hz = np.fft.rfftfreq(num_samples, 1 / RATE_HZ)
    times = np.arange(num_samples) / RATE_HZ
    match kind:
        case "quiet":  # the microphone's own
            made = white
        case "fan":
            made = _shaped(white, 1 / np.maximum(hz, 60) ** rng.uniform(0.4, 0.7))
            made *= 1 + 0.15 * np.sin(2 * np.pi * rng.uniform(3, 12) * times)
        case "hum":
            mains = float(rng.choice((50.0, 60.0)))
            made = _shaped(white, 1 / np.maximum(hz, 40)) * 3e2
            for number, part in enumerate(rng.uniform(0.2, 1.0, 8), 1):
                made += 4 * part / number * np.sin(2 * np.pi * mains * number * times + rng.uniform(0, 6.28))
        case "street":
            made = _shaped(white, 1 / np.maximum(hz, 50) ** 1.2)
            seconds = np.arange(0, times[-1] + 2)  # cars come and go
            slow = np.interp(times, seconds, rng.uniform(0.3, 1.5, len(seconds)))
            made *= slow
        case "music":
            made = _music(times, rng)
        case _:
            raise ValueError(f"no noise {kind}; there are {', '.join(NOISES)}")
    return (made / np.sqrt(np.mean(made**2))).astype(np.float32)


def _shaped(white: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(white) * gain, len(white))


def _music(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Chords that change, each note with overtones and a pluck's decay."""
    made = 1e-4 * rng.standard_normal(len(times))
    beat_s, root = rng.uniform(0.25, 0.6), rng.uniform(110, 220)
    for number in range(int(times[-1] / beat_s) + 1):
        since = times - number * beat_s
        on = since >= 0
        for step in rng.choice((0, 3, 4, 5, 7, 9, 12, 16, 19), 3, replace=False):
            base = root * 2 ** (step / 12)
            for overtone in range(1, 7):
                if base * overtone < RATE_HZ / 2:
                    fall = np.exp(-since[on] * (1.5 + overtone))
                    made[on] += fall / overtone**1.3 * np.sin(2 * np.pi * base * overtone * since[on])
    return made
