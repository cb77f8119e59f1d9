"""Scores a checkpoint that refers to places: python benchmarks/referential.py CHECKPOINT [--small] [--limit N]

New scenes of known kinds on photographs that training never showed, and scenes of kinds that it never showed. Each task
is scored with the scene's picture and with another scene's; places also against a box in the middle, dialogues also
without their history. Everything lies in OUT; OUT/table.md is the table of a model card, OUT/scores.json its numbers.

The exit status is 1 where a threshold is missed. They were fixed before the first run:
  places found (IoU above 0.5): 65 % (--small: 25 points more than the better control);
  descriptions and things named: 40 points more than with shuffled pictures (not for --small).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
from mmchat.config import SourceConfig
from mmchat.conversation import Record
from mmchat.data.lanes import SampleId
from mmchat.data.mixture import Mixture
from mmchat.errors import SampleError
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate
from mmchat.inference.load import Loaded, load
from mmchat.metrics.boxes import iou
from mmchat.models.llm import hide_progress_bars
from mmchat.models.packed import pack
from mmchat.tasks.question import Protocol, each_alone

UNREADABLE = "unreadable"  # stands among the kinds of expressions
LEAST_FOUND, LEAST_ABOVE_CONTROLS, LEAST_ABOVE_SHUFFLED = 0.65, 0.25, 0.40
PLAIN, SWAPPED = Controls(), Controls(swap=("image",))


@dataclass(frozen=True)
class Row:
    """One evaluation: which shards by which task, and which of its scores the table shows."""

    name: str
    task: str
    shards: str
    score: str
    controls: Controls = PLAIN
    history: bool = True


ROWS = (
    Row("places", "rec", "objects-test", "accuracy"),
    Row("places, shuffled pictures", "rec", "objects-test", "accuracy", SWAPPED),
    Row("places, unseen kinds", "rec", "objects-kinds", "accuracy"),
    Row("places, unseen kinds, shuffled", "rec", "objects-kinds", "accuracy", SWAPPED),
    Row("descriptions", "reg", "things-test", "exact_match"),
    Row("descriptions, shuffled pictures", "reg", "things-test", "exact_match", SWAPPED),
    Row("descriptions, unseen kinds", "reg", "things-kinds", "exact_match"),
    Row("grounded captions", "spot", "objects-test", "token_f1"),
    Row("grounded captions, shuffled pictures", "spot", "objects-test", "token_f1", SWAPPED),
    Row("questions", "vqa", "questions-test", "exact_match"),
    Row("questions, shuffled pictures", "vqa", "questions-test", "exact_match", SWAPPED),
    Row("questions, no picture", "vqa", "questions-test", "exact_match", Controls(missing={"image": 1.0})),
    Row("rounds (MRR)", "visdial", "rounds-test", "mrr"),
    Row("rounds (MRR), no history", "visdial", "rounds-test", "mrr", history=False),
    Row("rounds (MRR), shuffled pictures", "visdial", "rounds-test", "mrr", SWAPPED),
)
SMALL = ("places", "places, shuffled pictures")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--shards", type=Path, default=Path(".cache/referential_shards"))
    parser.add_argument("--out", type=Path, help="default: evaluations/RUN-STAGE-STEP, or RUN-FOLDER of a release")
    parser.add_argument("--small", action="store_true", help="places only, against the small run's threshold")
    parser.add_argument("--limit", type=positive, help="first N scenes of each set only")
    parser.add_argument("--dialogues", type=positive, help="first N dialogues only: a question has 100 candidates")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    hide_progress_bars()
    rows = [row for row in ROWS if not arguments.small or row.name in SMALL]
    try:
        loaded = load(arguments.checkpoint, arguments.dtype)
        pack(loaded.model)
        out = arguments.out or default_out(loaded)
        limits = {"visdial": arguments.dialogues or arguments.limit}
        scores = {
            row.name: _evaluated(loaded, row, arguments.shards, out, limits.get(row.task, arguments.limit))
            for row in rows
        }
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    centre = _centre_box(arguments.shards / "objects-test", arguments.limit)
    scores["places, a box in the middle"] = {"accuracy": centre, "num_questions": scores["places"]["num_questions"]}
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    table = _table(scores, rows)
    (out / "table.md").write_text(table)
    print(table)
    missed = _missed(scores, arguments.small)
    print("\n".join(f"MISSED: {one}" for one in missed) or "all thresholds are met")
    return int(bool(missed))


def positive(text: str) -> int:
    """A number of records on the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, found {text}")
    return value


def default_out(loaded: Loaded) -> Path:
    """A folder for each checkpoint of each run."""
    names = [loaded.config.run]
    if (checkpoint := loaded.checkpoint) is None:
        names.append("untrained")
    elif checkpoint.folder.name.startswith("step-"):
        names += [checkpoint.folder.parent.name, checkpoint.folder.name]
    else:
        names.append(checkpoint.folder.name)
    return Path("evaluations") / "-".join(names)


def folder_name(row: str) -> str:
    """Of a row of the table."""
    return re.sub(r"\W+", "-", row).strip("-")


def _evaluated(loaded: Loaded, row: Row, shards: Path, out: Path, limit: int | None) -> dict[str, Any]:
    """The row's scores, those by kind of expression among them where the facts name kinds."""
    folder = out / folder_name(row.name)
    print(f"{row.name}: {folder}", flush=True)
    protocol = Protocol(max_new_tokens=96 if row.task == "spot" else 40, history=row.history)
    where = str(shards / row.shards)
    metrics = evaluate(loaded, row.task, where, folder, protocol, row.controls, limit, batch_size=32)
    scores = {**metrics["scores"], "num_questions": metrics["num_questions"], "protocol": metrics["protocol_sha256"]}
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    facts = {one.key: one for one in _alone(where, limit) if one is not None}
    if row.task == "rec":
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for line in lines:
            if (one := facts.get(line["key"])) is None:
                by_kind[UNREADABLE].append(False)
                continue
            # Of one box the judge says its IoU, of several or none F1.
            by_kind[one.facts["kind"]].append(line["judge"] > (0.5 if len(one.facts["boxes"]) == 1 else 0.999))
        scores["by_kind"] = {kind: [sum(right) / len(right), len(right)] for kind, right in by_kind.items()}
    if row.task == "spot":
        named = [_share_named(line["answer"], facts.get(line["key"])) for line in lines]
        scores["things_named"] = sum(named) / len(named)
    return scores


def _share_named(answer: str, record: Record | None) -> float:
    """Which share of a scene's things the answer names, each as often as it is there; 0 where it cannot be read."""
    if record is None:
        return 0.0
    caption = record.facts["caption"]
    wanted = [caption[one["start"] : one["end"]].lower().split()[-1] for one in record.facts["phrases"]]
    words = re.findall(r"[a-z]+", answer.lower())
    return sum(min(words.count(word), wanted.count(word)) for word in set(wanted)) / len(wanted)


def _alone(shards: str, limit: int | None) -> list[Record | None]:
    """What is asked of each scene, each as a record; None for a scene that cannot be read, which counts as wrong."""
    mixture = Mixture([SourceConfig(name="scenes", task="rec", shards=shards)])
    found: list[Record | None] = []
    for i in range(min(limit or 10**9, mixture.sources[0].num_samples)):
        try:
            found += each_alone(mixture.record(SampleId("scenes", 0, i)))
        except SampleError:
            found.append(None)
    return found


def _centre_box(shards: Path, limit: int | None) -> float:
    """How often a box of half the picture's width and height in its middle would be right."""
    right, asked = 0, _alone(str(shards), limit)
    for one in asked:
        if one is None:
            continue
        header = one.media[0].header
        assert header is not None and header.width is not None and header.height is not None
        guess = (header.width / 4, header.height / 4, header.width * 3 / 4, header.height * 3 / 4)
        boxes = one.facts["boxes"]
        right += len(boxes) == 1 and iou(guess, tuple(boxes[0])) > 0.5
    return right / len(asked)


def _table(scores: dict[str, dict[str, Any]], rows: list[Row]) -> str:
    lines = ["| what | questions | score | |", "|---|---|---|---|"]
    for row in rows:
        of_row = scores[row.name]
        extra = ""
        if row.task == "rec":
            kinds = sorted(of_row["by_kind"].items(), key=lambda one: -one[1][1])
            extra = f"mean IoU {of_row['mean_iou']:.2f}; " + ", ".join(
                f"{k} {100 * v[0]:.0f} % of {v[1]}" for k, v in kinds
            )
        elif row.task == "spot":
            extra = f"things named {100 * of_row['things_named']:.1f} %"
        elif row.task == "visdial":
            extra = f"R@1 {100 * of_row['r@1']:.1f} %, mean rank {of_row['mean_rank']:.1f}, NDCG {of_row['ndcg']:.2f}"
        lines.append(
            f"| {row.name} | {of_row['num_questions']:,} | {100 * of_row[row.score]:.1f} % {row.score} | {extra} |"
        )
        if row.name == "places, shuffled pictures":
            centre = scores["places, a box in the middle"]
            lines.append(
                f"| places, a box in the middle | {centre['num_questions']:,} | {100 * centre['accuracy']:.1f} % | |"
            )
    return "\n".join(lines) + "\n"


def _missed(scores: dict[str, dict[str, Any]], is_small: bool) -> list[str]:
    found = scores["places"]["accuracy"]
    control = max(scores[f"places, {name}"]["accuracy"] for name in ("shuffled pictures", "a box in the middle"))
    if is_small:
        return [] if found >= control + LEAST_ABOVE_CONTROLS else [f"places {found:.3f}, controls {control:.3f}"]
    missed = [] if found >= LEAST_FOUND else [f"places {found:.3f}, wanted {LEAST_FOUND}"]
    for name, score in (("descriptions", "exact_match"), ("grounded captions", "things_named")):
        right, shuffled = scores[name][score], scores[f"{name}, shuffled pictures"][score]
        if right < shuffled + LEAST_ABOVE_SHUFFLED:
            missed.append(f"{name} {right:.3f}, shuffled {shuffled:.3f}, wanted {LEAST_ABOVE_SHUFFLED} between them")
    return missed


if __name__ == "__main__":
    sys.exit(main())
