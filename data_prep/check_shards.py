"""Says what is wrong with shards: python data_prep/check_shards.py SHARDS [--config configs/x.yaml] [--deep]"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any

# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism

import torch

from data_prep.engines import num_cores
from data_prep.make_shards import media_header
from data_prep.progress import Progress
from mmchat.config import RunConfig, load_config
from mmchat.conversation import Modality
from mmchat.data.build import build_template
from mmchat.data.check import ShardChecker
from mmchat.data.check_report import Job, Report, ShardCheck, Use
from mmchat.data.shards import expand_shards
from mmchat.modalities.audio import SAMPLE_RATE_HZ, AudioConfig
from mmchat.modalities.image import ImageConfig, ImagePreprocess
from mmchat.modalities.image_encoders import ImageSpec
from mmchat.modalities.sandbox import Sandbox, SandboxLimits
from mmchat.modalities.video import VideoConfig, VideoPreprocess
from mmchat.storage import CacheConfig, is_url, make_folder
from mmchat.tasks import TASKS

EPILOG = """\
Without --config and --task: indexes, tars, facts and sizes. --task: also conversations, regions and media counts.
--config: also what its template and packs refuse. The findings and the fields of --json: data_prep/README.md.
Exit status: 0 nothing wrong, 1 errors found (with --strict: or warnings), 2 the check could not be made, 130 stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, see EPILOG."""
    parser = argparse.ArgumentParser(
        prog="check_shards.py",
        description="Says what is wrong with shards before a run meets it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", nargs="*", metavar="SHARDS", help="tars, folders, globs, ranges; default: the config's"
    )
    parser.add_argument("--config", metavar="YAML", help="check for this run: all sources of all its stages, or SHARDS")
    parser.add_argument(
        "--task", metavar="T", help=f"the task of SHARDS, where the config does not tell: {', '.join(TASKS)}"
    )
    parser.add_argument("--deep", action="store_true", help="read every byte: hash the tars, decode all media")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="EVAL", help="shards whose media must not be in SHARDS"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    args = parser.parse_args(arguments)
    if not args.shards and not args.config:
        parser.error("name SHARDS or --config")
    if not args.shards and args.task:
        parser.error("--task says how SHARDS are read; the sources of a config name their own")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be 1 or more, found {args.workers}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    if args.json and (
        args.json.is_dir() or not os.access(args.json if args.json.exists() else args.json.parent, os.W_OK)
    ):
        parser.error(f"--json: {args.json} is a folder or cannot be written; name a file")

    start = time.monotonic()
    try:
        config = load_config(args.config) if args.config else None
        jobs = plan(args.shards, config, args.task, args.against)
        shards_cache = config.cache if config is not None else CacheConfig()
        if any(is_url(job.path) for job in jobs):
            make_folder(shards_cache)  # else every shard would be told to be unreachable
        with tempfile.TemporaryDirectory(prefix="mmchat-check-") as folder:
            checker = ShardChecker(
                None if config is None else build_template(config).without_dropout(),
                media_header,
                decode,
                args.deep,
                any(job.is_evaluation for job in jobs),
                Path(folder),
                shards_cache,
            )
            report = Report(run(checker, jobs, args.workers or num_cores()), shards_cache)
    except BrokenProcessPool:
        print(
            "check_shards: a process of the check was killed; is there enough memory? Try fewer --workers",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print("check_shards: " + "\n".join(map(_plain, str(error).split("\n"))), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("check_shards: stopped, nothing is reported", file=sys.stderr)
        return 130
    values, found = report.as_json(), report.findings
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # keys may have letters that the terminal's encoding lacks
    try:
        print_report(values, time.monotonic() - start)
        no_index = dict.fromkeys(c.job.path for c in report.checks if ("error", "no index") in c.findings)
        if no_index := [path for path in no_index if not is_url(path)]:
            print(_plain(f"make the missing indexes with: python data_prep/index_shards.py {shlex.join(no_index)}"))
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the text has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if args.json:
        values |= {"deep": args.deep, "config": args.config, "task": args.task}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        try:
            # Half a surrogate pair, as in a path that is no UTF-8, becomes the escape that JSON has for it.
            args.json.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            print(f"check_shards: the report cannot be written: {error}", file=sys.stderr)
            return 2
    return 1 if found.count("error") or (args.strict and found) else 0


def plan(shards: list[str], config: RunConfig | None, task: str | None, against: list[str]) -> list[Job]:
    """A job for each shard, with every use that the config has for it. Raises ValueError."""
    uses: dict[str, dict[Use, None]] = {}
    sources: dict[str, dict[str, None]] = {}
    if task is not None and task not in TASKS:
        raise ValueError(f"no task {task!r}, there are {', '.join(TASKS)}")
    for stage in config.stages if config is not None else ():
        for source in stage.data:
            if source.task not in TASKS:
                raise ValueError(f"source {source.name!r}: no task {source.task!r}, there are {', '.join(TASKS)}")
            for path in _paths(source.shards):
                sources.setdefault(path, {})[source.name] = None
                uses.setdefault(path, {})[Use(source.task, stage.batch.tokens, stage.batch.patches)] = None
    evaluation = {path for path, names in sources.items() if any(map(is_evaluation, names))}
    if shards:
        budgets = [(stage.batch.tokens, stage.batch.patches) for stage in config.stages] if config is not None else [()]
        named = _paths(shards)
        if task is None and (unknown := [path for path in named if config is not None and path not in uses]):
            raise ValueError(f"{unknown[0]} is in no source of the config: say with --task how it is read")
        if task is not None:
            uses = {path: {Use(task, *budget): None for budget in budgets} for path in named}
        sources = {path: sources.get(path) or {path.rpartition("/")[0] or ".": None} for path in named}
    jobs = [Job(p, tuple(names), tuple(uses.get(p, ())), p in evaluation) for p, names in sources.items()]
    return jobs + [Job(path, ("--against",), is_evaluation=True, only_hash=True) for path in _paths(against)]


def is_evaluation(source: str) -> bool:
    """Whether a source's name has the word eval in it."""
    return "eval" in re.split(r"[^a-z]+", source.lower())


def _paths(patterns: str | list[str]) -> list[str]:
    """Comparable paths: the same shard is the same string, however it was named."""
    return [_path(str(path)) for path in (expand_shards(patterns) if patterns else [])]


def _path(path: str) -> str:
    if is_url(path):
        return path
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def decode(modality: Modality, data: bytes) -> object:
    """Decodes an item as a run with default settings would, to one small picture a frame. Raises SampleError."""
    if modality == "audio":
        longest_s = AudioConfig.model_fields["max_duration_s"].default
        return _sandbox().call("audio_samples", data, sample_rate_hz=SAMPLE_RATE_HZ, max_duration_s=longest_s)
    preprocess = _preprocess(modality)
    return preprocess(data, preprocess.plan(preprocess.header(data)))


@cache
def _preprocess(modality: Modality) -> ImagePreprocess | VideoPreprocess:
    spec = ImageSpec(8, (0.0,) * 3, (1.0,) * 3, "bicubic", grid_height=1, grid_width=1, feature_dim=1)
    if modality == "video":
        return VideoPreprocess(VideoConfig(), spec)
    config = ImageConfig.model_validate({"encoder": {"kind": "timm", "model": ""}})  # whose encoder is never looked up
    return ImagePreprocess(config, spec)


@cache
def _sandbox() -> Sandbox:
    return Sandbox(SandboxLimits())


class Counters:
    """Samples done and their bytes, counted by all processes, and whether they are to stop."""

    def __init__(self) -> None:
        self.samples, self.bytes = multiprocessing.Value("q"), multiprocessing.Value("q")
        self.is_stopped = multiprocessing.Value("b")

    def add(self, num_bytes: int) -> None:
        """Raises RuntimeError once the check is stopped."""
        if self.is_stopped.value:
            raise RuntimeError("the check was stopped")
        for counter, amount in ((self.samples, 1), (self.bytes, num_bytes)):
            with counter.get_lock():
                counter.value += amount


_worker: dict[str, Any] = {}


def _start_worker(checker: ShardChecker, counters: Counters) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one; its decoders inherit it
    torch.set_num_threads(1)
    _worker.update(checker=checker, counters=counters)


def _check(job: Job) -> ShardCheck:
    return _worker["checker"].check(job, _worker["counters"].add)


def run(checker: ShardChecker, jobs: Sequence[Job], num_workers: int) -> list[ShardCheck]:
    """The checks in the order of the jobs; with one worker in this process."""
    counters, progress = Counters(), Progress("samples", "all shards")
    is_local = not any(is_url(job.path) for job in jobs)  # the sizes of others are not asked for beforehand
    total = sum(os.path.getsize(job.path) for job in jobs) if is_local else 0

    def say() -> None:
        num_bytes = counters.bytes.value
        share = min(1.0, num_bytes / total) if total else None
        progress.add(counters.samples.value - progress.num, num_bytes - progress.num_bytes, share)

    if num_workers == 1:

        def on_sample(num_bytes: int) -> None:
            counters.add(num_bytes)
            say()

        return [checker.check(job, on_sample) for job in jobs]
    with ProcessPoolExecutor(
        min(len(jobs), num_workers), initializer=_start_worker, initargs=(checker, counters)
    ) as pool:
        try:
            futures = [pool.submit(_check, job) for job in jobs]
            while wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION).not_done:
                for future in futures:
                    if future.done():
                        future.result()  # raises what its process raised
                say()
            return [future.result() for future in futures]
        except BaseException:
            counters.is_stopped.value = True
            pool.shutdown(wait=False, cancel_futures=True)
            wait(futures, timeout=3)  # most end after the sample at hand, and their decoders with them
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def print_report(report: dict[str, Any], seconds: float) -> None:
    """Totals of every source, then the findings, errors first, each with its examples."""
    lines = []
    for name, source in report["sources"].items():
        media = ", ".join(f"{count:,} {modality}" for modality, count in source["media"].items()) or "no media"
        lines.append(
            f"{name}: {source['shards']:,} shards, {source['samples']:,} samples ({media}), "
            f"{source['bytes'] / 1e6:,.1f} MB; {source['bad_samples']:,} samples with an error"
        )
    for severity in ("error", "warning"):
        lines.append(f"{report[severity + 's']:,} {severity}s")
        for finding in report["findings"]:
            if finding["severity"] == severity:
                lines.append(f"  {finding['count']:,} x {finding['reason']} ({', '.join(finding['sources'])})")
                for example in finding["examples"]:
                    lines.append("      " + ": ".join(filter(None, example.values())))
    for line in [*lines, f"checked in {seconds:.1f} s"]:
        print(_plain(line))


def _plain(text: str) -> str:
    """Without what moves a terminal's cursor or cannot be printed: keys and facts are anybody's."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


if __name__ == "__main__":
    sys.exit(main())
