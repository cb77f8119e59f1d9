"""Each case runs in an interpreter of its own: what is tested is the order of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    """What the code prints. Fails the test with the code's own error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_libraries_import_and_nms_suppresses() -> None:
    # Boxes 0 and 1 share 9 x 10 of 10 x 10 + 10 x 10 - 90 = 110: IoU 0.818. Box 2 is apart.
    out = run(
        """
import mmchat
import torchvision, timm, open_clip, torch
from transformers import LlamaForCausalLM
boxes = torch.tensor([[0., 0., 10., 10.], [1., 0., 11., 10.], [20., 20., 30., 30.]])
scores = torch.tensor([0.5, 0.9, 0.1])
print(torch.ops.torchvision.nms(boxes, scores, 0.8).tolist())
print(torch.ops.torchvision.nms(boxes, scores, 0.82).tolist())
print(torch.ops.torchvision.nms(boxes[:0], scores[:0], 0.5).tolist())
"""
    )
    assert out.splitlines() == ["[1, 2]", "[1, 0, 2]", "[]"]


def test_costs_nothing_before_torchvision_is_used() -> None:
    out = run(
        """
import sys, importlib.util
import mmchat
found = importlib.util.find_spec("torchvision")
print(found is not None, "torch" in sys.modules, "torchvision" in sys.modules)
"""
    )
    assert out.split() == ["True", "False", "False"]


@pytest.mark.parametrize(
    "first",
    [
        "from mmchat import torchvision_repair; torchvision_repair.install()",
        # Without the repair the import may fail; a later one must work.
        """
try:
    import torchvision
except RuntimeError:
    pass
""",
    ],
    ids=["installed twice", "torchvision first"],
)
def test_is_idempotent(first: str) -> None:
    out = run(
        f"""
import sys
{first}
import mmchat
from mmchat import torchvision_repair
torchvision_repair.install()
import torchvision.transforms.v2
torchvision_repair.install()
print(sum(type(item).__module__ == "mmchat.torchvision_repair" for item in sys.meta_path) <= 1)
"""
    )
    assert out.split() == ["True"]
