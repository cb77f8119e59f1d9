"""The FLoRA experiment (arXiv 2406.09617): python benchmarks/flora/run.py [--list] [--cells 'small-*-s0'] [--hours 6]

Runs the cells of grid.yaml that have no result yet, most informative first, and writes a JSON for each. A run that was
stopped or killed is continued by the same command, in the middle of a cell too; what is finished is never run again.
benchmarks/flora/table.py makes the table and figures.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn in forked workers otherwise
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

GRID = Path(__file__).with_name("grid.yaml")


def main() -> int:
    """Returns the exit status: 0 if nothing is left to do, 3 where --hours are over, 130 stopped, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the grid: a.b.c=value")
    parser.add_argument("--grid", type=Path, default=GRID, metavar="F", help="default: benchmarks/flora/grid.yaml")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="names such as 'small-*-s0'; default: all")
    parser.add_argument("--list", action="store_true", help="show the cells and the time left; run nothing")
    parser.add_argument("--hours", type=float, metavar="H", help="begin no cell that should not be done by then")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

    import torch

    from benchmarks.flora.grid import load_grid
    from benchmarks.flora.prepare import Stopped
    from benchmarks.flora.runner import listing, run_cells
    from mmchat.models.llm import hide_progress_bars

    hide_progress_bars()
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
        grid = load_grid(arguments.grid, arguments.overrides)
        cells = grid.chosen(arguments.cells)
        if arguments.list:
            print(listing(grid, cells))
            return 0
        from mmchat.training.engine import start_distributed
        from mmchat.training.stage import StopRequest

        start_distributed()
        return 3 if run_cells(grid, cells, StopRequest(), arguments.hours) else 0
    except (Stopped, KeyboardInterrupt):
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(code)
