"""Turns a public format into shards: python data_prep/make_shards.py TASK SOURCE OUT [--split train]"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmchat.conversation import MediaHeader, Modality, Record
from mmchat.data.shard_index import ShardReport
from mmchat.data.shard_writer import write_shards
from mmchat.errors import SampleError
from mmchat.modalities.image import ImageConfig, ImagePreprocess
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.sources import choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if samples were written, 1 if none was or SOURCE or OUT cannot be used."""
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description="Turns a public format into shards: webdataset tars with an index beside each.",
        epilog="The formats of each task are in data_prep/README.md.",
    )
    tasks = sorted(TASKS)
    parser.add_argument("task", choices=tasks, metavar="TASK", help=f"one of: {', '.join(tasks)}")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the annotation file, or the folder it lies in")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; must hold none yet")
    parser.add_argument("--split", default="train", help="which split of a folder (default: %(default)s)")
    parser.add_argument("--format", metavar="NAME", help="format of SOURCE (default: told by its files)")
    parser.add_argument(
        "--media",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder or archive that media paths may be relative to; may be repeated",
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-shard-mb", type=float, default=512, metavar="M", help="default: %(default)s")
    args = parser.parse_args(arguments)

    start = time.monotonic()
    try:
        files = Files(args.source, args.media, args.out / ".work")
        name = choose_source(args.task, files, args.split, args.format)
        records = read_source(name, files, args.split)
        report = write_shards(
            with_progress(phrasable(records, args.task), "samples"),
            args.out,
            args.samples_per_shard,
            int(args.max_shard_mb * 1e6),
            media_header,
        )
    except (ValueError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"make_shards: stopped; {args.out} holds the shards finished so far", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    print(
        f"wrote {report.num_samples:,} samples in {len(report.shards):,} shards, "
        f"{report.num_bytes / 1e6:,.1f} MB, to {args.out} in {seconds:.1f} s "
        f"({report.num_samples / seconds:,.0f} a second)"
    )
    print_problems(report, "skipped")
    if report.num_samples == 0:
        print(f"make_shards: no sample of {args.source} could be written", file=sys.stderr)
        return 1
    return 0


def phrasable(records: Iterable[Record | SampleError], task: str) -> Iterator[Record | SampleError]:
    """The records; one that the task cannot phrase is not worth storing, and comes as the error."""
    for record in records:
        try:
            if isinstance(record, Record):
                TASKS[task].conversation(record, random.Random(0))
            yield record
        except SampleError as error:
            yield error


def media_header(modality: Modality, data: bytes) -> MediaHeader:
    """What a file's header says. Pictures are held to the default limits; a run's own limits come later.

    Raises SampleError.
    """
    if modality == "image":
        return _picture().header(data)
    facts, _ = _sandbox().call(f"{modality}_header", data)
    if facts["duration_s"] <= 0:
        raise SampleError(f"empty {modality}", f"a duration of {facts['duration_s']} s")
    return MediaHeader(**facts)


@cache
def _picture() -> ImagePreprocess:
    # Reading a header asks nothing of the encoder, so it is one that is never looked up.
    config = ImageConfig.model_validate({"encoder": {"kind": "timm", "model": ""}})
    return ImagePreprocess(
        config, ImageSpec(1, (0.0,) * 3, (1.0,) * 3, "bicubic", grid_height=1, grid_width=1, feature_dim=1)
    )


@cache
def _sandbox() -> Sandbox:
    return Sandbox(SandboxLimits())


def with_progress(items: Iterable[T], noun: str, every_s: float = 5.0) -> Iterator[T]:
    """The items; says on stderr how many have passed and how fast."""
    start = said = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - said >= every_s:
            said = now
            print(f"{count:,} {noun}, {count / (now - start):,.0f} a second", file=sys.stderr)


def print_problems(report: ShardReport, verb: str) -> None:
    """Counts by reason, most frequent first, with examples."""
    if report.problems:
        print(f"{verb} {report.problems.total():,}:")
    for reason, count in report.problems.most_common():
        print(f"  {count:,} x {reason}")
        for example in report.examples[reason]:
            print(f"      {example}")


if __name__ == "__main__":
    sys.exit(main())
