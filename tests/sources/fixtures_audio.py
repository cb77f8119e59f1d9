"""Small LibriSpeech, Speech Commands, SLURP, AudioCaps and Clotho folders in the published layouts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from tests import tiny
from tests.sources.fixture import Fixture, Fixtures


def flac(hz: float, duration_s: float) -> bytes:
    out = io.BytesIO()
    samples = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(16000 * duration_s)) / 16000)
    soundfile.write(out, samples.astype(np.float32), 16000, format="FLAC")
    return out.getvalue()


def librispeech(folder: Path) -> Fixture:
    """Two speakers; one utterance's recording is cut short, and one line of a transcript has no recording."""
    for speaker, chapter, count in (("84", "121123", 3), ("174", "50561", 2)):
        where = folder / "LibriSpeech" / "dev-clean" / speaker / chapter
        where.mkdir(parents=True)
        lines = []
        for i in range(count):
            key = f"{speaker}-{chapter}-{i:04d}"
            lines.append(f"{key} THE TONE'S NUMBER {['ZERO', 'ONE', 'TWO'][i]}")
            (where / f"{key}.flac").write_bytes(flac(200 + 100 * i, 0.4))
        (where / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    cut = folder / "LibriSpeech/dev-clean/174/50561/174-50561-0001.flac"
    cut.write_bytes(cut.read_bytes()[:20])
    with open(folder / "LibriSpeech/dev-clean/84/121123/84-121123.trans.txt", "a") as file:
        file.write("84-121123-0003 NOBODY RECORDED THIS\n")
    (folder / "LibriSpeech/SPEAKERS.TXT").write_text("; ID |SEX| SUBSET |MINUTES| NAME\n84 | F | dev-clean | 8 | A\n")
    skipped = {"undecodable audio": 1, "missing media": 1}
    return Fixture("transcribe", folder, 4, skipped, "dev-clean")


def speech_commands(folder: Path) -> Fixture:
    """Packed as it is published, in a .tar.gz with names that start with ./; one speaker breaks into training."""
    names = {
        "yes/0a7c2a8d_nohash_0.wav": "train",
        "no/0a7c2a8d_nohash_0.wav": "train",
        "yes/1b4c9b89_nohash_1.wav": "train",
        "yes/ffa1b2c3_nohash_0.wav": "validation",
        "no/004ae714_nohash_0.wav": "testing",
        "go/004ae714_nohash_1.wav": "train",  # its speaker is in the test list
        "_background_noise_/running_tap.wav": "",
    }
    members = {name: tiny.tone(300 + 40 * i, 1.0) for i, name in enumerate(names)}
    for part in ("validation", "testing"):
        members[f"{part}_list.txt"] = "".join(f"{name}\n" for name in names if names[name] == part).encode()
    archive = folder / "speech_commands_v0.02.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Fixture("transcribe", archive, 3, {"speaker of another split": 1})


def slurp(folder: Path) -> Fixture:
    """Sentences with one and two recordings; the recordings lie in a tar of their own."""
    rows = [
        {"slurp_id": 13804, "sentence": "turn up the volume", "intent": "audio_volume_up", "action": "volume_up",
         "scenario": "audio", "sentence_annotation": "turn up the volume", "tokens": [], "entities": [],
         "recordings": [{"file": "audio-1501754435-headset.flac", "wer": 0.0, "ent_wer": 0.0, "status": "correct"},
                        {"file": "audio-1501754435.flac", "wer": 0.1, "ent_wer": 0.0, "status": "correct"}]},
        {"slurp_id": 9, "sentence": "what time is it", "intent": "datetime_query", "action": "query",
         "scenario": "datetime", "sentence_annotation": "what time is it", "tokens": [], "entities": [],
         "recordings": [{"file": "audio-1490.flac", "wer": 0.0, "ent_wer": 0.0, "status": "correct"}]},
        {"slurp_id": 10, "sentence": "call my mother", "intent": "x", "recordings": [{"file": "audio-none.flac"}]},
        {"slurp_id": 11, "recordings": []},
    ]  # fmt: skip
    (folder / "dataset/slurp").mkdir(parents=True)
    (folder / "dataset/slurp/devel.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "slurp_real.tar.gz", "w:gz") as tar:
        for row in rows[:2]:
            for recording in row["recordings"]:
                data = flac(440, 0.5)
                info = tarfile.TarInfo(f"slurp_real/{recording['file']}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    options = ("--media", str(folder / "slurp_real.tar.gz"))
    return Fixture("transcribe", folder, 3, {"missing media": 1, "unreadable row": 1}, "dev", options)


def audiocaps(folder: Path) -> Fixture:
    """Two captions of one clip, quotes and commas in captions, a clip that is gone, a row that lost its caption."""
    (folder / "val").mkdir()
    rows = [
        "audiocap_id,youtube_id,start_time,caption",
        '97151,vfY_TJq7n_U,130,"Rustling, then ""quacking"""',
        "97152,vfY_TJq7n_U,130,Ducks quack",
        "103541,tdWhHV3X25Q,60,A man speaks",
        "103548,tw76HGONaKg,570,A siren",
        "104000,gone0000000,30,Nobody has this clip any more",
        "104001,tw76HGONaKg,,",
    ]
    (folder / "val.csv").write_text("\n".join(rows) + "\n")
    for name in ("vfY_TJq7n_U", "Ytw76HGONaKg_570", "103541"):
        (folder / "val" / f"{name}.wav").write_bytes(tiny.tone(500, 0.4))
    return Fixture("caption", folder, 3, {"missing media": 1, "unreadable row": 1}, "val")


def clotho(folder: Path) -> Fixture:
    """File names with spaces and commas, as Clotho has; one row lacks its last caption."""
    (folder / "evaluation").mkdir()
    lines = ["file_name,caption_1,caption_2,caption_3,caption_4,caption_5"]
    for i, name in enumerate(["Rain, then sun.wav", "a b (2).wav", "Tür.wav"]):
        (folder / "evaluation" / name).write_bytes(tiny.tone(300 + i, 0.4))
        lines.append(f'"{name}",One {i},Two,Three,"Four, and more",Five')
    lines.append("short.wav,One,Two,Three,Four,")
    (folder / "clotho_captions_evaluation.csv").write_text("\n".join(lines) + "\n")
    return Fixture("caption", folder, 3, {"unreadable row": 1}, "test")


FIXTURES: Fixtures = {
    "librispeech": librispeech,
    "speech_commands": speech_commands,
    "slurp": slurp,
    "audiocaps": audiocaps,
    "clotho": clotho,
}
