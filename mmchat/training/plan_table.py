"""A stage's plan as a table for a person, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from typing import Any

from mmchat.models.head import HEAD_CHUNK

WIDTH = 100
MEMORY_LINES = {
    "weights": "weights",
    "gathered": "weights gathered by ZeRO-3, at most",
    "gradients": "gradients",
    "optimizer": "optimizer: moments, fp32 masters",
    "step_gradients": "gradients in fp32 while stepping",
    "reduce_bucket": "DeepSpeed's reduce bucket",
    "llm_activations": "activations of the LLM",
    "media_activations": "activations of what learns around it",
    "logits": f"logits, {HEAD_CHUNK} positions at a time",
}


def plan_table(plan: dict[str, Any]) -> str:
    """The text of what plan_stage() returned."""
    about, at_least, of_planned = ("", "", "") if plan["is_exact"] else ("~", ", at least", " of the planned steps")
    how = "exact: every pack was planned"
    if not plan["is_exact"]:
        how = f"~: first {plan['steps_planned']:,} of {plan['steps']:,} steps, extrapolated"
    lines = [
        f"{plan['stage']}: {plan['steps']:,} steps of {plan['lanes']} packs of {plan['pack_tokens']:,} tokens ({how})",
        "",
        f"{'source':<18} {'task':<9} {'weight':>6} {'in shards':>10} {'samples':>12} {'left out':>8} {'epochs':>7} "
        f"{'tokens':>15} {'learned':>7}",
    ]
    for row in plan["sources"]:
        epochs = format(row["epochs"], ".2f" if row["epochs"] < 999 else ",.0f")
        lines.append(
            f"{_cut(row['name'], 18):<18} {_cut(row['task'], 9):<9} {row['weight']:>6.1%} {row['in_shards']:>10,} "
            f"{about + format(row['samples'], ','):>12} {_count(row['left_out'], about):>8} "
            f"{about + epochs:>7} {_count(row['tokens'], about):>15} "
            + ("      ?" if row["tokens"] is None else f"{row['learned'] / max(1, row['tokens']):>7.1%}")
        )
    lines.append(
        f"{'all':<28} {'':>6} {sum(row['in_shards'] for row in plan['sources']):>10,} "
        f"{about + format(plan['samples'], ','):>12} {_count(plan['left_out'], about):>8} {'':>7} "
        f"{about + format(plan['tokens'], ','):>15} {plan['learned'] / max(1, plan['tokens']):>7.1%}"
    )
    lines += [f"left out: {about}{count:,}, {reason}" for reason, count in plan["left_out_by_reason"].items()]
    for one in plan["excerpts"]:
        how = f"{one['shown']:,.6g} of {one['whole']:,.6g} {one['unit']}, {one['shown'] / one['whole']:.1%}"
        said = f"shortened: {about}{one['items']:,} items, {one['rule']}: {about}{how}"
        lines.append(textwrap.fill(said, WIDTH, subsequent_indent="  "))
    lines += [f"padding {plan['padding']:.1%}, learned {about}{plan['learned']:,} tokens", ""]

    lines.append(f"{'modality':<18} {'items':>14} {'LLM tokens':>16} {'share':>6} {'encoder patches':>18}")
    of_media = sum(counts["tokens"] for counts in plan["modalities"].values())
    rows = {"text": {"items": 0, "tokens": plan["tokens"] - of_media, "patches": 0}, **plan["modalities"]}
    for name, counts in rows.items():
        items, tokens, patches = (about + format(counts[what], ",") for what in ("items", "tokens", "patches"))
        if name == "text":
            items = patches = ""
        share = counts["tokens"] / max(1, plan["tokens"])
        lines.append(f"{name:<18} {items:>14} {tokens:>16} {share:>6.1%} {patches:>18}")
    for what, pack in plan["largest"].items():
        if pack[what]:
            where = f"{pack['tokens']:,} tokens, {pack['patches']:,} patches, step {pack['step']}, lane {pack['lane']}"
            lines.append(_cut(f"most {what} in a pack{of_planned}: {where}: {', '.join(pack['samples'])}", WIDTH))
    lines.append("")

    lines.append(f"{'part':<20} {'parameters':>16}")
    for part in plan["parts"]:
        lines.append(f"{part['name']:<20} {part['parameters']:>16,}  {'learns' if part['learns'] else 'frozen'}")
    lines.append("")

    columns, when = plan["memory"], plan["time"]
    lines.append(f"{'memory of a rank (estimate), by ranks':<48}" + "".join(f"{c['ranks']:>12}" for c in columns))
    for key, said in MEMORY_LINES.items():
        if key in columns[0]:
            said += at_least if key.endswith("_activations") else ""  # a pack to come may be larger
            lines.append(f"{said:<48}" + "".join(f"{_bytes(column[key]):>12}" for column in columns))
    unknown = any(value is None for value in columns[0].values())
    totals = [sum(value or 0 for key, value in column.items() if key != "ranks") for column in columns]
    said = "sum" + " of what is known" * unknown + at_least
    lines.append(f"{said:<48}" + "".join(f"{_bytes(total):>12}" for total in totals))
    lines += [
        "Not in it: temporary buffers (of frozen encoders too), fragmentation, the GPU's own context",
        "",
        f"FLOPs: {about}{_si(plan['flops'] / plan['steps'], 'FLOP')} a step, {about}{_si(plan['flops'], 'FLOP')} in "
        "all, by the formula of the log's MFU",
        f"time: {about}{when['gpu_hours']:,.3g} GPU hours at {when['utilisation']:.0%} of an {when['gpu']}'s "
        f"{_si(when['peak_flops'], 'FLOP/s')}: arithmetic, not a measurement",
    ]
    warnings = [textwrap.fill(f"warning: {text}", WIDTH, subsequent_indent="  ") for text in plan["warnings"]]
    return "\n".join([*map(str.rstrip, lines), *warnings])


def _si(value: float, unit: str) -> str:
    """12345 -> '12.3 kB'."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def _count(value: int | None, about: str) -> str:
    return "?" if value is None else f"{about}{value:,}"


def _bytes(value: int | None) -> str:
    return "unknown" if value is None else _si(value, "B")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
