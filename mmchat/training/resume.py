"""What must hold before a stage continues or starts from a checkpoint."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmchat import distributed
from mmchat.checkpoint import Checkpoint, CheckpointError, base_identity, newest
from mmchat.config import RunConfig, StageConfig, parse_config
from mmchat.models.probe import probe_agrees, probe_logits

if TYPE_CHECKING:  # --plan reads a start by this module, and must not load DeepSpeed
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


def claim(folder: Path) -> Any:
    """Keeps other processes from training in a run's folder for as long as the returned object lives.

    Raises ValueError on every rank where another process has it.
    """
    failure, lock = "", None
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            failure = f"another process is training in {folder}; wait for it, or give this run another name (run=...)"
        except OSError:
            lock = None  # a file system without locks
    if failure := distributed.from_main(failure):
        raise ValueError(failure)
    return lock


def last_of(config: RunConfig, previous: Path | None, stage: StageConfig) -> Checkpoint | None:
    """The checkpoint that ended the stage before; None for a first stage. Raises ValueError if it is not finished.

    A constant stage is finished at its steps in this configuration, whichever number it had when it was trained.
    """
    if previous is None:
        return None
    found = newest(previous)
    before = next(one for one in config.stages if one.name == previous.name)
    is_constant = before.schedule.is_constant
    if found is None or not (found.step >= before.steps if is_constant else found.manifest["is_last"]):
        reached = f" (it has {found.step} of {before.steps} steps)" if found is not None else ""
        raise ValueError(
            f"stage {stage.name} starts from the end of stage {previous.name}, which has not been finished in "
            f"{previous}{reached}; train that stage first"
        )
    _compare(identity(values_of(found)), identity(config.model_dump(mode="json")), found)
    return found


def refuse_later_stages(config: RunConfig, stage: StageConfig, resumed: Checkpoint) -> None:
    """Raises CheckpointError where a stage goes on that a later one was already trained from."""
    for later in config.stages[config.stages.index(stage) + 1 :]:
        if newest(config.folder / later.name) is not None:
            raise CheckpointError(
                f"stage {stage.name} would go on from step {resumed.step} to {stage.steps}, but "
                f"{config.folder / later.name} was trained from where it ended before. Remove that folder to train "
                "it anew, or give the run another name (run=...)"
            )


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """What makes a run the run it is, in every stage: seed, model, chat format, and the weights it began with."""
    how = ("attention", "gradient_checkpointing")
    llm = {k: v for k, v in values["model"]["llm"].items() if k not in how}
    model = {**values["model"], "llm": llm}
    began = {key: values[key] for key in ("seed", "start", "start_as")}
    return {**began, "model": model, "chat": values["chat"]}


def check_same_run(config: RunConfig, stage: StageConfig, resumed: Checkpoint) -> None:
    """Raises CheckpointError where the checkpoint's configuration differs in what makes the run what it is."""

    def relevant(values: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = next((s for s in values["stages"] if s["name"] == stage.name), {})
        kept = {k: v for k, v in own.items() if k not in FREE_STAGE_KEYS}
        if stage.schedule.is_constant:
            kept.pop("steps", None)  # no step depends on their number: such a stage may be made longer, or cut short
        # How packs are joined changes neither the plan nor the gradient, and follows the number of ranks.
        kept["batch"] = {k: v for k, v in kept.get("batch", {}).items() if k != "packs_per_micro_batch"}
        # Where shards lie and how attention is computed may change; what is in them is checked by its hash.
        kept["data"] = [{k: v for k, v in source.items() if k != "shards"} for source in kept.get("data", [])]
        return {"stage": kept, **identity(values)}

    _compare(relevant(values_of(resumed)), relevant(config.model_dump(mode="json")), resumed)


def values_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Its configuration; keys that are newer than it have their defaults. Raises ConfigError."""
    values = parse_config(yaml.safe_load(checkpoint.config_text), str(checkpoint.folder / "config.yaml"))
    return values.model_dump(mode="json")


def _compare(old: dict[str, Any], new: dict[str, Any], checkpoint: Checkpoint) -> None:
    before, now = (values["model"]["modalities"]["image"] for values in (old, new))
    if before and now and now["read_boxes"]:
        # A later stage may bring the layer that reads boxes: nothing but its own loss depends on it.
        before["read_boxes"] = True
    if changed := differences(old, new):
        raise CheckpointError(
            f"{checkpoint.folder} was made with another configuration:\n  " + "\n  ".join(changed) + "\n"
            "Give the run another name (run=...), or change these back to continue it"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each value of two nested configurations that is not the same in both."""
    before, now = _flat(old), _flat(new)
    return [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        return {k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()}
    if isinstance(values, list):
        return {k: v for i, inner in enumerate(values) for k, v in _flat(inner, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): values}


def check_probe(engine: Engine, start: Checkpoint) -> None:
    """Raises CheckpointError where the loaded model answers the stored probe differently.

    It is asked with the modalities of the checkpoint's model; a run that starts from it may have more.
    """
    stored = start.manifest["probe"]
    modalities = [name for name, entry in values_of(start)["model"]["modalities"].items() if entry is not None]
    found = probe_logits(engine.model, engine.device, modalities)
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
        if isinstance(pretrained, str):  # timm's own weights are True
            bases[modality] = base_identity(pretrained)
        else:
            bases[modality] = {"encoder": entry.encoder.model_dump(mode="json")}
    return bases
