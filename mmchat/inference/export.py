"""A trained model in the form that other programs read: a LLaVA of transformers, a merged LLM, or one whole folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig

from mmchat.checkpoint import base_identity, write_checkpoint
from mmchat.config import RunConfig, dump_config, parse_config
from mmchat.conversation import Modality
from mmchat.inference.hub import write_hub
from mmchat.inference.llava_card import llava_card
from mmchat.inference.llava_check import Heard, differences, drawn_picture, hear, prompts
from mmchat.inference.llava_folder import (
    exported_model,
    exported_processor,
    exported_tokenizer,
    fusion_obstacles,
    image_token_id,
    obstacles,
)
from mmchat.inference.load import Loaded, lies_inside, load
from mmchat.models.build import ModelConfig
from mmchat.models.fusion import EarlyConfig, FLoRAConfig, merge
from mmchat.models.llm import decoder_of
from mmchat.models.parts import names_in
from mmchat.models.probe import probe_logits

DTYPES = ("float32", "bfloat16", "float16")
LLM = "llm"  # folder of a merged LLM, within the export
MAX_SHARD = "5GB"  # of weights in one file
QUESTION = "What is shown in this picture?"

Say = Callable[[str], None]


def export_llava(
    path: str | Path,
    out: Path,
    assumed: Modality | None = None,
    dtype: str | None = None,
    picture: bytes | None = None,
    question: str = QUESTION,
    evaluations: Sequence[Path] = (),
    licence: str | None = None,
    say: Say = print,
) -> None:
    """Writes a folder that transformers loads as LlavaForConditionalGeneration, after comparing it with the model.

    Compared are, in float32, the ids of three prompts, the pixels of a picture, and the logits of every position. The
    folder appears whole or not at all; where something differs it is left beside, as OUT.partial.

    Args:
        assumed: merges this modality's FLoRA pairs, as if it were present in every prompt.
        dtype: of the stored weights; None takes that of the LLM's own folder.
        picture: that is compared with, encoded; None draws one.
        evaluations: metrics.json files for the model card.
        licence: of the trained weights, by its SPDX name, for the card.
    Raises:
        ValueError: the model does not fit, with every reason; `out` is not empty; what was written answers differently.
    """
    check_out(out)
    loaded = load(path, "float32")
    reasons = obstacles(loaded) + fusion_obstacles(loaded, assumed)
    _refuse(path, "hf-llava", reasons)
    card = llava_card(loaded, out.name, assumed, licence, evaluations)
    dtype = dtype or stored_dtype(loaded)
    tokenizer = exported_tokenizer(loaded)
    image_id = image_token_id(tokenizer)
    asked = prompts(picture or drawn_picture(), question)
    say("asking the model")
    heard = hear(loaded, asked, image_id)
    num_compared = len(asked) if assumed is None else len(asked) - 1  # without the picture, it is another model then
    if _merge(loaded, assumed):
        for one, merged in zip(heard[:num_compared], hear(loaded, asked[:num_compared], image_id), strict=True):
            _close(one.logits, merged.logits, "the merged model")
    if dtype != "float32":
        _round(loaded.model, dtype)
        exact, heard = heard, hear(loaded, asked, image_id)
        say(f"weights in {dtype}: logits change by up to {_largest(exact[:num_compared], heard):.3g}")

    partial = partial_of(out)
    model, processor = exported_model(loaded, tokenizer), exported_processor(loaded, tokenizer)
    check_space(partial, model, dtype)
    say(f"writing {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} million weights in {dtype}")
    stored: Any = model.to(getattr(torch, dtype))
    for part in (stored.config.text_config, stored.config.vision_config):
        part.dtype = getattr(torch, dtype)
    stored.save_pretrained(partial, max_shard_size=MAX_SHARD)
    processor.save_pretrained(partial)
    (partial / "README.md").write_text(card)
    config, device = loaded.config, loaded.device
    del loaded, model, stored  # the folder is loaded now: one model at a time
    if device.type == "cuda":
        torch.cuda.empty_cache()
    say("loading it back with transformers, and comparing")
    found, largest = differences(partial, heard, num_compared)
    if found:
        raise ValueError(
            f"{partial} does not answer as {path} does:\n  - " + "\n  - ".join(found) + "\nIt is left there to look "
            f"at, and removed by the next export to {out}. {_advice(config)}"
        )
    finish(partial, out)
    say(f"{out}: the same ids and pixels; logits differ by {largest:.1g} at most")


def export_merged(
    path: str | Path, out: Path, assumed: Modality | None = None, dtype: str | None = None, say: Say = print
) -> None:
    """Writes a checkpoint whose LLM, in OUT/llm, holds what was learned in plain weights: no low-rank pairs.

    OUT/llm is a causal LM of transformers like any other; OUT is a checkpoint of fusion `early` over it. Encoders that
    were not trained are named, as in any checkpoint.

    Raises:
        ValueError: the fusion depends on presence; `out` is not empty; what was written answers differently.
    """
    check_out(out)
    loaded = load(path, "float32")
    checkpoint = loaded.checkpoint
    if checkpoint is None:
        raise ValueError(f"{path} is a configuration; wanted a checkpoint, or the folder of a run or stage")
    _refuse(path, "merged", fusion_obstacles(loaded, assumed))
    dtype = dtype or stored_dtype(loaded)
    before = torch.tensor(probe_logits(loaded.model, loaded.device))
    _merge(loaded, assumed)
    _close(before, torch.tensor(probe_logits(loaded.model, loaded.device)), "the merged model")
    _round(loaded.model.llm, dtype)
    after = probe_logits(loaded.model, loaded.device)
    say(f"LLM in {dtype}: logits of the probe change by up to {float((torch.tensor(after) - before).abs().max()):.3g}")

    stored = parse_config(yaml.safe_load(checkpoint.config_text), str(checkpoint.folder / "config.yaml"))
    is_learned = {part for part in checkpoint.manifest["parts"] if part.partition(".")[0] in ("connectors", "encoders")}
    names = names_in(loaded.model, is_learned, is_full=False)
    weights = {name: tensor.contiguous() for name, tensor in loaded.model.state_dict().items() if name in names}
    partial = partial_of(out)
    check_space(partial, loaded.model.llm, dtype)
    config = _merged_config(stored, loaded.config, checkpoint.folder)
    say(f"writing the LLM in {dtype}")
    llm: Any = loaded.model.llm
    llm.config.use_cache = True
    llm.to(getattr(torch, dtype)).save_pretrained(partial / LLM, max_shard_size=MAX_SHARD)
    loaded.template.tokenizer.save_pretrained(partial / LLM)
    facts = checkpoint.facts | {"parts": sorted(is_learned), "fusion": config.model.fusion.model_dump(mode="json")}
    facts["probe"] = {"dtype": "float32", "logits": after}
    facts["bases"] = {**facts["bases"], "llm": identity_within(partial, LLM)}
    add_checkpoint(partial, dump_config(config), weights, facts)
    del loaded, llm
    say("loading it back, and comparing")
    _close(torch.tensor(after), torch.tensor(_probe(partial)), str(partial))
    finish(partial, out)
    say(f"{out}: python infer.py chat {out}; {out / LLM} is its LLM for any program")


def export_hub(
    path: str | Path,
    out: Path,
    with_base: bool,
    licence: str | None = None,
    evaluations: Sequence[Path] = (),
    say: Say = print,
) -> None:
    """Writes the model in this project's own format as one folder (see write_hub)."""
    check_out(out)
    if out.exists():
        out.rmdir()
    for line in write_hub(load(path, "float32"), out, with_base, licence, evaluations):
        say(line)


def check_out(out: Path) -> None:
    """Raises ValueError where `out` is there and not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is not empty; remove it, or name another folder")


def stored_dtype(loaded: Loaded) -> str:
    """The type that the LLM's own folder has its weights in."""
    llm = loaded.config.model.llm
    config = AutoConfig.from_pretrained(llm.pretrained, revision=llm.revision, trust_remote_code=False)
    stored = str(config.dtype or "float32")
    name = stored.removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _refuse(path: str | Path, form: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(
            f"{path} does not fit --format {form}:\n  - " + "\n  - ".join(reasons) + "\nWhat works for every model: "
            "--format hub, which mmchat.load opens"
        )


def _merge(loaded: Loaded, assumed: Modality | None) -> bool:
    """Adds the low-rank pairs into the LLM's weights; False where it has none."""
    model = loaded.model
    if model.gates is None:
        return False
    merge(decoder_of(model.llm), assumed if isinstance(loaded.config.model.fusion, FLoRAConfig) else None)
    model.gates = None
    return True


@torch.no_grad()
def _round(module: torch.nn.Module, dtype: str) -> None:
    """Rounds every weight to a precision and back, so that what is stored can be compared in float32."""
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} has weights that {dtype} cannot hold; choose another --dtype")


def _merged_config(stored: RunConfig, found: RunConfig, folder: Path) -> RunConfig:
    """The configuration as it was trained, over the merged LLM; encoders within `folder` are named where they lie."""
    values = stored.model.model_dump(mode="json")
    for modality, entry in found.model.modalities.entries().items():
        encoder = values["modalities"][modality]["encoder"]
        if isinstance(encoder.get("pretrained"), str) and lies_inside(folder, encoder["pretrained"]):
            encoder["pretrained"] = entry.encoder.model_dump()["pretrained"]
    values["llm"] |= {"pretrained": LLM, "revision": None}
    fusion = EarlyConfig(modality_dropout=stored.model.fusion.modality_dropout)
    values["fusion"] = fusion.model_dump(mode="json")
    return stored.model_copy(update={"model": ModelConfig.model_validate(values)})


def _probe(folder: Path) -> list[float]:
    again = load(folder, "float32")
    return probe_logits(again.model, again.device)


def _largest(some: Sequence[Heard], others: Sequence[Heard]) -> float:
    return max(float((a.logits - b.logits).abs().max()) for a, b in zip(some, others, strict=False))


def _close(wanted: Tensor, found: Tensor, who: str) -> None:
    change, limit = float((wanted - found).abs().max()), 1e-4 * max(1.0, float(wanted.abs().max()))
    if not change <= limit:
        raise ValueError(f"{who} answers differently: a logit by {change:.3g}, wanted {limit:.1g} at most")


def partial_of(out: Path) -> Path:
    """Where the export grows until it is whole; what an earlier one left there is removed."""
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    return partial


def identity_within(folder: Path, place: str) -> dict[str, Any]:
    """What a base model within a checkpoint's folder is, for its manifest."""
    return {**base_identity(str(folder / place)), "pretrained": place}


def add_checkpoint(folder: Path, config_text: str, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint's files into a folder that holds its base models already."""
    made = write_checkpoint(folder.with_name(folder.name + ".files"), config_text, weights, None, None, facts)
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def check_space(partial: Path, model: torch.nn.Module, dtype: str) -> None:
    needed = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    free = shutil.disk_usage(partial.parent).free
    if free < needed + (64 << 20):
        raise OSError(f"{partial}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} are free")


def finish(partial: Path, out: Path) -> None:
    """Syncs every file and puts the folder in its place in one move."""
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    os.replace(partial, out)


def _advice(config: RunConfig) -> str:
    return (
        f"Where token ids differ, this tokenizer makes other ids of a whole prompt than of its parts, as chat.format "
        f"{config.chat.format} has them: choose --format hub, or train with chat.format: llava"
    )
