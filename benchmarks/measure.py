"""What every benchmark here needs: the facts of the machine, the spread of repeated figures, the GEMM limit."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def say(text: str) -> None:
    print(text, flush=True)


def machine(*libraries: ModuleType) -> dict[str, Any]:
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            facts["cpu"] = line.split(":")[1].strip()
    facts |= {module.__name__: module.__version__ for module in (torch, *libraries)}
    return facts | {"python": platform.python_version()}


def spread(values: list[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "iqr": high - low, "min": min(values), "max": max(values)}


def gemm_rates(products: Iterable[tuple[int, torch.Size]]) -> tuple[float, float]:
    """FLOP/s of matrix products alone, forward and both gradients: of the best shape, and of all of them together.

    products: rows of the input, and shape [out, in] of the weight.
    """
    timed: dict[tuple[int, ...], tuple[float, float]] = {}
    best = flops = seconds = 0.0
    for rows, (num_out, num_in) in products:
        shape = (rows, num_out, num_in)
        if shape not in timed:
            w, x, y = torch.randn(num_out, num_in), torch.randn(rows, num_in), torch.randn(rows, num_out)
            outs = [torch.empty_like(tensor) for tensor in (y, x, w)]
            taken = []
            for _ in range(5):
                started = time.process_time()
                for (a, b), out in zip(((x, w.t()), (y, w), (y.t(), x)), outs, strict=True):
                    torch.mm(a, b, out=out)
                taken.append(time.process_time() - started)
            timed[shape] = 6.0 * rows * num_out * num_in, min(taken)
        best = max(best, timed[shape][0] / timed[shape][1])
        flops, seconds = flops + timed[shape][0], seconds + timed[shape][1]
    return best, flops / seconds
