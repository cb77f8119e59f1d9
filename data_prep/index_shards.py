"""Makes the index of webdataset shards: python data_prep/index_shards.py 'foreign/{000000..000012}.tar'"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.engines import num_cores, run_local
from data_prep.make_shards import media_header, option, positive, print_problems
from data_prep.progress import Progress
from mmchat.data.energon import FOLDER, EnergonDataset
from mmchat.data.foreign import AsFormat, Classes, Reading
from mmchat.data.shard_index import ShardReport, index_shard, is_current, read_report, reading_label
from mmchat.data.shards import expand_shards
from mmchat.sources import SOURCES
from mmchat.storage import is_url

DESCRIPTION = """\
Makes NAME.tar.index.jsonl beside each shard: training reads by it. The tars themselves are never changed.
The facts of a sample are its .json, or its .txt as a caption. Where neither is what a task understands, the index holds
what --as or --classes read, or what the .nv-meta of a Megatron-Energon dataset says of its members.
"""
EPILOG = """\
A sample that cannot be used stays in the index with the reason, and is reported here. A shard whose index is newer than
the tar and was made the same way is passed over, so a run that was stopped is continued by the same command.
Exit status: 0 every shard has an index now, 1 some has none, 130 stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: see EPILOG."""
    parser = argparse.ArgumentParser(
        prog="index_shards.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, folders (of tars, or a Megatron-Energon dataset), globs, or ranges like 'x/{000000..000012}.tar'",
    )
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument(
        "--as",
        dest="format",
        choices=sorted(SOURCES),
        metavar="FORMAT",
        help="the .json members are rows of this format of make_shards.py, such as chat (LLaVA's conversations)",
    )
    reading.add_argument(
        "--classes", type=Path, metavar="FILE", help="captions are class names: line N of FILE names the .cls member N"
    )
    parser.add_argument(
        "--set", type=option, action="append", default=[], metavar="NAME=VALUE", help="an option of the format of --as"
    )
    parser.add_argument("--force", action="store_true", help="make every index anew")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one for each core)")
    args = parser.parse_args(arguments)

    try:
        return index_shards(args)
    except (ValueError, OSError) as error:
        print(f"index_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("index_shards: stopped; run the same command again to continue", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Job:
    """One shard to index."""

    path: Path
    reading: Reading | None
    excluded: frozenset[str] = frozenset()

    @property
    def label(self) -> str | None:
        return reading_label(self.reading, self.excluded)


def index_shards(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises ValueError, OSError or KeyboardInterrupt."""
    given: Reading | None = None
    if args.set and not args.format:
        raise ValueError("--set is for the options of --as FORMAT")
    if args.format:
        given = AsFormat(args.format, dict(args.set))
    elif args.classes:
        given = Classes(tuple(args.classes.read_text(encoding="utf-8").splitlines()))

    jobs: list[Job] = []
    for name in args.shards:
        if (Path(name) / FOLDER).is_dir():
            jobs += energon_jobs(EnergonDataset.open(Path(name)), given)
            continue
        for path in expand_shards(name):
            if is_url(str(path)):
                raise ValueError(f"{path}: index a local copy, and put the index beside the shard")
            jobs.append(Job(Path(path), given))
    if len({job.path for job in jobs}) < len(jobs):
        raise ValueError("shards are named more than once")

    left = [job for job in jobs if args.force or not is_current(job.path, job.label)]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left):,} shards have their index already; --force makes it anew")
    kept, made_now = ShardReport(), {job.path for job in left}
    for job in jobs:
        if job.path not in made_now:
            kept.merge(read_report(job.path))
    total, num_failed = ShardReport(), 0
    num_bytes = max(1, sum(job.path.stat().st_size for job in left))
    progress = Progress("samples")
    with closing(run_local(_index, left, args.workers or min(num_cores(), max(1, len(left))))) as results:
        for path, found in results:
            size = path.stat().st_size
            if isinstance(found, str):
                num_failed += 1
                print(f"index_shards: {found}", file=sys.stderr)
                progress.add(0, size, (progress.num_bytes + size) / num_bytes)
                continue
            print(f"{path}: {found.num_samples:,} samples, {found.problems.total():,} problems")
            total.merge(found)
            progress.add(found.num_samples, size, (progress.num_bytes + size) / num_bytes)
    print(f"indexed {total.num_samples:,} samples in {len(total.shards):,} of {len(left):,} shards")
    if total.unread:
        types = ", ".join(f"{count:,} x .{type_}" for type_, count in total.unread.most_common())
        print(f"members of types that are not read: {types}")
    total.merge(kept)
    print_problems(total, "found problems, which training will refuse:")
    return 1 if num_failed else 0


def energon_jobs(dataset: EnergonDataset, given: Reading | None) -> list[Job]:
    """The shards of all splits; prints what they are. Raises ValueError."""
    print(f"{dataset.folder}: Megatron-Energon, {dataset.sample_type or 'crude samples'}")
    for split, paths in dataset.splits.items():
        print(f"  {split}: {len(paths):,} shards; in a configuration:")
        print(f"    shards: [{', '.join(map(str, paths[:3]))}{', ...' if len(paths) > 3 else ''}]")
    reading = given or dataset.reading()
    shards = dict.fromkeys(path for paths in dataset.splits.values() for path in paths)
    return [Job(path, reading, dataset.excluded_keys(path)) for path in shards]


def _index(job: Job) -> tuple[Path, ShardReport | str]:
    """The shard, and what was found in it or why it has no index."""
    try:
        return job.path, index_shard(job.path, media_header, job.reading, job.excluded)
    except (ValueError, OSError) as error:
        return job.path, str(error)


if __name__ == "__main__":
    sys.exit(main())
