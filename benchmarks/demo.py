"""Scores the demo and shows it: python benchmarks/demo.py [--checkpoint FOLDER] [--out FOLDER]

New scenes of known things are named by free generation: with their picture, with another scene's picture, and by the
model before training. Then one picture is talked about, and everything stands on one page, FOLDER/index.html.

The exit status is 1 where fewer than 60 % are named exactly, or more than 10 % with another scene's picture.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
import shutil
import sys
import time
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
from mmchat.inference.chat import ChatSession
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate import evaluate
from mmchat.inference.generate import Decoding
from mmchat.inference.load import Loaded, load
from mmchat.metrics.text import normalised
from mmchat.models.llm import hide_progress_bars
from mmchat.tasks.question import Protocol

LEAST_EXACT, MOST_EXACT_SWAPPED = 0.60, 0.10
QUESTIONS = ("What is in this picture?", "Where is it?", "What is the capital of France?")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/first_words/instruct")
    parser.add_argument("--config", default="configs/demo.yaml", help="the model before training")
    parser.add_argument("--shards", default=".cache/demo/shards/captions-test")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/first_words/page"))
    parser.add_argument("--limit", type=int, help="first N scenes only")
    arguments = parser.parse_args()
    hide_progress_bars()
    try:
        trained = load(arguments.checkpoint)
        arguments.out.mkdir(parents=True, exist_ok=True)

        def scored(name: str, loaded: Loaded, limit: int | None, swap: bool = False) -> dict[str, Any]:
            print(f"{name}:")
            folder = arguments.out / name.replace(" ", "-")
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier training
            controls = Controls(swap=("image",) if swap else ())
            protocol = Protocol(max_new_tokens=16)
            return evaluate(loaded, "caption", arguments.shards, folder, protocol, controls, limit, batch_size=25)

        rows = {
            "right picture": scored("right picture", trained, arguments.limit),
            "shuffled pictures": scored("shuffled pictures", trained, arguments.limit, swap=True),
            # Fifty are enough to show that it names next to nothing, and it answers at length.
            "before training": scored("before training", load(arguments.config), min(50, arguments.limit or 50)),
        }
        mixture = Mixture([SourceConfig(name="test", task="caption", shards=arguments.shards)])
        records = [mixture.record(SampleId("test", 0, i)) for i in range(rows["right picture"]["num_records"])]
        kinds = len({record.facts["caption"] for record in records})
        talk = _talk(trained, records[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"\n{'':<20}{'scenes':>8}{'named exactly':>16}{'token F1':>10}   ({kinds} kinds of things)")
    for name, metrics in rows.items():
        exact, f1 = metrics["scores"]["exact_match"], metrics["scores"]["token_f1"]
        print(f"{name:<20}{metrics['num_records']:>8}{100 * exact:>14.1f} %{f1:>10.2f}")
    for question, answer in talk:
        print(f"\n> {question}\n{answer}")
    page = arguments.out / "index.html"
    page.write_text(_page(rows, kinds, records, arguments.out / "right-picture/predictions.jsonl", talk, trained))
    (arguments.out / "scores.json").write_text(
        json.dumps({name: {"scenes": m["num_records"], **m["scores"]} for name, m in rows.items()}, indent=1)
    )
    print(f"\nThe page to look at: {page}")
    exact = rows["right picture"]["scores"]["exact_match"]
    swapped = rows["shuffled pictures"]["scores"]["exact_match"]
    if exact < LEAST_EXACT or swapped > MOST_EXACT_SWAPPED:
        print(f"FAILED: wanted at least {LEAST_EXACT:.0%} exact and at most {MOST_EXACT_SWAPPED:.0%} shuffled")
        return 1
    return 0


def _talk(loaded: Loaded, record: Record) -> list[tuple[str, str]]:
    """Questions about one picture in one conversation; the last one needs no picture and is asked without."""
    session = ChatSession(loaded, Decoding(max_new_tokens=24))
    said = []
    for number, question in enumerate(QUESTIONS[:-1]):
        parts = (record.media[0], question) if number == 0 else (question,)
        said.append((question, "".join(session.ask(parts))))
    plain = ChatSession(loaded, Decoding(max_new_tokens=24))
    said.append((f"{QUESTIONS[-1]} (without a picture)", "".join(plain.ask((QUESTIONS[-1],)))))
    return said


def _page(
    rows: dict[str, dict[str, Any]],
    kinds: int,
    records: list[Record],
    answers: Path,
    talk: list[tuple[str, str]],
    loaded: Loaded,
) -> str:
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    # Wrong ones first: they say more.
    order = sorted(range(len(lines)), key=lambda i: _is_right(lines[i]))[:48]
    cards = "\n".join(
        f'<figure class="{"right" if _is_right(lines[i]) else "wrong"}"><img alt="" src="{_uri(records[i])}">'
        f"<figcaption>{html.escape(lines[i]['answer'])}"
        + ("" if _is_right(lines[i]) else f"<br><s>{html.escape(lines[i]['reference'])}</s>")
        + "</figcaption></figure>"
        for i in order
    )
    table = "\n".join(
        f"<tr><th>{name}</th><td>{m['num_records']}</td><td>{100 * m['scores']['exact_match']:.1f} %</td></tr>"
        for name, m in rows.items()
    )
    said = "\n".join(f'<p class="user">{html.escape(q)}</p><p class="model">{html.escape(a)}</p>' for q, a in talk)
    step = loaded.checkpoint.folder if loaded.checkpoint else "untrained"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>mmchat demo</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem 1rem .3rem 0; text-align: left; font-weight: normal }}
td {{ font-variant-numeric: tabular-nums; text-align: right }}
.talk {{ display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: flex-start }}
.talk img {{ width: 224px; border-radius: .5rem }}
.user {{ margin: .2rem 0; opacity: .75 }} .model {{ margin: 0 0 1rem; font-size: 1.2rem }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem }}
figure {{ margin: 0; border-top: 4px solid }}
figure.right {{ border-color: #2a8a4a }} figure.wrong {{ border-color: #c0392b }}
figure img {{ width: 100%; display: block }} figcaption {{ font-size: .85rem }} s {{ opacity: .6 }}
</style>
<h1>What the demo learned</h1>
<div class="talk"><img alt="a composed scene" src="{_uri(records[0])}"><div>{said}</div></div>
<h2>New scenes, named by free generation</h2>
<table><tr><th></th><td>scenes</td><td>named exactly</td></tr>{table}</table>
<p>{kinds} kinds of things; the scenes (background, place, size, turn) are new, the things are not.
Loss while training, both stages:</p>
{_curve(Path(step).parent.parent)}
<h2>Scenes and answers</h2>
<p>Wrong answers come first, with the right one struck through.</p>
<div class="grid">{cards}</div>
<p>Checkpoint {html.escape(str(step))}, page made {time.strftime("%Y-%m-%d %H:%M")}.</p>
</html>
"""


def _is_right(line: dict[str, str]) -> bool:
    return normalised(line["answer"]) == normalised(line["reference"])


def _uri(record: Record) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(record.media[0].read()).decode()


def _curve(run: Path) -> str:
    """Loss against step as a small SVG."""
    losses = []
    for stage in ("align", "instruct"):
        path = run / stage / "log.jsonl"
        if path.is_file():
            steps = [json.loads(line) for line in path.read_text().splitlines()]
            losses += [step["loss"] for step in steps if step.get("loss") is not None]
    if len(losses) < 2:
        return ""
    width, height, top = 640, 140, max(losses)
    points = " ".join(
        f"{i / (len(losses) - 1) * width:.1f},{height - loss / top * height:.1f}" for i, loss in enumerate(losses)
    )
    return (
        f'<svg viewBox="-4 -14 {width + 8} {height + 20}" width="100%" style="max-width:{width}px" role="img" '
        f'aria-label="loss falls from {losses[0]:.2f} to {losses[-1]:.2f}"><polyline points="{points}" fill="none" '
        f'stroke="currentColor"/><text x="0" y="-3" font-size="11" fill="currentColor">{losses[0]:.2f}</text>'
        f'<text x="{width}" y="{height - 6}" font-size="11" text-anchor="end" fill="currentColor">{losses[-1]:.2f} '
        f"after {len(losses)} steps</text></svg>"
    )


if __name__ == "__main__":
    sys.exit(main())
