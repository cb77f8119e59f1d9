"""What must hold before a stage continues or starts from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmchat.checkpoint import Checkpoint, CheckpointError, base_identity, newest
from mmchat.config import RunConfig, StageConfig, dump_config
from mmchat.models.probe import probe_agrees, probe_logits
from mmchat.training.engine import Engine

# A stage may be resumed with these keys changed; any other difference would make it another run.
FREE_STAGE_KEYS = {
    "zero",
    "deepspeed",
    "save_every",
    "keep",
    "workers",
    "bad_samples",
    "nan_steps",
}


def last_of(previous: Path | None, stage: StageConfig) -> Checkpoint | None:
    """The checkpoint that ended the stage before; None for a first stage. Raises ValueError if it is not finished."""
    if previous is None:
        return None
    found = newest(previous)
    if found is None or not found.manifest["is_last"]:
        raise ValueError(
            f"stage {stage.name} starts from the end of stage {previous.name}, which has not been finished in "
            f"{previous}; train that stage first"
        )
    return found


def check_same_run(config: RunConfig, stage: StageConfig, resumed: Checkpoint) -> None:
    """Raises CheckpointError where the checkpoint's configuration differs in what makes the run what it is."""

    def relevant(values: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = next((s for s in values["stages"] if s["name"] == stage.name), {})
        kept = {k: v for k, v in own.items() if k not in FREE_STAGE_KEYS}
        # How packs are joined changes neither the plan nor the gradient, and follows the number of ranks.
        kept["batch"] = {k: v for k, v in kept.get("batch", {}).items() if k != "packs_per_micro_batch"}
        return {"seed": values["seed"], "model": values["model"], "chat": values["chat"], "stage": kept}

    old = _flat(relevant(yaml.safe_load(resumed.config_text)))
    new = _flat(relevant(yaml.safe_load(dump_config(config))))
    changed = [
        f"{key}: was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{resumed.folder} was made with another configuration:\n  " + "\n  ".join(changed) + "\n"
            "Give the run another name (run=...), or change these back to continue it"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): values}


def check_probe(engine: Engine, start: Checkpoint) -> None:
    """Raises CheckpointError where the loaded model answers the stored probe differently."""
    stored = start.manifest["probe"]
    found = probe_logits(engine.model, engine.device)
    if not probe_agrees(found, stored["logits"], stored["dtype"] == engine.stage.dtype):
        raise CheckpointError(
            f"{start.folder}: the model does not answer the stored probe as it did when it was saved. Its base models, "
            "or the code that loads them, are not the same; compare manifest.json's `bases` with what is on disk"
        )


def bases(config: RunConfig) -> dict[str, Any]:
    """What the frozen base models are, for the manifest."""
    bases = {"llm": base_identity(config.model.llm.pretrained)}
    for modality, entry in config.model.modalities.entries().items():
        pretrained = entry.encoder.model_dump().get("pretrained")
        bases[modality] = (
            base_identity(pretrained) if pretrained else {"encoder": entry.encoder.model_dump(mode="json")}
        )
    return bases
