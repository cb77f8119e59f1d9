"""Human recordings for the corpus of device-directed speech: a small split `real`, for testing alone.

| what | licence | spoken to a device |
|---|---|---|
| prompts of the Asterisk telephone exchange, one studio voice | CC-BY-SA-3.0 | no: a machine's announcements |
| LibriVox: sentences of a novel that is read aloud | public domain | no |
| PocketSphinx's own tests: a robot is told to move, cards are named to a game | BSD-2-Clause | yes |

Nothing is added to them, neither room nor noise. The recordings are fetched and are not kept in this repository. Few
are directed, and the two classes were recorded by different people in different places: read their scores apart, as
what a model makes of real voices, not as an error rate of the task.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from data_prep.directed_sentences import plain
from data_prep.open_data import POCKETSPHINX
from data_prep.packages import DOWNLOADS, Package, fetch_debian
from data_prep.rooms import RATE_HZ
from data_prep.voices import speech_power
from mmchat.conversation import Record
from mmchat.sources import read_source
from mmchat.sources.files import Files

ASTERISK = Package(
    "debian",
    "asterisk-core-sounds-en-wav",
    "1.6.1-1",
    "asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "CC-BY-SA-3.0",
)

# What is said in each, heard by Whisper and compared with the names of the files.
ANNOUNCEMENTS = {
    "agent-loginok": "agent logged in",
    "all-circuits-busy-now": "all circuits are busy now",
    "cannot-complete-as-dialed": "your call cannot be completed as dialed",
    "check-number-dial-again": "please check the number and dial again",
    "conf-noempty": "no empty conferences currently exist",
    "conf-invalid": "that is not a valid conference number please try again",
    "conf-kicked": "you have been kicked from this conference",
    "conf-muted": "you are now muted",
    "conf-onlyperson": "you are currently the only person in this conference",
    "conf-unmuted": "you are now unmuted",
    "do-not-disturb": "do not disturb",
    "dir-nomore": "there are no more compatible entries in the directory",
    "enter-num-blacklist": "please enter the number to be blacklisted",
    "feature-not-avail-line": "that feature is not available on this line",
    "from-unknown-caller": "from an unknown caller",
    "hello-world": "hello world",
    "im-sorry": "i'm sorry",
    "info-about-last-call": "information about your last call",
    "number-not-answering": "the number is not answering",
    "one-moment-please": "one moment please",
    "please-try-again": "please try again",
    "please-try-call-later": "please try your call again later",
    "pls-hold-while-try": "please hold while we try to connect you",
    "queue-thankyou": "thank you for your patience",
    "simul-call-limit-reached": "simultaneous call limit reached",
    "something-terribly-wrong": "something is terribly wrong",
    "speed-dial": "speed dial",
    "to-call-this-number": "to call this number",
    "to-listen-to-it": "to listen to it",
    "transfer": "please hold while i try that extension",
    "tt-weasels": "weasels have eaten our phone system",
    "vm-changeto": "change to which folder",
    "vm-deleted": "message deleted",
    "vm-isonphone": "is on the phone",
    "vm-msgsaved": "your message has been saved",
    "vm-nobodyavail": "nobody is available to take your call at the moment",
    "vm-nomore": "no more messages",
    "vm-sorry": "i'm sorry i did not understand your response",
    "vm-tocancel": "or pound to cancel",
    "vm-tomakecall": "press four to place an outgoing call",
    "vm-toreply": "press one to send a reply",
}


def write_real(folder: Path, cache: Path = DOWNLOADS) -> Path:
    """Writes FOLDER/audio/*.flac and FOLDER/directed.jsonl; returns the latter. Raises PackageError."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (samples, facts) in enumerate(real_clips(cache)):
        name = f"audio/{number:06d}.flac"
        soundfile.write(folder / name, samples, RATE_HZ, format="FLAC", subtype="PCM_16")
        level = 10 * np.log10(speech_power(samples.astype(np.float32) / 32768))
        measured = {
            "level_dbfs": round(float(level), 1),
            "seconds": round(len(samples) / RATE_HZ, 3),
            "samples_sha256": hashlib.sha256(samples.tobytes()).hexdigest()[:16],
        }
        rows.append({"id": f"real-{number:06d}", "audio": name, **facts, **measured})
    file = folder / "directed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def real_clips(cache: Path = DOWNLOADS) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Samples, int16 at 16 kHz, and facts of each. Raises PackageError."""
    sounds = fetch_debian(ASTERISK, cache) / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name, text in ANNOUNCEMENTS.items():
        facts = {"text": text, "directed": False, "kind": "background", "speaker": "asterisk", "voice": "human"}
        facts |= {"source": f"asterisk-core-sounds-en {name}", "licence": ASTERISK.licence}
        yield _read(sounds / f"{name}.wav"), facts
    tests = fetch_debian(POCKETSPHINX, cache) / "usr/share/pocketsphinx/test/data"
    for record in read_source("pocketsphinx", Files(tests), "train"):
        assert isinstance(record, Record)
        if "tidigits" in record.key:  # digits read out for a corpus: to nobody, or to a recogniser
            continue
        is_book = "librivox" in record.key
        facts = {"text": plain(record.facts["text"]), "directed": not is_book}
        facts |= {"kind": "background" if is_book else "command", "voice": "human"}
        facts |= {
            "speaker": f"pocketsphinx {record.key.split('/')[0]}",
            "source": f"pocketsphinx-testdata {record.key}",
        }
        facts |= {"licence": "public domain" if is_book else "BSD-2-Clause"}
        yield _read(record.media[0].read()), facts


def _read(file: Path | bytes) -> np.ndarray:
    """[samples] of one channel, int16 at 16 kHz, a second long at least."""
    samples, rate_hz = soundfile.read(
        io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32", always_2d=True
    )
    samples = soxr.resample(samples.mean(1), rate_hz, RATE_HZ)
    samples = np.pad(samples, (0, max(0, RATE_HZ - len(samples))))
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
