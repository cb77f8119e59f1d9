"""Datasets of NVIDIA's Megatron-Energon: webdataset shards with a folder .nv-meta beside them.

From its source code (github.com/NVIDIA/Megatron-Energon, version 7: flavors/webdataset/{config,structs,metadata,
field_access}.py, the sample types in flavors/*.py) and its docs/source/basic/data_prep.md:

    .nv-meta/.info.json    {"shard_counts": {"shards/000.tar": 1223, ...}}; .info.yaml before version 7
    .nv-meta/split.yaml    split_parts: {train: [shards/{000..007}.tar, ...]}, exclude: [SHARD, SHARD/KEY];
                           or split.json
    .nv-meta/dataset.yaml  sample_type: {__class__: VQASample}, field_map: {image: jpg, context: json[question]}
                           before: __class__: VQAWebdataset; crude: __class__: CrudeWebdataset, without a field_map

A field is the suffix of a member, with keys into a .json in brackets; alternatives are parted by commas. A
`sample_loader` is python code of the dataset and is not run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from mmchat.conversation import Modality
from mmchat.data.foreign import Listed, Members
from mmchat.errors import SampleError

FOLDER = ".nv-meta"
_FIELD = re.compile(r"([^\[\],]+)((?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class EnergonDataset:
    """What .nv-meta says.

    Attributes:
        sample_type: such as "CaptioningSample"; None for crude data.
        field_map: field of the sample type to where it is.
    """

    folder: Path
    sample_type: str | None
    field_map: Mapping[str, str]
    splits: Mapping[str, list[Path]]
    excluded: frozenset[str]

    @classmethod
    def open(cls, folder: Path) -> EnergonDataset:
        """Raises ValueError where the files are missing, are not as described, or name a shard that is not there."""
        meta = folder / FOLDER
        split = _load(meta, "split.yaml", "split.json")
        parts, excluded = split.get("split_parts"), split.get("exclude") or []
        if not isinstance(parts, dict) or not isinstance(excluded, list):
            raise ValueError(f"{meta}: the splits want split_parts and exclude, found {', '.join(split) or 'nothing'}")
        excluded = frozenset(name for one in excluded for name in braceexpand(str(one)))
        splits = {
            str(part): [folder / name for one in names or [] for name in braceexpand(str(one)) if name not in excluded]
            for part, names in parts.items()
        }
        if missing := [str(path) for paths in splits.values() for path in paths if not path.is_file()]:
            raise ValueError(f"{meta}/split.yaml names shards that do not exist:\n  " + "\n  ".join(missing[:20]))
        facts = _load(meta, "dataset.yaml")
        named = facts.get("sample_type") or facts
        name = str(named.get("__class__", "")) if isinstance(named, dict) else ""
        sample_type = None if name in ("", "CrudeWebdataset") else re.sub("Webdataset$", "Sample", name)
        return cls(folder, sample_type, facts.get("field_map") or {}, splits, excluded)

    def excluded_keys(self, shard: Path) -> frozenset[str]:
        prefix = shard.relative_to(self.folder).as_posix() + "/"
        return frozenset(name.removeprefix(prefix) for name in self.excluded if name.startswith(prefix))

    def reading(self) -> EnergonReading | None:
        """None for crude data, which is read as plain shards are. Raises ValueError for a type that is not read."""
        if self.sample_type is None:
            return None
        if self.sample_type not in SAMPLE_TYPES or not self.field_map:
            what = "a sample_loader, which is code and is not run" if not self.field_map else "no facts of a task here"
            raise ValueError(
                f"{self.folder}: {self.sample_type} with {what}. Sample types with a field_map are read: "
                f"{', '.join(SAMPLE_TYPES)}. For others say with --as which format their .json members have"
            )
        return EnergonReading(self.sample_type, tuple(self.field_map.items()))


@dataclass(frozen=True)
class EnergonReading:
    """Facts of samples by a field_map; see mmchat.data.foreign.Reading."""

    sample_type: str
    field_map: tuple[tuple[str, str], ...]

    @cached_property
    def label(self) -> str:
        digest = hashlib.sha256(json.dumps(self.field_map).encode()).hexdigest()[:16]
        return f"energon {self.sample_type} {digest}"

    def __call__(self, members: Members) -> tuple[dict[str, Any], Listed]:
        modality, facts_of = SAMPLE_TYPES[self.sample_type]
        fields = dict(self.field_map)
        listed: Listed = []
        if modality is not None:
            wanted = fields.pop(modality, "").split(",")
            member = next((suffix for suffix in map(str.lower, wanted) if suffix in members.places), None)
            if member is None:
                raise SampleError("missing member", f"{members.key}: wanted {modality} in .{' or .'.join(wanted)}")
            listed = [{"modality": modality, "member": member}]
        values = {name: _value(members, place) for name, place in fields.items()}
        return facts_of(values, members.key), listed


def _value(members: Members, place: str) -> Any:
    """The value that a field of the field_map has. Raises SampleError where none of its alternatives is there."""
    for match in _FIELD.finditer(place):
        suffix = match[1].strip().lower()
        if suffix not in members.places:
            continue
        value: Any = members.json(suffix) if suffix.rpartition(".")[2] == "json" else members.text(suffix)
        try:
            for key in re.findall(r"\[([^\[\]]+)\]", match[2]):
                value = value[int(key)] if isinstance(value, list) else value[key]
            return value
        except (KeyError, IndexError, TypeError, ValueError):
            continue
    raise SampleError("missing field", f"{members.key}: nothing at {place!r}; members: {', '.join(members.places)}")


def _caption(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {"caption": _text(values, "caption", key)}


def _class(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {"class": values.get("label"), "caption": _text(values, "label_name", key)}


def _vqa(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The answer of the largest weight first: it is the one that is learned."""
    answers, weights = values.get("answers"), values.get("answer_weights")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers:
        raise SampleError("no answer", f"{key}: wanted a list of answers, found {answers!r:.200}")
    if isinstance(weights, list) and len(weights) == len(answers):
        order = sorted(range(len(answers)), key=lambda i: -float(weights[i]))
        answers = [answers[i] for i in order]
    return {"question": _text(values, "context", key), "answers": answers}


def _choice(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    choices, correct = values.get("choices"), values.get("correct_choice_idx", 0)
    if not isinstance(choices, list) or not str(correct).isdecimal() or int(correct) >= len(choices):
        raise SampleError("no answer", f"{key}: wanted the index of one of the choices, found {correct!r:.100}")
    return {"question": _text(values, "context", key), "choices": choices, "answers": [choices[int(correct)]]}


def _text(values: Mapping[str, Any], name: str, key: str) -> str:
    found = values.get(name)
    if not isinstance(found, str):
        raise SampleError("missing field", f"{key}: wanted text for {name!r}, found {found!r:.200}")
    return found


# Sample type to its media field, and to the facts of the tasks caption and vqa.
SAMPLE_TYPES: dict[str, tuple[Modality, Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "CaptioningSample": ("image", _caption),
    "ImageClassificationSample": ("image", _class),
    "VQASample": ("image", _vqa),
    "VidQASample": ("video", _vqa),
    "MultiChoiceVQASample": ("image", _choice),
}


def _load(meta: Path, *names: str) -> dict[str, Any]:
    """The first of the files that is there; YAML holds JSON too. Raises ValueError."""
    for name in names:
        try:
            found = yaml.safe_load((meta / name).read_text())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{meta / name} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{meta / name}: wanted names with values, found {found!r:.100}")
        return found
    raise ValueError(f"{meta} has no {' or '.join(names)}; energon prepare makes them")
