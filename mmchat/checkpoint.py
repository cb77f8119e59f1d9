"""Checkpoints: written beside, synced, hashed and renamed, so that a half-written one is never seen.

checkpoints/<run>/<stage>/step-000500/
    config.yaml            the resolved configuration
    weights.safetensors    every part that this or an earlier stage trained, whole, in fp32
    optimizer.safetensors  Adam's moments of the parts that this stage trains
    state.json             step, lane states, counters
    manifest.json          format, sizes and sha256 of the files above, base models, parts, probe

A released checkpoint is one without optimizer.safetensors and state.json, wherever it lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
CONFIG, WEIGHTS, OPTIMIZER, STATE, MANIFEST = (
    "config.yaml", "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message says what was found and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def config_text(self) -> str:
        return (self.folder / CONFIG).read_text()

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / STATE).read_text())

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the model, for a checkpoint that is made of this one."""
        return {name: value for name, value in self.manifest.items() if name not in ("format", "files", "sha256")}

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def weights(self) -> dict[str, Tensor]:
        return _load(self.folder / WEIGHTS)

    def moments(self) -> dict[str, Tensor]:
        return _load(self.folder / OPTIMIZER)


def write_checkpoint(
    folder: Path,
    config_text: str,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None,
    state: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> Path:
    """Writes one checkpoint; at any moment of a crash, `folder` is absent or complete.

    Args:
        moments, state: None in a checkpoint that is released, from which no training is resumed.
    Raises:
        OSError: no space or no permission; nothing is left behind but a partial folder that the next save removes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    # A stage's folder is its own; a release may lie beside anything.
    for leftover in folder.parent.glob("*.partial" if state is not None else partial.name):
        shutil.rmtree(leftover)
    partial.mkdir()
    tensors = [*weights.values(), *(moments or {}).values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if shutil.disk_usage(partial).free < needed + (16 << 20):
        raise OSError(
            f"{partial}: {needed / 1e9:.2f} GB are needed, {shutil.disk_usage(partial).free / 1e9:.2f} are free"
        )
    (partial / CONFIG).write_text(config_text)
    try:
        save_file(dict(weights), partial / WEIGHTS)
        if moments is not None:
            save_file(dict(moments), partial / OPTIMIZER)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(f"{partial}: {error}") from error
    if state is not None:
        (partial / STATE).write_text(json.dumps(state))
    files = {
        name: {"size": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
        for name in (CONFIG, WEIGHTS, OPTIMIZER, STATE)
        if (partial / name).exists()
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    (partial / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1))
    for name in (*files, MANIFEST):
        # safetensors makes files that only their owner can read; these are as readable as the others.
        (partial / name).chmod((partial / CONFIG).stat().st_mode)
        _sync(partial / name)
    _sync(partial)
    if folder.exists():  # the same step again, after a resume from an older one
        _remove(folder)
    partial.rename(folder)
    _sync(folder.parent)
    return folder


def prune(stage_folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints of a stage; called only after a new one is complete."""
    for folder in checkpoints_in(stage_folder)[:-keep]:
        _remove(folder)


def checkpoints_in(stage_folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    found = [path.parent for path in stage_folder.glob(f"step-*/{MANIFEST}") if path.parent.suffix != ".partial"]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies one checkpoint.

    Raises:
        CheckpointError: not a checkpoint, another format, or a file that is not what was written.
    """
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        found = checkpoints_in(folder) or [c for f in sorted(folder.glob("*/")) for c in checkpoints_in(f)]
        hint = f"; did you mean {found[-1]}?" if found else ""
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}{hint}")
    try:
        manifest = json.loads(manifest_path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{manifest_path} is damaged ({error}). {_advice(folder)}") from error
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise CheckpointError(f"{manifest_path} is damaged: wanted a table with `files`. {_advice(folder)}")
    facts = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if manifest.get("sha256") != _digest(facts):
        raise CheckpointError(f"{manifest_path} is damaged: it is not what was written. {_advice(folder)}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. {_advice(folder)}")
        if path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{path} is damaged: it is not the file that was written. {_advice(folder)}")
    return Checkpoint(folder, manifest)


def find(path: Path) -> Path:
    """A checkpoint folder itself, the newest one of a stage's folder, or that of a run's last stage."""
    if path in checkpoints_in(path.parent):
        return path
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints_in(path) or [c for stage in path.glob("*/") for c in checkpoints_in(stage)]
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint. Wanted a folder with manifest.json, or a stage's or run's folder under "
            "checkpoints/ (infer.py also takes a configuration, .yaml: the untrained model)"
        )
    if checkpoints_in(path):
        return found[-1]
    return max(found, key=_place)


def _place(folder: Path) -> tuple[int, str]:
    """Where a checkpoint stands in its run, by its own configuration: that of an earlier stage may lack later ones."""
    try:
        stages = [stage["name"] for stage in yaml.safe_load((folder / CONFIG).read_text())["stages"]]
        return stages.index(folder.parent.name), folder.name
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged, or of another run. {_advice(folder)}") from error


def newest(stage_folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a stage, verified; None without one. Raises CheckpointError."""
    found = checkpoints_in(stage_folder)
    return open_checkpoint(found[-1]) if found else None


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    expected: set[str],
    where: Path,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> None:
    """Copies weights into the model; the names and shapes must be exactly `expected`'s.

    gather: makes a partitioned parameter whole for a moment, to write.

    Raises:
        CheckpointError: lists every missing, unexpected and misshapen name.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: tuple(getattr(own[name], "ds_shape", own[name].shape)) for name in expected if name in own}
    faults = [f"missing: {name}" for name in sorted(expected - weights.keys())]
    faults += [f"unexpected: {name}" for name in sorted(weights.keys() - expected)]
    faults += [
        f"shape of {name}: found {tuple(weights[name].shape)}, wanted {shape}"
        for name, shape in sorted(shapes.items())
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if faults:
        shown = "\n  ".join(faults[:12] + ([f"... and {len(faults) - 12} more"] if len(faults) > 12 else []))
        raise CheckpointError(f"{where} is of another architecture than this configuration builds:\n  {shown}")
    with torch.no_grad():
        for name, value in weights.items():
            with gather([own[name]]):  # type: ignore[list-item]
                own[name].copy_(value.to(own[name].device, own[name].dtype))


def base_identity(pretrained: str) -> dict[str, Any]:
    """What a base model's folder is: sizes of its weight files and a hash of its config; a hub name is its own."""
    folder = Path(pretrained)
    if folder.is_file():
        return {"pretrained": pretrained, "config_sha256": None, "weights": {folder.name: folder.stat().st_size}}
    if not folder.is_dir():
        return {"pretrained": pretrained}
    config = folder / "config.json"
    return {
        "pretrained": pretrained,
        "config_sha256": _sha256(config) if config.is_file() else None,
        "weights": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
    }


def _remove(folder: Path) -> None:
    """Out of sight in one move first: a kill in between leaves no half checkpoint."""
    doomed = folder.with_name(folder.name + ".old.partial")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _advice(folder: Path) -> str:
    return f"Remove or restore {folder}; without it, the run continues from the checkpoint before it"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}. {_advice(path.parent)}") from error


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
