"""A page to listen to the corpus of device-directed speech: `directed_speech.py --page out.html`, one file of its own.

Clips of the test split, some of each kind, and of the human recordings; each with what is said, a spectrogram, and how
it was made. Lines of the game Fish Fillets (GPL-2) and Asterisk's prompts (CC-BY-SA) are left out, so that the page can
be passed on with the project.
"""

from __future__ import annotations

import base64
import html
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data_prep.directed_config import DirectedConfig
from data_prep.rooms import RATE_HZ
from mmchat.html_page import document

_LEFT_OUT = ("fillets-ng", "asterisk-core-sounds-en")
_GAIN_DB = 12.0  # for listening: the corpus has the level of a microphone across a room
_SHOWN_DB = 70.0

# Heading, what a row must have, and how many are shown.
_SECTIONS: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("Commands to the device", "Directed.", {"kind": "command", "words": "command"}, 10),
    ("Other lines to the device", "Directed; the words do not show it.", {"kind": "command", "words": "dialogue"}, 4),
    (
        "The same sentences, to somebody else",
        "Not directed; only the sound can show it.",
        {"kind": "to_person", "words": "command"},
        8,
    ),
    ("Commands to somebody by name", "Not directed.", {"kind": "to_person", "words": "addressed"}, 4),
    ("Talk in the room", "Not directed.", {"kind": "dialogue"}, 7),
    ("Television and radio", "Not directed.", {"kind": "background"}, 6),
)
_REAL: tuple[str, str, dict[str, Any], int] = ("Human recordings", "Of the split real, for testing alone.", {}, 4)


def page(folder: Path, config: DirectedConfig) -> str:
    """The whole HTML, of a finished corpus."""
    manifest = json.loads((folder / "manifest.json").read_text())
    sections = [_section(folder / "test", *section) for section in _SECTIONS] + [_section(folder / "real", *_REAL)]
    counts = ", ".join(
        f"{name} {one['clips']:,} ({one['directed']:,} directed)" for name, one in manifest["splits"].items()
    )
    body = f"""<header><h1>Is somebody talking to the device?</h1>
<p class="muted">Clips: {html.escape(counts)}. Configuration {config.sha256[:16]}. All voices but the last section's are
synthetic, all rooms simulated. Played {_GAIN_DB:.0f} dB louder than they are stored. The spectrograms end at 8 kHz.</p>
</header><main>{"".join(sections)}</main>"""
    return document("Device-directed speech", _STYLE, "", body)


def _section(folder: Path, title: str, about: str, wanted: dict[str, Any], count: int) -> str:
    rows = [json.loads(line) for line in (folder / "directed.jsonl").read_text(encoding="utf-8").splitlines()]
    fitting = [
        row
        for row in rows
        if all(row.get(name) == value for name, value in wanted.items()) and not row["source"].startswith(_LEFT_OUT)
    ]
    # As many different voices as there are, then the order of the split.
    turn: dict[str, int] = {}
    for row in fitting:
        turn[row["speaker"]] = turn.get(row["speaker"], -1) + 1
        row["turn"] = turn[row["speaker"]]
    shown = sorted(fitting, key=lambda row: row["turn"])[:count]
    cards = "".join(_card(folder, row) for row in shown)
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(about)}</p><div class=cards>{cards}</div></section>"


def _card(folder: Path, row: dict[str, Any]) -> str:
    samples, _rate_hz = soundfile.read(folder / row["audio"], dtype="float32")
    played = BytesIO()
    soundfile.write(
        played, np.clip(samples * 10 ** (_GAIN_DB / 20), -1, 1), RATE_HZ, format="MP3", compression_level=0.9
    )
    picture = BytesIO()
    _spectrogram(samples).save(picture, "PNG", optimize=True)
    facts = [row["speaker"]]
    if "room" in row:
        facts += [
            f"{row['distance_m']:g} m away, turned {row['facing_deg']:.0f}°",
            f"effort {row['effort_db']:+.1f} dB, rate {row['rate']:.2f}",
            f"{row['noise']}, SNR {row['snr_db']:.0f} dB",
            f"RT60 {row['rt60_s']:.2f} s, DRR {row['drr_db']:.0f} dB",
        ]
    else:
        facts += [row["source"], row["licence"]]
    answer = "yes" if row["directed"] else "no"
    return f"""<figure class="{answer}"><figcaption><b>{html.escape(row["text"])}</b> <span>{answer}</span></figcaption>
<img alt="spectrogram" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">
<audio controls preload="none" src="data:audio/mpeg;base64,{base64.b64encode(played.getvalue()).decode()}"></audio>
<small>{html.escape(row["id"])}: {html.escape("; ".join(facts))}</small></figure>"""


def _spectrogram(samples: np.ndarray) -> Image.Image:
    """A picture 64 high, low tones at the bottom, 20 ms a column; 16 shades."""
    window = 512
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, (0, window)), window)[:: RATE_HZ // 50]
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(window), axis=1)))[:, :256]
    levels = 10 * np.log10(power.reshape(len(power), 64, 4).mean(-1) + 1e-9).T[::-1]
    shades = ((levels - levels.max() + _SHOWN_DB) / _SHOWN_DB).clip(0, 1)
    return Image.fromarray((shades * 255).astype(np.uint8)).quantize(16)


_STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --text: #1c1e21; --muted: #5d646c; --line: #dfe2e5;
  --yes: #0b6e62; --no: #a8481a }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1e2125; --text: #e8e8e6; --muted: #a0a7af;
  --line: #363b41; --yes: #4fd1bd; --no: #ff9a6b } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin: 1.8rem 0 0 } section p { margin: .2rem 0 .6rem }
.muted, small, section p { color: var(--muted) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .8rem }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  display: grid; gap: .35rem; align-content: start }
figcaption { display: flex; justify-content: space-between; gap: .6rem; overflow-wrap: anywhere }
figcaption span { flex: none } .yes span { color: var(--yes) } .no span { color: var(--no) }
img { width: 100%; height: 80px; image-rendering: pixelated; border-radius: 3px } audio { width: 100%; height: 34px }
small { font-size: .78rem; overflow-wrap: anywhere }
"""
