"""Makes the index of webdataset shards: python data_prep/index_shards.py 'foreign/{000000..000012}.tar'"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.make_shards import media_header, print_problems, with_progress
from mmchat.data.shard_index import ShardReport, index_shard
from mmchat.data.shards import expand_shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if every shard has an index now, else 1."""
    parser = argparse.ArgumentParser(
        prog="index_shards.py",
        description="Makes NAME.tar.index.jsonl beside each shard: training reads by it.",
        epilog="A sample that cannot be used stays in the index with the reason, and is reported here.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, folders, globs, or ranges such as 'x/{000000..000012}.tar'",
    )
    args = parser.parse_args(arguments)

    total = ShardReport()
    num_failed = 0
    try:
        paths = expand_shards(args.shards)
        for path in with_progress(paths, "shards"):
            try:
                report = index_shard(path, media_header)
            except (ValueError, OSError) as error:
                num_failed += 1
                print(f"index_shards: {error}", file=sys.stderr)
                continue
            print(f"{path}: {report.num_samples:,} samples, {report.problems.total():,} problems")
            total.merge(report)
    except ValueError as error:
        print(f"index_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("index_shards: stopped", file=sys.stderr)
        return 130
    print(f"indexed {total.num_samples:,} samples in {len(total.shards):,} of {len(paths):,} shards")
    print_problems(total, "found problems, which training will refuse:")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
