"""Scores a checkpoint that hears and watches: python benchmarks/media.py CHECKPOINT [--limit N]

Clips, recordings, pictures and voices are such that training never showed; `unseen kinds` are of things that it never
showed. Each task is scored with its media and with a control; a model without ears or without video is not asked what
needs them. Everything lies in OUT; OUT/table.md is a table for a model card, OUT/scores.json its numbers.

The exit status is 1 where a threshold is missed. They were fixed before the first evaluation:
  what came first: 70 % of questions; with frames in any order 40 to 60 %, as chance is 50 %;
  spoken commands: 20 points more than with another recording; spoken questions: 10 points more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmchat  # noqa: F401  (repairs torchvision before transformers looks for it)

# isort: split
from benchmarks.referential import default_out, folder_name, positive
from mmchat.conversation import Modality
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate, load_protocol
from mmchat.inference.load import Loaded, load
from mmchat.models.llm import hide_progress_bars
from mmchat.models.packed import pack

PROTOCOLS = Path(__file__).resolve().parent.parent / "configs" / "protocols"
LEAST_FIRST, SHUFFLED_FIRST = 0.70, (0.40, 0.60)
LEAST_ABOVE_OTHER = {"spoken commands": 0.20, "spoken questions": 0.10}
FIRST = "accuracy_temporal"
WORDS = ("word_error_rate", "character_error_rate", "exact_match")
_PLAIN, _OTHER, _NONE = Controls(), Controls(swap=("audio",)), Controls(missing={"audio": 1.0})


@dataclass(frozen=True)
class Row:
    """One evaluation: which shards by which task and protocol, and which of its scores the table shows."""

    name: str
    task: str
    shards: str
    scores: tuple[str, ...]
    controls: Controls = _PLAIN
    protocol: str | None = None

    @property
    def modality(self) -> Modality:
        """Without which a model cannot be asked."""
        return "video" if self.task == "video_qa" else "audio"


def _clips(name: str, shards: str, controls: Controls = _PLAIN) -> Row:
    scores = ("accuracy", FIRST, "accuracy_motion", "accuracy_yes_no", "accuracy_object")
    return Row(name, "video_qa", shards, scores, controls, "video_qa.yaml")


ROWS = (
    _clips("clips", "moves-test"),
    _clips("clips, frames in any order", "moves-test", Controls(shuffle=("video",))),
    _clips("clips, another clip", "moves-test", Controls(swap=("video",))),
    _clips("clips, unseen kinds", "moves-kinds"),
    Row("spoken commands", "instruct", "commands-test", ("exact_match",)),
    Row("spoken commands, another recording", "instruct", "commands-test", ("exact_match",), _OTHER),
    Row("spoken commands, no recording", "instruct", "commands-test", ("exact_match",), _NONE),
    Row("spoken questions", "vqa", "asked-test", ("exact_match",)),
    Row("spoken questions, another recording", "vqa", "asked-test", ("exact_match",), _OTHER),
    Row("spoken questions, no recording", "vqa", "asked-test", ("exact_match",), _NONE),
    Row("transcripts", "transcribe", "speech-test", WORDS, protocol="transcribe.yaml"),
    Row("transcripts, people", "transcribe", "human/*/*.tar", WORDS, protocol="transcribe.yaml"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--shards", type=Path, default=Path(".cache/media_shards"))
    parser.add_argument("--out", type=Path, help="default: evaluations/RUN-STAGE-STEP, or RUN-FOLDER of a release")
    parser.add_argument("--limit", type=positive, help="first N records of each set only")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    hide_progress_bars()
    try:
        loaded = load(arguments.checkpoint, arguments.dtype)
        pack(loaded.model)
        out = arguments.out or default_out(loaded)
        rows = [row for row in ROWS if row.modality in loaded.template.preprocesses]
        scores = {row.name: _evaluated(loaded, row, arguments.shards, out, arguments.limit) for row in rows}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    table = _table(scores, rows)
    (out / "table.md").write_text(table)
    print(table)
    missed = _missed(scores)
    print("\n".join(f"MISSED: {one}" for one in missed) or "all thresholds are met")
    return int(bool(missed))


def _evaluated(loaded: Loaded, row: Row, shards: Path, out: Path, limit: int | None) -> dict[str, Any]:
    folder = out / folder_name(row.name)
    print(f"{row.name}: {folder}", flush=True)
    protocol = load_protocol(PROTOCOLS / row.protocol, []) if row.protocol else None
    where = str(shards / row.shards)
    metrics = evaluate(loaded, row.task, where, folder, protocol, row.controls, limit, batch_size=32)
    return {**metrics["scores"], "num_questions": metrics["num_questions"], "protocol": metrics["protocol_sha256"]}


def _table(scores: dict[str, dict[str, Any]], rows: Sequence[Row]) -> str:
    lines = ["| what | questions | score | |", "|---|---|---|---|"]
    for row in rows:
        of_row = scores[row.name]
        main_score, *others = (f"{100 * of_row[score]:.1f} % {score}" for score in row.scores)
        lines.append(f"| {row.name} | {of_row['num_questions']:,} | {main_score} | {', '.join(others)} |")
    return "\n".join(lines) + "\n"


def _missed(scores: dict[str, dict[str, Any]]) -> list[str]:
    """The thresholds that are missed, of the modalities that the model has."""
    missed = []
    if "clips" in scores:
        first, shuffled = scores["clips"][FIRST], scores["clips, frames in any order"][FIRST]
        if first < LEAST_FIRST:
            missed.append(f"what came first {first:.3f}, wanted {LEAST_FIRST}")
        if not SHUFFLED_FIRST[0] <= shuffled <= SHUFFLED_FIRST[1]:
            missed.append(f"what came first, frames in any order {shuffled:.3f}, wanted {SHUFFLED_FIRST}")
    for name, least in LEAST_ABOVE_OTHER.items():
        if name not in scores:
            continue
        right, other = (scores[one]["exact_match"] for one in (name, f"{name}, another recording"))
        if right < other + least:
            missed.append(f"{name} {right:.3f}, another recording {other:.3f}, wanted {least} between them")
    return missed


if __name__ == "__main__":
    sys.exit(main())
