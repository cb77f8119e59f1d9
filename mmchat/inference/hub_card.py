"""The model card of a folder for the hub, with its licences and evaluations, and the notice of its base models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmchat.inference.controls import Controls
from mmchat.inference.load import Loaded

# What the hub calls the task, by what the model takes; the first that fits.
_PIPELINES = {"image": "image-text-to-text", "video": "video-text-to-text", "audio": "audio-text-to-text"}
# Written by data_prep/base_models.py beside the models that it makes.
_SOURCE = "source.json"


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        part: llm, or a modality.
        name: as the configuration names it.
        origin: which model it is; "" where its folder does not say.
        licence: as its folder states it; "" where it does not.
        place: its folder inside; "" where it is not inside.
        is_on_hub: whether `name` is that of a model on the hub.
    """

    part: str
    name: str
    origin: str
    licence: str
    place: str
    is_on_hub: bool


def base_of(part: str, name: str, source: Path | None, place: str, is_on_hub: bool) -> Base:
    """What a base model's folder says of itself, in the source.json of this project or in its model card."""
    facts: Mapping[str, Any] = {}
    if source is not None and (source / _SOURCE).is_file():
        facts = json.loads((source / _SOURCE).read_text(encoding="utf-8"))
    elif source is not None and (source / "README.md").is_file():
        facts = front_matter((source / "README.md").read_text(encoding="utf-8"))
    licence = facts.get("licence") or facts.get("license_name") or facts.get("license") or ""
    return Base(part, name, str(facts.get("origin", "")), str(licence), place, is_on_hub)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two lines of a model card that are `---`; {} where there is none, or it is broken."""
    lines = text.splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What `infer.py evaluate` wrote. Raises ValueError for a file that is something else."""
    found = []
    for path in paths:
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read as metrics.json ({error})") from error
        wanted = {"task", "scores", "num_questions", "controls", "protocol_sha256", "checkpoint_sha256"}
        if not isinstance(metrics, dict) or not wanted <= metrics.keys():
            raise ValueError(f"{path}: wanted a metrics.json of infer.py evaluate, with task and scores")
        found.append(metrics)
    return found


def card(
    loaded: Loaded,
    name: str,
    bases: Sequence[Base],
    metrics: Sequence[Mapping[str, Any]],
    licence: str | None,
    own: str | None,
) -> str:
    """The text of README.md.

    Args:
        own: a card that lies beside the checkpoint: it is kept, with front matter where it has none.
    """
    head = f"---\n{yaml.safe_dump(_front_matter(loaded, bases, licence), sort_keys=False)}---\n"
    if own is not None:
        return own if front_matter(own) else f"{head}\n{own}"
    sections = [_what(loaded, name), _use(loaded, name, bases), _training(loaded), evaluation(loaded, metrics)]
    return "\n".join([head, *sections, _licences(bases, licence)])


def notice(bases: Sequence[Base]) -> str:
    """The text of NOTICE: whose base models these are."""
    lines = ["The weights here were trained on top of base models that others made:", ""]
    for base in bases:
        lines += [
            f"{base.part}: {base.origin or base.name}",
            f"  licence: {base.licence or 'not stated in its folder'}",
            f"  here: {base.place or 'not included'}",
            "",
        ]
    return "\n".join(lines)


def _front_matter(loaded: Loaded, bases: Sequence[Base], licence: str | None) -> dict[str, Any]:
    modalities = list(loaded.template.preprocesses)
    values: dict[str, Any] = {"library_name": "mmchat"}
    if licence is not None:
        values["license"] = licence.lower()
    else:
        values |= {"license": "other", "license_name": "not-stated", "license_link": "NOTICE"}
    if on_hub := [base.name for base in bases if base.is_on_hub]:
        values["base_model"] = on_hub
    values["pipeline_tag"] = next((tag for m, tag in _PIPELINES.items() if m in modalities), "text-generation")
    return values | {"tags": ["mmchat", "multimodal", loaded.config.model.fusion.kind, *modalities]}


def _what(loaded: Loaded, name: str) -> str:
    model = loaded.config.model
    entries = model.modalities.entries()
    takes = ", ".join(["text", *entries])
    lines = [f"# {name}", "", f"A multimodal chat model of mmchat. It takes {takes} and answers with text.", ""]
    lines += [f"- fusion: {model.fusion.kind}"]
    lines += [f"- {m}: encoder {entry.encoder.kind}, connector {entry.connector.kind}" for m, entry in entries.items()]
    lines += [f"- places in answers are written in the dialect {loaded.config.chat.region_dialect}"]
    return "\n".join([*lines, ""])


def _use(loaded: Loaded, name: str, bases: Sequence[Base]) -> str:
    media = ', image="photo.jpg"' if "image" in loaded.template.preprocesses else ""
    code = f'import mmchat\n\nchat = mmchat.load("{name}")  # this folder, or owner/{name} on the hub\n'
    code += f'print(chat.ask("What is this?"{media}))'
    absent = [f"`{base.name}` ({base.part})" for base in bases if not base.place]
    needs = "Everything it needs is in this folder."
    if absent:
        needs = f"It needs these base models, which are not in this folder, by these names: {', '.join(absent)}."
    return f"## Use\n\n```python\n{code}\n```\n\n{needs} Nothing in it is pickled or run.\n"


def _training(loaded: Loaded) -> str:
    checkpoint = loaded.checkpoint
    assert checkpoint is not None, "a card is made of a checkpoint"
    manifest = checkpoint.manifest
    parts = ", ".join(manifest["parts"])
    said = f"Run {manifest['run']}, stage {manifest['stage']}, step {manifest['step']}. Trained parts: {parts}."
    rows = [
        f"| {stage.name} | {stage.steps:,} | {', '.join(stage.train)} "
        f"| {', '.join(f'{source.name} ({source.task})' for source in stage.data)} |"
        for stage in loaded.config.stages
    ]
    table = ["| stage | steps | learns | data (task) |", "|---|---|---|---|", *rows]
    return "\n".join(["## Training", "", said, "", *table, "", "`config.yaml` has all of it.", ""])


def evaluation(loaded: Loaded, metrics: Sequence[Mapping[str, Any]]) -> str:
    """The card's section of scores: under which controls, and whether of this checkpoint."""
    if not metrics:
        return "## Evaluation\n\nNo evaluation was given.\n"
    own = loaded.checkpoint.manifest["sha256"] if loaded.checkpoint is not None else None
    rows = []
    for one in metrics:
        controls = "; ".join(Controls.model_validate(one["controls"]).described()) or "none"
        whose = "this" if one["checkpoint_sha256"] == own else f"another, {one['checkpoint_sha256'][:12]}"
        of = f"{one['num_questions']:,} | {controls} | {one['protocol_sha256'][:12]} | {whose}"
        for score, value in one["scores"].items():
            shown = "not finite" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            rows.append(f"| {one['task']} | {score} | {shown} | {of} |")
    head = "| task | score | value | questions | controls | protocol | checkpoint |"
    said = "By `infer.py evaluate`. Equal protocols have equal hashes; with a control on, the media was tampered with."
    return "\n".join(["## Evaluation", "", said, "", head, "|---|---|---|---|---|---|---|", *rows, ""])


def _licences(bases: Sequence[Base], licence: str | None) -> str:
    rows = [
        f"| {base.part} | {base.origin or f'`{base.name}`'} | {base.licence or 'not stated'} "
        f"| {f'`{base.place}`' if base.place else 'not included'} |"
        for base in bases
    ]
    trained = licence or "not stated; whoever publishes them fills this in"
    said = f"The trained weights: {trained}. NOTICE names the base models:"
    table = ["| base model | what | licence | here |", "|---|---|---|---|", *rows]
    return "\n".join(["## Licences", "", said, "", *table, ""])
