"""The results of run.py beside the paper's claims: python benchmarks/flora/table.py [--out docs/flora_results.md]

Writes the tables between two marks of the page, leaving what people wrote around them, and the figures beside it. The
rules of the verdicts are those of grid.yaml.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.flora.figures import chart
from benchmarks.flora.grid import Cell, Claim, Grid, load_grid, read_result
from mmchat.training.log import duration

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results: written by benchmarks/flora/table.py -->", "<!-- end of results -->"
REPRODUCED, NOT_REPRODUCED, NOT_RUN, NOT_COMPARABLE = "reproduced", "not reproduced", "not run", "not comparable"


@dataclass(frozen=True)
class Found:
    """The results that there are, of the cells of a grid."""

    grid: Grid

    @cached_property
    def cells(self) -> list[Cell]:
        return self.grid.all_cells()

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """By name of the cell. Raises ValueError for those of another grid.yaml, whose rules these would not be."""
        found = {cell: read_result(self.grid.result(cell)) for cell in self.cells}
        of_others = [
            cell.name
            for cell, result in found.items()
            if result is not None and result["config_sha256"] != self.grid.config_sha256(cell)
        ]
        if of_others:
            raise ValueError(f"results of another grid.yaml: {', '.join(of_others)}; move them away, or put it back")
        shards = {result["data_sha256"] for result in found.values() if result is not None}
        if len(shards) > 1:
            raise ValueError(f"the results are of {len(shards)} sets of shards, which cannot be compared")
        return {cell.name: result for cell, result in found.items() if result is not None}

    def seeds(self, size: str, method: str, rank: int | None = None, scope: str | None = None) -> list[Cell]:
        """The cells that the grid has of one kind, one a seed; the usual rank and scope where none is given."""
        kind = self.grid.cell(size, method, 0, rank, scope)
        return [c for c in self.cells if (c.size, c.method, c.rank, c.scope) == (size, method, kind.rank, kind.scope)]

    def values(self, cells: Sequence[Cell], metric: str, missing: float = 0.0) -> list[float]:
        """Of those of the cells that have a result."""
        done = [self.results[cell.name] for cell in cells if cell.name in self.results]
        if metric == "share":
            return [result["parameters"]["share"] for result in done]
        return [result["missing"][f"{missing:g}"][metric] for result in done]


def verdict(found: Found, claim: Claim, size: str) -> tuple[str, str]:
    """One of the four verdicts on a claim at one size, and the figures that it follows from."""
    if claim.not_comparable:
        return NOT_COMPARABLE, claim.not_comparable
    wanted = [found.seeds(size, method) for method in (claim.of, claim.than) if method]
    lacking = [cell for cells in wanted for cell in cells if cell.name not in found.results]
    if lacking or not all(wanted):
        return NOT_RUN, f"{len(lacking)} of {sum(map(len, wanted))} results missing" if all(
            wanted
        ) else "not in the grid"
    means = [statistics.fmean(found.values(cells, claim.metric, claim.missing)) for cells in wanted]
    if claim.value is not None:
        holds, shown = means[0] <= claim.value, _percent(means[0])
    else:
        of, than = means
        limit = than * claim.ratio if claim.ratio is not None else than + (claim.difference or 0.0)
        # With nothing but `below` to show, an equal rate does not show it.
        holds = of < limit if claim.ratio == 1.0 else of <= limit
        change = f", {abs(of / than - 1):.0%} {'lower' if of <= than else 'higher'}" if than else ""
        shown = f"{_percent(of)} against {_percent(than)}{change}"
    return (REPRODUCED if holds else NOT_REPRODUCED), shown


def page(found: Found, figures: Sequence[str]) -> str:
    """The part of the page between the marks."""
    return "\n\n".join(
        [
            "## The paper's claims",
            claims_table(found),
            "## Error rates",
            "Mean over the seeds, and their standard deviation where there are several; in percent.",
            *(part for size in found.grid.sizes for part in _rates(found, size)),
            *(f"![{Path(name).stem.replace('_', ' ')}](images/{name})" for name in figures),
            "## Ranks and scopes",
            kinds_table(found),
            "## What was run",
            _account(found),
        ]
    )


def claims_table(found: Found) -> str:
    sizes = list(found.grid.sizes)
    rows = [["the paper", "rule, fixed before the run", *sizes]]
    for claim in found.grid.claims:
        if claim.not_comparable:
            rows.append([claim.paper, claim.not_comparable, *([NOT_COMPARABLE] * len(sizes))])
            continue
        verdicts = [verdict(found, claim, size) for size in sizes]
        rows.append([claim.paper, claim.rule, *(f"**{word}**: {shown}" for word, shown in verdicts)])
    return _markdown(rows)


def kinds_table(found: Found) -> str:
    """Every rank and scope of the methods that have them."""
    rows = [["size", "method", "rank", "scope", "seeds", "trained", "EER, none missing", "EER, half missing"]]
    seen = set()
    for cell in found.cells:
        kind = (cell.size, cell.method, cell.rank, cell.scope)
        if cell.rank is None or kind in seen or not found.grid.methods[cell.method].hears:
            continue
        seen.add(kind)
        cells = found.seeds(*kind)
        if not (shares := found.values(cells, "share")):
            continue
        label = found.grid.methods[cell.method].label
        rates = [_mean(found.values(cells, "eer", missing)) for missing in (0.0, 0.5)]
        seeds = f"{len(shares)} of {len(cells)}"
        rows.append([cell.size, label, str(cell.rank), cell.scope or "", seeds, _percent(shares[0]), *rates])
    return _markdown(rows) if len(rows) > 1 else "Not run."


def draw(found: Found) -> dict[str, str]:
    """The figures by name of the file, of what has results."""
    grid, drawn = found.grid, {}
    shares = sorted(grid.missing)
    for size in grid.sizes:
        lines = {}
        for name, method in grid.methods.items():
            cells = found.seeds(size, name)
            if found.values(cells, "eer"):
                lines[method.label] = [(x, statistics.fmean(found.values(cells, "eer", x))) for x in shares]
        if lines:
            ticks = [(share, f"{share:.0%}") for share in shares]
            title = f"EER, {size} ({_millions(_parameters(found, size))})"
            drawn[f"flora_missing_{size}.svg"] = chart(title, lines, "recordings missing", ticks)
    run = {size: _parameters(found, size) for size in grid.sizes if _parameters(found, size)}
    by_size = {}
    for name, method in grid.methods.items():
        rates = [(count, found.values(found.seeds(size, name), "eer")) for size, count in run.items()]
        if points := [(float(count), statistics.fmean(values)) for count, values in rates if values]:
            by_size[method.label] = sorted(points)
    if by_size:
        ticks = [
            (float(count), f"{size}, {_millions(count)}") for size, count in sorted(run.items(), key=lambda one: one[1])
        ]
        drawn["flora_size.svg"] = chart("EER, no recording missing", by_size, "parameters", ticks, is_log=True)
    return drawn


def _rates(found: Found, size: str) -> list[str]:
    shares = sorted(found.grid.missing)
    head = ["method", "seeds", "trained", *(f"EER, {share:.0%} missing" for share in shares)]
    rows = [[*head, "FAR at 10 % FRR, none missing", "half missing"]]
    for name, method in found.grid.methods.items():
        cells = found.seeds(size, name)
        if not (trained := found.values(cells, "share")):
            continue
        rates = [_mean(found.values(cells, "eer", share)) for share in shares]
        fars = [_mean(found.values(cells, "far_at_frr_10", share)) for share in (0.0, 0.5)]
        rows.append([method.label, f"{len(trained)} of {len(cells)}", _percent(trained[0]), *rates, *fars])
    if len(rows) == 1:
        return [f"### {size}", "Not run."]
    return [f"### {size}: {_millions(_parameters(found, size))} parameters", _markdown(rows)]


def _account(found: Found) -> str:
    """How much was run, on what, and what was not."""
    lacking = [cell.name for cell in found.cells if cell.name not in found.results]
    lines = [f"{len(found.results)} of {len(found.cells)} cells."]
    if found.results:
        done = list(found.results.values())
        hours = duration(sum(result["seconds"]["wall"] for result in done))
        machines = sorted({_machine(result) for result in done})
        questions = sorted({result["missing"]["0"]["num_questions"] for result in done})
        lines.append(
            f"They took {hours}, on {'; '.join(machines)}. Each was asked {' or '.join(f'{n:,}' for n in questions)} "
            f"questions. Shards {done[0]['data_sha256'][:12]}."
        )
        failed = sum(s["num_questions"] - s["num_answered"] for r in done for s in r["missing"].values())
        if failed:
            lines.append(f"{failed:,} questions had no answer; they count as wrong.")
    if lacking:
        lines.append(f"Not run: {', '.join(f'`{name}`' for name in lacking)}.")
    return "\n\n".join(lines)


def _machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    if result["device"] != "cpu":
        return str(result["device"])
    return f"{facts['cpu']}, {facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'}"


def _parameters(found: Found, size: str) -> int:
    """Of the smallest model of a size that was run: the LLM with next to nothing around it; 0 where none was."""
    totals = [
        found.results[c.name]["parameters"]["total"] for c in found.cells if c.size == size and c.name in found.results
    ]
    return min(totals, default=0)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _millions(count: int) -> str:
    return f"{count / 1e6:.0f}M"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the grid: a.b.c=value")
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_name("grid.yaml"), metavar="F")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/flora_results.md", metavar="F", help="the page")
    args = parser.parse_intermixed_args(arguments)
    try:
        found = Found(load_grid(args.grid, args.overrides))
        figures = draw(found)
        text = args.out.read_text() if args.out.exists() else f"# FLoRA's experiment\n\n{BEGIN}\n{END}\n"
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{args.out} lacks the line {BEGIN!r} or, behind it, {END!r}: the tables go between them")
        images = args.out.parent / "images"
        images.mkdir(parents=True, exist_ok=True)
        for old in images.glob("flora_missing_*.svg"):
            old.unlink()
        for name, svg in figures.items():
            (images / name).write_text(svg)
        args.out.write_text(f"{before}{BEGIN}\n\n{page(found, list(figures))}\n\n{END}{after}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(found.results)} of {len(found.cells)} cells; {len(figures)} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
