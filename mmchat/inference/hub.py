"""Models to and from the Hugging Face hub: a folder that holds everything, and the download of one.

config.yaml, weights.safetensors, manifest.json     the checkpoint
base/llm, base/image, ...                           with the base models inside: their own folders
tokenizer/                                          without them: the LLM's tokenizer with its chat template
README.md, NOTICE                                   the model card, and whose base models these are
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download

from mmchat.checkpoint import Checkpoint, base_identity, write_checkpoint
from mmchat.inference.hub_card import base_of, card, notice, read_metrics
from mmchat.inference.load import Loaded, lies_inside

# What is ever downloaded, or put into a folder: nothing that could run or be unpickled.
PATTERNS = ["*.safetensors", "*.json", "*.yaml", "*.txt", "*.model", "*.jinja"]
_TERMS = ["LICENSE*", "LICENCE*", "NOTICE*"]
# Kinds of encoders whose `pretrained` may be a name on the hub, as the LLM's, which has no kind.
_NAMED_BY_HUB = (None, "transformers", "whisper")


def is_hub_name(name: str) -> bool:
    """Whether a name has the form owner/name; whether there is such a model, the hub knows."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is not None


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a model on the hub, from the local cache where it is there already; no pickles, no code.

    Raises ValueError where it cannot be had.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{name}: there is no such folder below {Path.cwd()}, and the hub does not give a model of this name{at} "
            f"({reason})"
        ) from error


def write_hub(
    loaded: Loaded, out: Path, with_base: bool, licence: str | None = None, evaluations: Sequence[Path] = ()
) -> list[str]:
    """Writes a checkpoint as a folder that `mmchat.load` loads from wherever it lies, or from the hub.

    The weights are as the checkpoint has them; `infer.py release` makes them small first. A README.md, LICENSE or
    NOTICE beside the checkpoint is kept. The folder appears whole or not at all.

    Args:
        with_base: whether the base models go inside, so that nothing else is needed.
        licence: of the trained weights, by its SPDX name, such as apache-2.0.
        evaluations: metrics.json files of `infer.py evaluate`, beside those below the checkpoint's folder.
    Returns:
        Lines for a person: the size, and what whoever loads the folder must still have.
    Raises:
        ValueError: `out` exists, there is no checkpoint, or a base model cannot go inside.
        OSError: no space or no permission.
    """
    checkpoint = loaded.checkpoint
    if checkpoint is None:
        raise ValueError("found a configuration; wanted a checkpoint, or the folder of a run or stage")
    if out.exists():
        raise ValueError(f"{out} exists; remove it, or name another folder")
    metrics = read_metrics([*sorted(checkpoint.folder.rglob("metrics.json")), *evaluations])
    values = yaml.safe_load(checkpoint.config_text)
    parts = _parts(loaded, values)
    inside = [part.name for part in parts if lies_inside(checkpoint.folder, part.pretrained)]
    if inside and not with_base:
        raise ValueError(
            f"the base model of {inside[0]} lies in {checkpoint.folder} itself, and no other place is known; export it "
            "with the base models inside"
        )
    if with_base:
        parts = _placed(parts)
        for part in parts:
            _sections(values)[part.name] |= {"pretrained": part.place} | ({"revision": None} if part.is_llm else {})
    bases = [base_of(p.name, p.pretrained, p.source, p.place, p.is_on_hub) for p in parts]

    partial = out.with_name(out.name + ".hub.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        _write_checkpoint(checkpoint, values, parts, partial, with_base)
        if not with_base:
            loaded.template.tokenizer.save_pretrained(partial / "tokenizer")
        for file in _files(checkpoint.folder, _TERMS):
            shutil.copyfile(file, partial / file.name)
        if not (partial / "NOTICE").exists():
            (partial / "NOTICE").write_text(notice(bases), encoding="utf-8")
        readme = checkpoint.folder / "README.md"
        own = readme.read_text(encoding="utf-8") if readme.is_file() else None
        (partial / "README.md").write_text(card(loaded, out.name, bases, metrics, licence, own), encoding="utf-8")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return _said(out, parts, with_base, licence is None and own is None)


@dataclass(frozen=True)
class _Part:
    """A base model of a checkpoint.

    Attributes:
        name: llm, or a modality.
        pretrained: as config.yaml names it.
        source: its folder or file on this machine; None for a name that only its library can resolve.
        kind: of the encoder; None for the LLM.
        is_on_hub: whether `pretrained` is a name on the hub.
        place: where it goes inside the folder, relative to it; "" while it does not.
    """

    name: str
    pretrained: str
    source: Path | None
    kind: str | None
    revision: str | None
    is_on_hub: bool
    place: str = ""

    @property
    def is_llm(self) -> bool:
        return self.kind is None


def _sections(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a configuration that name a base model, by name."""
    modalities = {m: entry["encoder"] for m, entry in values["model"]["modalities"].items() if entry}
    # Of timm and open_clip, `model: "hf-hub:..."` brings its weights with it.
    named = {m: e for m, e in modalities.items() if e.get("pretrained") or ":" in e.get("model", "")}
    return {"llm": values["model"]["llm"]} | named


def _parts(loaded: Loaded, values: dict[str, Any]) -> list[_Part]:
    found = _sections(loaded.config.model_dump(mode="json"))
    parts = []
    for name, section in _sections(values).items():
        weights = section["pretrained"]  # of timm also True: its own weights of that model
        pretrained = weights if isinstance(weights, str) and weights else str(section["model"])
        place = Path(pretrained if pretrained != weights else found[name]["pretrained"])
        source = place if place.exists() else None
        kind, revision = section.get("kind"), section.get("revision")
        is_on_hub = source is None and kind in _NAMED_BY_HUB and is_hub_name(pretrained)
        parts.append(_Part(name, pretrained, source, kind, revision, is_on_hub))
    return parts


def _placed(parts: Sequence[_Part]) -> list[_Part]:
    """The parts with their sources and their places inside; a source that two parts share goes in once.

    Raises ValueError for one that cannot go inside.
    """
    places: dict[Path, str] = {}
    placed = []
    for part in parts:
        source = part.source
        if part.is_on_hub:
            source = download(part.pretrained, part.revision)
        weights = [] if source is None else [source] if source.is_file() else _files(source, ["*.safetensors"])
        if source is None or not any(file.suffix == ".safetensors" for file in weights):
            raise ValueError(
                f"the base model of {part.name}, {part.pretrained}, cannot go inside: wanted a folder or file of "
                "safetensors. Export without the base models; who loads the folder then needs it under this name"
            )
        place = f"base/{part.name}/{source.name}" if source.is_file() else f"base/{part.name}"
        placed.append(replace(part, source=source, place=places.setdefault(source.resolve(), place)))
    return placed


def _write_checkpoint(
    checkpoint: Checkpoint, values: dict[str, Any], parts: Sequence[_Part], folder: Path, with_base: bool
) -> None:
    """The checkpoint's own files, and with `with_base` what lies below base/."""
    facts = checkpoint.facts
    text = checkpoint.config_text
    if with_base:
        text = yaml.safe_dump(values, sort_keys=False, width=110)
        copied = {p.name: {**base_identity(str(p.source)), "pretrained": p.place} for p in parts}
        facts["bases"] = facts["bases"] | copied
    write_checkpoint(folder, text, checkpoint.weights(), None, None, facts)
    for part in parts if with_base else []:
        assert part.source is not None, "a part with a place has a source"
        target = folder / part.place
        if target.exists():  # shared with a part before it
            continue
        if part.source.is_file():
            target.parent.mkdir(parents=True)
            shutil.copyfile(part.source, target)
            continue
        target.mkdir(parents=True)
        for file in _files(part.source, [*PATTERNS, *_TERMS, "README.md"]):
            shutil.copyfile(file, target / file.name)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [f for f in sorted(folder.iterdir()) if f.is_file() and any(fnmatch(f.name, one) for one in patterns)]


def _said(out: Path, parts: Sequence[_Part], with_base: bool, lacks_licence: bool) -> list[str]:
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    lines = [f"{out}: {size / 1e6:.1f} MB, loads with mmchat.load({str(out)!r})"]
    if not with_base:
        names = ", ".join(f"{part.name} {part.pretrained}" for part in parts)
        lines.append(f"base models are not inside; whoever loads it needs them by these names: {names}")
    if lacks_licence:
        lines.append(f"no licence of the trained weights was given; {out / 'README.md'} says so: fill it in")
    return lines
