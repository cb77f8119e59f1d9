"""What must hold before a run's first stage begins with the weights of another run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmchat.checkpoint import Checkpoint, CheckpointError, find, open_checkpoint
from mmchat.config import RunConfig
from mmchat.models.mmchat import MMChat
from mmchat.models.parts import parts_of
from mmchat.training.resume import bases, differences, values_of

# Of a modality: what decides whether its weights mean the same. All else of it may differ, which is said.
MEANING = ("encoder", "resize", "connector", "stored_features")
# Of the fusion: what training does with it.
FREE_FUSION_KEYS = ("adapter_dropout", "modality_dropout")
# What starts as the LLM that it adapts: a model without low-rank pairs may be given them.
FROM_EARLY = ("flora", "lora", "full")


def open_start(config: RunConfig) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `start` names, and what differs in its configuration without making it unusable.

    Raises:
        CheckpointError: none is there, it is damaged, or its weights would mean something else in this model.
    """
    assert config.start is not None
    try:
        checkpoint = open_checkpoint(find(Path(config.start)))
    except CheckpointError as error:
        raise CheckpointError(f"start: {error}") from error
    theirs, ours = values_of(checkpoint), config.model_dump(mode="json")
    if faults := _faults(checkpoint, config, theirs, ours):
        raise CheckpointError(
            f"start: {checkpoint.folder} is of another model than this configuration's:\n  " + "\n  ".join(faults)
            + "\nChange these back, or leave `start` out"
        )  # fmt: skip
    before, now = _all_else(theirs, ours), _all_else(ours, theirs)
    return checkpoint, differences(before, now)


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the manifests of a run say about the checkpoint that it began with."""
    named = {key: checkpoint.manifest.get(key) for key in ("run", "stage", "step")}
    return {"folder": str(checkpoint.folder), "manifest_sha256": checkpoint.manifest["sha256"], **named}


def check_parts(model: MMChat, checkpoint: Checkpoint, is_full: bool) -> list[str]:
    """The connectors, fusion and readouts of the model that the checkpoint does not hold: they begin anew.

    Raises:
        CheckpointError: it holds a part that the model has not.
    """
    own, held = parts_of(model, is_full).keys(), set(checkpoint.manifest["parts"])
    if extra := sorted(held - own):
        raise CheckpointError(
            f"start: {checkpoint.folder} holds {', '.join(extra)}, which this configuration's model has not; its parts "
            f"are {', '.join(sorted(own))}. Configure a model that has them, or leave `start` out"
        )
    return sorted(part for part in own - held if part.startswith(("connectors.", "fusion", "readouts.")))


def _faults(checkpoint: Checkpoint, config: RunConfig, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    shared = _entries(theirs).keys() & _entries(ours).keys()
    faults = [
        f"model.modalities.{modality}: the checkpoint has it, this configuration has not; add it"
        for modality in sorted(_entries(theirs).keys() - shared)
    ]
    faults += differences(_meaning(theirs, shared), _meaning(ours, shared))
    for new_one, old_one in config.start_as.items():
        held = f"connectors.{old_one}" in checkpoint.manifest["parts"]
        if not held or new_one in _entries(theirs):
            found = f"the checkpoint has {', '.join(checkpoint.manifest['parts'])}"
            faults.append(
                f"start_as {new_one}: {old_one}: wanted a checkpoint with {old_one} alone of the two; {found}"
            )
    old, new = (_fusion(values, shared) for values in (theirs, ours))
    if not (old["kind"] == "early" and new["kind"] in FROM_EARLY):
        faults += differences({"model.fusion": old}, {"model.fusion": new})
    before, now = checkpoint.manifest["bases"], bases(config)
    for name in ["llm", *sorted(shared)]:
        if name in before and not _is_same_base(before[name], now[name]):
            faults.append(f"base model of {name}: was {_base_name(before[name])}, is {_base_name(now[name])}")
    return faults


def _meaning(values: dict[str, Any], shared: set[str]) -> dict[str, Any]:
    modalities = {}
    for modality in shared:
        entry = _entries(values)[modality]
        kept = {key: entry[key] for key in MEANING if key in entry}
        # Where the base model lies may differ; what it is, is compared by `bases`.
        if isinstance(kept["encoder"].get("pretrained"), str):
            kept["encoder"] = {**kept["encoder"], "pretrained": ""}
        modalities[modality] = kept
    return {"model": {"modalities": modalities, "llm": {"revision": values["model"]["llm"]["revision"]}}}


def _fusion(values: dict[str, Any], shared: set[str]) -> dict[str, Any]:
    fusion = {k: v for k, v in values["model"]["fusion"].items() if k not in FREE_FUSION_KEYS}
    ranks = fusion.get("ranks", {})  # a modality that only one of the two has may have a rank of its own
    return fusion | {"ranks": {m: ranks.get(m, fusion["rank"]) for m in sorted(shared)} if "ranks" in fusion else {}}


def _all_else(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """What the two configurations may disagree about, which the answers may show."""
    shared = _entries(values).keys() & _entries(others).keys()
    modalities = {m: {k: v for k, v in _entries(values)[m].items() if k not in MEANING} for m in shared}
    return {"model": {"modalities": modalities}, "chat": values["chat"]}


def _is_same_base(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """By what they are where both are folders, by name where one is on a hub; other encoders are configuration."""
    if "encoder" in before or "encoder" in now:
        return True
    keys = ("config_sha256", "weights") if "weights" in before and "weights" in now else ("pretrained",)
    return all(before[key] == now[key] for key in keys)


def _base_name(base: dict[str, Any]) -> str:
    if "weights" not in base:
        return str(base["pretrained"])
    size = sum(base["weights"].values())
    return f"{base['pretrained']} (config.json {str(base['config_sha256'])[:8]}, {size:,} bytes of weights)"


def _entries(values: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in values["model"]["modalities"].items() if entry is not None}
