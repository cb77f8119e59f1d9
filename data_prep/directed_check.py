"""How far simple classifiers come on the corpus of device-directed speech: what `directed_speech.py --check` prints.

Text: logistic regression on the words, pairs of words and first words of a sentence. Sound: logistic regression on
sixteen statistics of the samples (level, noise, spectral tilt, how fast sound falls, length) and their squares. Both: a
logistic regression on the two scores, which were made for each training clip by models that had not seen it. All three
learn from `train` and are scored on the other splits. They are there to show that each cue informs and that neither is
enough; a good model of either kind will do better.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_prep.rooms import RATE_HZ
from mmchat.metrics.detection import eer, far_at_frr

_FOLDS = 5
_CUES = ("text", "sound")
_FRAME, _WINDOW = 160, 400  # samples: 10 ms, 25 ms
_BANDS_HZ = (100, 300, 600, 1000, 2000, 3500, 5500, 8000)


@dataclass(frozen=True)
class Split:
    """Rows, what is wanted, [clips], and statistics of the sound, [clips, statistics]."""

    rows: list[dict[str, Any]]
    directed: np.ndarray
    sound: np.ndarray


def check(folder: Path) -> dict[str, dict[str, float]]:
    """Equal error rates of text, sound and both, by split; on `test` also by kind at 10 % false rejects."""
    splits = {name: _read(folder / name) for name in ("train", "val", "test", "real")}
    train = splits["train"]
    vocabulary = _vocabulary([row["text"] for row in train.rows])
    mean, spread = train.sound.mean(0), train.sound.std(0) + 1e-9
    inputs = {
        name: (Words.of([row["text"] for row in one.rows], vocabulary), _squared((one.sound - mean) / spread))
        for name, one in splits.items()
    }
    # Scores of training clips by models of the other folds: in their own they would be too good to weigh by.
    fold = np.arange(len(train.rows)) % _FOLDS
    unseen = np.zeros((len(train.rows), 2))
    for number in range(_FOLDS):
        for place in (0, 1):
            weights = _fit(inputs["train"][place][fold != number], train.directed[fold != number], _PENALTY[place])
            unseen[fold == number, place] = _scores(inputs["train"][place][fold == number], weights)
    models = [_fit(inputs["train"][place], train.directed, _PENALTY[place]) for place in (0, 1)]
    joined = _fit(unseen, train.directed, 1e-3)
    found: dict[str, dict[str, float]] = {}
    for name in ("val", "test", "real"):
        scores = {cue: _scores(inputs[name][number], models[number]) for number, cue in enumerate(_CUES)}
        scores["both"] = _scores(np.stack([scores["text"], scores["sound"]], 1), joined)
        wanted = splits[name].directed
        found[name] = {cue: eer(of_cue[wanted], of_cue[~wanted]) for cue, of_cue in scores.items()}
        if name == "test":
            for cue, of_cue in scores.items():
                found[f"FAR at 10 % FRR, {cue}"] = _by_kind(splits[name], of_cue)
    return found


def report(found: dict[str, dict[str, float]]) -> str:
    """The tables as Markdown, in percent."""
    cues = ("text", "sound", "both")
    kinds = list(found["FAR at 10 % FRR, both"])
    lines = ["| equal error rate, % | text | sound | both |", "|---|---|---|---|"]
    lines += [_line(name, [found[name][cue] for cue in cues]) for name in ("val", "test", "real")]
    lines += ["", f"| test: false accepts at 10 % false rejects, % | {' | '.join(kinds)} |"]
    lines += ["|---|" + "---|" * len(kinds)]
    lines += [_line(cue, [found[f"FAR at 10 % FRR, {cue}"][kind] for kind in kinds]) for cue in cues]
    return "\n".join(lines)


def _line(name: str, values: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"


def _by_kind(split: Split, scores: np.ndarray) -> dict[str, float]:
    """All, then each kind of clip that is not directed, at one threshold: it depends on the directed ones alone."""
    kinds = np.array([row["kind"] + (", same sentences" if row["words"] == "command" else "") for row in split.rows])
    others = sorted(set(kinds[~split.directed]))
    found = {"all": far_at_frr(scores[split.directed], scores[~split.directed])}
    return found | {
        kind: far_at_frr(scores[split.directed], scores[~split.directed & (kinds == kind)]) for kind in others
    }


def _read(folder: Path) -> Split:
    rows = [json.loads(line) for line in (folder / "directed.jsonl").read_text(encoding="utf-8").splitlines()]
    sound = np.stack([statistics(soundfile.read(folder / row["audio"], dtype="float32")[0]) for row in rows])
    return Split(rows, np.array([row["directed"] for row in rows]), sound)


# --- Text


def _features(text: str) -> set[str]:
    words = text.split()
    pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
    return {*words, *pairs, f"^{words[0]}", f"{words[-1]}$", f"#{min(len(words), 9)}"}


def _vocabulary(texts: list[str]) -> dict[str, int]:
    counts = Counter(feature for text in texts for feature in _features(text))
    return {feature: number for number, feature in enumerate(sorted(one for one in counts if counts[one] >= 3))}


@dataclass(frozen=True)
class Words:
    """Which features each text has: a matrix of 0 and 1, [texts, vocabulary], of which only the ones are kept.

    Attributes:
        places: [texts, most ones of a text]; filled up with `size`, which is no feature.
    """

    places: np.ndarray
    size: int

    @classmethod
    def of(cls, texts: list[str], vocabulary: dict[str, int]) -> Words:
        found = [[vocabulary[one] for one in sorted(_features(text)) if one in vocabulary] for text in texts]
        most = max(map(len, found), default=0)
        filled = [[*places, *[len(vocabulary)] * (most - len(places))] for places in found]
        return cls(np.array(filled, int).reshape(len(texts), most), len(vocabulary))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: np.ndarray) -> Words:
        return Words(self.places[chosen], self.size)

    def times(self, weights: np.ndarray) -> np.ndarray:
        """[texts]"""
        return np.append(weights, 0)[self.places].sum(1)

    def transposed_times(self, values: np.ndarray) -> np.ndarray:
        """[vocabulary]"""
        spread = np.repeat(values, self.places.shape[1])
        return np.bincount(self.places.ravel(), spread, self.size + 1)[: self.size]


# --- Sound


def statistics(samples: np.ndarray) -> np.ndarray:
    """[statistics] of a clip: levels in dB, their spread, tilt, fall after loud frames, length."""
    num_frames = max(1, (len(samples) - _WINDOW) // _FRAME + 1)
    padded = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_FRAME][:num_frames]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=1)))
    hz = np.fft.rfftfreq(_WINDOW, 1 / RATE_HZ)
    bands = [power[:, (hz >= low) & (hz < high)].sum(1) for low, high in itertools.pairwise(_BANDS_HZ)]
    levels = 10 * np.log10(np.stack(bands, 1) + 1e-9)  # [frames, bands]
    whole = 10 * np.log10(power.sum(1) + 1e-9)
    loud, floor = np.percentile(whole, 95), np.percentile(whole, 5)
    speech = whole > loud - 15
    falls = whole[8:] - whole[:-8] if len(whole) > 16 else np.zeros(1)  # over 80 ms: reverberation fills the gaps
    return np.array(
        [
            loud,
            floor,
            loud - floor,
            np.percentile(whole, 50) - floor,
            whole.std(),
            *(levels[speech].mean(0) - whole[speech].mean()),
            *np.percentile(falls, [2, 10]),
            speech.mean(),
            len(samples) / RATE_HZ,
        ]
    )


def _squared(values: np.ndarray) -> np.ndarray:
    clipped = np.clip(values, -4, 4)
    return np.concatenate([clipped, clipped**2 / 4], 1)


# --- Logistic regression

_PENALTY = (0.003, 0.001)  # of text, of sound


def _fit(inputs: Words | np.ndarray, wanted: np.ndarray, penalty: float, steps: int = 400) -> np.ndarray:
    """[inputs + 1] weights, the last one the offset: Nesterov's method on the mean log loss with a squared penalty."""
    num_weights = (inputs.size if isinstance(inputs, Words) else inputs.shape[1]) + 1
    weights = ahead = np.zeros(num_weights)
    start, largest = np.random.default_rng(0).standard_normal(num_weights), 1.0
    for _ in range(20):  # the largest curvature, which sets the step
        start = _back(inputs, _scores(inputs, start))
        largest = float(np.linalg.norm(start))
        start = start / largest
    rate = 1 / (0.25 * largest * 1.1 + penalty)
    for step in range(steps):
        likely = 1 / (1 + np.exp(-np.clip(_scores(inputs, ahead), -30, 30)))
        slope = _back(inputs, likely - wanted)
        slope[:-1] += penalty * ahead[:-1]
        before, weights = weights, ahead - rate * slope
        ahead = weights + step / (step + 3) * (weights - before)
    return weights


def _scores(inputs: Words | np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[clips]"""
    products = inputs.times(weights[:-1]) if isinstance(inputs, Words) else inputs @ weights[:-1]
    return products + weights[-1]


def _back(inputs: Words | np.ndarray, values: np.ndarray) -> np.ndarray:
    """[inputs + 1] means over the clips of inputs, and of the offset's 1, times values."""
    products = inputs.transposed_times(values) if isinstance(inputs, Words) else inputs.T @ values
    return np.append(products, values.sum()) / len(values)
