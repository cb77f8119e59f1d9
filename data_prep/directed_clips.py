"""The clips of the corpus of device-directed speech: what each is to be, how it is said, and how it is heard."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from data_prep.directed_config import DirectedConfig, Split
from data_prep.directed_sentences import Line, Sentences, spoken_form
from data_prep.packages import DOWNLOADS
from data_prep.rooms import (
    RATE_HZ,
    Room,
    direct_to_reverberant_db,
    draw_room,
    heard,
    impulse_response,
    loudspeaker,
    noise,
    place,
)
from data_prep.voices import LEVEL_DBFS, Voice, say, speech_power

CHUNK = 50  # clips that a process makes before it writes down that they are made

_TAIL_S = 0.15  # of the room, behind the last word
_TRIES = 30
_BABBLE_S, _NUM_BABBLES, _NUM_BABBLERS = 8, 4, 4
_babbles: dict[tuple[str, str], list[np.ndarray]] = {}  # by configuration and split; a process makes them once


@dataclass(frozen=True)
class Said:
    """What one clip is to be: who is spoken to (a manner of the configuration), where the words are from."""

    manner: Literal["directed", "to_person", "background"]
    words: Literal["command", "addressed", "dialogue"]
    kind: Literal["command", "to_person", "background", "dialogue"]  # as the task `directed` has them


@dataclass(frozen=True)
class ClipMaker:
    """Makes chunks of one split; the unit of work of a process."""

    config: DirectedConfig
    split: Split
    sentences: Sentences
    folder: Path
    cache: Path = DOWNLOADS
    chunk: int = CHUNK

    def chunk_file(self, start: int) -> Path:
        return self.folder / "chunks" / f"{start:06d}.jsonl"

    def __call__(self, start: int) -> int:
        """Writes the clips from `start` on, then their rows; returns how many."""
        rows = []
        for index in range(start, min(start + self.chunk, self.config.clips[self.split])):
            samples, facts = self.clip(index)
            name = f"audio/{index:06d}.flac"
            soundfile.write(self.folder / name, samples, RATE_HZ, format="FLAC", subtype="PCM_16")
            rows.append({"id": f"{self.split}-{index:06d}", "audio": name, **facts})
        file = self.chunk_file(start)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.rename(file)
        return len(rows)

    def clip(self, index: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The samples of clip `index`, int16 at 16 kHz, and its facts."""
        rng = self._rng("clip", index)
        said, acoustics = self.plan[index], self.config.acoustics
        manner = {
            "directed": acoustics.directed, "to_person": acoustics.to_person, "background": acoustics.background
        }[said.manner]  # fmt: skip
        voice = self._voice(rng)
        effort = float(rng.normal(*manner.effort_db))
        rate = float(np.clip(rng.normal(*manner.rate), 0.7, 1.35))
        pitch = float(np.clip(rng.normal(*manner.pitch), 0.85, 1.2))
        line, speech = self._speech(said, voice, rate, pitch, effort, rng)
        if said.manner == "background":
            speech = self._played(speech, rng)
        room = self.rooms[int(rng.integers(len(self.rooms)))]
        median, spread = manner.distance_m
        mouth, distance = place(room, float(np.clip(median * np.exp(rng.normal(0, spread)), 0.3, 7.0)), rng)
        facing = float(np.clip(abs(rng.normal(*manner.facing_deg)), 0, 180))
        response = impulse_response(room, mouth, facing, rng)
        speech = heard(speech, response * 10 ** ((acoustics.level_dbfs - LEVEL_DBFS) / 20))
        level = 10 * np.log10(speech_power(speech))
        speech = self._padded(speech, rng)
        kinds, shares = list(acoustics.noises), list(acoustics.noises.values())
        kind = str(rng.choice(kinds, p=shares))
        noise_level = float(np.clip(rng.normal(*acoustics.noise_dbfs), *acoustics.noise_range_dbfs))
        mixed = speech + self._noise(kind, len(speech), rng) * 10 ** (noise_level / 20)
        samples = np.round(np.clip(mixed, -1, 1) * 32767).astype(np.int16)
        return samples, {
            "text": line.text,
            "directed": said.manner == "directed",
            "kind": said.kind,
            "words": said.words,
            "speaker": voice.name,
            "voice": f"{voice.engine}.{voice.base}",
            "source": line.source,
            "distance_m": round(distance, 2),
            "facing_deg": round(facing, 1),
            "effort_db": round(effort, 2),
            "rate": round(rate, 3),
            "room": room.name,
            "rt60_s": round(room.decay_s, 3),
            "drr_db": round(direct_to_reverberant_db(response), 1),
            "noise": kind,
            "level_dbfs": round(float(level), 1),
            "snr_db": round(float(level) - noise_level, 1),
            "seconds": round(len(samples) / RATE_HZ, 3),
            "samples_sha256": hashlib.sha256(samples.tobytes()).hexdigest()[:16],
        }

    @cached_property
    def plan(self) -> list[Said]:
        """What each clip of the split is: the shares of the configuration, as exactly as whole clips allow, mixed."""
        rules, total = self.config.sentences, self.config.clips[self.split]
        num_directed = round(total * self.config.directed_share)
        directed = {
            Said("directed", "command", "command"): 1 - rules.chat,
            Said("directed", "dialogue", "command"): rules.chat,
        }
        others = {
            Said("to_person", "command", "to_person"): rules.literal,
            Said("to_person", "addressed", "to_person"): rules.addressed,
            Said("to_person", "dialogue", "dialogue"): rules.dialogue,
            Said("background", "command", "background"): rules.background * rules.background_commands,
            Said("background", "dialogue", "background"): rules.background * (1 - rules.background_commands),
        }
        planned = [*_shared(num_directed, directed), *_shared(total - num_directed, others)]
        return [planned[int(number)] for number in self._rng("plan").permutation(total)]

    @cached_property
    def rooms(self) -> list[Room]:
        acoustics = self.config.acoustics
        return [
            draw_room(f"{self.split}-{number:02d}", acoustics.decay_s, self._rng("room", number))
            for number in range(acoustics.rooms[self.split])
        ]

    @cached_property
    def _speakers(self) -> list[list[list[Voice]]]:
        """By engine, then by base."""
        engines: dict[str, dict[str, list[Voice]]] = {}
        for voice in self.config.speakers(self.split):
            engines.setdefault(voice.engine, {}).setdefault(voice.base, []).append(voice)
        return [list(bases.values()) for bases in engines.values()]

    def _voice(self, rng: np.random.Generator) -> Voice:
        """An engine, a base of it, a warp of that, each as likely as the others."""
        bases = self._speakers[int(rng.integers(len(self._speakers)))]
        warps = bases[int(rng.integers(len(bases)))]
        return warps[int(rng.integers(len(warps)))]

    def _speech(
        self, said: Said, voice: Voice, rate: float, pitch: float, effort: float, rng: np.random.Generator
    ) -> tuple[Line, np.ndarray]:
        """A line, and how it is spoken. What is too long for a clip is drawn again: raises ValueError if all are."""
        longest = self.config.length_s[1] - 2 * self.config.acoustics.pause_s[0] - _TAIL_S
        lines = self.sentences.dialogue if said.words == "dialogue" else self.sentences.commands
        for _ in range(_TRIES):
            line = lines[int(rng.integers(len(lines)))]
            if said.words == "addressed":
                line = Line(self.sentences.addressed(line.text, rng), line.source)
            speech = say(spoken_form(line.text), voice, rate, pitch, effort, self.cache)
            if len(speech) <= longest * RATE_HZ:
                return line, speech
        raise ValueError(f"{voice.name} takes over {longest:.1f} s for each of {_TRIES} lines; raise length_s")

    def _played(self, speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """As a television plays it, with music under it or not; as loud as the speech was."""
        level = np.sqrt(speech_power(speech))
        if rng.random() < self.config.acoustics.background_music:
            speech = speech + noise("music", len(speech), rng) * level * 10 ** (rng.uniform(-18, -8) / 20)
        low, high = (float(rng.uniform(*edge)) for edge in self.config.acoustics.loudspeaker_hz)
        played = loudspeaker(speech, low, high)
        return played * level / np.sqrt(speech_power(played))

    def _padded(self, speech: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """With silence before and behind, which noise will fill; within the lengths of a clip.

        The room's tail is cut where a clip ends.
        """
        shortest, longest = (int(length * RATE_HZ) for length in self.config.length_s)
        before, behind = (int(rng.uniform(*self.config.acoustics.pause_s) * RATE_HZ) for _ in range(2))
        before += max(0, shortest - before - len(speech) - behind) // 2
        length = min(max(before + len(speech) + behind, shortest), longest)
        before = min(before, max(length - len(speech), int(self.config.acoustics.pause_s[0] * RATE_HZ)))
        clip = np.zeros(length, np.float32)
        part = speech[: length - before]
        clip[before : before + len(part)] = part
        return clip

    def _noise(self, kind: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        if kind != "babble":
            return noise(kind, num_samples, rng)
        babble = self._babbles[int(rng.integers(len(self._babbles)))]
        start = int(rng.integers(len(babble)))
        return np.roll(babble, -start)[:num_samples]

    @property
    def _babbles(self) -> list[np.ndarray]:
        """Several people of the split who speak at once, with a mean power of 1; the same in every process."""
        key = self.config.sha256, self.split
        if key not in _babbles:
            _babbles[key] = [self._babble(self._rng("babble", number)) for number in range(_NUM_BABBLES)]
        return _babbles[key]

    def _babble(self, rng: np.random.Generator) -> np.ndarray:
        mixed = np.zeros(_BABBLE_S * RATE_HZ, np.float32)
        for _ in range(_NUM_BABBLERS):
            voice, spoken = self._voice(rng), [np.zeros(0, np.float32)]
            while sum(map(len, spoken)) < len(mixed):
                line = self.sentences.dialogue[int(rng.integers(len(self.sentences.dialogue)))]
                spoken.append(say(spoken_form(line.text), voice, cache_folder=self.cache))
            mixed += np.concatenate(spoken)[: len(mixed)]
        return mixed / np.sqrt(np.mean(mixed**2))

    def _rng(self, what: str, number: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, zlib.crc32(f"{what}/{self.split}".encode()), number])


def _shared(total: int, shares: dict[Said, float]) -> Sequence[Said]:
    """`total` of them in these shares, which add up to 1; what is left over by rounding goes to the largest parts."""
    counts = {said: int(total * share) for said, share in shares.items()}
    missing = total - sum(counts.values())
    for said in sorted(shares, key=lambda one: counts[one] - total * shares[one])[:missing]:
        counts[said] += 1
    return [said for said, count in counts.items() for _ in range(count)]
