"""Turns a public format into shards: python data_prep/make_shards.py TASK SOURCE OUT [--split train]"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import itertools
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.engines import num_cores, run_local, run_on_ray
from data_prep.journal import Journal, ShardLine, asked_before, locked
from data_prep.progress import Progress
from mmchat.conversation import MediaHeader, Modality, Record, Region
from mmchat.data.shard_index import ShardReport
from mmchat.data.shard_writer import Chunk, cut_chunks, shard_path, write_shard
from mmchat.data.shards import FORMAT, Shard
from mmchat.errors import SampleError
from mmchat.modalities.image import ImageConfig, ImagePreprocess
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.regions import check_region
from mmchat.sources import SOURCES, choose_source, read_source
from mmchat.sources.files import Files
from mmchat.tasks import TASKS

DESCRIPTION = """\
Turns a public format into shards: webdataset tars with an index beside each. Archives are read where they lie.
A run that was stopped, even by a kill or a full disk, is continued by the same command: what is finished stays.
Neither workers nor engine nor interruptions change a byte of OUT. OUT/report.json says what was written and skipped.
"""
EXIT_STATUS = "Exit status: 0 samples were written, 1 none was or something cannot be used, 130 stopped."


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: see EXIT_STATUS."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser(next((word for word in arguments if word in TASKS), None)).parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what UTF-8 cannot
    terminated = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return make_shards(args)
    except OSError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"make_shards: {args.out} is full; make room and run the same command again", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"make_shards: stopped; {args.out} holds whole shards only. Run the same command again to continue",
            file=sys.stderr,
        )
        return 130
    finally:
        signal.signal(signal.SIGTERM, terminated)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser(task: str | None) -> argparse.ArgumentParser:
    """Its help tells the formats of one task, or of all."""
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description=DESCRIPTION,
        epilog=f"{formats_text([task] if task else sorted(TASKS))}\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=sorted(TASKS), metavar="TASK", help="make_shards.py TASK --help: its formats")
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="the annotation file, the folder it lies in, or an archive"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards; empty, or of the same command")
    parser.add_argument("--split", type=word, default="train", help="which split of a folder (default: %(default)s)")
    parser.add_argument("--format", metavar="NAME", help="format of SOURCE (default: told by its files)")
    parser.add_argument(
        "--media",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder or archive that media paths may be relative to; may be repeated",
    )
    parser.add_argument(
        "--set",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the format; may be repeated",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N records of SOURCE, for a try")
    parser.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument("--max-shard-mb", type=megabytes, default=512, metavar="M", help="default: %(default)s")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="shards under way at a time (default: one for each core)"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="processes of this machine, or a Ray cluster"
    )
    parser.add_argument(
        "--ray-address", metavar="A", help="a running cluster, such as auto or 10.0.0.1:6379 (default: start one here)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="hash finished shards before they are trusted, not only their size"
    )
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number above 0, found {text!r}")
    return int(text)


def megabytes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found * 1e6 >= 1):
        raise argparse.ArgumentTypeError(f"wanted a number of megabytes above 0, found {text!r}")
    return found


def word(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("wanted a name, found nothing")
    return text


def option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"wanted NAME=VALUE, found {text!r}")
    return name, value


def formats_text(tasks: Sequence[str]) -> str:
    """The formats of each task, with the files that tell them and their options."""
    lines = ["formats (files that tell them; then options for --set):"]
    for task in tasks:
        lines.append(f"  {task}")
        for name, source in SOURCES.items():
            if task in source.tasks:
                lines.append(f"    {name}: {', '.join(source.marks)}")
                lines += [f"      {option}: {text}" for option, text in source.options.items()]
    return "\n".join(lines)


def make_shards(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises ValueError, OSError or KeyboardInterrupt; what is finished then stays."""
    if args.ray_address and args.engine != "ray":
        raise ValueError("--ray-address needs --engine ray")
    if args.out.resolve() in (args.source.resolve(), args.source.resolve().parent):
        raise ValueError(f"OUT {args.out} is where SOURCE lies; name a folder of its own")
    # Absolute: workers on other machines have another working directory.
    source, out = Path(os.path.abspath(args.source)), Path(os.path.abspath(args.out))
    media = [Path(os.path.abspath(path)) for path in args.media]
    work = out / ".work"
    files = Files(source, media, work)
    was_there = out.exists()
    with locked(out):
        for path in work.glob("*.partial"):
            path.unlink()
        try:
            report = _make_shards(args, files, source, media, out)
        except ValueError:  # a damaged archive will be replaced; after a kill or a full disk the copies are of use
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                if not was_there:
                    out.rmdir()  # only where nothing was begun
            raise
        shutil.rmtree(work, ignore_errors=True)
    print(
        f"{args.out} holds {report.num_samples:,} samples in {len(report.shards):,} shards, "
        f"{report.num_bytes / 1e6:,.1f} MB"
    )
    print_problems(report, "skipped")
    if report.num_samples == 0:
        print(f"make_shards: no sample of {args.source} could be written", file=sys.stderr)
        return 1
    return 0


def _make_shards(args: argparse.Namespace, files: Files, source: Path, media: list[Path], out: Path) -> ShardReport:
    """What OUT holds in the end."""
    options = dict(args.set)
    asked = {
        "task": args.task,
        "source": str(source),
        "source_bytes": source.stat().st_size if source.is_file() else None,
        "format": None,
        "split": args.split,
        "set": options,
        "media": [str(path) for path in media],
        "limit": args.limit,
        "samples_per_shard": args.samples_per_shard,
        "max_shard_mb": args.max_shard_mb,
        "shard_format": FORMAT,
    }
    name = asked_before(out).get("format")
    if asked | {"format": name} != asked_before(out) or args.format not in (None, name):
        name = choose_source(args.task, files, args.split, args.format)
    others = [key for key, source in SOURCES.items() if args.task in source.tasks and key != name]
    print(f"format {name}; task {args.task} also has: {', '.join(others) or 'no other'}")
    start = time.monotonic()
    with Journal(out, asked | {"format": name}, args.verify) as journal:
        if journal.num_found:
            print(f"{args.out} has {journal.num_found:,} finished shards of this command")
        if journal.is_finished:
            print(f"finished before; SOURCE was not read again (remove {args.out} to make it anew)")
            return journal.report()
        samples = itertools.islice(read_source(name, files, args.split, options), args.limit)
        chunks = cut_chunks(samples, args.samples_per_shard, int(args.max_shard_mb * 1e6))
        progress = Progress("samples")
        shares: dict[int, float | None] = {}
        left = journal.left(_with_shares(chunks, files, shares, progress))
        maker = ShardMaker(args.task, out)
        if args.engine == "ray":
            seen = [source, *media, journal.path]
            lines = run_on_ray(maker, left, args.workers, args.ray_address, seen)
        else:
            lines = run_local(maker, left, args.workers or num_cores())
        with contextlib.closing(lines):  # no worker is left when the journal cleans up
            for line in lines:
                journal.add(line)
                progress.add(line.num_samples, line.num_bytes, shares.pop(line.number))
        journal.finish()
        made = sum(line.num_samples for line in journal.added)
        seconds = time.monotonic() - start
        print(f"made {made:,} samples in {seconds:.1f} s ({made / seconds:,.0f} a second)")
        return journal.report()


def _with_shares(
    chunks: Iterator[Chunk], files: Files, shares: dict[int, float | None], progress: Progress
) -> Iterator[Chunk]:
    """The chunks; notes for each how much of the source had been read.

    That is known while one file of rows is read. A source of several files would begin anew with each, so a share that
    falls ends it for good, and with it the time left.
    """
    last: float | None = 0.0
    for chunk in chunks:
        share = files.share_read
        last = share if share is not None and last is not None and share >= last else None
        shares[chunk.number] = last
        progress.add(share=last if not progress.num else None)
        yield chunk


@dataclass(frozen=True)
class ShardMaker:
    """Makes one shard of one chunk; the unit of work of every engine."""

    task: str
    out: Path

    def __call__(self, chunk: Chunk) -> ShardLine:
        path = shard_path(self.out, chunk.number)
        report = chunk.skipped
        report.merge(write_shard(path, chunk.records, media_header, self._check))
        return ShardLine(
            chunk.number,
            chunk.digest,
            report.num_samples,
            report.num_bytes,
            Shard(path).sha256 if report.num_samples else None,
            dict(report.problems),
            report.examples,
        )

    def _check(self, record: Record) -> None:
        """Raises SampleError where the task cannot phrase the record, or names a place outside of a picture."""
        try:
            conversation = TASKS[self.task].conversation(record, random.Random(0))
            media = conversation.media
            for part in (part for turn in conversation.turns for part in turn.parts if isinstance(part, Region)):
                header = media[part.media].header
                if header is not None and header.width is not None and header.height is not None:
                    check_region(part, header.width, header.height)
        except SampleError as error:
            detail = error.detail if error.detail.startswith(record.key) else f"{record.key}: {error.detail}"
            raise SampleError(error.reason, detail) from error
        except Exception as error:  # would stop a training run, which is worse
            raise SampleError("task failed", f"{record.key}: {type(error).__name__}: {error}") from error


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


def print_problems(report: ShardReport, verb: str) -> None:
    """Counts by reason, most frequent first, with examples."""
    if report.problems:
        print(f"{verb} {report.problems.total():,}:")
    for reason, count in report.problems.most_common():
        print(f"  {count:,} x {reason}")
        for example in report.examples[reason]:
            print(f"      {example}")


if __name__ == "__main__":
    # By its full name: the workers of a cluster import what they run.
    from data_prep import make_shards as module

    sys.exit(module.main())
