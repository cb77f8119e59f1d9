"""The page of an evaluation: one file that needs nothing else, the worst answers first, boxes drawn on the pictures.

Pictures are data URIs. A content security policy forbids everything that is not in the file, and every script but the
one below; what a model says is escaped, so that it stays text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mmchat.data.chat_template import ChatTemplate
from mmchat.html_page import document
from mmchat.inference.controls import Controls
from mmchat.inference.evaluate_card import MAX_SHORT, MAX_TEXT, Pictures, card, escaped
from mmchat.inference.predictions import Case

NUM_WORST, NUM_BEST, NUM_NOT_ANSWERED = 60, 12, 12
WRONG_BELOW = 0.5  # by the task's judge
MAX_REASONS = 50  # that a list of them shows


def page(metrics: Mapping[str, Any], cases: Sequence[Case], template: ChatTemplate, picture: str = "") -> str:
    """The whole HTML of metrics.json's content and the questions; `template` reads the regions of an answer.

    `picture` is the SVG of a task that draws its scores.
    """
    title = f"{metrics['task']}: {metrics['num_questions']:,} questions"
    drawer = Pictures()
    kinds, chosen = _chosen(cases)
    cards = "\n".join(card(case, kind, drawer, template) for case, kind in chosen)
    shown = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
    body = f"""<a class="skip" href="#cards">Skip to the answers</a>
<header>
<h1>{escaped(title)}</h1>
<p class="muted">{escaped(_facts(metrics), MAX_TEXT)}</p>
{_banner(metrics)}
</header>
<main>
<div class="columns">
<section aria-labelledby="h-scores"><h2 id="h-scores">Scores</h2>{_scores(metrics)}</section>
<section aria-labelledby="h-judge"><h2 id="h-judge">How right each answer is</h2>{_histogram(cases)}</section>
</div>
{f'<figure class="curves">{picture}</figure>' if picture else ""}
{_not_answered(metrics)}
<details><summary>Protocol {escaped(metrics["protocol_sha256"][:16])}</summary>{_table(_protocol(metrics))}</details>
<h2>Answers, the worst first</h2>
<p class="muted">{shown} of {len(cases):,} are shown; among equals a hash of the key decides. Wrong: judged below
{WRONG_BELOW:g}.</p>
<form id="controls" role="search" aria-label="Choose answers">
<fieldset><legend class="out">Show</legend>
<label><input type="radio" name="kind" value="" checked> all</label>
<label><input type="radio" name="kind" value="wrong"> wrong</label>
<label><input type="radio" name="kind" value="right"> right</label>
<label><input type="radio" name="kind" value="none"> not answered</label></fieldset>
<label>Text <input id="text" type="search" placeholder="key or words" autocomplete="off"></label>
<output id="count" aria-live="polite"></output>
</form>
<p class="legend"><span class="chip true">R</span> right one, solid <span class="chip said">A</span> answer, dashed
<span class="chip c0">Q</span> in the question, dotted</p>
<div id="cards" tabindex="-1">
{cards or '<p class="muted">There is no answer to show.</p>'}
</div>
</main>"""
    return document(title, _STYLE, _SCRIPT, body)


def _chosen(cases: Sequence[Case]) -> tuple[dict[str, int], list[tuple[Case, str]]]:
    """What is shown, with its kind: worst answers, then some without one, then the best; and how many of each."""

    def spread(case: Case) -> str:  # so that equals come from everywhere in the set
        return hashlib.sha256(case.key.encode()).hexdigest()

    answered = sorted((case for case in cases if not case.answer.error), key=lambda one: (one.judge, spread(one)))
    failed = sorted((case for case in cases if case.answer.error), key=spread)[:NUM_NOT_ANSWERED]
    worst, rest = answered[:NUM_WORST], answered[NUM_WORST:]
    best = sorted(rest, key=lambda one: (-one.judge, spread(one)))[:NUM_BEST]
    marked = [(case, "wrong" if case.judge < WRONG_BELOW else "right") for case in worst]
    marked += [(case, "none") for case in failed]
    marked += [(case, "wrong" if case.judge < WRONG_BELOW else "right") for case in best]
    return {"worst": len(worst), "not answered": len(failed), "best": len(best)}, marked


# ---- the whole ------------------------------------------------------------------------------------------------------


def _facts(metrics: Mapping[str, Any]) -> str:
    """One line about what was evaluated."""
    checkpoint = metrics["checkpoint_folder"] or "untrained model"
    where = metrics["named_shards"]
    shards = where if isinstance(where, str) else " ".join(where)
    limit = f", the first {metrics['limit']:,}" if metrics["limit"] else ""
    return f"{checkpoint} on {shards}: {metrics['num_records']:,} records{limit}, {metrics['dtype']}"


def _banner(metrics: Mapping[str, Any]) -> str:
    lines = Controls.model_validate(metrics["controls"]).described()
    if not lines:
        return ""
    swapped = ""
    if metrics["controls"]["swap"]:
        swapped = " The pictures below were shown in the size of the own ones, whose right boxes are drawn."
    counts = ", ".join(f"{name}: {count:,}" for name, count in metrics["changed_records"].items()) or "none"
    return (
        f'<p class="banner" role="note"><strong>Control: {escaped("; ".join(lines))}.</strong> These are not the '
        f"scores of the model as it is used. Records changed: {escaped(counts)}.{swapped}</p>"
    )


def _scores(metrics: Mapping[str, Any]) -> str:
    columns = {"all": metrics["scores"]}
    for name, part in metrics.get("scores_by_presence", {}).items():
        columns[f"media {name} ({part['num_questions']:,})"] = part["scores"]
    if "guarded" in metrics:
        guarded = metrics["guarded"]
        columns[f"with safety {guarded['safety']} ({guarded['share_replaced']:.1%} replaced)"] = guarded["scores"]
    head = "".join(f"<th scope='col'>{escaped(name)}</th>" for name in columns) if len(columns) > 1 else ""
    rows = "".join(
        f"<tr><th scope='row'>{escaped(name).replace('_', '_<wbr>')}</th>"
        + "".join(f'<td class="number">{_number(column.get(name))}</td>' for column in columns.values())
        + "</tr>"
        for name in metrics["scores"]
    )
    malformed = metrics["num_with_malformed_regions"]
    note = f'<p class="muted">Answers with a malformed region: {malformed:,}.</p>' if malformed else ""
    return (
        f'<div class="scroll"><table class="scores">{f"<tr><td></td>{head}</tr>" if head else ""}{rows}</table></div>'
        f"{note}"
    )


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) and abs(value) <= 1 else f"{value:,.6g}"


def _histogram(cases: Sequence[Case], bins: int = 20) -> str:
    """Bars over judge values; questions without an answer are in the first one, in another colour."""
    counts, failed = [0] * bins, sum(bool(case.answer.error) for case in cases)
    for case in cases:
        counts[min(int(case.judge * bins), bins - 1)] += 1
    width, height, top = 300, 90, max([1, *counts])
    step, bars = width / bins, []
    for i, count in enumerate(counts):
        tall = count / top * height
        title = f"{i / bins:g} to {(i + 1) / bins:g}: {count:,} questions"
        bars.append(
            f'<rect class="bar" x="{i * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}"><title>{title}</title></rect>'
        )
    bars.append(
        f'<rect class="none" y="{height - failed / top * height:.1f}" width="{step - 1:.1f}" '
        f'height="{failed / top * height:.1f}"><title>not answered: {failed:,}</title></rect>'
    )
    mean = sum(case.judge for case in cases) / max(len(cases), 1)
    label = f"Histogram: mean {mean:.3f}, {counts[0]:,} in the lowest bar, {counts[-1]:,} in the highest"
    return (
        f'<figure class="plot"><svg viewBox="0 -1 {width} {height + 17}" role="img" aria-label="{label}">'
        f'{"".join(bars)}<line class="axis" x2="{width}" y1="{height}" y2="{height}"/>'
        f'<text y="{height + 12}">0, wrong</text><text x="{width / 2}" y="{height + 12}" text-anchor="middle">mean '
        f'{mean:.3f}</text><text x="{width}" y="{height + 12}" text-anchor="end">1, right</text></svg></figure>'
    )


def _not_answered(metrics: Mapping[str, Any]) -> str:
    """What has no answer, and what was left out while it was asked, by reason."""
    failed, warned = metrics["not_answered"], metrics["warnings"]
    count = sum(one["count"] for one in failed.values())
    title = f"{count:,} not answered, counted as wrong" if failed else "Every question was answered"
    return _reasons(title, failed) + (_reasons("Left out of facts or media", warned) if warned else "")


def _reasons(title: str, found: Mapping[str, Any]) -> str:
    if not found:
        return f'<p class="muted">{title}.</p>'
    rows = "".join(
        f'<tr><td class="number">{one["count"]:,}</td><td>{escaped(reason, MAX_SHORT)}</td><td class="muted">'
        f"{escaped(', '.join(one['keys']), MAX_TEXT)}{' …' if one['count'] > len(one['keys']) else ''}</td></tr>"
        for reason, one in list(found.items())[:MAX_REASONS]
    )
    if len(found) > MAX_REASONS:
        rows += f"<tr><td></td><td>and {len(found) - MAX_REASONS:,} more reasons</td></tr>"
    return (
        f'<section><h2 class="problem">{title}</h2><div class="scroll"><table><tr><th></th><th>reason</th><th>keys</th>'
        f"</tr>{rows}</table></div></section>"
    )


def _protocol(metrics: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [*metrics["protocol"].items()]
    rows += [(f"chat.{name}", value) for name, value in metrics["chat"].items()]
    names = ("decoding", "dtype", "mmchat_version", "protocol_sha256", "questions_sha256", "checkpoint_sha256")
    return rows + [(name, metrics[name]) for name in (*names, "shards_sha256")]


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    body = "".join(
        f"<tr><th scope='row'>{escaped(name)}</th><td>{escaped(repr(value))}</td></tr>" for name, value in rows
    )
    return f'<div class="scroll"><table>{body}</table></div>'


_STYLE = """
:root { color-scheme: light dark; --back: #fafaf8; --card: #fff; --text: #1c1e21; --muted: #5d646c; --line: #dfe2e5;
  --accent: #0b6e62; --bad: #b3261e; --bar: #6a8f8a; --warn: #fff3cd; --warn-text: #5c4700;
  --true: #1f7a34; --said: #c2255c; --c0: #1864ab; --c1: #6741d9; --c2: #0b7285; --c3: #a65308 }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1e2125; --text: #e8e8e6; --muted: #a0a7af;
  --line: #363b41; --accent: #4fd1bd; --bad: #ff8a80; --bar: #6fa39c; --warn: #4a3b08; --warn-text: #ffe9a8;
  --true: #69db7c; --said: #ff6b9d; --c0: #74c0fc; --c1: #b197fc; --c2: #3bc9db; --c3: #ffa94d } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Open Sans", sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 0 } h2 { font-size: 1.15rem; margin: 1.6rem 0 .4rem }
h3 { font-size: .95rem; margin: 0 } p { margin: .3rem 0 } .muted, figcaption { color: var(--muted); font-size: .85rem }
.problem { color: var(--bad) } h1, h3, p, td, th, summary { overflow-wrap: anywhere }
.skip, .out { position: absolute; left: -99rem } .skip:focus { left: 1rem }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.banner { background: var(--warn); color: var(--warn-text); border-radius: .5rem; padding: .6rem .9rem;
  margin: .8rem 0 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2.5rem }
table { border-collapse: collapse; font-size: .9rem } td, th { text-align: left; vertical-align: top;
  padding: .15rem 1.2rem .15rem 0; font-weight: normal } tr > th { color: var(--muted) }
.scores tr > th[scope=row] { color: var(--text) } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto } details { margin-top: 1rem } summary { cursor: pointer }
figure { margin: 0 } .plot { max-width: 26rem } .plot svg { width: 100%; display: block }
audio { width: 100%; max-width: 26rem; height: 36px; display: block }
.curves { margin: 1rem 0 } .curves svg { max-width: 100%; height: auto; border-radius: .4rem }
.plot text { font-size: 11px; fill: var(--muted) } .bar { fill: var(--bar) } .none { fill: var(--bad) }
.axis { stroke: var(--line) }
form { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center;
  background: var(--back); border-bottom: 1px solid var(--line); padding: .6rem 0; margin-top: .6rem }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem }
input { font: inherit } input[type=search] { width: 11rem; max-width: 60vw } output { color: var(--muted);
  margin-left: auto }
.card { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: .6rem;
  padding: .8rem 1rem; margin: .9rem 0 } .card[data-kind=right] { border-left-color: var(--true) }
.card[data-kind=none] { border-left-color: var(--muted) }
.card header { display: flex; gap: 1rem; justify-content: space-between; align-items: baseline }
.judge { font-variant-numeric: tabular-nums; color: var(--muted) }
.sample { display: grid; grid-template-columns: minmax(0, 26rem) minmax(0, 1fr); gap: 1.2rem; margin-top: .6rem }
.sample.bare { grid-template-columns: minmax(0, 1fr) } .media { display: grid; gap: .6rem; align-content: start }
.drawn { position: relative; line-height: 0; width: fit-content; max-width: 100% }
.drawn img, .gone { max-width: 100%; height: auto; border-radius: 3px }
.gone { background: repeating-linear-gradient(45deg, var(--line) 0 6px, transparent 6px 14px) }
.marks { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden }
.marks rect { fill: none; stroke: var(--c); stroke-width: 2.5px; vector-effect: non-scaling-stroke;
  filter: drop-shadow(0 0 1px #fff) drop-shadow(0 0 1px #fff) }
.marks circle { fill: var(--c); stroke: #fff; stroke-width: 1.5px; vector-effect: non-scaling-stroke }
.marks .said { stroke-dasharray: 7 4 } .marks rect[class^=c] { stroke-dasharray: 2 3 }
.marks text { fill: var(--c); stroke: #fff; stroke-width: .25em; paint-order: stroke; font-weight: bold;
  stroke-dasharray: none !important; vector-effect: none }
.marks, .marks * { --true: #1f7a34; --said: #c2255c; --c0: #1864ab; --c1: #6741d9; --c2: #0b7285; --c3: #a65308 }
.true { --c: var(--true) } .said { --c: var(--said) } .c0 { --c: var(--c0) } .c1 { --c: var(--c1) }
.c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.chip { color: var(--c, var(--muted)); border: 1.5px solid; border-radius: .4em; padding: 0 .35em; font-size: .8em;
  font-weight: 600; white-space: nowrap }
.chip.said { border-style: dashed } .chip[class*=" c"] { border-style: dotted }
.chip.item { font-weight: normal; margin-right: .3em }
.talk { white-space: pre-wrap } .talk table { white-space: normal; margin: .4rem 0 } .talk b { color: var(--muted);
  font-size: .75rem; font-weight: 600; margin-right: .5em; text-transform: uppercase; letter-spacing: .04em }
.talk > p { margin: 0 0 .5rem } .assistant { color: var(--muted) } .answer { font-size: 1.05rem }
.top .right td { color: var(--true); font-weight: 600 } .legend { font-size: .85rem; color: var(--muted) }
[hidden] { display: none !important }
@media (max-width: 46rem) { .sample { grid-template-columns: minmax(0, 1fr) } form { position: static } }
"""

_SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll(".card")];
const words = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
const form = document.getElementById("controls");
const choose = () => {
  const kind = form.elements.kind.value, text = document.getElementById("text").value.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    card.hidden = (kind !== "" && card.dataset.kind !== kind) || (text !== "" && !words.get(card).includes(text));
    shown += !card.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${cards.length} shown`;
};
form.addEventListener("input", choose);
form.addEventListener("submit", (event) => event.preventDefault());
choose();
"""
