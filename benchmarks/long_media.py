"""Hours of sound and video through the decoding child: its peak memory, and the time that it takes.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/long_media.py

Each file has a child of its own, whose peak is what Linux says of it (VmHWM), and is heard or seen by the default
limits with too_long: spread. `idle` is a child that has decoded nothing long. Exits with status 1 above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import av
import numpy as np
import soundfile

from benchmarks.measure import machine, say
from mmchat.modalities.audio import AudioConfig, AudioPreprocess, AudioSpec
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.video import VideoConfig, VideoPreprocess
from tests import odd_media, tiny

LIMIT_MB = 250  # above the size of the file itself
HOURS_8 = odd_media.EIGHT_HOURS_S


@dataclass(frozen=True)
class File:
    """name: of the row; held_mb: what all of it would take as the model's samples or frames."""

    name: str
    modality: str
    held_mb: float
    make: Callable[[], bytes]


def loud_flac() -> bytes:
    """Five minutes of six channels at 96 kHz."""
    out = BytesIO()
    with soundfile.SoundFile(out, "w", 96_000, 6, "PCM_16", format="FLAC") as file:
        for _ in range(30):
            file.write(np.zeros((960_000, 6), np.int16))
    return out.getvalue()


def wave(seconds: int) -> bytes:
    """16-bit WAV at 16 kHz, which takes as many bytes as it has to."""
    out = BytesIO()
    with soundfile.SoundFile(out, "w", 16_000, 1, "PCM_16", format="WAV") as file:
        for _ in range(seconds // 60):
            file.write(np.zeros(960_000, np.int16))
    return out.getvalue()


def files() -> list[File]:
    sound_mb, frame_mb = HOURS_8 * 64e-3, 224 * 224 * 3 / 1e6
    return [
        File("idle: a second of sound", "audio", 0.064, lambda: tiny.tone(440, 1.0)),
        File("eight hours of silence, FLAC, 8 kHz", "audio", sound_mb, lambda: odd_media.silent_flac(HOURS_8)),
        File("eight hours of silence, AAC in MP4", "audio", sound_mb, lambda: odd_media.silent_aac(HOURS_8)),
        File("two hours of silence, WAV", "audio", 2 * 3600 * 64e-3, lambda: wave(2 * 3600)),
        File("five minutes, 6 channels, 96 kHz, FLAC", "audio", 300 * 96e3 * 24 / 1e6, loud_flac),
        File("10,000 frames, MP4", "video", 10_000 * frame_mb, lambda: tiny.clip("left", 10_000, 25)),
        File("eight hours of slides, one a second", "video", HOURS_8 * frame_mb, lambda: odd_media.slides(HOURS_8)),
    ]


def measure(file: File, whisper: Path) -> dict[str, Any]:
    """One row. Peak and size in MB, time in seconds."""
    data = file.make()
    process: AudioPreprocess | VideoPreprocess
    if file.modality == "audio":
        config = AudioConfig.model_validate(
            {"encoder": {"kind": "whisper", "pretrained": str(whisper)}, "too_long": "spread"}
        )
        process = AudioPreprocess(config, AudioSpec(80, 1500, 32))
    else:
        spec = ImageSpec(224, (0.0,) * 3, (1.0,) * 3, "bicubic", 16, 16, 8)
        process = VideoPreprocess(VideoConfig(too_long="spread"), spec)
    process.sandbox.call("allocate", b"", size=1)  # starts the child
    started = time.monotonic()
    plan = process.plan(process.header(data))
    header_s = time.monotonic() - started
    process(data, plan)
    decode_s = time.monotonic() - started - header_s
    child = process.sandbox._child
    assert child is not None
    status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    peak_mb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
    process.sandbox.close()
    return {
        "file": file.name,
        "file_mb": len(data) / 1e6,
        "held_mb": file.held_mb,
        "peak_mb": peak_mb,
        "header_s": header_s,
        "decode_s": decode_s,
        "excerpts": [str(one) for one in plan.excerpts],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_media_cpu.json")
    arguments = parser.parse_args()
    whisper = tiny.FOLDER / "whisper"
    if not (whisper / "config.json").exists():
        tiny.build_whisper(whisper)
    rows = []
    say(f"{'file':<42}{'size MB':>9}{'held MB':>10}{'peak MB':>9}{'header s':>10}{'decode s':>10}")
    for file in files():
        rows.append(row := measure(file, whisper))
        numbers = (row["file_mb"], row["held_mb"], row["peak_mb"])
        say(
            f"{file.name:<42}{numbers[0]:>9.1f}{numbers[1]:>10,.0f}{numbers[2]:>9.0f}"
            f"{row['header_s']:>10.2f}{row['decode_s']:>10.2f}"
        )
        for excerpt in row["excerpts"]:
            say(f"    {excerpt}")
    high = [row["file"] for row in rows if row["peak_mb"] - row["file_mb"] > LIMIT_MB]
    result = {"command": shlex.join(["python", *sys.argv]), "machine": machine(av, soundfile), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if high:
        say(f"above {LIMIT_MB} MB besides the file: {', '.join(high)}")
    return 1 if high else 0


if __name__ == "__main__":
    sys.exit(main())
