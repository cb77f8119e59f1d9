"""Lets torchvision be imported where its wheel is linked to CUDA and torch is not.

The package index has one torchvision wheel for a torch version on Linux, linked to CUDA. Beside a CPU-only torch its
C++ library cannot be loaded; torchvision passes over that, then attaches shape functions to two of the library's
operators, and fails: "operator torchvision::nms does not exist". With it fail timm, open_clip and most of
transformers, which import torchvision for their picture transforms and need none of its operators. Naming the two
operators first is enough. Where the C++ library loads, nothing is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Operators that torchvision names without looking whether they exist.
OPERATORS = ("nms", "qnms")

# The operators live as long as the objects that registered them.
_registered: list[Any] = []


def install() -> None:
    """Repairs torchvision when it is first imported, not before: it costs nothing where torchvision is not used.

    Calling it again changes nothing, nor does calling it after torchvision was imported.
    """
    if "torchvision" not in sys.modules and not any(isinstance(item, _Finder) for item in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision where it lies, with a loader that repairs it. Looking for it imports nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _repair(Path(self.path).parent)
        super().exec_module(module)


def _repair(folder: Path) -> None:
    """Names the operators of the torchvision in `folder`, unless its own C++ library does."""
    import torch

    # Loading it first decides: once the operators are named here, a library that names them too cannot be loaded.
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    names = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            names.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            if operator == "nms":
                names.impl(operator, _nms, "CPU")
    _registered.append(names)


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression.

    dets [n, 4] as x1, y1, x2, y2; scores [n]. Returns the indices [kept] of boxes that overlap no better one by an
    intersection over union above the threshold, best first.
    """
    import torch

    left, top, right, bottom = dets.unbind(1)
    area = (right - left) * (bottom - top)
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        width = torch.minimum(right[best], right[rest]) - torch.maximum(left[best], left[rest])
        height = torch.minimum(bottom[best], bottom[rest]) - torch.maximum(top[best], top[rest])
        overlap = width.clamp(min=0) * height.clamp(min=0)
        order = rest[overlap <= iou_threshold * (area[best] + area[rest] - overlap)]
    return torch.stack(kept) if kept else order
