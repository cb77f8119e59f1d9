"""Shows what the model will see: python data_prep/inspect_shards.py --config configs/x.yaml --out page.html"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A script sees its own folder only: what runs is the checkout that it lies in, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
import numpy as np

from data_prep.inspect_page import MAX_REFUSED, page
from data_prep.inspect_samples import (
    PackReport,
    Placeholder,
    SourceReport,
    View,
    chosen_stages,
    inspect_packs,
    inspect_sources,
    num_learned,
)
from mmchat.config import load_config
from mmchat.data.build import build_template
from mmchat.data.lanes import SampleId
from mmchat.errors import SampleError
from mmchat.tasks import TASKS
from mmchat.training.plan import check_writable

_BAR = 60  # characters of a pack in the terminal
_GREEN, _DIM, _BLUE, _END = "\x1b[32m", "\x1b[2m", "\x1b[34m", "\x1b[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if the page or the text was made, 1 if something that was named cannot be used."""
    parser = argparse.ArgumentParser(
        prog="inspect_shards.py",
        description="Shows what the model will see: a page for a browser (--out), or text (--text).",
        epilog="Without SHARDS, every source of every stage of the configuration is shown.",
    )
    parser.add_argument("shards", nargs="*", metavar="SHARDS", help="tars, folders, globs or ranges of one source")
    parser.add_argument("--config", required=True, type=Path, help="the run whose model and budgets count")
    parser.add_argument("--task", choices=sorted(TASKS), help="of SHARDS, where no source of --config has them")
    parser.add_argument("--stage", help="this stage only (default: all; with SHARDS, the first that has them)")
    parser.add_argument("--out", type=Path, help="where to write the page")
    parser.add_argument("--text", action="store_true", help="print for a terminal")
    parser.add_argument("--samples", type=int, default=24, help="to show of each source (default: %(default)s)")
    parser.add_argument(
        "--planned", type=int, default=1000, help="samples of each source behind its figures (default: %(default)s)"
    )
    parser.add_argument("--packs", type=int, default=8, help="to show of each stage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws which samples are shown (default: %(default)s)")
    parser.add_argument("--no-media", action="store_true", help="decode no pictures, videos and sound")
    args = parser.parse_args(arguments)
    if args.out is None and not args.text:
        parser.error("name the page with --out, or ask for --text")
    if args.samples < 0 or args.planned < 1 or args.packs < 0:
        parser.error("--samples and --packs must be 0 or more, --planned 1 or more")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may have few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.out is not None:
            check_writable(args.out, "--out")
        config = load_config(args.config)
        stages = chosen_stages(config, args.shards, args.task, args.stage)
        template = build_template(config)
        sources = inspect_sources(
            config,
            stages,
            template,
            args.seed,
            args.samples,
            args.planned,
            with_media=not args.no_media,
            progress=_progress,
        )
        packs = [inspect_packs(config, stage, template, args.packs) for stage in stages] if args.packs else []
        if args.text:
            _print(sources, packs, in_colour=sys.stdout.isatty())
            sys.stdout.flush()
        if args.out is not None:
            title = f"What {config.run} will see"
            command = f"{args.config}, model seed {config.seed}; samples drawn with seed {args.seed}"
            html = page(title, command, sources, packs).encode(errors="replace")
            args.out.write_bytes(html)
            print(f"{args.out}: {len(html) / 1e6:.1f} MB", file=sys.stderr)
    except BrokenPipeError:  # who reads the text has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, SampleError) as error:
        print(f"inspect_shards: {_plain(str(error), keep_lines=True)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("inspect_shards: stopped", file=sys.stderr)
        return 130
    return 0


def _progress(numbers: Iterator[SampleId], total: int, name: str) -> Iterator[SampleId]:
    """The numbers; says on stderr how far they are and how long it will take."""
    start = said = time.monotonic()
    for count, number in enumerate(numbers):
        yield number
        now = time.monotonic()
        if now - said >= 2 or count + 1 == total:
            said = now
            left = (now - start) / (count + 1) * (total - count - 1)
            print(f"{_plain(name)}: {count + 1:,} of {total:,} samples, {left:.0f} s left", file=sys.stderr)


# ---- the terminal ---------------------------------------------------------------------------------------------------


def _print(sources: Sequence[SourceReport], packs: Sequence[PackReport], in_colour: bool) -> None:
    for report in sources:
        _print_source(report)
        for view in report.views:
            _print_view(view, in_colour)
    for packed in packs:
        _print_packs(packed)


def _print_source(report: SourceReport) -> None:
    figures = report.figures
    stages = ", ".join([report.stage.name, *report.also])
    print()
    _say(f"=== {report.source.name}: task {report.source.task}, stage {stages}")
    _say(f"{report.num_samples:,} samples in {report.num_shards:,} shards; {figures.num_drawn:,} looked at")
    lines: dict[str, Sequence[float]] = {
        "tokens": figures.tokens,
        "learned %": [100 * share for share in figures.learned],
        "patches": figures.patches,
        "turns": figures.turns,
        "regions": figures.regions,
    }
    lines |= {f"{modality} width": [width for width, _ in sizes] for modality, sizes in figures.sizes.items()}
    lines |= {f"{modality} height": [height for _, height in sizes] for modality, sizes in figures.sizes.items()}
    lines |= {f"{modality} seconds": durations for modality, durations in figures.durations_s.items()}
    for name, values in lines.items():
        if values:
            low, middle, high = np.quantile(values, [0, 0.5, 1])
            _say(f"  {name:<14} {low:>9.4g} to {high:<9.4g} median {middle:.4g}")
    for name, counts in (("prompts", figures.prompts), ("answers", figures.answers)):
        if counts:
            _say(f"  {name:<14} {len(counts):,} different of {counts.total():,}")
            for text, count in counts.most_common(3):
                _say(f"    {count / counts.total():>6.1%}  {text[:90]}")
    if figures.refused:
        reasons = Counter(refused.reason for refused in figures.refused)
        _say(f"  refused {len(figures.refused):,}: " + ", ".join(f"{n:,} x {reason}" for reason, n in reasons.items()))
        for refused in figures.refused[:MAX_REFUSED]:
            _say(f"    {refused.key}: {refused.reason}: {refused.detail[:300]}")


def _print_view(view: View, in_colour: bool) -> None:
    """One sample; without colours, what is learned stands between » and «."""
    planned, sample = view.planned, view.planned.sample
    print()
    _say(f"--- {planned.record.key} ({planned.shard})")
    _say(f"{len(sample):,} tokens, {view.num_learned:,} learned, {sample.num_patches:,} patches")
    for note in view.notes:
        _say(note)
    text, is_open = "", False
    for piece in view.pieces:
        is_learned = not isinstance(piece, Placeholder) and piece.is_learned
        if is_learned != is_open and not in_colour:
            text += "»" if is_learned else "«"
        is_open = is_learned
        if isinstance(piece, Placeholder):
            shown, colour = f"[{piece.modality} {piece.media}: {piece.num_tokens} tokens]", _BLUE
        else:
            shown = _plain(piece.text, keep_lines=True)
            colour = _GREEN if is_learned else _DIM if piece.is_special else ""
        text += f"{colour}{shown}{_END}" if in_colour and colour else shown
    print(text + ("«" if is_open and not in_colour else ""))
    for item in view.items:
        if item.plan is None:
            _say(f"  {item.modality} {item.media}: {item.note}")
        elif item.plan.times_s:
            _say(
                f"  {item.modality} {item.media}: frames at " + ", ".join(f"{t:.2f}" for t in item.plan.times_s) + " s"
            )
    for i, mark in enumerate(view.marks):
        where = mark.region.box or mark.region.point or mark.region.tube
        said = mark.text if mark.is_said else "in the facts, not said"
        _say(f"  region {i}: {mark.shape} on item {mark.region.media} {mark.region.label or ''} {where} {said}")


def _print_packs(report: PackReport) -> None:
    batch = report.stage.batch
    print()
    _say(f"=== packs of stage {report.stage.name}, lane 0: {batch.tokens:,} tokens, {batch.patches:,} patches")
    for i, pack in enumerate(report.packs):
        used = sum(len(sample) for _, sample in pack)
        bar, end = "", 0
        for number, (_, sample) in enumerate(pack):
            end += len(sample)
            bar += "#="[number % 2] * (round(end / batch.tokens * _BAR) - len(bar))
        learned = sum(num_learned(sample) for _, sample in pack)
        patches = sum(sample.num_patches for _, sample in pack)
        _say(
            f"{i:>3} {bar:.<{_BAR}} {len(pack)} samples, {used:,} tokens, {learned:,} learned, {patches:,} patches, "
            f"{1 - used / batch.tokens:.0%} padding"
        )
    if report.num_refused:
        _say(f"    {report.num_refused:,} samples refused on the way")
    if report.problem:
        _say(f"    {report.problem}")


def _say(line: str) -> None:
    """Prints one line; whatever data is in it stays one."""
    print(_plain(line))


def _plain(text: str, keep_lines: bool = False) -> str:
    """Without control characters, which a terminal would obey."""
    kept = text if keep_lines else text.replace("\n", " ")
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in kept)


if __name__ == "__main__":
    sys.exit(main())
