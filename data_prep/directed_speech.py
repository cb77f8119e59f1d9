"""Makes a corpus of device-directed speech: python data_prep/directed_speech.py [--out FOLDER] [--check] [--page HTML]

Is somebody talking to the device? Commands are said to it by synthetic voices in simulated rooms; the same commands and
other lines are said to people in the room, or come from a television. What is said tells something, how it sounds tells
something, and neither is enough: configs/directed_speech.yaml holds the strength of every cue, docs/directed_speech.md
explains them. The split `real` is a slice of human recordings, for testing alone.

The clips are a function of the configuration and of the packages' versions; a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.directed_clips import ClipMaker
from data_prep.directed_config import CONFIG, SPLITS, VERSION, DirectedConfig, load_directed
from data_prep.directed_real import write_real
from data_prep.directed_sentences import load_sentences
from data_prep.engines import num_cores, run_local
from data_prep.journal import locked
from data_prep.packages import DOWNLOADS, ROOT, PackageError
from data_prep.progress import Progress
from data_prep.voices import prepare

OUT = ROOT / ".cache" / "directed_speech"
ROWS = "directed.jsonl"

_PACKAGES = ("hibari-tts", "espeakng-loader", "onnxruntime", "hassil", "home-assistant-intents", "numpy", "soxr")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if all splits are there, made with this configuration, and the check passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/directed_speech.yaml")
    parser.add_argument("--out", type=Path, default=OUT, help="default: .cache/directed_speech")
    parser.add_argument("--clips", type=int, metavar="N", help="at most so many clips of a split, for a try")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: one for each core)")
    parser.add_argument("--check", action="store_true", help="how far simple classifiers come by text, sound and both")
    parser.add_argument("--page", type=Path, metavar="HTML", help="write a page to listen to")
    parser.add_argument("--cache", type=Path, default=DOWNLOADS, help="where packages are kept")
    args = parser.parse_args(arguments)
    try:
        config = load_directed(args.config)
        if args.clips is not None:
            clips = {split: min(args.clips, count) for split, count in config.clips.items()}
            config = config.model_copy(update={"clips": clips})
        make(config, args.out, args.workers, args.cache)
        if args.check:
            from data_prep.directed_check import check, report

            print(report(check(args.out)))
        if args.page is not None:
            from data_prep.directed_page import page

            args.page.parent.mkdir(parents=True, exist_ok=True)
            args.page.write_text(page(args.out, config), encoding="utf-8")
            print(f"{args.page}: {args.page.stat().st_size / 1e6:.1f} MB")
    except (PackageError, ValueError, OSError) as error:
        print(f"directed_speech: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("directed_speech: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def make(config: DirectedConfig, out: Path, num_workers: int = 1, cache: Path = DOWNLOADS) -> dict[str, Any]:
    """Writes OUT/SPLIT/directed.jsonl and OUT/SPLIT/audio/*.flac for each split and `real`; returns OUT/manifest.json.

    What is there of the same configuration is left as it is. Raises PackageError, and ValueError for a folder that was
    made with another configuration, or is being made.
    """
    with locked(out):
        return _make(config, out, num_workers, cache)


def _make(config: DirectedConfig, out: Path, num_workers: int, cache: Path) -> dict[str, Any]:
    manifest_file = out / "manifest.json"
    begun = out / "begun.json"  # what an unfinished corpus is made with
    about = {"version": VERSION, "config_sha256": config.sha256, "packages": _versions()}
    for file in (manifest_file, begun):
        before = json.loads(file.read_text()) if file.exists() else about
        if differs := [name for name in about if before.get(name) != about[name]]:
            raise ValueError(f"{out} was made with other {', '.join(differs)}; remove it or choose another --out")
    if manifest_file.exists():
        manifest: dict[str, Any] = json.loads(manifest_file.read_text())
        print(f"{out} is there: " + ", ".join(f"{name} {one['clips']:,}" for name, one in manifest["splits"].items()))
        return manifest
    prepare([voice for split in SPLITS for voice in config.speakers(split)], cache)
    sentences = load_sentences(config, cache)
    begun.write_text(json.dumps(about))
    splits: dict[str, Any] = {}
    for split in SPLITS:
        start = time.monotonic()
        splits[split] = make_split(ClipMaker(config, split, sentences[split], out / split, cache), num_workers)
        print(f"{out / split}: {splits[split]['clips']:,} clips, {time.monotonic() - start:.0f} s", flush=True)
    splits["real"] = _summary(write_real(out / "real", cache))
    print(f"{out / 'real'}: {splits['real']['clips']:,} clips of human voices, {splits['real']['directed']} directed")
    manifest = {**about, "splits": splits}
    manifest_file.write_text(json.dumps(manifest, indent=1) + "\n")
    begun.unlink()
    return manifest


def _versions() -> dict[str, str]:
    """Of the packages that what is said and how it sounds depend on; Debian's and data are pinned by hash anyway."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise PackageError(
                f"the package {name} is missing: pip install -c constraints.txt -e '.[speech]'"
            ) from None
    return found


def make_split(maker: ClipMaker, num_workers: int) -> dict[str, Any]:
    """Makes the clips that are missing, a chunk at a time, then the list of all."""
    total = maker.config.clips[maker.split]
    (maker.folder / "audio").mkdir(parents=True, exist_ok=True)
    starts = range(0, total, maker.chunk)
    left = [start for start in starts if not maker.chunk_file(start).exists()]
    progress, done = Progress("clips", maker.split), total - len(left) * maker.chunk
    progress.add(share=max(done, 0) / total)
    for count in run_local(maker, left, num_workers):
        done += count
        progress.add(count, share=done / total)
    text = "".join(maker.chunk_file(start).read_text(encoding="utf-8") for start in starts)
    rows = maker.folder / ROWS
    rows.write_text(text, encoding="utf-8")
    return _summary(rows)


def _summary(rows: Path) -> dict[str, Any]:
    """The rows hold a hash of each clip's samples, so their hash stands for the split."""
    data = rows.read_bytes()
    found = [json.loads(line) for line in data.splitlines()]
    return {
        "clips": len(found),
        "directed": sum(row["directed"] for row in found),
        "seconds": round(sum(row["seconds"] for row in found), 1),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


if __name__ == "__main__":
    # By its full name: the processes that share the work import what they run.
    from data_prep import directed_speech as module

    sys.exit(module.main())
