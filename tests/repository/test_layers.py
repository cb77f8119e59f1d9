"""A module imports its own folder and lower layers only, and each outside library has its place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [
    {"schema", "errors", "conversation", "html_page", "metrics", "regions", "region_marks", "region_text", "storage"}
    | {"batch", "distributed", "torchvision_repair"},
    {"modalities", "models", "tasks", "sources"},
    {"config", "checkpoint"},
    {"data"},
    {"training", "inference"},
    {"serving"},
]  # fmt: skip
# Within layer 1, models may use modalities; nothing else crosses.
ALLOWED = {("models", "modalities")}
# Library -> the only places that may import it.
OUTSIDE = {
    "deepspeed": {"mmchat/training/engine.py"},
    "webdataset": {"mmchat/data/shard_writer.py"},
    "transformers": {"mmchat/models/", "mmchat/modalities/", "mmchat/inference/", "mmchat/training/engine.py",
                     "mmchat/data/chat_template.py", "mmchat/data/chat_format.py"},
    "huggingface_hub": {"mmchat/inference/hub.py"},
    "open_clip": {"mmchat/modalities/"},
    "timm": {"mmchat/modalities/"},
    "av": {"mmchat/modalities/"},
    "fsspec": {"mmchat/storage.py"},
    "ijson": {"mmchat/sources/files.py", "mmchat/sources/json_text.py"},
    "braceexpand": {"mmchat/data/energon.py"},
    "datasets": {"mmchat/sources/hf_dataset.py"},
    "pyarrow": {"mmchat/sources/hf_dataset.py"},
    "fastapi": {"mmchat/serving/"},
    "starlette": {"mmchat/serving/"},
    "uvicorn": {"mmchat/serving/server.py"},
    "h11": {"mmchat/serving/server.py", "mmchat/serving/fetch.py"},
    "prometheus_client": {"mmchat/serving/metrics.py"},
    "sacrebleu": {"mmchat/metrics/text.py"},
    "rouge_score": {"mmchat/metrics/text.py"},
}  # fmt: skip
MODULES = sorted((ROOT / "mmchat").rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from mmchat import distributed` imports mmchat.distributed
            names |= {f"mmchat.{a.name}" for a in node.names} if node.module == "mmchat" else {node.module}
    return names


def _layer(package: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def faults(path: Path, root: Path = ROOT) -> list[str]:
    relative = path.relative_to(root).as_posix()
    own = relative.split("/")[1].removesuffix(".py")
    found = []
    for name in _imports(path):
        head = name.split(".")[0]
        if head == "mmchat" and own != "__init__" and len(name.split(".")) > 1:
            other = name.split(".")[1]
            lower = _layer(other) < _layer(own)
            if not (other == own or lower or (own, other) in ALLOWED or (_layer(own) == 0 == _layer(other))
                    or (_layer(own) == 2 == _layer(other))):  # fmt: skip
                found.append(f"{relative} imports {name}")
        elif head in OUTSIDE and not any(relative.startswith(place) for place in OUTSIDE[head]):
            found.append(f"{relative} imports {head}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    assert not faults(path)


@pytest.mark.parametrize(
    "line", ["from mmchat.training.stage import x", "import deepspeed", "from mmchat.tasks import TASKS"]
)
def test_a_planted_import_is_caught(tmp_path, line):
    planted = tmp_path / "mmchat/models/planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert faults(planted, tmp_path)
